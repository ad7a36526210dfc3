"""Haiku's batch norm, by the names in its dictionaries of parameters and state."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._checks import check_instance, check_mapping, check_share
from jaxbn._core.normalize import Params
from jaxbn._core.running import State
from jaxbn.convert.arrays import (
    debias_divisor,
    from_layer_like,
    to_count,
    to_layer,
    to_numbers,
)

# Haiku keeps each average twice: `hidden`, and `average`, which is `hidden` after
# debiasing. Inference uses `average`.
WORDS = ("scale", "offset", "mean_ema/average", "var_ema/average")

Tree = Mapping[str, Mapping[str, ArrayLike]]


def from_haiku(
    haiku_params: Tree, haiku_state: Tree, *, name: str = "batch_norm"
) -> tuple[Params, State]:
    """Return the parameters and statistics of the `haiku.BatchNorm` called `name`.

    Haiku's `decay_rate` d is the `momentum` of jaxbn, and both keep the biased
    variance. Haiku's averages start at 0 and are debiased. To go on in the same way
    after t = `state.num_updates` updates, train with
    `momentum=d * (1 - d**t) / (1 - d ** (t + 1))`. `debias=True` comes close: it gives
    the first batches equal weights.

    Args:
        haiku_params: The parameters, from `init` of the transformed function.
        haiku_state: The state, from `init` or `apply`.
        name: The module's name, with those of the modules around it: "net/batch_norm".

    Returns:
        Copies of the parameters, and of the statistics that Haiku's inference uses,
        float32 at least. Both come without the axes of length 1 that Haiku keeps.

    Raises:
        ValueError: There is no batch norm of this name. The message names what is
            missing or has a different shape.
        TypeError: A tree is not a mapping, or holds something other than floats.

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
) -> tuple[dict[str, object], dict[str, object]]:
    """Return Haiku's parameters and state with a batch norm of jaxbn put in.

    Args:
        params: Scale and bias, None where Haiku creates none.
        state: Running statistics. If Haiku is to train on, `num_updates` must be the
            true number of updates, since Haiku debiases by it.
        haiku_params: The parameters, from `init` of the transformed function. They give
            the shapes and dtypes; those of other modules are returned as they are.
        haiku_state: The state, from `init` or `apply`, used in the same way.
        decay_rate: The `decay_rate` of the Haiku module.
        name: The module's name, with those of the modules around it.

    Returns:
        New dictionaries of both.

    Raises:
        ValueError: There is no such batch norm of this name, or `decay_rate` is outside
            [0, 1]. The message names what is missing, extra or of a different shape.
        TypeError: `params` or `state` has another class, a tree is not a mapping, or it
            holds something other than floats.

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
    squeezed = _squeezed(templates)
    arrays = from_layer_like(squeezed, params, state, WORDS, _named(name))
    arrays = {word: a.reshape(templates[word].shape) for word, a in arrays.items()}
    learned = {word: arrays[word] for word in WORDS[:2] if word in arrays}
    divisor = debias_divisor(decay_rate, state.num_updates, state.mean.dtype)
    averages = {
        path: {
            "hidden": arrays[word] * divisor,
            "average": arrays[word],
            "counter": jnp.array(state.num_updates, jnp.int32),
        }
        for path, word in zip(_average_paths(name), WORDS[2:], strict=True)
    }
    return (
        {**haiku_params, name: learned} if learned else dict(haiku_params),
        {**haiku_state, **averages},
    )


def _read(
    haiku_params: Tree, haiku_state: Tree, name: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the arrays that the module has, by its `WORDS`, and its update count."""
    check_instance("name", name, str, "a string")
    learned = _module("haiku_params", haiku_params, name)
    mean, var = (_module("haiku_state", haiku_state, p) for p in _average_paths(name))
    averages = zip(WORDS[2:], (mean.get("average"), var.get("average")), strict=True)
    arrays = {
        word: to_numbers(_named(name), word, value, np.inexact)
        for word, value in [*learned.items(), *averages]
        if value is not None
    }
    return arrays, to_count(_named(name), "counter", mean.get("counter", 0))


def _average_paths(name: str) -> tuple[str, str]:
    return f"{name}/~/mean_ema", f"{name}/~/var_ema"


def _module(argument: str, tree: Tree, name: str) -> Mapping[str, ArrayLike]:
    """Return the arrays of the module called `name`, none if `tree` lacks it."""
    check_mapping(argument, tree)
    module = tree.get(name, {})
    check_mapping(f"{argument}[{name!r}]", module)
    return module


def _squeezed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays without the reduced axes, which Haiku keeps with length 1."""
    return {word: np.atleast_1d(value.squeeze()) for word, value in arrays.items()}


def _named(name: str) -> str:
    return f"What is called {name!r}"
