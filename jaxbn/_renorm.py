"""Batch renormalization: batch norm that trains on what inference will use."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxbn import _affine, _normalize, _shapes
from jaxbn._affine import Config
from jaxbn._batch_norm import Params, apply_batch_norm
from jaxbn._moments import Moments, moments
from jaxbn._running import State

# A number, an array, or a schedule: a function of the number of updates so far.
Limit = Any | Callable[[jax.Array], Any]


def ramp_r_max(num_updates: jax.Array) -> jax.Array:
    """The paper's r_max: 1 for 5,000 updates, then in a line to 3 at 40,000.

    Args:
        num_updates: Of any shape, as in `jaxbn.State`.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> print(jaxbn.ramp_r_max(jnp.array([0, 5000, 22500, 99999])))
        [1. 1. 2. 3.]

    Source: Ioffe, "Batch Renormalization", 2017, section 4.1.
    """
    return 1 + 2 * _ramp(num_updates, 5_000, 40_000)


def ramp_d_max(num_updates: jax.Array) -> jax.Array:
    """The paper's d_max: 0 for 5,000 updates, then in a line to 5 at 25,000.

    Args:
        num_updates: Of any shape, as in `jaxbn.State`.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> print(jaxbn.ramp_d_max(jnp.array([0, 5000, 15000, 99999])))
        [0.  0.  2.5 5. ]

    Source: Ioffe, "Batch Renormalization", 2017, section 4.1.
    """
    return 5 * _ramp(num_updates, 5_000, 25_000)


def _ramp(num_updates: jax.Array, begin: int, end: int) -> jax.Array:
    t = jnp.asarray(num_updates).astype(jnp.float32)
    return jnp.clip((t - begin) / (end - begin), 0, 1)


def batch_renorm(
    x: Any,
    params: Params,
    state: State,
    *,
    train: bool,
    r_max: Limit = ramp_r_max,
    d_max: Limit = ramp_d_max,
    momentum: Any = 0.9,
    epsilon: float = 1e-5,
    axis: _shapes.Axis = -1,
    mask: Any = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    running_variance: _shapes.RunningVariance = "biased",
    debias: bool = False,
    derivative: _shapes.Derivative = "vjp",
) -> tuple[jax.Array, State]:
    """Batch renormalization: y = (x_hat r + d) scale + bias in training.

    r = std(batch) / std(running), clipped to [1 / r_max, r_max], and d = (mean(batch) -
    mean(running)) / std(running), clipped to [-d_max, d_max], are constants to the
    gradient. Where nothing is clipped, training computes what inference computes, so
    that small batches and batches of a few classes train as large mixed ones. Equals
    `batch_norm` for r_max=1, d_max=0, and always in inference.

    Args:
        x: As for `batch_norm`.
        params: As for `batch_norm`.
        state: As for `batch_norm`.
        train: True normalizes by the batch, corrected towards `state`.
        r_max: At least 1: a number, an array, or a schedule (any function, such as
            optax's, of `state.num_updates`). The paper's ramp unless said.
        d_max: At least 0; likewise.
        momentum: As for `batch_norm`.
        epsilon: As for `batch_norm`; std is sqrt(var + epsilon) here too.
        axis: As for `batch_norm`.
        mask: As for `batch_norm`.
        axis_name: As for `batch_norm`.
        axis_index_groups: As for `batch_norm`.
        running_variance: As for `batch_norm`.
        debias: As for `batch_norm`.
        derivative: As for `batch_norm`.

    Returns:
        y, with x's shape and dtype, and the new state, updated as by `batch_norm`.

    Raises:
        ValueError: `r_max` is a number below 1, `d_max` one below 0, or as for
            `batch_norm`.
        TypeError: As for `batch_norm`.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.init(1)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, _ = jaxbn.batch_renorm(x, params, state, train=True, r_max=3, d_max=5)
        >>> print(y.round(2).T)  # as with the running mean 0 and variance 1
        [[1. 3.]]

    Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models", 2017, algorithm 1.
    """
    return apply_batch_norm(
        x,
        params,
        state,
        train=train,
        momentum=momentum,
        epsilon=epsilon,
        axis=axis,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        running_variance=running_variance,
        debias=debias,
        derivative=derivative,
        **as_renorm(r_max, d_max),
    )


def as_renorm(r_max: Limit, d_max: Limit) -> dict[str, Any]:
    """The arguments that make `apply_batch_norm` renormalize."""
    limits = {
        "r_max": check_limit("r_max", r_max, 1),
        "d_max": check_limit("d_max", d_max, 0),
    }
    return {"normalize": functools.partial(renormalize, **limits)}


def check_limit(name: str, limit: Limit, least: int) -> Limit:
    """`limit` as it came; a number in it that is too small is refused."""
    if callable(limit) or isinstance(limit, Tracer):
        return limit
    if not np.all(np.asarray(limit) >= least):
        raise ValueError(f"`{name}` must be at least {least}; got {limit}")
    return limit


def renormalize(
    config: Config,
    derivative: str,
    x: jax.Array,
    scale: Any,
    bias: Any,
    mask: Any,
    state: State,
    *,
    r_max: Limit,
    d_max: Limit,
) -> tuple[jax.Array, Moments]:
    """A `Normalize`: the kernel with scale r and bias + scale d."""
    batch, _ = moments(x, mask, config.features, config.axis_name, config.groups)
    batch, state = lax.stop_gradient((batch, state))
    dtype = _shapes.accumulation_dtype(x.dtype)
    rstd = _affine.rstd_of(state.var, config.epsilon, dtype)
    r = rstd / _affine.rstd_of(batch.var, config.epsilon, dtype)
    d = (batch.mean - _affine.cast(state.mean, dtype)) * rstd

    def limit(value: Limit) -> jax.Array:
        value = value(state.num_updates) if callable(value) else value
        return jnp.asarray(value).astype(r.real.dtype)

    largest, furthest = limit(r_max), limit(d_max)
    tiny = jnp.finfo(r.real.dtype).tiny
    r = jnp.clip(r.real, 1 / largest, largest).astype(dtype)
    # By its length, as d is complex where x is; the same as a clip where d is real.
    d = d * (furthest / jnp.maximum(jnp.maximum(abs(d), furthest), tiny)).astype(dtype)
    scale = jnp.ones_like(r) if scale is None else _affine.cast(scale, dtype)
    shift = scale * d
    bias = shift if bias is None else _affine.cast(bias, dtype) + shift
    y, batch = _normalize.normalize_batch(config, derivative, x, scale * r, bias, mask)
    return y, Moments(*(m[None] for m in batch))
