"""A mean as two numbers, from sums of blocks: on the CPU, at the price of one sum.

One float32 sum of many numbers is off by a spacing or more of its own size. The sums of
a few blocks of them are off by less, and what rounding takes from the sum of those few,
and from the quotient, can be had: it is small beside them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _centered, _shapes
from jaxbn._quotient import digits, quotient

# A power of 2, and how many sums side by side do not make XLA:CPU slow.
BLOCKS, WIDEST = 16, 2048


def can_be_split(x: Any, features: tuple[int, ...]) -> bool:
    """Whether an x of that type is split; y in half precision would not gain."""
    known = all(isinstance(size, int) for size in x.shape)
    reduced = known and math.prod(x.shape) > 0 and len(features) < x.ndim
    return reduced and x.dtype == jnp.float32


def mean_in_two(
    x: jax.Array,
    divisor: jax.Array,
    mask: jax.Array | None,
    features: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """The mean rounded to float32, and what that leaves out."""
    parts, axis = _sums(_centered.zero_masked(x, mask), features)
    blocks = parts.shape[axis]
    total = parts.sum(axis)
    # Of few digits: less it, parts that are unlike are exact, too.
    part = digits(total / blocks, 8)
    rest = (parts - jnp.expand_dims(part, axis)).sum(axis)
    # Rounded here, and not once more in each place where it is added.
    mean, low = lax.optimization_barrier(quotient(part * blocks, divisor, rest))
    finite = jnp.isfinite(low)  # inf - inf is NaN
    better = jnp.where(finite, mean + low, total / divisor)
    return better, jnp.where(finite, low - (better - mean), 0)


def _sums(x, features):
    """Of interleaved blocks, and the axis that they lie on."""
    reduced = _shapes.reduction_axes(features, x.ndim)
    last = x.ndim - 1
    # Beside the features if they are last, and away from them if not.
    axis = reduced[-1 if last in features else 0]
    size, num_features = x.shape[axis], math.prod(x.shape[i] for i in features)
    blocks = math.gcd(size, BLOCKS)
    # Of one long run of memory, which XLA adds up well, blocks would be short pieces.
    if last not in features and axis not in (0, last):
        blocks = 1
    while blocks > 1 and blocks * num_features > WIDEST:
        blocks //= 2
    x = x.reshape(*x.shape[:axis], -1, blocks, *x.shape[axis + 1 :])
    # Behind the barrier, or XLA makes one sum of this one and that of the blocks.
    parts = lax.optimization_barrier(x.sum([i + (i > axis) for i in reduced]))
    return parts, sum(i < axis for i in features)
