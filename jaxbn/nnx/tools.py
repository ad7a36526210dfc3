"""Tools for NNX models: recalibration, inspection and weight decay."""

from collections.abc import Iterable
from typing import Any

from flax import nnx

from jaxbn._core.moments import Moments
from jaxbn._models.inspection import Layer, LayerStatistics, inspected
from jaxbn._models.measure import (
    Kwargs,
    Path,
    PyTree,
    Recording,
    recalibrated,
    statistics,
)
from jaxbn._models.rules import BatchNormBase
from jaxbn.nnx.batch_norm import BatchNorm
from jaxbn.nnx.models import as_ours, batch_norms, check_module, replaced
from jaxbn.nnx.recording import Recorded


def recalibrate(
    model: nnx.Module,
    batches: Iterable[PyTree],
    *,
    sequential: bool = False,
    progress: bool = False,
    **call_kwargs: object,
) -> None:
    """Replace the running statistics of an NNX model by those of given data.

    As `jaxbn.linen.recalibrate`, in place: every batch norm, ours or Flax's, gets the
    exact mean and biased variance of what it is given over all `batches`. Nothing else
    of the model changes, not even its random streams, and nothing at all if there is an
    error. A change of the model's modes or hyperparameters compiles a new program.

    Args:
        model: An NNX module; its other layers run as it was set, by `eval()` or
            `train()`.
        batches: An iterable of batches. A tuple holds positional arguments of the
            model, a dict keyword arguments, and anything else is the one argument.
        sequential: One pass for each layer, in which the layers before it use what
            they were already given: exact for any split of the data at every layer.
        progress: Whether to show a progress bar (needs rich, in `jaxbn[demo]`).
        **call_kwargs: Further arguments of the model's call. Whatever they say, the
            batch norms normalize by their batch or, with `sequential`, by their
            running statistics.

    Raises:
        ValueError: There are no batches, or the model calls no batch norm, or, without
            `sequential`, a batch has one element per feature.
        TypeError: `sequential` with `batches` that can be iterated only once.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbn.nnx import BatchNorm, recalibrate
        >>> x = jnp.array([[1.0], [3.0], [5.0], [7.0], [9.0]])
        >>> norm = BatchNorm(1, rngs=nnx.Rngs(0))
        >>> recalibrate(norm, [x[:2], x[2:]])
        >>> print(norm.mean[...].round(), norm.var[...].round())
        [5.] [8.]

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3; Izmailov
    et al., "Averaging Weights Leads to Wider Optima", 2018.
    """
    adapter = _NnxModel(model)
    new = recalibrated(
        adapter,
        adapter.variables,
        batches,
        call_kwargs,
        sequential=sequential,
        progress=progress,
    )
    nnx.update(model, nnx.filter_state(new, nnx.BatchStat))


def inspect_statistics(
    model: nnx.Module, batches: Iterable[PyTree] | None = None, **call_kwargs: object
) -> list[LayerStatistics]:
    """Examine every batch norm of an NNX model; data tells which one is spoiled.

    As `jaxbn.linen.inspect_statistics`, with the epsilon of each layer. The model stays
    as it is.

    Args:
        model: An NNX module.
        batches: As for `recalibrate`, or None.
        **call_kwargs: Further arguments of the model's call.

    Returns:
        One record for each batch norm: with data the one with the largest mean
        divergence first, without in the order of the model's attributes.

    Raises:
        ValueError: The model has no batch norm or calls none, there are no batches, or
            one of them has one element per feature.

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
    adapter = _NnxModel(model)
    layers = {
        path: Layer(
            norm.mean[...],
            norm.var[...],
            None if norm.scale is None else norm.scale[...],
            norm.epsilon,
        )
        for path, norm in batch_norms(model).items()
    }
    if not layers:
        raise ValueError("`model` must have a BatchNorm; got none")
    return inspected(layers, adapter, adapter.variables, batches, call_kwargs)


def weight_decay_mask(
    model: nnx.Module, *, wrt: nnx.filterlib.Filter = nnx.Param
) -> nnx.State[Any, Any]:
    """Return which parameters of an NNX model to decay: all but those of batch norms.

    As `jaxbn.linen.weight_decay_mask`: the batch norms are found by their class, which
    is jaxbn's or `flax.nnx.BatchNorm`; names do not matter. A Linen module in
    `nnx.bridge.ToNNX` is not looked into, and is decayed as a whole.

    Args:
        model: An NNX module, abstract (`nnx.eval_shape`) or not.
        wrt: What is optimized, as for `nnx.Optimizer`.

    Returns:
        A state like `nnx.state(model, wrt)`: False at the scale and bias of each batch
        norm, True elsewhere. As `mask` of `optax.adamw` and `optax.masked`.

    Raises:
        TypeError: `model` is not an NNX module.

    Examples:
        >>> import optax
        >>> from flax import nnx
        >>> from jaxbn.nnx import BatchNorm, weight_decay_mask
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), BatchNorm(3, rngs=rngs))
        >>> mask = weight_decay_mask(model)
        >>> print(mask["layers"][0]["kernel"], mask["layers"][1]["scale"])
        True False
        >>> adamw = optax.adamw(1e-3, weight_decay=1e-4, mask=mask)
        >>> optimizer = nnx.Optimizer(model, adamw, wrt=nnx.Param)
    """
    check_module(model)
    decayed_not = {
        (*path, name)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm | BatchNormBase)
        for name in ("scale", "bias")
    }
    params = nnx.to_flat_state(nnx.state(model, wrt))
    return nnx.from_flat_state([(path, path not in decayed_not) for path, _ in params])


class _NnxModel:
    """An NNX model as the tools see it; its variables are its state."""

    def __init__(self, model: nnx.Module):
        check_module(model)
        self.model = model
        split: tuple[Any, Any] = nnx.split(model)
        self.definition, self.variables = split

    @staticmethod
    def call(
        definition: nnx.GraphDef[Any],
        recording: Recording,
        variables: PyTree,
        args: tuple[PyTree, ...],
        kwargs: Kwargs,
    ) -> dict[Path, Moments]:
        """Call a copy of the model, and return what was recorded, by path."""
        model: Any = nnx.merge(definition, variables)
        model, _ = replaced(model, lambda norm: as_ours(norm, BatchNorm))
        norms = batch_norms(model)
        for path, norm in norms.items():
            norm.recorded = Recorded(recording, path, norm.mean[...])
        model(*args, **kwargs)
        return {path: norms[path].recorded.moments for path, _ in recording.called}

    def replace(self, variables: PyTree, new: dict[Path, Moments]) -> PyTree:
        """Return `variables` with the running statistics of the layers in `new`."""
        model = nnx.merge(self.definition, variables, copy=True)
        norms = batch_norms(model)
        for path, moments in new.items():
            norm = norms[path]
            mean, var = statistics(moments, norm.mean[...], norm.var[...])
            norm.mean.set_value(mean)
            norm.var.set_value(var)
        return nnx.state(model)
