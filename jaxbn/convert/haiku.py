"""Haiku's batch norm, by the names in its dictionaries of parameters and state."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._checks import check_instance, check_mapping, check_share
from jaxbn._core.batch_norm import Params
from jaxbn._core.running import State
from jaxbn.convert.arrays import (
    check_alike,
    debiasing,
    from_layer,
    to_count,
    to_layer,
    to_numbers,
)

# Of Haiku's averages, `average` is `hidden` after the debiasing: what inference uses.
WORDS = ("scale", "offset", "mean_ema/average", "var_ema/average")

Tree = Mapping[str, Mapping[str, Any]]


def from_haiku(
    haiku_params: Tree, haiku_state: Tree, *, name: str = "batch_norm"
) -> tuple[Params, State]:
    """The `haiku.BatchNorm` of this name.

    Haiku's `decay_rate` d is our `momentum`, and its variance the biased one. Its
    averages start at 0 and are debiased. With t = `state.num_updates`
    `momentum=d * (1 - d**t) / (1 - d ** (t + 1))` trains on in the same way.
    Nearly the same, `debias=True` weights the first batches equally.

    Args:
        haiku_params: As `init` of the transformed function returned it.
        haiku_state: Likewise.
        name: Of the module, with the names of those around it: "net/batch_norm".

    Returns:
        The parameters, without their axes of length 1, and the state, that of inference
        in Haiku. Copies.

    Raises:
        ValueError: There is no batch norm of this name; what is missing or of a
            different shape is named.
        TypeError: The trees are no mappings, or hold something else than floats.

    Examples:
        >>> import jaxbn, numpy as np
        >>> average = {"hidden": np.zeros((1, 2)), "average": np.ones((1, 2))}
        >>> average["counter"] = 7
        >>> params, state = jaxbn.convert.from_haiku(
        ...     {"batch_norm": {"scale": np.ones((1, 2)), "offset": np.zeros((1, 2))}},
        ...     {"batch_norm/~/mean_ema": average, "batch_norm/~/var_ema": average},
        ... )
        >>> print(params.scale, state.mean, state.num_updates)
        [1. 1.] [1. 1.] 7
    """
    arrays, count = _read(haiku_params, haiku_state, name)
    return to_layer(_squeezed(arrays), WORDS, count, _named(name))


def to_haiku(
    params: Params,
    state: State,
    haiku_params: Tree,
    haiku_state: Tree,
    *,
    decay_rate: float,
    name: str = "batch_norm",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Haiku's parameters and state, with this batch norm put in.

    Args:
        params: Scale and bias, None where Haiku creates none.
        state: Running statistics; `num_updates` has to be their true number if Haiku is
            to train on, since it debiases by it.
        haiku_params: As `init` of the transformed function returned it: the shapes and
            dtypes, and the modules that stay as they are.
        haiku_state: Likewise.
        decay_rate: That of the Haiku module.
        name: As for `from_haiku`.

    Returns:
        New dictionaries of both.

    Raises:
        ValueError: There is no batch norm of this name, or it differs; what is missing,
            extra or of a different shape is named; or `decay_rate` is outside [0, 1].
        TypeError: `params`, `state` or a tree is something else.

    Examples:
        >>> import jaxbn, numpy as np
        >>> average = {"hidden": np.zeros((1, 2)), "average": np.zeros((1, 2))}
        >>> average["counter"] = 0
        >>> names = "batch_norm/~/mean_ema", "batch_norm/~/var_ema"
        >>> params, state = jaxbn.init(2, use_scale=False, use_bias=False)
        >>> _, new = jaxbn.convert.to_haiku(
        ...     params, state, {}, dict.fromkeys(names, average), decay_rate=0.9
        ... )
        >>> print(new["batch_norm/~/var_ema"]["average"])
        [[1. 1.]]
    """
    templates, _ = _read(haiku_params, haiku_state, name)
    decay_rate = check_share("decay_rate", decay_rate)
    arrays = from_layer(params, state, WORDS)
    check_alike(arrays, _squeezed(templates), _named(name))
    shaped = {
        word: jnp.array(
            array.reshape(templates[word].shape).astype(templates[word].dtype)
        )
        for word, array in arrays.items()
    }
    learned = {word: shaped[word] for word in WORDS[:2] if word in shaped}
    divisor = debiasing(decay_rate, state.num_updates)
    averages = {
        f"{name}/~/{word.split('/')[0]}": {
            "hidden": shaped[word] * divisor,
            "average": shaped[word],
            "counter": jnp.array(state.num_updates, jnp.int32),
        }
        for word in WORDS[2:]
    }
    return (
        {**haiku_params, name: learned} if learned else dict(haiku_params),
        {**haiku_state, **averages},
    )


def _read(params: Tree, state: Tree, name: str) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays by their `WORDS`, those that there are, and the count."""
    check_instance("name", name, str, "a string")
    learned = _module("haiku_params", params, name)
    mean, var = (
        _module("haiku_state", state, f"{name}/~/{word.split('/')[0]}")
        for word in WORDS[2:]
    )
    averages = zip(WORDS[2:], (mean.get("average"), var.get("average")), strict=True)
    arrays = {
        word: to_numbers(_named(name), word, value, np.inexact)
        for word, value in [*learned.items(), *averages]
        if value is not None
    }
    return arrays, to_count(_named(name), "counter", mean.get("counter", 0))


def _module(argument: str, tree: Any, name: str) -> Mapping[str, Any]:
    """What the tree holds for the module of this name; nothing where there is none."""
    check_mapping(argument, tree)
    module = tree.get(name, {})
    check_mapping(f"{argument}[{name!r}]", module)
    return module


def _squeezed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the axes that Haiku reduced, and kept with length 1."""
    return {word: np.atleast_1d(value.squeeze()) for word, value in arrays.items()}


def _named(name: str) -> str:
    return f"What is called {name!r}"
