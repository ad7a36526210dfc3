"""Tools for Linen models: recalibration, inspection and weight decay."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import FrozenDict
from flax.core.scope import DenyList
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbn import _checks
from jaxbn._core.moments import Moments
from jaxbn._models.inspection import EPSILON, Layer, LayerStatistics, inspected
from jaxbn._models.measure import (
    Kwargs,
    Path,
    PyTree,
    Recording,
    recalibrated,
    statistics,
)
from jaxbn._models.rules import BatchNormBase
from jaxbn.linen.batch_norm import compute_as_ours
from jaxbn.linen.recording import RECORDED, activate

Variables = Mapping[str, PyTree]

_CALLS = itertools.count()


def recalibrate(
    model: nn.Module,
    variables: Variables,
    batches: Iterable[PyTree],
    *,
    sequential: bool = False,
    progress: bool = False,
    **apply_kwargs: object,
) -> dict[str, PyTree]:
    """Return variables whose running statistics are those of given data.

    After training, the running statistics describe a moving target; after averaging
    parameters (SWA, EMA), nothing at all. Here every batch norm, ours or Flax's, gets
    the exact mean and biased variance of what it is given over all `batches`: each
    batch's moments, merged with weights equal to their counts, so that batches of
    unequal size and masks are right. What `torch.optim.swa_utils.update_bn` does, but
    exactly.

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
        ValueError: There are no batches, or no batch norms in the model, or, without
            `sequential`, a batch has one element per feature.
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
    adapter = _LinenModel(model)
    _checks.check_variables(variables, "batch_stats")
    return recalibrated(
        adapter,
        dict(variables),
        batches,
        apply_kwargs,
        sequential=sequential,
        progress=progress,
    )


def inspect_statistics(
    variables: Variables,
    model: nn.Module | None = None,
    batches: Iterable[PyTree] | None = None,
    *,
    epsilon: float = EPSILON,
    **apply_kwargs: object,
) -> list[LayerStatistics]:
    """Examine every batch norm of a Linen model; data tells which one is spoiled.

    From the variables alone: channels that are dead, whose scale is near 0, whose mean
    is too many standard deviations away from 0 for float16 or bfloat16. With a model
    and data, too, how far the running statistics are from those of the data. These
    come from one pass in which each layer normalizes by its batch's own statistics, so
    that a spoiled layer does not spoil what is measured after it; exact with all data
    in one batch, and as for `recalibrate` with several.

    Args:
        variables: Those of the model, or of a checkpoint: `batch_stats` and `params`.
            Without data, layers of `flax.linen.BatchNorm` are as good as ours.
        model: A Linen module.
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
        >>> from jaxbn.linen import BatchNorm, inspect_statistics
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
    layers = {
        path: Layer(
            stats[*path, "mean"],
            stats[*path, "var"],
            params.get((*path, "scale")),
            epsilon,
        )
        for path in paths
    }
    adapter = None if model is None else _LinenModel(model)
    return inspected(layers, adapter, variables, batches, apply_kwargs)


def weight_decay_mask(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, PyTree]:
    """Return which parameters of a Linen model to decay: all but those of batch norms.

    Decay there would pull at the outputs, while the kernel before a batch norm may be
    of any size without a change in them. The batch norms are found by running the
    model on shapes, and by their class, which is jaxbn's or `flax.linen.BatchNorm`, or
    by a `mean` and a `var` in `batch_stats`. Names of modules do not matter.

    Args:
        model: A Linen module.
        *args: As for `model.init`, without the key; a `jax.ShapeDtypeStruct` does in
            place of an array. Nothing is computed.
        **kwargs: As for `model.init`.

    Returns:
        A tree like the model's `params`: False at the scale and bias of each batch
        norm, True elsewhere. As `mask` of `optax.adamw` and `optax.masked`.

    Raises:
        TypeError: `model` is not a Linen module.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
        >>> from jaxbn.linen import BatchNorm, weight_decay_mask
        >>> model = nn.Sequential([nn.Dense(3), BatchNorm(use_running_average=False)])
        >>> mask = weight_decay_mask(model, jax.ShapeDtypeStruct((8, 2), jnp.float32))
        >>> print(mask["layers_0"]["kernel"], mask["layers_1"]["scale"])
        True False
        >>> optimizer = optax.adamw(1e-3, weight_decay=1e-4, mask=mask)
    """
    check_module(model)
    decayed_not: set[Path] = set()

    def note(method, args, kwargs, context: nn.module.InterceptorContext):
        if issubclass(type(context.module), nn.BatchNorm | BatchNormBase):
            path = context.module.path
            decayed_not.update({(*path, "scale"), (*path, "bias")})
        return method(*args, **kwargs)

    def init() -> PyTree:
        key, mutable = jax.random.key(0), all_but("intermediates")
        return model.lazy_init(key, *args, mutable=mutable, **kwargs)

    with nn.intercept_methods(note):
        variables = jax.eval_shape(init)
    # nn.jit uses one trace for several modules, of which only the first was noted.
    stats = flatten_dict(variables.get("batch_stats", {}))
    for *path, name in stats:
        if name == "var" and (*path, "mean") in stats:
            decayed_not.update({(*path, "scale"), (*path, "bias")})
    params = flatten_dict(variables.get("params", {}))
    return unflatten_dict({path: path not in decayed_not for path in params})


class _LinenModel:
    """A Linen model as the tools see it; its variables are those of Flax."""

    def __init__(self, model: nn.Module):
        check_module(model)
        self.model = model
        # Equal to the model, and does not hold it.
        self.definition: nn.Module = model.clone()

    @staticmethod
    def call(
        definition: nn.Module,
        recording: Recording,
        variables: PyTree,
        args: tuple[PyTree, ...],
        kwargs: Kwargs,
    ) -> dict[Path, Moments]:
        """Call the model, and return what was recorded, by path."""
        with activate(recording), nn.intercept_methods(compute_as_ours):
            _, updates = definition.apply(
                variables, *args, mutable=all_but("params"), **kwargs
            )
        flat = _flattened(updates.get("batch_stats", {}))
        # Not by `recording.called`: nn.jit uses one trace for several modules.
        paths = [path[:-1] for path in flat if path[-1] == RECORDED[0]]
        return {p: Moments(*(flat[*p, name] for name in RECORDED)) for p in paths}

    def replace(self, variables: PyTree, new: dict[Path, Moments]) -> dict[str, PyTree]:
        """Return `variables` with the running statistics of the layers in `new`."""
        flat = _flattened(variables["batch_stats"])
        for path, moments in new.items():
            keys = (*path, "mean"), (*path, "var")
            boxes = [flat[key] for key in keys]  # with metadata, or plain arrays
            values = list(statistics(moments, *nn.meta.unbox(boxes)))
            flat.update(zip(keys, nn.meta.replace_boxed(boxes, values), strict=True))
        return variables | {"batch_stats": unflatten_dict(flat)}


def check_module(model: object) -> None:
    """Refuse what is not a Linen module."""
    hint = "for NNX there is jaxbn.nnx"
    _checks.check_instance("model", model, nn.Module, "a flax.linen.Module", hint)


def all_but(*collections: str) -> DenyList:
    """Return a `mutable` of all but these collections, different in each call.

    nn.jit traces a module once for each `mutable`. Only while it is traced does a
    module note its path, so that each call has to trace it anew.
    """
    return DenyList((*collections, f"jaxbn_{next(_CALLS)}"))


def _flat(variables: Variables, name: str) -> dict[Path, PyTree]:
    tree = variables.get(name, {})
    _checks.check_instance(
        f"variables[{name!r}]", tree, (dict, FrozenDict), "a dictionary"
    )
    return _flattened(tree)


def _flattened(tree: PyTree) -> dict[Path, PyTree]:
    return dict(flatten_dict(tree))
