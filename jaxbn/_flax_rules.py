"""Flax's rules on dtypes and masks, for both wrappers."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import _shapes


def result_dtype(dtype: Any, x: jax.Array, param_dtypes: list[Any]) -> Any:
    """The dtype of y: the one asked for, else that of x and the parameters together."""
    if dtype is not None:
        return _shapes.check_inexact("dtype", dtype)
    with jax.numpy_dtype_promotion("standard"):
        result = jnp.result_type(x, *param_dtypes)
        return result if jnp.issubdtype(result, jnp.inexact) else jnp.dtype(jnp.float32)


def promote(x: jax.Array, dtype: Any) -> jax.Array:
    """X in a dtype whose arithmetic is precise enough for y in `dtype`.

    A bfloat16 x stays as it is for a float32 y: its arithmetic is in float32 already.
    """
    with jax.numpy_dtype_promotion("standard"):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x.astype(jnp.promote_types(dtype, jnp.float32))
        if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
            return x.real  # as a cast to `dtype` would have it
        arithmetic = _shapes.accumulation_dtype(x.dtype)
        wanted = jnp.promote_types(arithmetic, dtype)
    return x if wanted == arithmetic else x.astype(wanted)


def broadcast_mask(mask: Any, x: jax.Array) -> jax.Array | None:
    """`mask` of any dtype, broadcasting to x as in NumPy, as a boolean of x's rank."""
    if mask is None:
        return None
    mask = jnp.asarray(mask).astype(bool)
    if not _shapes.broadcasts(mask.shape, x.shape):
        raise ValueError(
            f"`mask` must broadcast to the shape of x, {x.shape}, as in NumPy; got "
            f"{mask.shape}{_shapes.row_mask_hint(mask)}"
        )
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
