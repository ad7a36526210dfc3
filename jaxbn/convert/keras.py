"""Keras's batch norm, by the attributes of the layer."""

from typing import Any

import numpy as np

from jaxbn._core.batch_norm import Params
from jaxbn._core.running import State
from jaxbn.convert.arrays import from_layer, to_layer

WORDS = ("gamma", "beta", "moving_mean", "moving_variance")


def from_keras(layer: Any) -> tuple[Params, State]:
    """The parameters and statistics of a `keras.layers.BatchNormalization`.

    Keras's `momentum` is ours, and its variance the biased one; its `epsilon` is 1e-3
    unless said. To train on: `batch_norm(..., momentum=0.99, epsilon=1e-3)`.

    Args:
        layer: Built, with any of Keras's backends.

    Returns:
        The parameters, None for `scale=False` and `center=False`, and the state.
        `num_updates` is 0, since Keras does not count: with `momentum=None` or `debias`
        put the number in, `state._replace(num_updates=...)`, or the first update
        replaces the statistics. Copies.

    Raises:
        ValueError: The layer is not built yet, or no batch norm; what is missing or of
            a different shape is named.

    Examples:
        >>> import types, jaxbn
        >>> layer = types.SimpleNamespace(
        ...     gamma=[2.0], beta=None, moving_mean=[0.5], moving_variance=[1.0]
        ... )
        >>> params, state = jaxbn.convert.from_keras(layer)
        >>> print(params.scale, params.bias, state.mean)
        [2.] None [0.5]
    """
    arrays = {word: _value(getattr(layer, word, None)) for word in WORDS}
    return to_layer(arrays, WORDS, 0, "`layer`, built,")


def to_keras(params: Params, state: State) -> list[np.ndarray]:
    """What `set_weights` of a `keras.layers.BatchNormalization` takes.

    Args:
        params: Scale and bias, None where the layer has `scale=False`, `center=False`.
        state: Running statistics. Their `num_updates` has no place in Keras.

    Returns:
        gamma, beta, moving mean and moving variance, those that there are.

    Raises:
        TypeError: `params` or `state` is something else.

    Examples:
        >>> import jaxbn
        >>> [a.tolist() for a in jaxbn.convert.to_keras(*jaxbn.init(1))]
        [[1.0], [0.0], [0.0], [1.0]]
    """
    return list(from_layer(params, state, WORDS).values())


def _value(variable: Any) -> Any:
    """What a variable of Keras holds; its own conversion to NumPy warns in NumPy 2."""
    value = getattr(variable, "value", variable)
    return variable if callable(value) else value  # a method in Keras 2
