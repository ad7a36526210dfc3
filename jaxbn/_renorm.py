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

    Raises:
        TypeError: `num_updates` is not made of real numbers.

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

    Raises:
        TypeError: `num_updates` is not made of real numbers.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> print(jaxbn.ramp_d_max(jnp.array([0, 5000, 15000, 99999])))
        [0.  0.  2.5 5. ]

    Source: Ioffe, "Batch Renormalization", 2017, section 4.1.
    """
    return 5 * _ramp(num_updates, 5_000, 25_000)


def _ramp(num_updates: jax.Array, begin: int, end: int) -> jax.Array:
    t = _real("num_updates", num_updates).astype(jnp.float32)
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
    r"""Batch renormalization: y = (x_hat r + d) scale + bias in training.

    $$y = \gamma \left(r \, \frac{x - \mu}{\sigma} + d\right) + \beta \qquad
    r = \frac{\sigma}{\sigma_\text{run}} \qquad
    d = \frac{\mu - \mu_\text{run}}{\sigma_\text{run}}$$

    r, the ratio of the batch's std and the running one, clipped to [1 / r_max, r_max],
    and d, the way between their means, clipped to [-d_max, d_max], are constants to the
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
        ValueError: `r_max` is a number below 1, `d_max` one below 0, one of them does
            not broadcast to the features, or as for `batch_norm`.
        TypeError: `r_max` or `d_max` is not made of real numbers, or as for
            `batch_norm`.

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
    if callable(limit):
        return limit
    _real(name, limit)
    # `limit` itself: under jit the array of a number is a tracer.
    if not isinstance(limit, Tracer) and not np.all(np.asarray(limit) >= least):
        raise ValueError(f"`{name}` must be at least {least}; got {limit}")
    return limit


def _limit_now(
    name: str, limit: Limit, num_updates: jax.Array, like: jax.Array
) -> jax.Array:
    """`limit` after `num_updates`, in the dtype of `like`, to which it broadcasts."""
    value = _real(name, limit(num_updates) if callable(limit) else limit)
    if not _shapes.broadcasts(value.shape, like.shape):
        raise ValueError(
            f"`{name}` must broadcast to the features {like.shape}; got {value.shape}"
        )
    return jnp.broadcast_to(value.astype(like.dtype), like.shape)


def _real(name: str, value: Any) -> jax.Array:
    """`value` as an array of real numbers."""
    array = _shapes.as_array(name, value)
    if jnp.iscomplexobj(array) or array.dtype == jnp.bool_:
        raise TypeError(f"`{name}` must be real numbers; got dtype {array.dtype}")
    return array


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

    largest = _limit_now("r_max", r_max, state.num_updates, r.real)
    furthest = _limit_now("d_max", d_max, state.num_updates, r.real)
    r = jnp.clip(r.real, 1 / largest, largest).astype(dtype)
    # By its length, as d is complex where x is; the same as a clip where d is real.
    length = jnp.maximum(abs(d), jnp.finfo(r.real.dtype).tiny)
    d = d * jnp.where(length > furthest, furthest / length, 1).astype(dtype)
    scale = jnp.ones_like(r) if scale is None else _affine.cast(scale, dtype)
    shift = scale * d
    bias = shift if bias is None else _affine.cast(bias, dtype) + shift
    y, batch = _normalize.normalize_batch(config, derivative, x, scale * r, bias, mask)
    return y, Moments(*(m[None] for m in batch))
