"""Inspection of Linen models: which batch norm is unwell, and in which way."""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict

from jaxbn import _checks
from jaxbn._layer_statistics import (
    EPSILON,
    LayerStatistics,
    layer_statistics,
    worst_first,
)
from jaxbn._measure import Path
from jaxbn._moments import Moments
from jaxbn._recalibrate import Measurement


def inspect_statistics(
    variables: Mapping[str, Any],
    model: Any = None,
    batches: Iterable[Any] | None = None,
    *,
    epsilon: float = EPSILON,
    **apply_kwargs: Any,
) -> list[LayerStatistics]:
    """Looks at every batch norm of a Linen model, and with data finds the spoiled one.

    From the variables alone: channels that are dead, whose scale is near 0, whose mean
    is too many standard deviations away from 0 for float16 or bfloat16. With a model
    and data, too, how far the running statistics are from those of the data. These
    come from one pass in which each layer normalizes by its batch's own statistics, so
    that a spoiled layer does not spoil what is measured after it; exact with all data
    in one batch, and as for `recalibrate` with several.

    Args:
        variables: Those of the model, or of a checkpoint: `batch_stats` and `params`.
            Without data, layers of `flax.linen.BatchNorm` are as good as ours.
        model: A Linen module whose batch norms are those of jaxbn.
        batches: As for `recalibrate`; goes with `model`.
        epsilon: That of the layers, added to the variances.
        **apply_kwargs: Further arguments of `model.apply`, such as `train=True`.

    Returns:
        One record for each batch norm: with data the one with the largest mean
        divergence first, without in the order of the variables.

    Raises:
        ValueError: There is no batch norm in the variables or in the model, there are
            no batches, one of them has one element per feature, or one of `model` and
            `batches` is missing.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxbn._inspect import inspect_statistics
        >>> from jaxbn.linen import BatchNorm
        >>> x = jnp.array([[0.0, 2.0], [2.0, 4.0]])  # means 1 and 3, variance 1
        >>> norm = BatchNorm(use_running_average=True)
        >>> variables = norm.init(jax.random.key(0), x)  # running mean 0, variance 1
        >>> [layer] = inspect_statistics(variables, norm, [x])
        >>> print(layer.kl.round(3), layer.worst_channel)
        [0.5 4.5] (1,)
    """
    if (model is None) != (batches is None):
        given, missing = (
            ("model", "batches") if batches is None else ("batches", "model")
        )
        raise ValueError(f"`{missing}` must be given with `{given}`; got None")
    epsilon = _checks.check_epsilon(epsilon)
    _checks.check_mapping("variables", variables)
    variables = nn.meta.unbox(dict(variables))
    stats, params = (_flat(variables, name) for name in ("batch_stats", "params"))
    paths = [path[:-1] for path in stats if path[-1] == "mean"]
    paths = [path for path in paths if (*path, "var") in stats]
    if not paths:
        raise ValueError(
            "`variables` must hold `batch_stats` with a mean and a var; got "
            f"{', '.join(variables) or 'nothing'} without any"
        )
    moments: dict[Path, Moments] = {}
    if batches is not None:
        measure = Measurement(model, apply_kwargs, sequential=False)
        moments = measure.over(batches, variables, progress=False)
        called = [path for path in measure.depths if path in paths]
        paths = called + [path for path in paths if path not in called]

    def record(path: Path) -> LayerStatistics:
        mean, var = stats[*path, "mean"], stats[*path, "var"]
        scale = params.get((*path, "scale"))
        return layer_statistics(path, mean, var, scale, moments.get(path), epsilon)

    return worst_first(map(record, paths))


def _flat(variables: Mapping[str, Any], name: str) -> dict[Any, Any]:
    tree = variables.get(name, {})
    _checks.check_instance(
        f"variables[{name!r}]", tree, (dict, FrozenDict), "a dictionary"
    )
    return dict(flatten_dict(tree))
