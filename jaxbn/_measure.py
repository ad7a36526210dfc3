"""Measuring: passes over data in which each batch norm records what it is given.

What recalibrates and inspects models of Linen and of NNX alike.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

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

    def __init__(self, *, sequential: bool):
        """A batch norm normalizes by its batch or, if `sequential`, as in inference."""
        self.sequential = _checks.check_static_bool("sequential", sequential)
        self.depths: dict[Path, int] = {}

        def measure(variables: Any, batch: Any) -> dict[Path, Moments]:
            recording = Recording(use_running_average=self.sequential)
            moments = self.call(recording, variables, *_arguments(batch))
            for path, shape in recording.called:
                self.depths[path] = moments[path].mean.size // max(1, math.prod(shape))
            return moments

        self._measure = jax.jit(measure)
        self._merge = jax.jit(lambda a, b: {k: merge_moments(a[k], b[k]) for k in a})

    def call(
        self,
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
            moments = self._measure(variables, batch)
            total = self._merge(total, moments) if total else moments
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
