"""Recalibration of Linen models: population statistics ("precise BN")."""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbn import _checks, _measure, _recording
from jaxbn._measure import Path
from jaxbn._model_linen import check_module, unseen
from jaxbn._moments import Moments


def recalibrate(
    model: Any,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    sequential: bool = False,
    progress: bool = False,
    **apply_kwargs: Any,
) -> dict[str, Any]:
    """Replaces the running statistics of a Linen model by those of given data.

    After training, the running statistics describe a moving target; after averaging
    parameters (SWA, EMA), nothing at all. Here every `BatchNorm` gets the exact mean
    and biased variance of what it is given over all `batches`: each batch's moments,
    merged with weights equal to their counts, so that batches of unequal size and
    masks are right. What `torch.optim.swa_utils.update_bn` does, but exactly.

    In one pass each layer normalizes by its batch's own statistics, as in training:
    exact for layers that no batch norm precedes; for the others a little dependent on
    how the data is split, as their input is. With `sequential` there is one pass for
    each layer in call order, in which the layers before it use what they were already
    given: exact for any split at every layer, and what inference will meet.

    The passes compile once for a model, its options and shapes; later calls reuse the
    program as long as the model lives.

    Limits:
        * A model that cannot be hashed compiles in each call.
        * So does an option that holds anything but arrays, numbers, strings and types:
          write `method="encode"` in place of `method=Model.encode`.
        * As in `jax.jit`, an object in a field of the model must not change.

    Args:
        model: A Linen module.
        variables: Its variables; any parameters, averaged ones too.
        batches: An iterable of batches. A tuple holds positional arguments of the
            model, a dict keyword arguments, and anything else is the one argument.
        sequential: One pass for each layer; `batches` is then iterated as often.
        progress: Whether to show a progress bar (needs rich, in `jaxbn[demo]`).
        **apply_kwargs: Further arguments of `model.apply`, such as `train=True` or
            `rngs`. Whatever they say, the layers normalize as told above.

    Returns:
        The variables, with new `mean` and `var` in `batch_stats` and all else as it
        was. A feature for which nothing was counted, or not finite, keeps its old ones.

    Raises:
        ValueError: There are no batches, or no batch norms of jaxbn in the model, or,
            without `sequential`, a batch has one element per feature.
        TypeError: `sequential` with `batches` that can be iterated only once.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxbn.linen import BatchNorm, recalibrate
        >>> x = jnp.array([[1.0], [3.0], [5.0], [7.0], [9.0]])
        >>> norm = BatchNorm(use_running_average=True)
        >>> variables = norm.init(jax.random.key(0), x)
        >>> variables = recalibrate(norm, variables, [x[:2], x[2:]])
        >>> print(*(a.round() for a in variables["batch_stats"].values()))
        [5.] [8.]

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3; Izmailov
    et al., "Averaging Weights Leads to Wider Optima", 2018.
    """
    measure = Measurement(model, apply_kwargs, sequential=sequential)
    _checks.check_variables(variables, "batch_stats")
    return measure.recalibrated(batches, dict(variables), _replace, progress)


class Measurement(_measure.Measurement):
    """Of a Linen model; `variables` are its variables."""

    def __init__(
        self, model: Any, apply_kwargs: Mapping[str, Any], *, sequential: bool
    ):
        """As for `recalibrate`."""
        check_module(model)
        definition = model.clone()  # equal to the model, and does not hold it
        super().__init__(model, definition, apply_kwargs, sequential=sequential)

    @staticmethod
    def call(
        definition: Any,
        recording: _recording.Recording,
        variables: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[Path, Moments]:
        """Calls the model, and returns what was recorded, by path."""
        with _recording.activate(recording):
            _, updates = definition.apply(
                variables, *args, mutable=unseen("params"), **kwargs
            )
        flat: dict[Any, Any] = dict(flatten_dict(updates.get("batch_stats", {})))
        return {
            path: Moments(*(flat[*path, name] for name in _recording.NAMES))
            for path, _ in recording.called
        }


def _replace(variables: dict[str, Any], moments: dict[Path, Moments]) -> dict[str, Any]:
    """`variables` with means and variances from `moments`, where there are any."""
    flat: dict[Any, Any] = dict(flatten_dict(variables["batch_stats"]))
    for path, new in moments.items():
        keys = (*path, "mean"), (*path, "var")
        boxes = [flat[key] for key in keys]  # with metadata, or plain arrays
        values = _measure.statistics(new, *nn.meta.unbox(boxes))
        flat.update(zip(keys, nn.meta.replace_boxed(boxes, list(values)), strict=True))
    return variables | {"batch_stats": unflatten_dict(flat)}
