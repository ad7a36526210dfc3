"""Equinox's batch norm, by the attributes of the layer and its `State.get`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

from jaxbn._checks import kind
from jaxbn._core.batch_norm import Params
from jaxbn._core.running import State, new_state
from jaxbn.convert.arrays import check_alike, debiasing, from_layer, to_layer

WORDS = ("weight", "bias", "running_mean", "running_var")


def from_equinox(layer: Any, layer_state: Any) -> tuple[Params, State]:
    """The parameters of an `equinox.nn.BatchNorm`, and what its inference uses.

    Equinox's `momentum` is ours, and its variance the biased one. In mode "batch" its
    inference divides both averages by 1 - momentum^t. That is right for the mean. The
    variance, which starts at 1, is too large by momentum^t / (1 - momentum^t): it comes
    as Equinox uses it, and further updates wear the excess off. In mode "ema" training
    normalizes by the running statistics, which has no counterpart here; inference has.

    Args:
        layer: The module.
        layer_state: The `equinox.nn.State` that knows it, of the whole model or a part.

    Returns:
        The parameters and the state. `num_updates` is Equinox's counter in mode
        "batch"; in mode "ema", which counts nothing, 1 after any update. Copies.

    Raises:
        TypeError: `layer` is not an Equinox batch norm, or `layer_state` none
            that knows it.

    Examples:
        After `layer, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(8,
        "batch", mode="batch")` and some training, `from_equinox(layer, state)`.
    """
    mean, var, count = _running(layer, layer_state)
    if layer.mode == "batch":
        divisor = _divisor(layer, count)
        mean, var = mean / divisor, var / divisor
    else:
        count = 1 - int(count)  # "is this the first time?"
        if count == 0:  # Equinox leaves them uninitialized
            mean, var, _ = new_state(mean.shape, mean.dtype)
    values = (layer.weight, layer.bias, mean, var)
    return to_layer(dict(zip(WORDS, values, strict=True)), WORDS, count, "`layer`")


def to_equinox(
    params: Params, state: State, layer: Any, layer_state: Any
) -> tuple[Any, Any]:
    """Equinox's layer and state, with this batch norm put in.

    Args:
        params: Scale and bias, None where the layer has `channelwise_affine=False`.
        state: Running statistics; `num_updates` has to be their true number if Equinox
            is to train on in mode "batch", since it debiases by it.
        layer: An `equinox.nn.BatchNorm` of this size.
        layer_state: The `equinox.nn.State` that knows it. It can be used further.

    Returns:
        New ones of both. Inference agrees; see `from_equinox` about training.

    Raises:
        ValueError: The layer differs; what is missing, extra or of a different shape is
            named.
        TypeError: `params`, `state`, `layer` or `layer_state` is something else.

    Examples:
        `layer, layer_state = to_equinox(params, state, layer, layer_state)`
    """
    averages, counter = _indices(layer)
    *statistics, old_count = _running(layer, layer_state)
    values = (layer.weight, layer.bias, *statistics)
    pairs = zip(WORDS, values, strict=True)
    templates = {word: value for word, value in pairs if value is not None}
    arrays = from_layer(params, state, WORDS)
    check_alike(arrays, templates, "`layer`")
    new = {
        word: jnp.array(arrays[word].astype(value.dtype))
        for word, value in templates.items()
    }
    if layer.mode == "batch":
        count, divisor = state.num_updates, _divisor(layer, state.num_updates)
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


def _indices(layer: Any) -> tuple[Any, Any]:
    """Where the state has the averages, and what it counts updates by."""
    mode = getattr(layer, "mode", None)
    if mode == "batch":
        return layer.batch_state_index, layer.batch_counter
    if mode == "ema":
        return layer.ema_state_index, layer.ema_first_time_index
    raise TypeError(f"`layer` must be an equinox.nn.BatchNorm; got {kind(layer)}")


def _running(layer: Any, layer_state: Any) -> tuple[Any, Any, Any]:
    """Mean, variance and what updates are counted by, as Equinox has them."""
    averages, counter = _indices(layer)
    try:
        mean, var = layer_state.get(averages)
        return mean, var, layer_state.get(counter)
    except (AttributeError, KeyError, TypeError) as error:
        raise TypeError(
            "`layer_state` must be an equinox.nn.State that knows `layer`; got "
            f"{kind(layer_state)}"
        ) from error


def _divisor(layer: Any, count: Any) -> Any:
    """What Equinox's inference divides its averages by, in mode "batch"."""
    return debiasing(layer.momentum, count) if count else 1
