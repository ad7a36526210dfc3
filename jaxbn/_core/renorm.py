"""Batch renorm: the correction of a batch towards the running statistics."""

import dataclasses
import math
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

# A function of the number of updates so far.
Schedule = Callable[[jax.Array], ArrayLike]
Limit = ArrayLike | Schedule


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


def step_limits(
    warmup: int, r_max: float = 3.0, d_max: float = 5.0
) -> tuple[Schedule, Schedule]:
    """Return CrossQ's limits: plain batch norm for `warmup` updates, then r_max, d_max.

    Equal arguments give equal schedules. They can be hashed and pickled, so that they
    are fields of a Flax module that compiles once.

    Args:
        warmup: How many updates normalize as batch norm does, with r = 1 and d = 0.
            CrossQ takes 100,000.
        r_max: At least 1: the limit on r after the warm-up.
        d_max: At least 0: the limit on d after the warm-up.

    Returns:
        The schedules for `r_max` and `d_max`: functions of the number of updates.

    Raises:
        ValueError: `warmup` is negative, `r_max` below 1 or `d_max` below 0.
        TypeError: An argument is not a number, or is traced.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> r_max, d_max = jaxbn.step_limits(1000)
        >>> print(r_max(jnp.array([999, 1000])), d_max(jnp.array([999, 1000])))
        [1. 3.] [0. 5.]

    Source: Bhatt et al., "CrossQ: Batch Normalization in Deep Reinforcement Learning
    for Greater Sample Efficiency and Simplicity", 2024, and its code.
    """
    number = _checks.check_number("warmup", warmup)
    if not number >= 0:
        raise ValueError(f"`warmup` must not be negative; got {warmup}")
    last = math.ceil(min(number, 2**31 - 1))
    largest = _checks.check_number("r_max", r_max)
    furthest = _checks.check_number("d_max", d_max)
    check_limits(largest, furthest)
    return _Step(last, 1.0, largest), _Step(last, 0.0, furthest)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A schedule that changes once; not a closure, which would equal itself alone."""

    warmup: int
    before: float
    after: float

    def __call__(self, num_updates: jax.Array) -> jax.Array:
        t = _real("num_updates", num_updates)
        return jnp.where(t < self.warmup, self.before, self.after)


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
