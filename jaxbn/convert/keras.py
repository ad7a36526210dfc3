"""Keras's batch norm, by the attributes of the layer."""

import numpy as np

from jaxbn._core.normalize import Params
from jaxbn._core.running import State
from jaxbn.convert.arrays import from_layer, to_layer

WORDS = ("gamma", "beta", "moving_mean", "moving_variance")


def from_keras(layer: object) -> tuple[Params, State]:
    """Return the parameters and statistics of a `keras.layers.BatchNormalization`.

    Keras's `momentum` means the same as in jaxbn, and both keep the biased variance.
    Keras's defaults are `batch_norm(..., momentum=0.99, epsilon=1e-3)`.

    Args:
        layer: A built layer, of any of Keras's backends.

    Returns:
        Copies of the parameters, each `(features,)`, or None for `scale=False` or
        `center=False`, and of the statistics, float32 at least. `num_updates` is 0,
        since Keras does not count. With `momentum=None` or `debias=True`, the first
        update would then replace the statistics: set their number before, with
        `state._replace(num_updates=...)`.

    Raises:
        ValueError: The layer is not built yet, is no batch norm, or has `renorm=True`.
            The message names what is missing or has a different shape.
        TypeError: The layer holds something other than floats.

    Examples:
        >>> import types, jaxbn
        >>> layer = types.SimpleNamespace(
        ...     gamma=[2.0], beta=None, moving_mean=[0.5], moving_variance=[1.0]
        ... )
        >>> params, state = jaxbn.convert.from_keras(layer)
        >>> print(params.scale, params.bias, state.mean)
        [2.] None [0.5]
    """
    if getattr(layer, "renorm", False):
        raise ValueError(
            "`layer` must have `renorm=False`, since its renorm weights have no place "
            "here (jaxbn.batch_renorm does the same with Params and State alone); got "
            "`renorm=True`"
        )
    arrays = {word: _value(getattr(layer, word, None)) for word in WORDS}
    return to_layer(arrays, WORDS, 0, "`layer`, built,")


def to_keras(params: Params, state: State) -> list[np.ndarray]:
    """Return the list that `set_weights` of a Keras BatchNormalization takes.

    Args:
        params: Scale and bias, None where the layer has `scale=False`, `center=False`.
        state: Running statistics. Keras has no place for `num_updates`.

    Returns:
        Copies of gamma, beta, moving mean and variance, without those that are None.

    Raises:
        ValueError: The shapes of `params` and `state` differ.
        TypeError: `params` or `state` has another class.

    Examples:
        >>> import jaxbn
        >>> [a.tolist() for a in jaxbn.convert.to_keras(*jaxbn.init(1))]
        [[1.0], [0.0], [0.0], [1.0]]
    """
    return list(from_layer(params, state, WORDS).values())


def _value(variable: object) -> object:
    """Return what a Keras variable holds; converting the variable warns in NumPy 2."""
    value = getattr(variable, "value", variable)
    return variable if callable(value) else value  # `value` is a method in Keras 2
