"""Measuring: passes over data in which each batch norm records what it is given.

What recalibrates and inspects models of Linen and of NNX alike.
"""

import contextlib
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
            kwargs: Further arguments of the model. Arrays are traced, and plain values
                are part of the program.
            sequential: As for `recalibrate`.
        """
        self.sequential = _checks.check_static_bool("sequential", sequential)
        self.depths: dict[Path, int] = {}
        self._traced = {k: v for k, v in kwargs.items() if _holds(v, _ARRAYS)}
        static = {k: v for k, v in kwargs.items() if k not in self._traced}
        self._measure = _program(model, self.call, definition, self.sequential, static)

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
            layers = self._measure(self._traced, variables, batch)
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


# The compiled programs of each model that is alive, by all that they depend on.
_PROGRAMS: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()

_ARRAYS = (jax.Array, np.ndarray)
# Not functions, which may hold the model, or arrays that change.
_PLAIN = (int, float, complex, str, type, np.dtype, np.generic)


def _program(
    model: Any, call: Any, definition: Any, sequential: bool, static: dict[str, Any]
) -> Callable[..., list[_Layer]]:
    """Return the jitted `_layers`, the same one as long as `model` lives.

    Return a new one in each call if the model or an option cannot be hashed, or if an
    option is anything but arrays or plain values.
    """
    new = jax.jit(functools.partial(_layers, call, definition, sequential, static))
    if _holds(static, _PLAIN):
        key = call, definition, sequential, tuple(sorted(static.items()))
        with contextlib.suppress(TypeError):
            return _PROGRAMS.setdefault(model, {}).setdefault(key, new)
    return new


def _holds(tree: Any, types: tuple[type, ...]) -> bool:
    return all(isinstance(leaf, types) for leaf in jax.tree.leaves(tree))


def _layers(
    call: Callable[..., dict[Path, Moments]],
    definition: Any,
    sequential: bool,
    static: dict[str, Any],
    traced: dict[str, Any],
    variables: Any,
    batch: Any,
) -> list[_Layer]:
    """What each batch norm of the model is given by this batch, in call order."""
    recording = Recording(use_running_average=sequential)
    args, kwargs = _arguments(batch)
    kwargs = dict(**kwargs, **static, **traced)  # TypeError if one is in two
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
