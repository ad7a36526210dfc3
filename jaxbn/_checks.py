"""Every check on an argument: what was needed, what came, and on which argument."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxbn._axes import Features, broadcasts, is_int, reduced_axes

# Choices are words, which editors complete and type checkers check.
RunningVariance = Literal["biased", "unbiased"]
Derivative = Literal["vjp", "jvp"]


def kind(value: object) -> str:
    """Return what `value` is, for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return type(value).__name__


def check_instance(
    name: str, value: object, cls: type | tuple[type, ...], needed: str, hint: str = ""
) -> None:
    """Refuse what is not an instance of `cls`; `needed` names that class."""
    if not isinstance(value, cls):
        hint = f" ({hint})" if hint else ""
        raise TypeError(f"`{name}` must be {needed}; got {kind(value)}{hint}")


def check_mapping(name: str, value: object) -> None:
    """Refuse what is not a mapping with strings for keys."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a mapping; got {kind(value)}")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(
                f"`{name}` must be a mapping with strings for keys; got {key!r}"
            )


def check_changes(changes: Mapping[str, object], known: Set[str], words: str) -> None:
    """Refuse changes to what is not `known`; `words` name that."""
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise TypeError(f"`changes` must be {words}; got {', '.join(unknown)}")


def check_iterable(name: str, value: object, of: str) -> None:
    """Refuse what cannot be iterated over, and a single item in place of several."""
    is_iterable = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    if isinstance(value, str | Mapping) or not is_iterable:
        raise TypeError(f"`{name}` must be an iterable of {of}; got {kind(value)}")


def check_variables(variables: Mapping[str, object], *collections: str) -> None:
    """Refuse what is not Flax variables with one of the `collections`."""
    check_mapping("variables", variables)
    if not set(collections) & set(variables):
        words = " or ".join(f'"{collection}"' for collection in collections)
        raise ValueError(
            f"`variables` must hold {words}, as from `model.init`; got "
            f"{list(variables)}"
        )


def check_path(name: str, path: object) -> tuple[str, ...]:
    """Return a module's path, a string or a sequence of strings, as a tuple."""
    names = path.split("/") if isinstance(path, str) else path
    if not (isinstance(names, Sequence) and all(isinstance(n, str) for n in names)):
        raise TypeError(
            f'`{name}` must hold paths, "a/b" or ("a", "b"), of modules; got {path!r}'
        )
    return tuple(n for n in names if n)


def check_number(name: str, value: Any) -> float:
    """Return `value` as a Python float; a tracer is refused."""
    is_bool = isinstance(value, bool) or getattr(value, "dtype", None) == jnp.bool_
    if is_bool or isinstance(value, Tracer | str | bytes):
        raise TypeError(
            f"`{name}` must be a Python number, known when tracing; got {value!r}"
        )
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"`{name}` must be a number; got {value!r}") from None


def check_epsilon(epsilon: float, dtype: DTypeLike | None = None) -> float:
    """Return `epsilon` as a positive, finite Python float.

    With `dtype`, that of the statistics, it must be a normal number there: XLA reads
    smaller ones as 0, and a constant feature would give 0 / 0.
    """
    number = check_number("epsilon", epsilon)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"`epsilon` must be positive and finite; got {number}")
    if dtype is not None and number < (least := float(jnp.finfo(dtype).tiny)):
        raise ValueError(
            f"`epsilon` must be at least {least:.3g}, the smallest normal number of "
            f"{dtype} statistics; got {number}"
        )
    return number


def check_momentum(momentum: ArrayLike | None) -> float | jax.Array | None:
    """Return `momentum` as None, a traced scalar, or a float in [0, 1]."""
    if momentum is None:
        return None
    if isinstance(momentum, Tracer):
        if momentum.shape != () or not jnp.issubdtype(momentum.dtype, jnp.floating):
            raise TypeError(
                "`momentum` must be a floating-point scalar; got "
                f"{momentum.dtype} of shape {momentum.shape}"
            )
        return momentum
    return check_share("momentum", momentum)


def check_share(name: str, share: ArrayLike) -> float:
    """Return `share` of the old value that is kept, as a Python float in [0, 1]."""
    number = check_number(name, share)
    if not 0 <= number <= 1:
        raise ValueError(
            f"`{name}`, the share of the old value that is kept, must lie in [0, 1]; "
            f"got {number}"
        )
    return number


def check_choice(name: str, value: object, choices: Any) -> Any:
    """Return `value`, which must be one of the words of the Literal `choices`."""
    if not isinstance(value, str) or value not in get_args(choices):
        words = " or ".join(f'"{word}"' for word in get_args(choices))
        raise ValueError(f"`{name}` must be {words}; got {value!r}")
    return value


def check_static_bool(name: str, value: object) -> bool:
    """Return `value`, a Python bool: it chooses the program, so it cannot be traced."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"`{name}` must be a Python bool, True or False; got {value!r} (make it "
            f'static: jax.jit(f, static_argnames="{name}") or functools.partial)'
        )
    return bool(value)


def check_inexact(name: str, dtype: Any) -> jnp.dtype:
    """Return `dtype`, floating point or complex, as JAX's configuration has it."""
    try:
        dtype = None if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
        is_inexact = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    except (TypeError, ValueError):
        is_inexact = False
    if dtype is None or not is_inexact:
        raise TypeError(f"`{name}` must be floating point or complex; got {dtype}")
    return dtype


def as_array(name: str, value: ArrayLike | None) -> jax.Array:
    """Return `value` as an array; what JAX cannot convert is refused by name."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        dtype = getattr(value, "dtype", None)
        of = "" if dtype is None else f" of dtype {dtype}"
        raise TypeError(
            f"`{name}` must be an array of numbers; got {kind(value)}{of}"
        ) from error


def check_array(name: str, value: ArrayLike | None) -> jax.Array:
    """Return `value` as an array of floating-point or complex numbers."""
    value = as_array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise TypeError(
            f"`{name}` must be floating point or complex; got dtype {value.dtype}"
        )
    return value


def as_x(x: ArrayLike) -> jax.Array:
    """Return `x` as an array, of any dtype, with at least one axis."""
    x = as_array("x", x)
    if x.ndim == 0:
        raise ValueError("`x` must have at least one axis, the features; got a scalar")
    return x


def check_x(x: ArrayLike) -> jax.Array:
    """Return the input as an array of inexact numbers with at least one axis."""
    return as_x(check_array("x", x))


def check_per_feature(
    name: str,
    value: ArrayLike | None,
    x: jax.Array,
    features: Features,
    x_name: str = "x",
) -> jax.Array | None:
    """Return `value` (None stays None) as an array with one entry per feature of x."""
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


def check_statistics(
    name: str,
    mean: ArrayLike | None,
    var: ArrayLike | None,
    x: jax.Array,
    features: Features,
    x_name: str = "x",
) -> tuple[jax.Array, jax.Array]:
    """Return mean and variance, neither of which may be None, as arrays that fit x."""
    mean = check_per_feature(f"{name}mean", mean, x, features, x_name)
    var = check_per_feature(f"{name}var", var, x, features, x_name)
    if mean is None or var is None:
        raise TypeError(f"`{name}mean` and `{name}var` must be arrays; got None")
    return mean, var


def check_mask(mask: ArrayLike | None, x: jax.Array) -> jax.Array | None:
    """Return `mask` (None stays None) as a boolean array of x's rank."""
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


def row_mask_hint(mask: jax.Array) -> str:
    """Return what to do about a mask (N,), which means one entry per row."""
    return " (for one entry per row write mask[:, None])" if mask.ndim == 1 else ""


def check_count(
    shape: Sequence[int],
    features: Features,
    devices: int,
    where: str,
    hint: str = "under vmap or shard_map, name the batch axis: `axis_name`",
) -> None:
    """Refuse a training batch with one element per feature, over all devices."""
    reduced = reduced_axes(features, len(shape))
    count = devices * math.prod(shape[i] for i in reduced)
    if isinstance(count, int) and count == 1:
        raise ValueError(
            f"{where} needs more than one element per feature, since the mean of one "
            f"element is itself; got x with shape {shape} and features on "
            f"{features} ({hint})"
        )


def check_num_features(num_features: int | Sequence[int]) -> tuple[int, ...]:
    """Return `num_features`, an int or a sequence of them, as a tuple."""
    shape: tuple[Any, ...] = (num_features,)
    if isinstance(num_features, Sequence) and not isinstance(num_features, bytes):
        shape = tuple(num_features)
    if not all(map(is_int, shape)) or isinstance(num_features, str):
        raise TypeError(
            f"`num_features` must be an int or a tuple of ints; got {num_features!r}"
        )
    if not all(n >= 0 for n in shape):
        raise ValueError(f"`num_features` must not be negative; got {num_features!r}")
    return tuple(int(n) for n in shape)
