"""X - mean, whose masked elements are 0, and its sums."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _shapes
from jaxbn._barriers import apart_on_cpu


def centered(
    x: jax.Array, mean: jax.Array, mask: jax.Array | None, features: tuple[int, ...]
) -> jax.Array:
    """X - mean in the accumulation dtype, 0 where the mask is False."""
    dtype = _shapes.accumulation_dtype(x.dtype)
    mean = _shapes.expand(mean.astype(dtype), features, x.ndim)
    return zero_masked(x.astype(dtype) - mean, mask)


def zero_masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """X with zeros where the mask is False; before any product, as 0 * NaN is NaN."""
    return x if mask is None else jnp.where(mask, x, 0)


def abs_squared(x: jax.Array) -> jax.Array:
    """|x|^2, real, and differentiable at 0 for complex x too."""
    if jnp.iscomplexobj(x):
        return lax.square(x.real) + lax.square(x.imag)
    return lax.square(x)


def total(
    x: jax.Array, mean: jax.Array, mask: jax.Array | None, features: tuple[int, ...]
) -> jax.Array:
    """The sum of x - mean."""
    x, mean = apart_on_cpu(x, mean)
    rest = centered(x, mean, mask, features)
    return rest.sum(_shapes.reduction_axes(features, x.ndim))


def sum_of_squares(
    x: jax.Array, mean: jax.Array, mask: jax.Array | None, features: tuple[int, ...]
) -> jax.Array:
    """The sum of |x - mean|^2."""
    x, mean = apart_on_cpu(x, mean)
    squares = abs_squared(centered(x, mean, mask, features))
    return squares.sum(_shapes.reduction_axes(features, x.ndim))
