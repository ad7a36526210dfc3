"""Inspection of NNX models: which batch norm is unwell, and in which way."""

from collections.abc import Iterable
from typing import Any

from flax import nnx

from jaxbn._layer_statistics import LayerStatistics, layer_statistics, worst_first
from jaxbn._model_nnx import batch_norms, check_module
from jaxbn._moments import Moments
from jaxbn._recalibrate_nnx import Measurement


def inspect_statistics(
    model: nnx.Module, batches: Iterable[Any] | None = None, **call_kwargs: Any
) -> list[LayerStatistics]:
    """Looks at every batch norm of an NNX model, and with data finds the spoiled one.

    As `jaxbn.linen.inspect_statistics`, with the epsilon of each layer. The model stays
    as it is.

    Args:
        model: An NNX module whose batch norms are those of jaxbn.
        batches: As for `recalibrate`, or None.
        **call_kwargs: Further arguments of the model's call.

    Returns:
        One record for each batch norm: with data the one with the largest mean
        divergence first, without in the order of the model's attributes.

    Raises:
        ValueError: The model has no batch norm of jaxbn or calls none, there are no
            batches, or one of them has one element per feature.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbn.nnx import BatchNorm, inspect_statistics
        >>> x = jnp.array([[0.0, 2.0], [2.0, 4.0]])  # means 1 and 3, variance 1
        >>> norm = BatchNorm(2, rngs=nnx.Rngs(0))  # running mean 0, variance 1
        >>> [layer] = inspect_statistics(norm, [x])
        >>> print(layer.kl.round(3), layer.worst_channel)
        [0.5 4.5] (1,)
    """
    check_module(model)
    norms = batch_norms(model)
    if not norms:
        raise ValueError("`model` must have a BatchNorm of jaxbn; got none")
    moments: dict[Any, Moments] = {}
    order = list(norms)
    if batches is not None:
        measure = Measurement(model, call_kwargs, sequential=False)
        moments = measure.over(batches, measure.initial)
        order.sort(key=lambda path: [*measure.depths, path].index(path))

    def record(path: Any) -> LayerStatistics:
        norm, names = norms[path], tuple(map(str, path))
        mean, var = norm.mean[...], norm.var[...]
        scale = None if norm.scale is None else norm.scale[...]
        return layer_statistics(
            names, mean, var, scale, moments.get(path), norm.epsilon
        )

    return worst_first(map(record, order))
