"""Recalibration: population statistics in place of running ones ("precise BN")."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core.scope import DenyList
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbn import _recording
from jaxbn._moments import Moments, merge_moments

Path = tuple[str, ...]


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
        ValueError: There are no batches, or no batch norms of jaxbn in the model.
        TypeError: `sequential` with `batches` that can be iterated only once.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxbn.linen import BatchNorm, recalibrate
        >>> x = jnp.array([[1.0], [3.0], [5.0], [7.0], [9.0]])
        >>> norm = BatchNorm(use_running_average=True)
        >>> variables = norm.init(jax.random.key(0), x)
        >>> variables = recalibrate(norm, variables, [x[:2], x[2:]])
        >>> print(variables["batch_stats"]["mean"], variables["batch_stats"]["var"])
        [5.] [8.]

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3; Izmailov
    et al., "Averaging Weights Leads to Wider Optima", 2018.
    """
    if sequential and iter(batches) is batches:
        raise TypeError(
            "`batches` must be re-iterable for `sequential`, which passes over them "
            f"once for each layer; got {type(batches).__name__} (make it a list)"
        )
    variables = dict(variables)
    measure = Measurement(model, apply_kwargs, use_running_average=sequential)
    moments = measure.over(batches, variables, progress)
    if not sequential:
        return _replace(variables, moments)
    # A stack of layers (nn.scan) has one path, and is right after one pass for each.
    turns = [path for path, depth in measure.depths.items() for _ in range(depth)]
    for turn, path in enumerate(turns):
        if turn > 0:
            moments = measure.over(batches, variables, progress)
        variables = _replace(variables, {path: moments[path]})
    return variables


class Measurement:
    """Passes over data, each giving the moments that every batch norm was given.

    Attributes:
        depths: How many layers each path stands for, in call order; after one pass.
    """

    def __init__(
        self, model: Any, apply_kwargs: Mapping[str, Any], *, use_running_average: bool
    ):
        """A batch norm normalizes by its running statistics, or by its batch."""
        self.depths: dict[Path, int] = {}

        def measure(variables: Any, batch: Any) -> dict[Path, Moments]:
            args, kwargs = _arguments(batch)
            with _recording.record(use_running_average) as recording:
                _, updates = model.apply(
                    variables,
                    *args,
                    mutable=DenyList("params"),
                    **kwargs,
                    **apply_kwargs,
                )
            moments = _recorded(updates.get("batch_stats", {}))
            for path, shape in recording.called:
                self.depths[path] = moments[path].mean.size // max(1, math.prod(shape))
            return moments

        self._measure = jax.jit(measure)
        self._merge = jax.jit(lambda a, b: {k: merge_moments(a[k], b[k]) for k in a})

    def over(
        self, batches: Iterable[Any], variables: Mapping[str, Any], progress: bool
    ) -> dict[Path, Moments]:
        """The moments of all batches together, by path."""
        total: dict[Path, Moments] = {}
        for batch in _shown(batches) if progress else batches:
            moments = self._measure(variables, batch)
            total = self._merge(total, moments) if total else moments
            if not total:
                raise ValueError("`model` must call a BatchNorm of jaxbn.linen; none")
        if not total:
            raise ValueError("`batches` must hold at least one batch; got none")
        return total


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, dict):
        return (), batch
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def _recorded(batch_stats: Any) -> dict[Path, Moments]:
    flat: dict[Any, Any] = dict(flatten_dict(batch_stats))
    paths = [path[:-1] for path in flat if path[-1] == _recording.NAMES[0]]
    return {
        path: Moments(*(flat[*path, name] for name in _recording.NAMES))
        for path in paths
    }


def _replace(variables: dict[str, Any], moments: dict[Path, Moments]) -> dict[str, Any]:
    """`variables` with means and variances from `moments`, where there are any."""
    flat: dict[Any, Any] = dict(flatten_dict(variables["batch_stats"]))
    for path, (num_elements, *new) in moments.items():
        usable = (num_elements > 0) & jnp.isfinite(new[0]) & jnp.isfinite(new[1])
        for name, value in zip(("mean", "var"), new, strict=True):
            old = flat[*path, name]
            flat[*path, name] = jnp.where(usable, value.astype(old.dtype), old)
    return variables | {"batch_stats": unflatten_dict(flat)}


def _shown(batches: Iterable[Any]) -> Iterable[Any]:
    from rich.progress import track  # in the extra `demo`

    return track(batches, description="recalibrating")
