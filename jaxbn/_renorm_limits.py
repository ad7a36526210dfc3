"""What batch renorm is limited by: r_max and d_max, numbers or schedules."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxbn import _shapes

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
        >>> print(jaxbn.ramp_r_max(jnp.array([0, 5000, 22500, 99999])).round())
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
        >>> print(jaxbn.ramp_d_max(jnp.array([0, 5000, 13000, 99999])).round())
        [0. 0. 2. 5.]

    Source: Ioffe, "Batch Renormalization", 2017, section 4.1.
    """
    return 5 * _ramp(num_updates, 5_000, 25_000)


def _ramp(num_updates: jax.Array, begin: int, end: int) -> jax.Array:
    t = _real("num_updates", num_updates).astype(jnp.float32)
    return jnp.clip((t - begin) / (end - begin), 0, 1)


def check_limit(name: str, limit: Limit, least: int) -> Limit:
    """`limit` as it came; a number in it that is too small is refused."""
    if callable(limit):
        return limit
    _real(name, limit)
    # `limit` itself: under jit the array of a number is a tracer.
    if not isinstance(limit, Tracer) and not np.all(np.asarray(limit) >= least):
        raise ValueError(f"`{name}` must be at least {least}; got {limit}")
    return limit


def limit_now(
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
