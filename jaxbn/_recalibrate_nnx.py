"""Recalibration of NNX models: population statistics ("precise BN")."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxbn import _measure, _recording
from jaxbn._measure import Path
from jaxbn._model_nnx import batch_norms, check_module
from jaxbn._moments import Moments, merge_moments


def recalibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    sequential: bool = False,
    progress: bool = False,
    **call_kwargs: Any,
) -> None:
    """Replaces the running statistics of an NNX model by those of given data.

    As `jaxbn.linen.recalibrate`, in place: every `BatchNorm` gets the exact mean and
    biased variance of what it is given over all `batches`. Nothing else of the model
    changes, not even its random streams, and nothing at all if there is an error. A
    change of the model's modes or hyperparameters compiles a new program.

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
        ValueError: There are no batches, or the model calls no batch norm of jaxbn, or,
            without `sequential`, a batch has one element per feature.
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
    measure = Measurement(model, call_kwargs, sequential=sequential)
    new = measure.recalibrated(batches, measure.initial, measure.replace, progress)
    nnx.update(model, nnx.filter_state(new, nnx.BatchStat))


class Measurement(_measure.Measurement):
    """Of an NNX model; `variables` are its state.

    Attributes:
        initial: The state of the model as it came.
    """

    def __init__(
        self,
        model: nnx.Module,
        call_kwargs: Mapping[str, Any],
        *,
        sequential: bool,
    ):
        """As for `recalibrate`."""
        check_module(model)
        self.graphdef, self.initial = nnx.split(model)
        super().__init__(model, self.graphdef, call_kwargs, sequential=sequential)

    @staticmethod
    def call(
        definition: Any,
        recording: _recording.Recording,
        variables: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[Path, Moments]:
        """Calls a copy of the model, and returns what was recorded, by path."""
        model = nnx.merge(definition, variables)
        norms = batch_norms(model)
        for path, norm in norms.items():
            norm.recorded = Recorded(recording, path, norm.mean[...])
        model(*args, **kwargs)
        return {path: norms[path].recorded.moments for path, _ in recording.called}

    def replace(self, variables: Any, moments: dict[Path, Moments]) -> Any:
        """`variables` with means and variances from `moments`."""
        model = nnx.merge(self.graphdef, variables, copy=True)
        norms = batch_norms(model)
        for path, new in moments.items():
            norm = norms[path]
            mean, var = _measure.statistics(new, norm.mean[...], norm.var[...])
            norm.mean.set_value(mean)
            norm.var.set_value(var)
        return nnx.state(model)


class Recorded(nnx.Module):
    """Hangs on a batch norm, and holds the moments of what that was given so far.

    Variables of the type of the running statistics, so that the model's vmaps and scans
    over layers treat them alike. The recording is no context, as it is in Linen, since
    `nnx.jit` would not see another one: it goes by the attributes of modules.
    """

    num_elements: nnx.BatchStat[jax.Array]
    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]

    def __init__(self, recording: _recording.Recording, path: Path, mean: jax.Array):
        self.recording = recording
        self.path = path
        nothing = _recording.nothing(mean)
        self.num_elements = nnx.BatchStat(nothing.num_elements)
        self.mean = nnx.BatchStat(nothing.mean)
        self.var = nnx.BatchStat(nothing.var)

    @property
    def moments(self) -> Moments:
        """What was recorded so far."""
        return Moments(self.num_elements[...], self.mean[...], self.var[...])

    def add(self, x: jax.Array, features: tuple[int, ...], mask: Any) -> None:
        """Records x."""
        so_far = self.moments
        batch = self.recording.moments_of(self.path, x, features, mask)
        pairs = zip(batch, so_far, strict=True)
        batch = Moments(*(new.astype(old.dtype) for new, old in pairs))
        num_elements, mean, var = merge_moments(so_far, batch)
        self.num_elements.set_value(num_elements)
        self.mean.set_value(mean)
        self.var.set_value(var)
