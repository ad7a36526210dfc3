"""Faults planted in the arithmetic, one at a time: each must turn a test red.

    python tests/mutants.py [WORD ...]       those whose file or text has such a word

A copy of the project is changed, not the project. A fault is a text as it stands and
that in its place; where the code has changed since, the list must follow, and says so.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import compiled as compiled  # the runs share what they compile
from rich.progress import track

ROOT = pathlib.Path(__file__).parents[1]
TESTS = [
    "test_rounding",
    "test_moments",
    "test_normalize",
    "test_overflow",
    "test_running",
    "test_batch_norm",
    "test_derivative",
    "test_renorm",
    "test_ghost",
    "test_collectives",
    "test_meshes",
    "test_barriers",
    "test_pair_sum",
    "test_mesh_derivatives",
    "test_transformations",
    "test_mesh_transformations",
]

FAULTS = {
    "_moments": [
        ("divisor = jnp.maximum(num_elements, 1)", "divisor = num_elements"),
        ("divisor = jnp.maximum(num_elements, 1)", "divisor = num_elements + 1"),
        ("zero_masked(x.astype(dtype), mask).sum", "x.astype(dtype).sum"),
        ("zero_masked(x.astype(dtype), mask).sum", "zero_masked(x, mask).sum"),
        ("* math.prod(repeated)", ""),
        ("dtype=jnp.int32).astype(dtype)", "dtype=dtype)"),
        ("if mask.shape[i] != x.shape[i]]", "if mask.shape[i] == x.shape[i]]"),
        ("total = num_elements.sum(0)", "total = num_elements.max(0)"),
        ("values = jnp.where(counted, values, 0)", "values = values"),
        ("between = abs_squared(offsets - offset[None])", "between = 0 * var"),
        ("between = abs_squared(offsets - offset[None])", "between = offsets**2"),
        ("offsets = head - shift[None] + tail", "offsets = head - shift[None]"),
        ("weight = num_elements / jnp.maximum(total, 1)", "weight = 1 / len(head)"),
        (
            "return SplitMoments(total, *_split(shift, offset), mean",
            "return SplitMoments(total, shift, 0 * offset, mean",
        ),
        ("shift = _rounded_once(mean(head))", "shift = mean(head)"),
        (
            "return lax.reduce_precision(shift, finfo.nexp, finfo.nmant - 1)",
            "return shift",
        ),
        ("(divisor + 0 * shift.real)", "divisor"),
        ("jnp.where(jnp.isfinite(square), abs_squared(offset), 0)", "0"),
        (
            "jnp.where(jnp.isfinite(square), abs_squared(offset), 0)",
            "abs_squared(offset)",
        ),
        ("var -= lax.stop_gradient(jnp.minimum(var, 0))", "var -= 0"),
        ("return head, shift - head + offset", "return head, 0 * offset"),
        (
            "x, shift, offset = apart_on_cpu(x, shift, offset)",
            "x, shift = apart_on_cpu(x, shift)",
        ),
        ("taken = -(-size // 16)", "taken = 1"),
        ("and spec[axis] is None", ""),
        ("blocks = rows & -rows", "blocks = 1"),
        ("(0, *(i + 1 for i in reduced))", "(0, *reduced)"),
        ('checkpoint_name(batch.var, "batch_norm_var")', "batch.var"),
        ('checkpoint_name(batch.tail, "batch_norm_mean")', "batch.tail"),
    ],
    "_centered": [
        ("return zero_masked(x, mask)", "return x"),
        ("lax.square(x.real) + lax.square(x.imag)", "lax.square(x.real)"),
    ],
    "_barriers": [
        (
            "mlir.lower_fun(lambda *arrays: lax.optimization_barrier(arrays)),",
            "lambda context, *arrays: list(arrays),",
        ),
        ('    platform="cpu",\n', ""),
        (
            "(apart_on_cpu(*primals), tangents)",
            "(list(primals), [0 * t for t in tangents])",
        ),
    ],
    "_pair_sum": [
        (', platform="gpu"', ""),
        ("lax.complex(a, b)", "lax.complex(b, a)"),
        ("if jnp.iscomplexobj(a):", "if False:"),
        ("_apart(a, b, axes=axes)\n\n\ndef _batch", "[a, b]\n\n\ndef _batch"),
        ("axis + 1 for axis in axes", "axis for axis in axes"),
    ],
    "_affine": [
        ("a = rstd if scale is None else rstd * cast(scale, dtype)", "a = rstd"),
        ("else offset - a * tail", "else offset"),
        ("offset = -a * tail if offset is None", "offset = None if offset is None"),
        ("return zero_masked(y, mask).astype", "return y.astype"),
        ("real_dtype(dtype)) + epsilon)", "real_dtype(dtype)))"),
        ("config.dtype or x.dtype", "x.dtype"),
    ],
    "_normalize": [
        ("g = zero_masked(dy.astype(dtype), mask)", "g = dy.astype(dtype)"),
        ("dscale = (dscale - tail * dbias) * rstd", "dscale = dscale * rstd"),
        ("dscale = (dscale - tail * dbias) * rstd", "dscale -= tail * dbias"),
        (
            "x, head, var = apart_on_cpu(x, head, var)",
            "x, head, rstd = apart_on_cpu(x, head, rstd)",
        ),
        ("offset = on_one - slope", "offset = -slope"),
        ("slope = rstd * on_x_hat", "slope = on_x_hat"),
        ("offset = on_one - slope * tail.conj()", "offset = on_one"),
        ("slope * tail.conj()", "slope * tail"),
        (
            "jnp.where(jnp.isinf(var), jnp.nan, rstd_of(",
            "jnp.where(False, jnp.nan, rstd_of(",
        ),
        (").conj()\n    dx", ")\n    dx"),
        ("(a * dscale).real.astype(dtype)", "(a * dscale)"),
        ("divisor = jnp.maximum(num_elements, 1)", "divisor = num_elements"),
        ("sums = _devices.group_sum(", "_devices.group_sum("),
        ("zero_masked(dx, mask).astype(x.dtype)", "dx.astype(x.dtype)"),
        ("zero_masked(dx, mask).astype(x.dtype)", "zero_masked(dx, mask)"),
        (
            "a = rstd if cache.scale is None else rstd * cast(cache.scale, dtype)",
            "a = rstd",
        ),
        (
            "g_apart = zero_masked(apart_on_cpu(dy, var)[0].astype(dtype), mask)",
            "g_apart = apart_on_cpu(dy, var)[0].astype(dtype)",
        ),
        (
            "g = zero_masked(apart_on_cpu(dy, on_x_hat)[0].astype(dtype), mask)",
            "g = apart_on_cpu(dy, on_x_hat)[0].astype(dtype)",
        ),
        ("cast(dscale, cache.scale.dtype)", "dscale"),
        ("return y, lax.stop_gradient(batch)", "return y, batch"),
        ("x, scale, bias, mask = _devices.vary_together(", "_devices.vary_together("),
    ],
    "_running": [
        ("enough = num_elements > 0", "enough = num_elements >= 0"),
        ("enough = num_elements > 1", "enough = num_elements > 0"),
        ("jnp.maximum(num_elements - 1, 1)", "jnp.maximum(num_elements, 1)"),
        ("enough & jnp.isfinite(batches.mean) & jnp.isfinite(var)", "enough"),
        (
            "enough & jnp.isfinite(batches.mean) & jnp.isfinite(var)",
            "enough & jnp.isfinite(batches.mean)",
        ),
        ("took = jnp.broadcast_to(_all_features(took), took.shape)", "pass"),
        ("keep[1:], jnp.ones_like(keep[:1])", "jnp.ones_like(keep[:1]), keep[1:]"),
        ("reverse=True", "reverse=False"),
        ("new = jnp.where(took, new, 0).astype(dtype)", "new = new.astype(dtype)"),
        ("jnp.prod(keep, axis=0)", "jnp.min(keep, axis=0)"),
        (
            "fits = jnp.isfinite(new[0]) & jnp.isfinite(new[1])",
            "fits = jnp.isfinite(new[0])",
        ),
        ("fits = jnp.broadcast_to(jnp.all(fits), fits.shape)", "pass"),
        ("jnp.any(took & fits[None],", "jnp.any(took,"),
        ("jnp.where(fits, new[0], state.mean)", "new[0]"),
        ("jnp.where(fits, new[1], state.var)", "new[1]"),
        ("keep = t / (t + 1)", "keep = t / (t + 2)"),
        ("keep = jnp.minimum(", "keep = jnp.maximum("),
        ("lax.cumsum(taken) - taken", "lax.cumsum(taken)"),
    ],
}


def run(module: str, old: str, new: str, folder: pathlib.Path) -> str:
    """Whether it was killed, or survived, or the list is wrong."""
    copy = folder / "project"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "jaxbn", copy / "jaxbn")
    shutil.copytree(ROOT / "tests", copy / "tests")
    shutil.copy(ROOT / "pyproject.toml", copy)
    path = copy / "jaxbn" / f"{module}.py"
    text = path.read_text()
    if old not in text:
        return "not found: the list must follow the code"
    path.write_text(text.replace(old, new, 1))
    nearest_first = sorted(TESTS, key=lambda name: name != f"test{module}")
    tests = [f"tests/{name}.py" for name in nearest_first]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", *tests],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    return {0: "survived", 1: "killed", 2: "killed"}.get(ran.returncode, ran.stdout)


def main(words: list[str]) -> int:
    faults = [
        (module, *fault)
        for module, listed in FAULTS.items()
        for fault in listed
        if not words or any(word in f"{module} {fault[0]}" for word in words)
    ]
    ended = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for fault in track(faults, description="planting"):
                ended[fault] = run(*fault, pathlib.Path(folder))
    except KeyboardInterrupt:
        print("stopped early")
    for (module, old, new), how in ended.items():
        if how != "killed":
            print(f"{module}: {old!r} -> {new!r}: {how}")
    killed = sum(how == "killed" for how in ended.values())
    print(f"{killed} of {len(ended)} killed ({len(faults)} listed)")
    return int(killed < len(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
