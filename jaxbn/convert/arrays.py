"""Arrays of any library: checked, and copied into a `Params` and a `State`, and back.

The other files here hold what is particular to one library. Each has the four names,
`WORDS`, that its library gives to scale, bias, mean and variance, in this order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _checks
from jaxbn._axes import accumulation_dtype
from jaxbn._core.normalize import Params
from jaxbn._core.running import State, check_state

KINDS: dict[type, str] = {
    np.inexact: "floats",
    np.integer: "ints",
    np.number: "numbers",
}


def to_numpy(value: Any) -> np.ndarray:
    """Return `value` as an array on the host, which may share its memory."""
    if hasattr(value, "detach"):  # a PyTorch tensor, with or without a gradient
        if "bfloat16" in str(value.dtype):  # PyTorch refuses to convert this dtype
            return value.float().numpy(force=True).astype(jnp.bfloat16)
        return value.numpy(force=True)
    try:
        return np.asarray(value)
    except ValueError:  # nested lists of different lengths
        return np.asarray(None)


def to_numbers(source: str, word: str, value: object, numbers: type) -> np.ndarray:
    """Return what `source` holds under `word`, as an array on the host.

    A dtype that is not one of `numbers`, a key of `KINDS`, is a TypeError.
    """
    array = to_numpy(value)
    if not jnp.issubdtype(array.dtype, numbers):
        raise TypeError(
            f"{source} must hold {word} as an array of {KINDS[numbers]}; got "
            f"{_checks.kind(value)} of dtype {array.dtype}"
        )
    return array


def to_count(source: str, word: str, value: object) -> np.ndarray:
    """Return the number of updates, which `source` holds under `word`, as a scalar."""
    count = to_numbers(source, word, value, np.integer)
    if count.shape != ():
        raise ValueError(f"{source} must hold {word} as a scalar; got {count.shape}")
    return count


def to_layer(
    arrays: Mapping[str, object],
    words: Sequence[str],
    num_updates: ArrayLike,
    source: str,
) -> tuple[Params, State]:
    """Return copies of `arrays`, which `words` name, as Params and State.

    Scale and bias may be missing or None; mean and variance may not. Statistics become
    float32 at least, as in `jaxbn.init`. Errors call the layer `source`.
    """
    present = {
        word: to_numbers(source, word, arrays[word], np.inexact)
        for word in words
        if arrays.get(word) is not None
    }
    shape = present[words[2]].shape if words[2] in present else None
    refuse(
        f"{source} must be a batch norm with running statistics",
        {
            "missing": [word for word in words[2:] if word not in present],
            "extra": [word for word in arrays if word not in words],
            f"shape other than that of {words[2]}, {shape}": [
                f"{word} {value.shape}"
                for word, value in present.items()
                if shape is not None and value.shape != shape
            ],
        },
    )
    copies = {word: jnp.array(value) for word, value in present.items()}
    scale, bias = (copies.get(word) for word in words[:2])
    mean, var = (
        copies[word].astype(accumulation_dtype(copies[word].dtype))
        for word in words[2:]
    )
    return Params(scale, bias), State(mean, var, jnp.array(num_updates, jnp.int32))


def from_layer(
    params: Params, state: State, words: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return copies of the arrays of a batch norm by their `words`, without Nones."""
    _checks.check_instance("params", params, Params, "a jaxbn.Params")
    _checks.check_instance("state", state, State, "a jaxbn.State")
    mean = _checks.check_array("state.mean", state.mean)
    fits = mean, tuple(range(mean.ndim)), "`state.mean`"
    check_state(state, *fits)
    for name, value in params._asdict().items():
        _checks.check_per_feature(f"params.{name}", value, *fits)
    pairs = zip(words, (*params, state.mean, state.var), strict=True)
    return {word: np.array(value) for word, value in pairs if value is not None}


def from_layer_like(
    templates: Mapping[str, np.ndarray | jax.Array],
    params: Params,
    state: State,
    words: Sequence[str],
    source: str,
) -> dict[str, jax.Array]:
    """Return the arrays of `from_layer` in the dtypes of `templates`.

    Names and shapes must be those of `templates`. Errors call the layer `source`.
    """
    arrays = from_layer(params, state, words)
    refuse(
        f"{source} must be a batch norm like `params` and `state`",
        {
            "missing": [word for word in arrays if word not in templates],
            "extra": [word for word in templates if word not in arrays],
            "shape": [
                f"{word} {template.shape} for {arrays[word].shape}"
                for word, template in templates.items()
                if word in arrays and template.shape != arrays[word].shape
            ],
        },
    )
    return {
        word: jnp.array(array.astype(templates[word].dtype))
        for word, array in arrays.items()
    }


def debias_divisor(
    momentum: float, num_updates: ArrayLike, dtype: DTypeLike
) -> jax.Array:
    """Return 1 - momentum^t, the weight of t updates in an average that began at 0.

    It is rounded as in Haiku and Equinox, so that a conversion and back is exact.
    """
    kept = jnp.asarray(momentum, accumulation_dtype(dtype))
    return 1 - jnp.power(kept, num_updates)


def refuse(needed: str, problems: Mapping[str, Sequence[str]]) -> None:
    """Raise a ValueError with all `problems`, if any, each kind on its own line."""
    lines = [
        f"{kind}: {', '.join(map(str, found))}"
        for kind, found in problems.items()
        if found
    ]
    if lines:
        raise ValueError("\n  ".join([f"{needed}; got", *lines]))
