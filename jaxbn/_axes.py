"""Feature and reduced axes, broadcasting, and the dtypes that arithmetic is done in."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

Axis = int | Iterable[int]
Features = tuple[int, ...]


def feature_axes(axis: Axis, ndim: int, name: str = "axis", of: str = "x") -> Features:
    """Return `axis` as ascending non-negative numbers.

    `name` and `of` are the words for the argument and its array in messages.
    """
    axes: tuple[Any, ...] = (axis,)
    if isinstance(axis, Iterable) and getattr(axis, "ndim", 1) > 0:
        axes = tuple(axis)
    if isinstance(axis, str | bytes) or not all(map(is_int, axes)):
        raise TypeError(f"`{name}` must be an int or a tuple of ints; got {axis!r}")
    if not all(-ndim <= i < ndim for i in axes):
        raise ValueError(
            f"`{name}` must lie in [{-ndim}, {ndim}) for {of} of rank {ndim}; got "
            f"{axis!r}"
        )
    positive = sorted(int(i) % ndim for i in axes)
    if len(set(positive)) < len(positive):
        raise ValueError(
            f"`{name}` must name each axis of {of} once; got {axis!r} for rank {ndim}"
        )
    return tuple(positive)


def is_int(value: object) -> bool:
    """Return whether `value` is an int of Python or NumPy; a bool is not one."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def reduced_axes(features: Features, ndim: int) -> tuple[int, ...]:
    """Return the axes that statistics are taken over: all but the feature axes."""
    return tuple(i for i in range(ndim) if i not in features)


def expand(per_feature: jax.Array, features: Features, ndim: int) -> jax.Array:
    """Reshape a scalar or per-feature array to broadcast against x of rank `ndim`."""
    if per_feature.ndim == 0:
        return per_feature.reshape((1,) * ndim)
    return jnp.expand_dims(per_feature, reduced_axes(features, ndim))


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Return whether an array of `shape` broadcasts to the shape `to` exactly."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(m in (1, n) for m, n in pairs)


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype for arithmetic: that of x, but at least 32 bits a number."""
    # Not promote_types: under strict promotion promote_types(bfloat16, float32) raises.
    return jnp.dtype(jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype)


def real_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return float32 for complex64, float64 for complex128, else the dtype itself."""
    return jnp.finfo(dtype).dtype


def statistics_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype of the variance: real, and at least 32 bits."""
    return real_dtype(accumulation_dtype(dtype))


def cast(per_feature: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Cast to `dtype`; a complex array loses its imaginary part if `dtype` is real."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return per_feature.astype(dtype)
    return per_feature.real.astype(dtype)


def centered(
    x: jax.Array, mean: jax.Array, mask: jax.Array | None, features: Features
) -> jax.Array:
    """Return x - mean in the accumulation dtype, with 0 where the mask is False."""
    dtype = accumulation_dtype(x.dtype)
    mean = expand(mean.astype(dtype), features, x.ndim)
    return zero_masked(x.astype(dtype) - mean, mask)


def zero_masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return x with 0 where the mask is False; before any product: 0 * NaN is NaN."""
    return x if mask is None else jnp.where(mask, x, 0)


def abs_squared(x: jax.Array) -> jax.Array:
    """Return |x|^2, real, and differentiable at 0 for complex x too."""
    if jnp.iscomplexobj(x):
        return lax.square(x.real) + lax.square(x.imag)
    return lax.square(x)
