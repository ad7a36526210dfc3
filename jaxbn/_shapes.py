"""Axes, dtypes and every check on arrays: what is wrong is said here, once."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbn._checks import is_int, kind

Axis = int | Iterable[int]

# Choices are words, which editors complete and type checkers check.
RunningVariance = Literal["biased", "unbiased"]
Derivative = Literal["vjp", "jvp"]


def accumulation_dtype(dtype: DTypeLike) -> Any:
    """The dtype arithmetic is done in: that of x, but at least 32 bits a number."""
    # Not promote_types: under strict promotion promote_types(bfloat16, float32) raises.
    return jnp.dtype(jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype)


def real_dtype(dtype: DTypeLike) -> Any:
    """float32 for complex64, float64 for complex128, else the dtype itself."""
    return jnp.finfo(dtype).dtype


def feature_axes(
    axis: Axis, ndim: int, name: str = "axis", of: str = "x"
) -> tuple[int, ...]:
    """`axis` as ascending non-negative numbers."""
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


def reduction_axes(features: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The axes that statistics are taken over: all but the feature axes."""
    return tuple(i for i in range(ndim) if i not in features)


def expand(per_feature: jax.Array, features: tuple[int, ...], ndim: int) -> jax.Array:
    """A scalar or per-feature array, shaped to broadcast against x of rank `ndim`."""
    if per_feature.ndim == 0:
        return per_feature.reshape((1,) * ndim)
    return jnp.expand_dims(per_feature, reduction_axes(features, ndim))


def as_array(name: str, value: Any) -> jax.Array:
    """`value` as an array; what JAX makes none of is refused by the argument's name."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        of = f" of dtype {value.dtype}" if hasattr(value, "dtype") else ""
        raise TypeError(
            f"`{name}` must be an array of numbers; got {kind(value)}{of}"
        ) from error


def check_array(name: str, value: Any) -> jax.Array:
    """`value` as an array of inexact numbers."""
    value = as_array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise TypeError(
            f"`{name}` must be floating point or complex; got dtype {value.dtype}"
        )
    return value


def as_x(x: Any) -> jax.Array:
    """`x` as an array, of any dtype, with at least one axis."""
    x = as_array("x", x)
    if x.ndim == 0:
        raise ValueError("`x` must have at least one axis, the features; got a scalar")
    return x


def check_x(x: Any) -> jax.Array:
    """The input as an array of inexact numbers with at least one axis."""
    return as_x(check_array("x", x))


def check_per_feature(
    name: str, value: Any, x: jax.Array, features: tuple[int, ...], x_name: str = "x"
) -> jax.Array | None:
    """`value` (None stays None) as an array with one entry per feature of x."""
    if value is None:
        return None
    value = check_array(name, value)
    needed = tuple(x.shape[i] for i in features)
    if value.shape != needed:
        on = (
            f"axis {features[0] - x.ndim}" if len(features) == 1 else f"axes {features}"
        )
        raise ValueError(
            f"`{name}` must have shape {needed}, one entry per feature on {on} of "
            f"{x_name} with shape {x.shape}; got {value.shape}"
        )
    if jnp.iscomplexobj(value) and (name.endswith("var") or not jnp.iscomplexobj(x)):
        raise TypeError(
            f"`{name}` must be real for {x_name} of dtype {x.dtype}; got {value.dtype}"
        )
    return value


def check_mask(mask: Any, x: jax.Array) -> jax.Array | None:
    """`mask` (None stays None) as a boolean array of x's rank that broadcasts to x."""
    if mask is None:
        return None
    mask = as_array("mask", mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"`mask` must be boolean, True where an element counts; got dtype "
            f"{mask.dtype} (write mask.astype(bool))"
        )
    if mask.ndim != x.ndim or not broadcasts(mask.shape, x.shape):
        raise ValueError(
            f"`mask` must have the rank of x and broadcast to its shape {x.shape}; "
            f"got {mask.shape}{row_mask_hint(mask)}"
        )
    return mask


def broadcasts(shape: tuple[Any, ...], to: tuple[Any, ...]) -> bool:
    """Whether an array of `shape` broadcasts to the shape `to`, without growing it."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(m in (1, n) for m, n in pairs)


def row_mask_hint(mask: jax.Array) -> str:
    """What to do about a mask (N,), which means one entry per row."""
    return " (for one entry per row write mask[:, None])" if mask.ndim == 1 else ""


def check_count(
    shape: tuple[Any, ...],
    features: tuple[int, ...],
    devices: int,
    where: str,
    hint: str = "under vmap or shard_map, name the batch axis: `axis_name`",
) -> None:
    """Refuses a training batch with one element per feature, over all devices."""
    reduced = reduction_axes(features, len(shape))
    count = devices * math.prod(shape[i] for i in reduced)
    if isinstance(count, int) and count == 1:
        raise ValueError(
            f"{where} needs more than one element per feature, since the mean of one "
            f"element is itself; got x with shape {shape} and features on "
            f"{features} ({hint})"
        )


def check_num_features(num_features: Any) -> tuple[int, ...]:
    """`num_features`, an int or a sequence of them, as a tuple."""
    many = isinstance(num_features, Sequence) and not isinstance(num_features, bytes)
    shape: tuple[Any, ...] = tuple(num_features) if many else (num_features,)
    if not all(map(is_int, shape)) or isinstance(num_features, str):
        raise TypeError(
            f"`num_features` must be an int or a tuple of ints; got {num_features!r}"
        )
    if not all(n >= 0 for n in shape):
        raise ValueError(f"`num_features` must not be negative; got {num_features!r}")
    return tuple(int(n) for n in shape)
