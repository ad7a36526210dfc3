"""`jaxbn check`: batch norm on the devices at hand against float64 on the host."""

import argparse
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbn
from jaxbn.cli import bench, common

DESCRIPTION = """\
Compute batch norms on the devices at hand, and the same in float64 NumPy on the host:
y, the running statistics and the gradients of x, scale and bias, in training and in
inference, for every dtype; with a mask over NaN padding, with channels first, at a mean
of 10,000 standard deviations; and, on several devices, over all of them.

An error is the largest absolute difference, relative to the largest value (at least 1).
It may be one spacing of the dtype and 32 spacings of the arithmetic, which is float32
at least; else the case has FAILED, and the exit code is 1.

examples:
  jaxbn check
  jaxbn check --devices 8 --json check.json
"""

ROWS, FEATURES, EPSILON = 64, 16, 1e-5
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64")
COLUMNS: dict[str, tuple[str, ...]] = {
    "y": ("y", "y, inference"),
    "stats": ("mean", "var"),
    "gradients": ("dx", "dscale", "dbias"),
}
QUANTITIES = [*itertools.chain(*COLUMNS.values())]


def add_arguments(parser: common.Parser) -> None:
    """Add the flags."""
    parser.add_number("--devices", "check the CPU, as N virtual devices")
    text = "also write all figures there"
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)


def run(args: argparse.Namespace) -> int:
    """Check, print, and return 0 where all errors are tolerable, else 1."""
    if args.json:
        common.make_room("--json", args.json)
    common.first_line("comparing this machine's batch norms with float64")
    if args.devices:
        common.virtual_devices(args.devices)
        jax.config.update("jax_platforms", "cpu")  # where there is a GPU, too

    out = common.console()
    machine = bench.machine_of(out, ["numpy"])
    chosen = cases(jax.device_count())
    rows: list[dict[str, Any]] = []
    title, headings = "relative errors", ("dtype", "case", *COLUMNS, "may be", "")
    table = common.table(*headings, words=2, title=title)
    with common.deferred_interrupts() as interrupted, common.progress(out) as bar:
        task = bar.add_task("checking", total=len(chosen), seen="")
        for case in chosen:
            if interrupted():
                raise KeyboardInterrupt
            name = f"{case.dtype}, {case.name}"
            bar.update(task, seen=name)
            try:
                found = errors(case)
            except Exception as error:  # what this backend cannot compile, say
                found = dict.fromkeys(QUANTITIES, float("inf"))
                line = f"{type(error).__name__}: {error}".splitlines()[0]
                out.print(f"{name}: {line}")
            failed = [each for each in found if found[each] > case.tolerance]
            for each in failed:
                off = f"off by {found[each]:.0e}, may be {case.tolerance:.0e}"
                out.print(f"FAILED: {name}: {each} is {off}")
            worst = [max(map(found.__getitem__, each)) for each in COLUMNS.values()]
            cells = [f"{error:.0e}" for error in (*worst, case.tolerance)]
            verdict, style = ("no", "bold red") if failed else ("ok", "")
            table.add_row(case.dtype, case.name, *cells, verdict, style=style)
            row = {"dtype": case.dtype, "case": case.name, "tolerance": case.tolerance}
            rows.append({**row, "errors": found, "failed": failed})
            bar.advance(task)
    out.print(table)
    if args.json:
        common.write_json(args.json, {"machine": machine, "rows": rows})
    failed = sum(bool(row["failed"]) for row in rows)
    on = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    out.print(f"{len(rows) - failed} of {len(rows)} cases are right on {on}")
    if jax.device_count() == 1:
        out.print("(`jaxbn check --devices 8` also checks several devices)")
    return 1 if failed else 0


class Case(NamedTuple):
    """A setting; `over` is None, "shard_map" or "sharded jit", over all devices."""

    dtype: str
    setting: str = "plain"
    over: str | None = None

    @property
    def name(self) -> str:
        """What the table calls it."""
        return ", ".join(filter(None, self[1:]))

    @property
    def tolerance(self) -> float:
        """The error that `--help` allows each quantity."""
        eps = float(jnp.finfo(self.dtype).eps)
        return eps + 32 * min(eps, float(jnp.finfo(jnp.float32).eps))


def cases(num_devices: int) -> list[Case]:
    """Return all that can be checked on so many devices."""
    overs = [None, "shard_map", "sharded jit"] if num_devices > 1 else [None]
    settings = [(s, over) for over in overs for s in ("plain", "masked")]
    settings.append(("channel first", None))
    # In float32 alone: half precisions cannot hold it, the host's is no better in 64.
    large = Case("float32", "large mean")
    return [*(Case(dtype, *each) for dtype in DTYPES for each in settings), large]


def errors(case: Case) -> dict[str, float]:
    """Return the relative error of each quantity; infinity where it is not finite."""
    rng, dtype = np.random.default_rng(0), jnp.dtype(case.dtype)
    real = jnp.finfo(dtype).dtype
    shape = (ROWS * jax.device_count(), FEATURES)

    def exact(a: np.ndarray, dtype: Any = dtype) -> np.ndarray:
        return a.astype(dtype).astype(a.dtype)  # float64, but what the dtype can hold

    def normal(mean: float) -> np.ndarray:
        a = rng.normal(mean, size=shape)
        return exact(a + 1j * rng.normal(size=shape) if dtype.kind == "c" else a)

    x, dy = normal(1e4 if case.setting == "large mean" else 1), normal(0.5)
    scale = exact(rng.uniform(0.5, 2, FEATURES), real)
    bias = exact(rng.normal(size=FEATURES), real)
    mask = rng.random((len(x), 1)) < np.linspace(0.2, 1, len(x))[:, None]
    mask |= case.setting != "masked"
    want = _oracle(x, dy, mask, scale, bias)
    with jax.enable_x64(case.dtype == "float64"):
        params = jaxbn.Params(jnp.asarray(scale, real), jnp.asarray(bias, real))
        got = _compute(case, x.astype(dtype), dy.astype(dtype), mask, params)

    found = {}
    for name, values, other in zip(QUANTITIES, want, got, strict=True):
        difference = np.abs(np.asarray(other).astype(values.dtype) - values).max()
        error = float(difference / max(1.0, np.abs(values).max()))
        found[name] = error if np.isfinite(error) else float("inf")
    return found


def _oracle(x: Any, dy: Any, mask: Any, scale: Any, bias: Any) -> tuple[Any, ...]:
    """Return what Ioffe & Szegedy's formulas give in float64 for unmasked rows."""
    kept = mask[:, 0]
    v, g = x[kept], dy[kept]
    mean, var = v.mean(0), (np.abs(v - v.mean(0)) ** 2).mean(0)
    std = np.sqrt(var + EPSILON)
    x_hat, n = (v - mean) / std, len(v)
    dbias, dscale = g.sum(0), (g * x_hat).sum(0)
    y, dx, inference = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    y[kept] = x_hat * scale + bias
    dx[kept] = scale / std * (g - dbias / n - x_hat.conj() * dscale.real / n)
    inference[kept] = v / np.sqrt(1 + EPSILON) * scale + bias
    return y, inference, mean, var, dx, dscale.real, dbias.real


def _compute(case: Case, x: Any, dy: Any, mask: Any, params: Any) -> list[Any]:
    """Return the same as jaxbn computes it on the devices."""
    axis = 0 if case.setting == "channel first" else -1
    arrays = [np.where(mask, x, np.nan).astype(x.dtype), dy]  # NaN must not matter
    arrays = [a.T for a in arrays] if axis == 0 else arrays
    arrays += [mask] if case.setting == "masked" else []
    _, state = jaxbn.init(FEATURES, param_dtype=x.dtype)
    name = "devices" if case.over == "shard_map" else None
    norm = functools.partial(jaxbn.batch_norm, axis=axis, epsilon=EPSILON, momentum=0.0)

    def outputs(params: Any, x: Any, dy: Any, mask: Any = None) -> tuple[Any, ...]:
        def train(x: Any, params: Any) -> Any:
            return norm(x, params, state, train=True, mask=mask, axis_name=name)

        y, vjp, new = jax.vjp(train, x, params, has_aux=True)
        dx, dparams = vjp(dy)
        inference, _ = norm(x, params, state, train=False, mask=mask)
        return y, inference, new.mean, new.var, dx, dparams.scale, dparams.bias

    if case.over is not None:
        mesh = jax.make_mesh((jax.device_count(),), ("devices",), (AxisType.Auto,))
        rows, whole = PartitionSpec("devices"), PartitionSpec()
        arrays = [jax.device_put(a, NamedSharding(mesh, rows)) for a in arrays]
        if name:
            inputs = (whole, *[rows] * len(arrays))
            specs = (rows, rows, whole, whole, rows, whole, whole)
            outputs = jax.shard_map(
                outputs, mesh=mesh, in_specs=inputs, out_specs=specs
            )
    results = jax.jit(outputs)(params, *arrays)
    return [a.T if axis == 0 else a for a in results]  # of vectors, themselves
