"""What `check` computes: one batch norm in many settings, and what must come out."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbn

ROWS, FEATURES, EPSILON = 64, 16, 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """A setting; `over` is None, "shard_map" or "jit" over all devices."""

    dtype: Any
    setting: str = "plain"
    over: str | None = None

    @property
    def name(self) -> str:
        """For the table."""
        return self.setting + (f", {self.over} over devices" if self.over else "")

    @property
    def ratio(self) -> float:
        """The mean, in standard deviations."""
        return 1e4 if self.setting == "large mean" else 1.0

    def tolerance(self) -> float:
        """As `check --help` says; of all quantities."""
        eps = float(jnp.finfo(self.dtype).eps)
        arithmetic = min(eps, float(jnp.finfo(jnp.float32).eps))
        return eps + 32 * arithmetic * self.ratio


def cases() -> Iterator[Case]:
    """All that can be checked on the devices at hand."""
    overs = [None, "shard_map", "jit"] if jax.device_count() > 1 else [None]
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64):
        for over in overs:
            yield Case(dtype, "plain", over)
            yield Case(dtype, "masked", over)
        yield Case(dtype, "channel first")
    # In float32 alone: half precisions cannot hold it, the host's is no better in 64.
    yield Case(jnp.float32, "large mean")


def errors(case: Case, seed: int) -> dict[str, float]:
    """The relative error of each quantity; of a failure to compute it, infinity."""
    wide = case.dtype == jnp.float64
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        x, scale, bias, mask, dy = _draw(case, seed)
        want = _oracle(x, scale, bias, mask, dy)
        got = _compute(case, x, scale, bias, mask, dy)
    return {name: _error(got[name], want[name]) for name in want}


def _draw(case: Case, seed: int) -> tuple[np.ndarray, ...]:
    """float64 (or complex128) arrays (rows, features), exact in the case's dtype."""
    rng = np.random.default_rng(seed)
    shape = (ROWS * jax.device_count(), FEATURES)
    is_complex = jnp.issubdtype(case.dtype, jnp.complexfloating)

    def exact(a: np.ndarray, dtype: Any = case.dtype) -> np.ndarray:
        wide = np.complex128 if np.iscomplexobj(a) else np.float64
        return a.astype(dtype).astype(wide)

    def normal() -> np.ndarray:
        a = rng.normal(size=shape)
        return a + 1j * rng.normal(size=shape) if is_complex else a

    x, dy = exact(normal() + case.ratio), exact(normal() + 0.5)
    real = jnp.finfo(case.dtype).dtype
    scale = exact(rng.uniform(0.5, 2, FEATURES), real)
    bias = exact(rng.normal(size=FEATURES), real)
    mask = rng.random((len(x), 1)) < np.linspace(0.2, 1, len(x))[:, None]
    return x, scale, bias, mask | (case.setting != "masked"), dy


def _oracle(
    x: np.ndarray, scale: np.ndarray, bias: np.ndarray, mask: np.ndarray, dy: np.ndarray
) -> dict[str, np.ndarray]:
    """The document's formulas, in float64, of the rows that count."""
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
    return {
        "y": y,
        "mean": mean,
        "var": var,
        "dx": dx,
        "dscale": dscale.real,
        "dbias": dbias.real,
        "y, inference": inference,
    }


def _compute(
    case: Case,
    x: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    mask: np.ndarray,
    dy: np.ndarray,
) -> dict[str, Any]:
    """The same by jaxbn, on the devices."""
    axis = 0 if case.setting == "channel first" else -1
    masked = case.setting == "masked"
    poison = np.where(mask, x, np.nan)  # under the mask nothing may matter
    arrays = [a.astype(case.dtype) for a in (poison, dy)]
    arrays = [a.T for a in arrays] if axis == 0 else arrays
    arrays += [mask] if masked else []
    param_dtype = jnp.finfo(case.dtype).dtype
    params = jaxbn.Params(*(jnp.asarray(p, param_dtype) for p in (scale, bias)))
    _, state = jaxbn.init(FEATURES, param_dtype=case.dtype)
    name = "devices" if case.over == "shard_map" else None
    norm = functools.partial(jaxbn.batch_norm, axis=axis, epsilon=EPSILON, momentum=0.0)

    def outputs(params: Any, x: Any, dy: Any, mask: Any = None) -> dict[str, Any]:
        def train(x: Any, params: Any) -> Any:
            return norm(x, params, state, train=True, mask=mask, axis_name=name)

        y, vjp, new = jax.vjp(train, x, params, has_aux=True)
        dx, dparams = vjp(dy)
        inference, _ = norm(x, params, state, train=False, mask=mask)
        return {
            "y": y,
            "mean": new.mean,
            "var": new.var,
            "dx": dx,
            "dscale": dparams.scale,
            "dbias": dparams.bias,
            "y, inference": inference,
        }

    if case.over is not None:
        mesh = jax.make_mesh((jax.device_count(),), ("devices",), (AxisType.Auto,))
        rows, whole = PartitionSpec("devices"), PartitionSpec()
        arrays = [jax.device_put(a, NamedSharding(mesh, rows)) for a in arrays]
        if case.over == "shard_map":
            specs = dict.fromkeys(["mean", "var", "dscale", "dbias"], whole)
            specs |= dict.fromkeys(["y", "dx", "y, inference"], rows)
            outputs = jax.shard_map(
                outputs,
                mesh=mesh,
                in_specs=(whole, *[rows] * len(arrays)),
                out_specs=specs,
            )
    got = jax.jit(outputs)(params, *arrays)
    if axis == 0:
        got |= {k: got[k].T for k in ("y", "dx", "y, inference")}
    return got


def _error(got: Any, want: np.ndarray) -> float:
    """Infinity where a value is not finite."""
    wide = np.complex128 if np.iscomplexobj(want) else np.float64
    difference = float(np.abs(np.asarray(got).astype(wide) - want).max())
    error = difference / max(1.0, float(np.abs(want).max()))
    return error if np.isfinite(error) else float("inf")
