"""Measuring: passes over data in which each batch norm records what it is given.

What recalibrates and inspects models of Linen and of NNX alike.
"""

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _checks
from jaxbn._moments import Moments, merge_moments
from jaxbn._recording import Recording

# Of a batch norm in its model.
Path = tuple[Any, ...]


# Options that are arrays are arguments of the compiled program; these are part of it. A
# function is not among them: it may hold the model, or arrays that change.
_PLAIN = (int, float, complex, str, bytes, type, np.dtype, np.generic)


class Measurement:
    """Passes over data, each giving the moments that every batch norm was given.

    Attributes:
        depths: How many layers each path stands for, in call order; after one pass.
    """

    def __init__(
        self,
        model: Any,
        definition: Any,
        kwargs: Mapping[str, Any],
        *,
        sequential: bool,
    ):
        """A batch norm normalizes by its batch or, if `sequential`, as in inference.

        Args:
            model: What the compiled program is kept for, as long as it lives.
            definition: What `call` needs of the model; it must not hold the model.
            kwargs: Further arguments of the model.
            sequential: As for `recalibrate`.
        """
        self.sequential = _checks.check_static_bool("sequential", sequential)
        self.depths: dict[Path, int] = {}
        leaves, tree = jax.tree.flatten(dict(kwargs))
        self._arrays = [
            leaf if isinstance(leaf, jax.Array | np.ndarray) else None
            for leaf in leaves
        ]
        others = tuple(
            (type(leaf), None if array is not None else leaf)  # 1 is not True
            if array is not None or isinstance(leaf, _PLAIN)
            else [leaf]  # not hashable
            for leaf, array in zip(leaves, self._arrays, strict=True)
        )
        self._measure = _program(
            model, self.call, definition, self.sequential, tree, others
        )

    @staticmethod
    def call(
        definition: Any,
        recording: Recording,
        variables: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[Path, Moments]:
        """Calls the model, and returns what was recorded, by path."""
        raise NotImplementedError("Linen and NNX call a model each in its own way")

    def over(
        self, batches: Iterable[Any], variables: Any, progress: bool = False
    ) -> dict[Path, Moments]:
        """The moments of all batches together, by path."""
        _checks.check_iterable("batches", batches, "batches")
        total: dict[Path, Moments] = {}
        for batch in _shown(batches) if progress else batches:
            layers = self._measure(self._arrays, variables, batch)
            self.depths = {layer.path: layer.depth for layer in layers}
            moments = {layer.path: layer.moments for layer in layers}
            if total:
                merged = _merge([*total.values()], [moments[path] for path in total])
                moments = dict(zip(total, merged, strict=True))
            total = moments
            if not total:
                raise ValueError("`model` must call a BatchNorm of jaxbn; got none")
        if not total:
            raise ValueError("`batches` must hold at least one batch; got none")
        return total

    def recalibrated(
        self,
        batches: Iterable[Any],
        variables: Any,
        replace: Callable[[Any, dict[Path, Moments]], Any],
        progress: bool = False,
    ) -> Any:
        """`variables` with the statistics of `batches`, put there by `replace`.

        By layers that normalize by their running statistics, in one pass for each.
        """
        if self.sequential and isinstance(batches, Iterator):
            raise TypeError(
                "`batches` must be re-iterable for `sequential`, which passes over "
                f"them once for each layer; got {type(batches).__name__} (make it a "
                "list)"
            )
        moments = self.over(batches, variables, progress)
        if not self.sequential:
            return replace(variables, moments)
        # A stack of layers (scan) has one path, and is right after one pass for each.
        turns = [path for path, depth in self.depths.items() for _ in range(depth)]
        for turn, path in enumerate(turns):
            if turn > 0:
                moments = self.over(batches, variables, progress)
            variables = replace(variables, {path: moments[path]})
        return variables


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Layer:
    """What one batch norm was given, in all `depth` layers of a stack (scan).

    The path and the depth are known when the model is traced. As static fields they are
    part of the compiled program's result, and come back when nothing is traced.
    """

    path: Path = dataclasses.field(metadata={"static": True})
    depth: int = dataclasses.field(metadata={"static": True})
    moments: Moments


# For each live model the compiled programs, by all that they were compiled for.
_PROGRAMS: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _program(model: Any, *options: Any) -> Callable[..., list[_Layer]]:
    """Return the jitted `_layers` of these options, the same one while `model` lives.

    A new one each time if the model or an option cannot be hashed.
    """
    new = jax.jit(functools.partial(_layers, *options))
    try:
        return _PROGRAMS.setdefault(model, {}).setdefault(options, new)
    except TypeError:
        return new


def _layers(
    call: Callable[..., dict[Path, Moments]],
    definition: Any,
    sequential: bool,
    tree: Any,
    others: tuple[Any, ...],
    arrays: list[Any],
    variables: Any,
    batch: Any,
) -> list[_Layer]:
    """What each batch norm of the model is given by this batch, in call order."""
    recording = Recording(use_running_average=sequential)
    leaves = [
        other[-1] if array is None else array
        for other, array in zip(others, arrays, strict=True)
    ]
    args, kwargs = _arguments(batch)
    kwargs = dict(**kwargs, **tree.unflatten(leaves))  # TypeError if one is in both
    moments = call(definition, recording, variables, args, kwargs)
    return [
        _Layer(path, moments[path].mean.size // max(1, math.prod(shape)), moments[path])
        for path, shape in dict(recording.called).items()
    ]


@jax.jit
def _merge(a: list[Moments], b: list[Moments]) -> list[Moments]:
    return [merge_moments(*pair) for pair in zip(a, b, strict=True)]


def statistics(moments: Moments, mean: Any, var: Any) -> tuple[jax.Array, jax.Array]:
    """The new mean and variance; the old ones where nothing finite was counted."""
    num_elements, *new = moments
    usable = (num_elements > 0) & jnp.isfinite(new[0]) & jnp.isfinite(new[1])
    mean, var = (
        jnp.where(usable, value.astype(old.dtype), old)
        for value, old in zip(new, (mean, var), strict=True)
    )
    return mean, var


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, dict):
        return (), batch
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def _shown(batches: Iterable[Any]) -> Iterable[Any]:
    from rich.progress import track  # in the extra `demo`

    return track(batches, description="recalibrating")
