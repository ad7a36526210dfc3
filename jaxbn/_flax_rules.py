"""Flax's rules on dtypes and masks, for both wrappers."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import _shapes


def result_dtype(dtype: Any, x: Any, scale: Any, bias: Any) -> Any:
    """The dtype of y: the one asked for, else that of x, scale and bias together."""
    if dtype is not None:
        return jax.dtypes.canonicalize_dtype(dtype)
    with jax.numpy_dtype_promotion("standard"):
        result = jnp.result_type(x, *(p for p in (scale, bias) if p is not None))
        return result if jnp.issubdtype(result, jnp.inexact) else jnp.dtype(jnp.float32)


def promote(x: Any, dtype: Any) -> jax.Array:
    """Integers to float32; x to `dtype` where more precise than x's arithmetic."""
    x = jnp.asarray(x)
    with jax.numpy_dtype_promotion("standard"):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if dtype is None:
            return x
        arithmetic = _shapes.accumulation_dtype(x.dtype)
        wanted = jnp.promote_types(arithmetic, dtype)
    return x if wanted == arithmetic else x.astype(wanted)


def broadcast_mask(mask: Any, x: jax.Array) -> jax.Array | None:
    """`mask` of any dtype and of up to x's rank, as a boolean one of x's rank."""
    if mask is None:
        return None
    mask = jnp.asarray(mask).astype(bool)
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
