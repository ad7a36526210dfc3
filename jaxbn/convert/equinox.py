"""Equinox's batch norm, by the attributes of the layer and its `State.get`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr
from jax.typing import DTypeLike

from jaxbn._checks import kind
from jaxbn._core.normalize import Params
from jaxbn._core.running import State, new_state
from jaxbn.convert.arrays import debias_divisor, from_layer_like, to_layer

# `equinox.nn.BatchNorm` and `equinox.nn.State`, which are not imported.
Layer = Any
LayerState = Any

WORDS = ("weight", "bias", "running_mean", "running_var")


def from_equinox(layer: Layer, layer_state: LayerState) -> tuple[Params, State]:
    """Return the parameters of an `equinox.nn.BatchNorm`, and its inference statistics.

    Equinox's `momentum` means the same as in jaxbn, and both keep the biased variance.

    Limits:
        * In mode "batch", inference divides both averages by 1 - momentum^t after t
          updates. Equinox's variance starts at 1, so the quotient is too large, by
          momentum^t / (1 - momentum^t). It is returned as Equinox uses it, and further
          updates reduce the excess.
        * In mode "ema", Equinox normalizes by the running statistics in training too.
          jaxbn does so in inference only.

    Args:
        layer: The batch norm module.
        layer_state: The `equinox.nn.State` of the layer or of the whole model.

    Returns:
        Copies of the parameters, each `(features,)` or None, and of the statistics,
        float32 at least. `num_updates` is Equinox's counter in mode "batch". Mode "ema"
        does not count: `num_updates` is then 1 after any update.

    Raises:
        TypeError: `layer` is not an Equinox batch norm, or `layer_state` does not hold
            its state.

    Examples:
        >>> import equinox as eqx, jaxbn  # doctest: +SKIP
        >>> norm = eqx.nn.BatchNorm(8, "batch", mode="batch")  # doctest: +SKIP
        >>> jaxbn.convert.from_equinox(norm, eqx.nn.State(norm))  # doctest: +SKIP
    """
    _, (mean, var, count) = _read(layer, layer_state)
    if layer.mode == "batch":
        divisor = _divisor(layer, count, mean.dtype)
        mean, var = mean / divisor, var / divisor
    else:
        count = 1 - int(count)  # Equinox keeps whether the next update is the first
        if count == 0:  # Equinox leaves the averages uninitialized until then
            mean, var, _ = new_state(mean.shape, mean.dtype)
    values = (layer.weight, layer.bias, mean, var)
    return to_layer(dict(zip(WORDS, values, strict=True)), WORDS, count, "`layer`")


def to_equinox(
    params: Params, state: State, layer: Layer, layer_state: LayerState
) -> tuple[Layer, LayerState]:
    """Return Equinox's layer and state with a batch norm of jaxbn put in.

    Inference agrees. `from_equinox` lists the limits of training in Equinox.

    Args:
        params: Scale and bias, None where the layer has `channelwise_affine=False`.
        state: Running statistics. If Equinox is to train on in mode "batch",
            `num_updates` must be the true number of updates, since it debiases by it.
        layer: An `equinox.nn.BatchNorm` of this size.
        layer_state: The `equinox.nn.State` of the layer or of the whole model. It
            remains usable.

    Returns:
        A new layer and a new state.

    Raises:
        ValueError: The layer differs. The message names what is missing, extra or of a
            different shape.
        TypeError: `params`, `state` or `layer` has another class, or `layer_state` does
            not hold the state of `layer`.

    Examples:
        >>> import equinox as eqx, jaxbn  # doctest: +SKIP
        >>> norm = eqx.nn.BatchNorm(8, "batch", mode="batch")  # doctest: +SKIP
        >>> norm, norm_state = jaxbn.convert.to_equinox(
        ...     *jaxbn.init(8), norm, eqx.nn.State(norm)
        ... )  # doctest: +SKIP
    """
    (averages, counter), (mean, var, old_count) = _read(layer, layer_state)
    pairs = zip(WORDS, (layer.weight, layer.bias, mean, var), strict=True)
    templates = {word: value for word, value in pairs if value is not None}
    new = from_layer_like(templates, params, state, WORDS, "`layer`")
    if layer.mode == "batch":
        count = state.num_updates
        divisor = _divisor(layer, count, state.mean.dtype)
    else:
        count, divisor = state.num_updates == 0, 1
    # A copy, since `set` makes the state that it is called on unusable.
    layer_state = jax.tree.map(lambda leaf: leaf, layer_state)
    layer_state = layer_state.set(averages, tuple(new[w] * divisor for w in WORDS[2:]))
    return (
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: new.get(keystr(path, simple=True), leaf), layer
        ),
        layer_state.set(counter, jnp.full_like(old_count, count)),
    )


def _read(
    layer: Layer, layer_state: LayerState
) -> tuple[tuple[Any, Any], tuple[jax.Array, jax.Array, jax.Array]]:
    """Return the layer's indices into the state, and mean, variance and count there."""
    mode = getattr(layer, "mode", None)
    if mode == "batch":
        averages, counter = layer.batch_state_index, layer.batch_counter
    elif mode == "ema":
        averages, counter = layer.ema_state_index, layer.ema_first_time_index
    else:
        raise TypeError(f"`layer` must be an equinox.nn.BatchNorm; got {kind(layer)}")
    try:
        mean, var = layer_state.get(averages)
        return (averages, counter), (mean, var, layer_state.get(counter))
    except (AttributeError, KeyError, TypeError) as error:
        raise TypeError(
            "`layer_state` must be an equinox.nn.State that knows `layer`; got "
            f"{kind(layer_state)}"
        ) from error


def _divisor(layer: Layer, count: jax.Array, dtype: DTypeLike) -> jax.Array | int:
    """Return what Equinox's inference divides its averages by, in mode "batch"."""
    return debias_divisor(layer.momentum, count, dtype) if count else 1
