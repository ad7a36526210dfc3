"""Passes over data in which each batch norm of a model records what it is given."""

import contextlib
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _checks
from jaxbn._axes import Features
from jaxbn._core.devices import ONE_DEVICE
from jaxbn._core.moments import Moments, merge_moments, moments

# Of a batch norm in its model.
Path = tuple[Any, ...]
# Of arrays: the variables of a model, or a batch.
PyTree = Any
# Further arguments of a model.
Kwargs = Mapping[str, PyTree]


@dataclasses.dataclass(eq=False)
class Recording:
    """One pass: the modules normalize as told, update nothing, and record their input.

    Attributes:
        use_running_average: Whether they normalize by their running statistics.
        called: The path and the features' shape of each module, in call order.
    """

    use_running_average: bool
    called: list[tuple[Path, tuple[int, ...]]] = dataclasses.field(default_factory=list)

    def note(
        self,
        path: Path,
        x: jax.Array,
        features: Features,
        mask: jax.Array | None,
        batch: Moments | None,
    ) -> Moments:
        """Return the moments of a module's input, with a count for each feature.

        `batch` is what the module normalized x by, None for its running statistics.
        """
        if batch is None:
            batch = moments(x, mask, features, ONE_DEVICE).rounded
        else:  # of one element, y is the bias, and spoils what follows
            hint = "put it together with another one; if x is all there is, write [x]"
            _checks.check_count(x.shape, features, 1, "each of `batches`", hint)
        self.called.append((path, batch.mean.shape))
        count = jnp.broadcast_to(batch.num_elements, batch.mean.shape)
        return batch._replace(num_elements=count)


def empty_moments(mean: jax.Array) -> Moments:
    """Return the moments of no data, of the shape and dtype of `mean`."""
    zeros = jnp.zeros_like(mean)
    return Moments(zeros.real, zeros, zeros.real)


class Adapter(Protocol):
    """A Linen or an NNX model, as recalibration and inspection see it.

    Attributes:
        model: What a compiled pass is kept for, as long as it lives.
        definition: What `call` needs of the model; hashable, and without the model.
    """

    model: Any
    definition: Any

    @staticmethod
    def call(
        definition: Any,
        recording: Recording,
        variables: PyTree,
        args: tuple[PyTree, ...],
        kwargs: Kwargs,
    ) -> dict[Path, Moments]:
        """Call the model, and return what was recorded, by path."""
        ...

    def replace(self, variables: PyTree, new: dict[Path, Moments]) -> PyTree:
        """Return `variables` with the running statistics of the layers in `new`."""
        ...


class Measurement:
    """Passes over data, each giving the moments that every batch norm was given.

    Attributes:
        depths: How many layers each path stands for, in call order; after one pass.
    """

    def __init__(self, adapter: Adapter, kwargs: Kwargs, *, sequential: bool):
        """Choose the compiled pass.

        Args:
            adapter: The model.
            kwargs: Further arguments of the model. Arrays are traced, and plain values
                are part of the program.
            sequential: True normalizes by the running statistics, False by the batch.
        """
        self.sequential = _checks.check_static_bool("sequential", sequential)
        self.depths: dict[Path, int] = {}
        self._traced = {k: v for k, v in kwargs.items() if _holds_only(v, _ARRAYS)}
        static = {k: v for k, v in kwargs.items() if k not in self._traced}
        self._pass = _compiled_pass(adapter, self.sequential, static)

    def measure(
        self, variables: PyTree, batches: Iterable[PyTree], progress: bool = False
    ) -> dict[Path, Moments]:
        """Return the moments of all batches together, by path."""
        _checks.check_iterable("batches", batches, "batches")
        total: dict[Path, Moments] = {}
        for batch in _with_progress_bar(batches) if progress else batches:
            layers = self._pass(self._traced, variables, batch)
            if not layers:
                raise ValueError("`model` must call a BatchNorm; got none")
            self.depths = {layer.path: layer.depth for layer in layers}
            new = {layer.path: layer.moments for layer in layers}
            if total:
                merged = _merge([*total.values()], [new[path] for path in total])
                new = dict(zip(total, merged, strict=True))
            total = new
        if not total:
            raise ValueError("`batches` must hold at least one batch; got none")
        return total


def recalibrated(
    adapter: Adapter,
    variables: PyTree,
    batches: Iterable[PyTree],
    kwargs: Kwargs,
    *,
    sequential: bool,
    progress: bool,
) -> PyTree:
    """Return `variables` with the statistics of `batches`.

    `sequential` takes one pass for each layer, in call order, in which layers normalize
    by their running statistics: those before it have their new ones already.
    """
    measurement = Measurement(adapter, kwargs, sequential=sequential)
    if sequential and isinstance(batches, Iterator):
        raise TypeError(
            "`batches` must be re-iterable for `sequential`, which passes over them "
            f"once for each layer; got {type(batches).__name__} (make it a list)"
        )
    new = measurement.measure(variables, batches, progress)
    if not sequential:
        return adapter.replace(variables, new)
    # A stack of layers (scan) has one path, and is right after one pass for each.
    turns = [path for path, depth in measurement.depths.items() for _ in range(depth)]
    for turn, path in enumerate(turns):
        if turn > 0:
            new = measurement.measure(variables, batches, progress)
        variables = adapter.replace(variables, {path: new[path]})
    return variables


def statistics(
    new: Moments, mean: jax.Array, var: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the new mean and variance; the old ones where none finite was counted."""
    usable = (new.num_elements > 0) & jnp.isfinite(new.mean) & jnp.isfinite(new.var)
    return (
        jnp.where(usable, new.mean.astype(mean.dtype), mean),
        jnp.where(usable, new.var.astype(var.dtype), var),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Layer:
    """What one batch norm was given, in all `depth` layers of a stack (scan).

    The path and the depth are known when the model is traced. As static fields they are
    part of the compiled pass's result, and come back when nothing is traced.
    """

    path: Path = dataclasses.field(metadata={"static": True})
    depth: int = dataclasses.field(metadata={"static": True})
    moments: Moments


# The compiled passes of each model that is alive, by all that they depend on.
_PASSES: weakref.WeakKeyDictionary[object, dict[Hashable, Any]] = (
    weakref.WeakKeyDictionary()
)

_ARRAYS = (jax.Array, np.ndarray)
# Not functions, which may hold the model, or arrays that change.
_PLAIN = (int, float, complex, str, type, np.dtype, np.generic)


def _compiled_pass(
    adapter: Adapter, sequential: bool, static: Kwargs
) -> Callable[..., list[_Layer]]:
    """Return the jitted `_record`, the same one in each call while the model lives.

    Models that are equal share it. Return a new one in each call if the model or an
    option cannot be hashed, or if an option is anything but arrays or plain values.
    """
    call, definition = type(adapter).call, adapter.definition
    new = jax.jit(functools.partial(_record, call, definition, sequential, static))
    if _holds_only(static, _PLAIN):
        leaves, structure = jax.tree.flatten(static)
        # By their words, since 1 == True == 1.0, and a type by itself.
        words = [v if isinstance(v, type) else (type(v), repr(v)) for v in leaves]
        key = call, definition, sequential, structure, tuple(words)
        with contextlib.suppress(TypeError):
            return _PASSES.setdefault(adapter.model, {}).setdefault(key, new)
    return new


def _holds_only(tree: PyTree, types: tuple[type, ...]) -> bool:
    return all(isinstance(leaf, types) for leaf in jax.tree.leaves(tree))


def _record(
    call: Callable[..., dict[Path, Moments]],
    definition: Hashable,
    sequential: bool,
    static: Kwargs,
    traced: Kwargs,
    variables: PyTree,
    batch: PyTree,
) -> list[_Layer]:
    """Return what each batch norm is given by this batch, in call order."""
    recording = Recording(use_running_average=sequential)
    args, kwargs = batch if isinstance(batch, tuple) else (batch,), {}
    if isinstance(batch, dict):
        args, kwargs = (), batch
    kwargs = dict(**kwargs, **static, **traced)  # TypeError if one is in two
    recorded = call(definition, recording, variables, args, kwargs)
    shapes = dict(recording.called)
    hidden = [path for path in recorded if path not in shapes]
    if hidden and sequential:
        raise ValueError(
            "`model` must not call several modules by one trace of nn.jit, which hides "
            f"the order of {hidden} that `sequential` needs; leave nn.jit out"
        )
    shapes |= {path: recorded[path].mean.shape for path in hidden}
    return [
        _Layer(
            path, recorded[path].mean.size // max(1, math.prod(shape)), recorded[path]
        )
        for path, shape in shapes.items()
    ]


@jax.jit
def _merge(a: list[Moments], b: list[Moments]) -> list[Moments]:
    return [merge_moments(*pair) for pair in zip(a, b, strict=True)]


def _with_progress_bar(batches: Iterable[PyTree]) -> Iterable[PyTree]:
    from rich.progress import track  # in the extra `demo`

    return track(batches, description="recalibrating")
