"""The batch norms of an NNX model, ours and Flax's, and others in Flax's place."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from jaxbn import _checks
from jaxbn._models.measure import Path
from jaxbn._models.rules import BatchNormBase, keep_dtypes, warn_of_own_call


def check_module(model: object) -> None:
    """Refuse what is not an NNX module."""
    hint = "for Linen there is jaxbn.linen"
    _checks.check_instance("model", model, nnx.Module, "a flax.nnx.Module", hint)


def batch_norms(model: nnx.Module) -> dict[Path, Any]:
    """Return the batch norms of jaxbn and of Flax in a model, each by its first path.

    A subclass of Flax's with a `__call__` of its own is not among them.
    """
    found: dict[Path, Any] = {}
    for path, norm in nnx.iter_modules(model):
        if isinstance(norm, BatchNormBase):
            found[path] = norm
        elif isinstance(norm, nnx.BatchNorm):
            if type(norm).__call__ is nnx.BatchNorm.__call__:
                found[path] = norm
            else:
                warn_of_own_call(norm, "flax.nnx.BatchNorm")
    return found


def replaced(model: Any, make: Callable[[Any], nnx.Module]) -> tuple[Any, list[Path]]:
    """Put `make(norm)` in the place of each batch norm of Flax, wherever it hangs.

    Returns:
        The model, the same object unless it is a batch norm itself, and the paths.
    """
    found = batch_norms(model).items()
    norms = {path: norm for path, norm in found if isinstance(norm, nnx.BatchNorm)}
    made = {id(norm): make(norm) for norm in norms.values()}
    put_modules(model, made)
    return made.get(id(model), model), list(norms)


def put_modules(model: nnx.Module, made: Mapping[int, nnx.Module]) -> None:
    """Put the modules `made` in the place of others, given by `id`, in a model."""

    def put(value: Any) -> Any:
        return made.get(id(value), value)

    def is_whole(value: Any) -> bool:
        return isinstance(value, nnx.Pytree | nnx.Variable)

    nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Pytree)]
    for node in nodes:
        for name, value in list(vars(node).items()):
            leaves = jax.tree.leaves(value, is_leaf=is_whole)
            if any(id(leaf) in made for leaf in leaves):
                setattr(node, name, jax.tree.map(put, value, is_leaf=is_whole))


def defaults_of(cls: Any) -> dict[str, Any]:
    """Return the keyword arguments of a class that have defaults, and these."""
    return cls.__init__.__kwdefaults__


def as_ours(norm: nnx.BatchNorm, cls: type[Any], **changes: Any) -> Any:
    """Return a batch norm of ours, `cls`, with the variables and settings of Flax's."""
    ours, flaxs = defaults_of(cls), defaults_of(nnx.BatchNorm)
    settings = {name: ours[name] for name in ours.keys() - flaxs.keys()}
    if norm.promote_dtype is promote_dtype:  # the default
        settings["promote_dtype"] = keep_dtypes
    new = object.__new__(cls)
    vars(new).update(vars(norm))
    for name, value in (settings | changes).items():
        setattr(new, name, value)
    if new._keeps_count():
        *stack, last = norm.mean.shape
        if last != norm.num_features:
            raise ValueError(
                "`momentum=None` and `debias` need stacked layers on the first axes of "
                f"a mean with {norm.num_features} features; got shape {norm.mean.shape}"
            )
        new.num_updates = nnx.BatchStat(jnp.zeros(stack, jnp.int32))
    return new
