"""Batch renorm: the correction of a batch towards the running statistics."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxbn import _axes, _checks
from jaxbn._axes import cast
from jaxbn._core.kernel import Config
from jaxbn._core.moments import Moments
from jaxbn._core.normalize import rstd_of
from jaxbn._core.running import State

# A number, an array, or a schedule: a function of the number of updates so far.
Limit = ArrayLike | Callable[[jax.Array], ArrayLike]


def corrected_parameters(
    config: Config,
    batch: Moments,
    state: State,
    scale: jax.Array | None,
    bias: jax.Array | None,
    r_max: Limit,
    d_max: Limit,
) -> tuple[jax.Array, jax.Array]:
    """Return scale r and bias + scale d, with which batch norm does batch renorm.

    r = std / running std is clipped to [1 / r_max, r_max], and d, the distance between
    the means in running stds, to [-d_max, d_max]. Both are constants.
    """
    batch, state = lax.stop_gradient((batch, state))
    dtype = batch.mean.dtype
    rstd = rstd_of(state.var, config.epsilon, dtype)
    r = rstd / rstd_of(batch.var, config.epsilon, dtype)
    d = (batch.mean - cast(state.mean, dtype)) * rstd

    largest = limit_now("r_max", r_max, state.num_updates, r.real)
    furthest = limit_now("d_max", d_max, state.num_updates, r.real)
    r = jnp.clip(r.real, 1 / largest, largest).astype(dtype)
    # By its length, as d is complex where x is; the same as a clip where d is real.
    length = jnp.maximum(abs(d), jnp.finfo(r.real.dtype).tiny)
    d = d * jnp.where(length > furthest, furthest / length, 1).astype(dtype)
    scale = jnp.ones_like(r) if scale is None else cast(scale, dtype)
    shift = scale * d
    bias = shift if bias is None else cast(bias, dtype) + shift
    return scale * r, bias


def ramp_r_max(num_updates: jax.Array) -> jax.Array:
    """Return the paper's r_max: 1 for 5,000 updates, then linearly to 3 at 40,000.

    Args:
        num_updates: Of any shape, as in `jaxbn.State`.

    Raises:
        TypeError: `num_updates` is not made of real numbers.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> print(jaxbn.ramp_r_max(jnp.array([0, 5000, 22500, 99999])).round())
        [1. 1. 2. 3.]

    Source: Ioffe, "Batch Renormalization", 2017, section 4.1.
    """
    return 1 + 2 * _ramp(num_updates, 5_000, 40_000)


def ramp_d_max(num_updates: jax.Array) -> jax.Array:
    """Return the paper's d_max: 0 for 5,000 updates, then linearly to 5 at 25,000.

    Args:
        num_updates: Of any shape, as in `jaxbn.State`.

    Raises:
        TypeError: `num_updates` is not made of real numbers.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> print(jaxbn.ramp_d_max(jnp.array([0, 5000, 13000, 99999])).round())
        [0. 0. 2. 5.]

    Source: Ioffe, "Batch Renormalization", 2017, section 4.1.
    """
    return 5 * _ramp(num_updates, 5_000, 25_000)


def _ramp(num_updates: jax.Array, begin: int, end: int) -> jax.Array:
    t = _real("num_updates", num_updates).astype(jnp.float32)
    return jnp.clip((t - begin) / (end - begin), 0, 1)


def check_limits(r_max: Limit, d_max: Limit) -> None:
    """Refuse what is neither a schedule nor real numbers of at least 1 and 0."""
    for name, limit, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if callable(limit):
            continue
        _real(name, limit)
        # `limit` itself: under jit the array of a number is a tracer.
        if not isinstance(limit, Tracer) and not np.all(np.asarray(limit) >= least):
            raise ValueError(f"`{name}` must be at least {least}; got {limit}")


def limit_now(
    name: str, limit: Limit, num_updates: jax.Array, like: jax.Array
) -> jax.Array:
    """Return `limit` after `num_updates`, with the shape and dtype of `like`."""
    value = _real(name, limit(num_updates) if callable(limit) else limit)
    if not _axes.broadcasts(value.shape, like.shape):
        raise ValueError(
            f"`{name}` must broadcast to the features {like.shape}; got {value.shape}"
        )
    return jnp.broadcast_to(value.astype(like.dtype), like.shape)


def _real(name: str, value: ArrayLike) -> jax.Array:
    """Return `value` as an array of real numbers."""
    array = _checks.as_array(name, value)
    if jnp.iscomplexobj(array) or array.dtype == jnp.bool_:
        raise TypeError(f"`{name}` must be real numbers; got dtype {array.dtype}")
    return array
