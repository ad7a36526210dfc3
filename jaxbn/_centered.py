"""x - mean, with 0 where the mask is False."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _shapes


def centered(
    x: jax.Array,
    mean: jax.Array,
    mask: jax.Array | None,
    features: tuple[int, ...],
) -> jax.Array:
    """Return x - mean in the accumulation dtype, 0 where the mask is False."""
    dtype = _shapes.accumulation_dtype(x.dtype)
    mean = _shapes.expand(mean.astype(dtype), features, x.ndim)
    return zero_masked(x.astype(dtype) - mean, mask)


def zero_masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return x with 0 where the mask is False; before any product: 0 * NaN is NaN."""
    return x if mask is None else jnp.where(mask, x, 0)


def abs_squared(x: jax.Array) -> jax.Array:
    """Return |x|^2, real, and differentiable at 0 for complex x too."""
    if jnp.iscomplexobj(x):
        return lax.square(x.real) + lax.square(x.imag)
    return lax.square(x)
