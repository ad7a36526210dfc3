"""Into NNX models that others wrote: Flax's batch norms become ours."""

from collections.abc import Callable

from flax import nnx

from jaxbn import _checks
from jaxbn._models.measure import Path
from jaxbn.nnx.batch_norm import BatchNorm
from jaxbn.nnx.models import as_ours, check_module, defaults_of, replaced

# What makes a variable, which stays as it is.
_MAKES_VARIABLES = {"param_dtype", "use_bias", "use_scale", "bias_init", "scale_init"}
_MAKES_VARIABLES |= {"bias_metadata", "scale_metadata"}


def replace_batch_norm(
    model: nnx.Module,
    *,
    make: Callable[[nnx.BatchNorm], nnx.Module] | None = None,
    **changes: object,
) -> list[Path]:
    """Put a `BatchNorm` in the place of every `flax.nnx.BatchNorm` of a model.

    For a model whose code is not yours. The new batch norms have the variables, the
    same objects, and the settings of the old, so that checkpoints and the state of an
    optimizer stay valid. They are found wherever they hang: in attributes, lists and
    dicts, shared, in stacks of layers (nnx.vmap, nnx.scan).

    `recalibrate`, `inspect_statistics` and `weight_decay_mask` need no replacement.

    Limits:
        * A subclass of Flax's with a `__call__` of its own is left alone, and a warning
          names it.
        * `momentum=None` and `debias` add `num_updates`, which begins at 0, so that the
          first update replaces the statistics.
        * What `make` returns has variables of its own unless it is given those of its
          argument. Make the optimizer anew after it.

    Args:
        model: An NNX module.
        make: Given a batch norm of Flax, returns the module to put in its place, such
            as a `flax.nnx.GroupNorm`. None makes a `BatchNorm`.
        **changes: Arguments of `BatchNorm` that get another value, such as `axis_name`
            or `ghost_batch_size`; none that makes a variable.

    Returns:
        The paths of what was replaced.

    Raises:
        ValueError: The model has no `flax.nnx.BatchNorm` or is one itself, or there are
            both `make` and `changes`.
        TypeError: `model` is not an NNX module, `make` does not return one, or a name
            is no argument of `BatchNorm`.

    Examples:
        >>> from flax import nnx
        >>> from jaxbn.nnx import replace_batch_norm
        >>> rngs = nnx.Rngs(0)
        >>> layers = nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        >>> model = nnx.Sequential(*layers)
        >>> replace_batch_norm(model, momentum=0.9)
        [('layers', 1)]
        >>> type(model.layers[1])
        <class 'jaxbn.nnx.BatchNorm'>
    """
    check_module(model)
    settings = defaults_of(BatchNorm).keys() - _MAKES_VARIABLES
    words = "arguments of jaxbn.nnx.BatchNorm that make no variable"
    _checks.check_changes(changes, settings, words)
    if make is not None and changes:
        raise ValueError(
            "`make` must be None with `changes`, which are those of a BatchNorm; got "
            f"{_checks.kind(make)} and {', '.join(changes)}"
        )

    def new(norm: nnx.BatchNorm) -> nnx.Module:
        if make is None:
            return as_ours(norm, BatchNorm, **changes)
        needed = "a function that returns a flax.nnx.Module"
        _checks.check_instance("make", module := make(norm), nnx.Module, needed)
        return module

    same, paths = replaced(model, new)
    if not paths or same is not model:
        raise ValueError(
            "`model` must hold a flax.nnx.BatchNorm in an attribute; got "
            + ("one itself" if paths else "none")
        )
    return paths
