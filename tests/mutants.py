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
    "test_blocks",
    "test_quotient",
    "test_moments",
    "test_normalize",
    "test_running",
    "test_batch_norm",
    "test_derivative",
    "test_renorm",
    "test_ghost",
    "test_collectives",
    "test_meshes",
    "test_barriers",
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
        ("total = num_elements.sum(0,", "total = num_elements.max(0,"),
        ("mean = jnp.where(num_elements > 0, mean, 0)", "mean = mean"),
        ("abs_squared(mean - merged - mean_low)", "0 * var"),
        ("abs_squared(mean - merged - mean_low)", "abs_squared(mean - merged)"),
        ("jnp.where(num_elements > 0, var + between", "jnp.where(True, var + between"),
        ("merged = rough + offset", "merged = rough"),
        ("weight = num_elements / jnp.maximum(total, 1)", "weight = 1 / len(rows)"),
        ("mean_low = offset - (merged - rough)", "mean_low = 0 * offset"),
        ('"batch_norm_var")', '"batch_norm_mean")'),
        ('checkpoint_name(mean_low, "batch_norm_mean")', "mean_low"),
    ],
    "_rounding": [
        ("better = mean + offset", "better = mean"),
        ("square - _centered.abs_squared(off), 0", "square, 0"),
        ("(mean, offset + rest) if", "(mean, offset) if"),
        ("else (better, low)", "else (better, 0 * low)"),
        ("features=features, in_one_pass=False)", "features=features)"),
        ("var = jnp.where(jnp.isfinite(square), var, square)", "var = var"),
        ("low = offset - (better - mean) + rest", "low = jnp.zeros_like(mean)"),
        ("low = offset - (better - mean) + rest", "low = offset + rest"),
        ("low = offset - (better - mean) + rest", "low = offset - (better - mean)"),
        ("jnp.any(abs(mean)", "jnp.all(abs(mean)"),
        ("FAR = 8.0", "FAR = 8e3"),
        ("FAR * jnp.sqrt(var)", "FAR * var"),
        ("features = (0, *(i + 1 for i in features))", "features = (0, *features)"),
        (
            "return [mean, var, low], [dmean, dvar,",
            "return [mean, var, low], [dvar, dmean,",
        ),
        ("masked = (*mask, None)[0]", "masked = None"),
    ],
    "_blocks": [
        ("(better - mean), 0)", "(better - mean), 0) * 0"),
        ("jnp.where(finite, mean + low, total / divisor)", "mean + low"),
        ("digits(total / blocks, 8)", "digits(total / blocks, 24)"),
        ("rest = (parts - jnp.expand_dims(part, axis)).sum(axis)", "rest = 0 * part"),
        ("quotient(part * blocks, divisor, rest)", "quotient(total, divisor)"),
        ("_centered.zero_masked(x, mask)", "x"),
        ("reduced[-1 if last in features else 0]", "reduced[0]"),
        ("reduced[-1 if last in features else 0]", "reduced[-1]"),
        ("if last not in features and axis not in (0, last)", "if False"),
        ("[i + (i > axis) for i in reduced]", "list(reduced)"),
        ("sum(i < axis for i in features)", "0"),
        ("BLOCKS, WIDEST = 16, 2048", "BLOCKS, WIDEST = 1, 2048"),
        ("WIDEST = 16, 2048", "WIDEST = 16, 1"),
        ("lax.optimization_barrier(x.sum", "(x.sum"),
        ("known and math.prod(x.shape) > 0", "math.prod(x.shape) > 0"),
        ("math.prod(x.shape) > 0 and len", "len"),
        ("and len(features) < x.ndim", ""),
        ("x.dtype == jnp.float32 and", ""),
    ],
    "_quotient": [
        ("digits(total / divisor, 12)", "digits(total / divisor, 24)"),
        ("digits(divisor, 12)", "digits(divisor, 24)"),
        (" - first * (divisor - half)", ""),
        ("left if rest is None else left + rest", "left"),
        ("if total.dtype != jnp.float32:", "if jnp.iscomplexobj(total):"),
        ("mantissa_bits=number - 1", "mantissa_bits=number"),
    ],
    "_devices": [
        ("axes: Any = context.module_context.axis_context", "return True"),
        ("set(axes.manual_axes) == set(axes.mesh.axis_names)", "True"),
        ("set(axes.manual_axes) == set(axes.mesh.axis_names)", "False"),
        ('getattr(axes, "num_devices", 2) == 1', "False"),
    ],
    "_centered": [
        (
            "return zero_masked(x.astype(dtype) - mean, mask)",
            "return x.astype(dtype) - mean",
        ),
        ("lax.square(x.real) + lax.square(x.imag)", "lax.square(x.real)"),
        ("x, mean = apart_on_cpu(x, mean)\n    squares", "squares"),
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
    "_affine": [
        ("a = a if scale is None else a * cast(scale, dtype)", "a = a"),
        (
            "shift = -a * mean_low if shift is None",
            "shift = a * mean_low if shift is None",
        ),
        ("shift - a * mean_low", "shift"),
        ("return zero_masked(y, mask).astype", "return y.astype"),
        ("real_dtype(dtype)) + epsilon)", "real_dtype(dtype)))"),
        ("config.dtype or x.dtype", "x.dtype"),
    ],
    "_normalize": [
        ("dbias = zero_masked(dy.astype(dtype), mask)", "dbias = dy.astype(dtype)"),
        ("dscale = (dscale - cache.mean_low * dbias) * rstd", "dscale = dscale * rstd"),
        (
            "dscale = (dscale - cache.mean_low * dbias) * rstd",
            "dscale = dscale - cache.mean_low * dbias",
        ),
        ("level = on_one - slope * cache.mean_low.conj()", "level = on_one"),
        ("level = on_one - slope * cache.mean_low.conj()", "level = 0 * on_one"),
        ("slope = rstd * on_x_hat", "slope = 0 * on_x_hat"),
        ("slope = rstd * on_x_hat", "slope = on_x_hat"),
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
            "g = zero_masked(apart_on_cpu(dy, mean)[0].astype(dtype), mask)",
            "g = apart_on_cpu(dy, mean)[0].astype(dtype)",
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
