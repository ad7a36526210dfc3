"""Axes, dtypes and every check on arguments: what is wrong is said here, once."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

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


def feature_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """`axis` as ascending non-negative numbers."""
    axes: tuple[Any, ...] = (axis,)
    if isinstance(axis, Iterable) and getattr(axis, "ndim", 1) > 0:
        axes = tuple(axis)
    if isinstance(axis, str | bytes) or not all(map(is_int, axes)):
        raise TypeError(f"`axis` must be an int or a tuple of ints; got {axis!r}")
    if not all(-ndim <= i < ndim for i in axes):
        raise ValueError(
            f"`axis` must lie in [{-ndim}, {ndim}) for x of rank {ndim}; got {axis!r}"
        )
    positive = sorted(int(i) % ndim for i in axes)
    if len(set(positive)) < len(positive):
        raise ValueError(
            f"`axis` must name each axis of x once; got {axis!r} for rank {ndim}"
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


def is_int(value: Any) -> bool:
    """Whether `value` is an int of Python or NumPy; a bool is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_array(name: str, value: Any) -> jax.Array:
    """`value` as an array; what JAX makes none of is refused by the argument's name."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` must be an array of numbers; got {type(value).__name__}"
        ) from error


def check_x(x: Any) -> jax.Array:
    """The input as an array of inexact numbers with at least one axis."""
    x = as_array("x", x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"`x` must be floating point or complex; got dtype {x.dtype}")
    if x.ndim == 0:
        raise ValueError("`x` must have at least one axis, the features; got a scalar")
    return x


def check_per_feature(
    name: str, value: Any, x: jax.Array, features: tuple[int, ...], x_name: str = "x"
) -> jax.Array | None:
    """`value` (None stays None) as an array with one entry per feature of x."""
    if value is None:
        return None
    value = as_array(name, value)
    needed = tuple(x.shape[i] for i in features)
    if value.shape != needed:
        on = (
            f"axis {features[0] - x.ndim}" if len(features) == 1 else f"axes {features}"
        )
        raise ValueError(
            f"`{name}` must have shape {needed}, one entry per feature on {on} of "
            f"{x_name} with shape {x.shape}; got {value.shape}"
        )
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise TypeError(f"`{name}` must be floating point; got dtype {value.dtype}")
    if jnp.iscomplexobj(value) and (name == "var" or not jnp.iscomplexobj(x)):
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


def check_number(name: str, value: Any) -> float:
    """`value` as a Python float; a tracer is refused."""
    is_bool = isinstance(value, bool) or getattr(value, "dtype", None) == jnp.bool_
    if is_bool or isinstance(value, Tracer | str | bytes):
        raise TypeError(
            f"`{name}` must be a Python number, known when tracing; got {value!r}"
        )
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"`{name}` must be a number; got {value!r}") from None


def check_epsilon(epsilon: Any) -> float:
    """`epsilon` as a positive, finite Python float."""
    number = check_number("epsilon", epsilon)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"`epsilon` must be positive and finite; got {number}")
    return number


def check_momentum(momentum: Any) -> Any:
    """`momentum` as it came: None, a traced scalar, or a number in [0, 1]."""
    if momentum is None:
        return None
    if isinstance(momentum, Tracer):
        if momentum.shape != () or not jnp.issubdtype(momentum.dtype, jnp.floating):
            raise TypeError(
                "`momentum` must be a floating-point scalar; got "
                f"{momentum.dtype} of shape {momentum.shape}"
            )
        return momentum
    number = check_number("momentum", momentum)
    if not 0 <= number <= 1:
        raise ValueError(
            "`momentum`, the share of the old value that is kept, must lie in [0, 1]; "
            f"got {number}"
        )
    return number


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value`, one of the words in `choices`."""
    if not isinstance(value, str) or value not in choices:
        words = " or ".join(f'"{word}"' for word in choices)
        raise ValueError(f"`{name}` must be {words}; got {value!r}")
    return value


def check_static_bool(name: str, value: Any) -> bool:
    """`value`, a Python bool: two programs hang on it, so it cannot be traced."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"`{name}` must be a Python bool, True or False; got {value!r} (make it "
            f'static: jax.jit(f, static_argnames="{name}") or functools.partial)'
        )
    return bool(value)


def check_count(
    shape: tuple[Any, ...], features: tuple[int, ...], devices: int, where: str
) -> None:
    """Refuses a training batch with one element per feature, over all devices."""
    reduced = reduction_axes(features, len(shape))
    count = devices * math.prod(shape[i] for i in reduced)
    if isinstance(count, int) and count == 1:
        raise ValueError(
            f"{where} needs more than one element per feature, since the mean of one "
            f"element is itself; got x with shape {shape} and features on "
            f"{features} (under vmap or shard_map, name the batch axis: `axis_name`)"
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


def check_inexact(name: str, dtype: Any) -> Any:
    """`dtype`, floating point or complex, as JAX's configuration has it."""
    try:
        dtype = None if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
        is_inexact = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    except (TypeError, ValueError):
        is_inexact = False
    if not is_inexact:
        raise TypeError(f"`{name}` must be floating point or complex; got {dtype}")
    return dtype
