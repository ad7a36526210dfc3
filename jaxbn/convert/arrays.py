"""What every conversion needs: arrays of any library, checked and copied."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _axes, _checks
from jaxbn._core.batch_norm import Params
from jaxbn._core.running import State, check_state

KINDS = {np.inexact: "floats", np.integer: "ints", np.number: "numbers"}


def to_numpy(value: Any) -> np.ndarray:
    """`value` on the host; it may share the memory of `value`."""
    if hasattr(value, "detach"):  # PyTorch's, on any device, with a gradient or not
        if "bfloat16" in str(value.dtype):  # NumPy's is JAX's, unknown to PyTorch
            return value.float().numpy(force=True).astype(jnp.bfloat16)
        return value.numpy(force=True)
    try:
        return np.asarray(value)
    except ValueError:  # lists of no one length
        return np.asarray(None)


def to_numbers(source: str, word: str, value: Any, kind: type) -> np.ndarray:
    """What `source` has under this word, on the host; of floats, say, by `kind`."""
    array = to_numpy(value)
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(
            f"{source} must hold {word} as an array of {KINDS[kind]}; got "
            f"{_checks.kind(value)} of dtype {array.dtype}"
        )
    return array


def to_count(source: str, word: str, value: Any) -> np.ndarray:
    """Likewise, the number of updates."""
    count = to_numbers(source, word, value, np.integer)
    if count.shape != ():
        raise ValueError(f"{source} must hold {word} as a scalar; got {count.shape}")
    return count


def to_layer(
    arrays: Mapping[str, Any], words: Sequence[str], num_updates: Any, source: str
) -> tuple[Params, State]:
    """Params and State from `arrays`, where `words` name scale, bias, mean and var.

    Absent, or None, can be the first two. `source` says in the error what had to be a
    batch norm. The statistics come as float32 at least, as `jaxbn.init` makes them.
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
    scale, bias, mean, var = (present.get(word) for word in words)
    return (
        Params(
            None if scale is None else jnp.array(scale),
            None if bias is None else jnp.array(bias),
        ),
        State(
            jnp.array(mean, _statistics_dtype(mean)),
            jnp.array(var, _statistics_dtype(var)),
            jnp.array(num_updates, jnp.int32),
        ),
    )


def from_layer(params: Params, state: State, words: Sequence[str]) -> dict[str, Any]:
    """The inverse of `to_layer`: the arrays by their `words`, absent where None."""
    _checks.check_instance("params", params, Params, "a jaxbn.Params")
    _checks.check_instance("state", state, State, "a jaxbn.State")
    mean = _checks.check_array("state.mean", state.mean)
    fits = mean, tuple(range(mean.ndim)), "`state.mean`"
    check_state(state, *fits)
    for name, value in params._asdict().items():
        _checks.check_per_feature(f"params.{name}", value, *fits)
    values = (params.scale, params.bias, state.mean, state.var)
    pairs = zip(words, values, strict=True)
    return {word: np.array(value) for word, value in pairs if value is not None}


def check_alike(
    arrays: Mapping[str, Any], templates: Mapping[str, Any], source: str
) -> None:
    """Refuses to put `arrays` in the place of `templates` of other names or shapes."""
    refuse(
        f"{source} must be a batch norm like `params` and `state`",
        {
            "missing": [word for word in arrays if word not in templates],
            "extra": [word for word in templates if word not in arrays],
            "shape": [
                f"{word} {np.shape(template)} for {np.shape(arrays[word])}"
                for word, template in templates.items()
                if word in arrays and np.shape(template) != np.shape(arrays[word])
            ],
        },
    )


def debiasing(momentum: float, num_updates: Any) -> jax.Array:
    """What Haiku and Equinox divide an average that began at 0 by, rounded as there."""
    return 1 - jnp.power(jnp.float32(momentum), num_updates)


def refuse(needed: str, problems: Mapping[str, Sequence[str]]) -> None:
    """Raises a ValueError with all problems at once, each kind on its own line."""
    lines = [
        f"{kind}: {', '.join(map(str, found))}"
        for kind, found in problems.items()
        if found
    ]
    if lines:
        raise ValueError("\n  ".join([f"{needed}; got", *lines]))


def _statistics_dtype(value: Any) -> Any:
    return _axes.accumulation_dtype(jnp.result_type(value))
