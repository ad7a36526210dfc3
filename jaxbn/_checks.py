"""Every check on an argument that is no array: what is wrong is said here, once.

Those on arrays, axes and shapes are in `jaxbn._shapes`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def kind(value: Any) -> str:
    """What `value` is, for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return type(value).__name__


def check_instance(
    name: str, value: Any, cls: type | tuple[type, ...], needed: str, hint: str = ""
) -> None:
    """Refuses what is no instance of `cls`, in words what is `needed`."""
    if not isinstance(value, cls):
        hint = f" ({hint})" if hint else ""
        raise TypeError(f"`{name}` must be {needed}; got {kind(value)}{hint}")


def check_mapping(name: str, value: Any) -> None:
    """Refuses what is no mapping from strings."""
    check_instance(name, value, Mapping, "a mapping")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(
                f"`{name}` must be a mapping with strings for keys; got {key!r}"
            )


def check_iterable(name: str, value: Any, of: str) -> None:
    """Refuses what cannot be iterated over, and one of several in their place."""
    is_iterable = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    if isinstance(value, str | Mapping) or not is_iterable:
        raise TypeError(f"`{name}` must be an iterable of {of}; got {kind(value)}")


def check_variables(variables: Any, *collections: str) -> None:
    """Refuses what are no variables of Flax with one of the `collections`."""
    check_mapping("variables", variables)
    if not set(collections) & set(variables):
        words = " or ".join(f'"{collection}"' for collection in collections)
        raise ValueError(
            f"`variables` must hold {words}, as from `model.init`; got "
            f"{list(variables)}"
        )


def check_path(name: str, path: Any) -> tuple[str, ...]:
    """A module's path, a string or a sequence of strings, as a tuple."""
    names = path.split("/") if isinstance(path, str) else path
    if not (isinstance(names, Sequence) and all(isinstance(n, str) for n in names)):
        raise TypeError(
            f'`{name}` must hold paths, "a/b" or ("a", "b"), of modules; got {path!r}'
        )
    return tuple(n for n in names if n)


def is_int(value: Any) -> bool:
    """Whether `value` is an int of Python or NumPy; a bool is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


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


def check_epsilon(epsilon: Any, dtype: Any = None) -> float:
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
    return check_share("momentum", momentum)


def check_share(name: str, share: Any) -> float:
    """`share` of the old value that is kept, as a Python float in [0, 1]."""
    number = check_number(name, share)
    if not 0 <= number <= 1:
        raise ValueError(
            f"`{name}`, the share of the old value that is kept, must lie in [0, 1]; "
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
