"""Inspection: which channels are dead, and which statistics are far from the data."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jaxbn._core.moments import Moments
from jaxbn._models.measure import Adapter, Kwargs, Measurement, Path, PyTree
from jaxbn.convert.arrays import to_numbers

# An index into the layer's `mean`: `(5,)`, or longer in a stack (nn.scan) of layers.
Channel = tuple[int, ...]

# The default of Flax's layers and of ours.
EPSILON = 1e-5

# A channel is dead where its variance is this share of epsilon or less: y then has a
# tenth of its standard deviation, since epsilon normalizes, not the data.
DEAD = 1e-2
# The scale begins at 1; a channel at a thousandth of that hardly reaches what follows.
SCALE_NEAR_ZERO = 1e-3
# The significand has 8 and 11 bits: where |mean| / std is larger, numbers next to each
# other are further apart than the standard deviation, which is lost.
STD_IS_LOST = {"bfloat16": 2.0**8, "float16": 2.0**11}
# In place of an infinite divergence, so that means and JSON stay finite.
LARGEST_KL = 1e30


@dataclasses.dataclass(frozen=True, eq=False)
class LayerStatistics:
    """One batch norm: its statistics, and what they tell.

    Attributes:
        path: Of the module, as in `batch_stats`.
        mean: The running mean, in double precision like all arrays here.
        var: The running variance.
        scale: The learned one, or None.
        data: The moments of what the layer is given; None without data, and where they
            are finite for no channel.
        epsilon: That of the layer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxbn.linen import inspect_statistics
        >>> stats = {"mean": jnp.array([0.0, 3.0]), "var": jnp.array([1.0, 0.0])}
        >>> [layer] = inspect_statistics({"batch_stats": {"norm": stats}})
        >>> print(layer.name, layer.num_features, layer.dead)
        norm 2 [(1,)]
    """

    path: Path
    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray | None
    data: Moments | None
    epsilon: float

    @property
    def name(self) -> str:
        """The path in one word."""
        return "/".join(self.path) or "(the model itself)"

    @property
    def num_features(self) -> int:
        """Channels, those of all layers in a stack."""
        return self.mean.size

    @property
    def dead(self) -> list[Channel]:
        """Channels whose variance, running or that of the data, is near 0."""
        dead = self.var <= DEAD * self.epsilon
        if self.data is not None:
            dead |= self._measured & (self.data.var <= DEAD * self.epsilon)
        return _where(dead)

    @property
    def scale_near_zero(self) -> list[Channel]:
        """Channels that the scale all but switches off."""
        if self.scale is None:
            return []
        return _where(abs(self.scale) < SCALE_NEAR_ZERO)

    @property
    def not_finite(self) -> list[Channel]:
        """Channels whose running statistics are not those of any data."""
        return _where(~(np.isfinite(self.mean) & np.isfinite(self.var)))

    @property
    def mean_over_std(self) -> np.ndarray:
        """|mean| / std by channel: of the data, else of the running statistics."""
        mean, var = self.mean, self.var
        if self.data is not None:
            mean = np.where(self._measured, self.data.mean, mean)
            var = np.where(self._measured, self.data.var, var)
        ratio = abs(mean) / np.sqrt(np.maximum(var, 0) + self.epsilon)
        return np.where(np.isnan(ratio), np.inf, ratio)

    @property
    def worst_mean_over_std(self) -> float:
        """The largest |mean| / std; inf where a statistic is not finite."""
        return float(self.mean_over_std.max(initial=0))

    @property
    def kl(self) -> np.ndarray | None:
        """KL(data || running) of two normals, in nats, by channel; None without data.

        0.5 is a mean that is one standard deviation off. Never above `LARGEST_KL`, and
        0 where no finite moments were measured.
        """
        if self.data is None:
            return None
        with np.errstate(all="ignore"):
            var = self.var + self.epsilon
            ratio = (self.data.var + self.epsilon) / var
            off = abs(self.data.mean - self.mean) ** 2 / var
            kl = (ratio - 1 - np.log(ratio) + off) / 2
        kl = np.where(np.isnan(kl) | (var <= 0), LARGEST_KL, np.clip(kl, 0, LARGEST_KL))
        return np.where(self._measured, kl, 0)

    @property
    def mean_kl(self) -> float | None:
        """The mean over all channels of `kl`."""
        return None if self.kl is None else float(self.kl.mean())

    @property
    def worst_channel(self) -> Channel | None:
        """The one with the largest `kl`."""
        if self.kl is None:
            return None
        return tuple(map(int, np.unravel_index(self.kl.argmax(), self.kl.shape)))

    @property
    def _measured(self) -> np.ndarray:
        assert self.data is not None
        return _usable(self.data)


class Layer(NamedTuple):
    """The arrays of one batch norm, of any kind, and its epsilon."""

    mean: ArrayLike
    var: ArrayLike
    scale: ArrayLike | None
    epsilon: float


def inspected(
    layers: Mapping[Path, Layer],
    adapter: Adapter | None,
    variables: PyTree,
    batches: Iterable[PyTree] | None,
    kwargs: Kwargs,
) -> list[LayerStatistics]:
    """Return the records of `layers`, the largest mean divergence first.

    Layers with the same divergence stay in the order in which the model calls them.
    """
    order, data = list(layers), {}
    if batches is not None and adapter is not None:
        measurement = Measurement(adapter, kwargs, sequential=False)
        data = measurement.measure(variables, batches)
        order.sort(key=lambda path: [*measurement.depths, path].index(path))
    records = [_record(path, layers[path], data.get(path)) for path in order]
    return sorted(records, key=lambda record: -(record.mean_kl or 0))


def _record(path: Path, layer: Layer, data: Moments | None) -> LayerStatistics:
    path = tuple(map(str, path))

    def double(name: str, array: ArrayLike) -> Any:
        word = "/".join((*path, name))
        array = to_numbers("A model's variables", word, array, np.number)
        return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)

    if data is not None:
        data = Moments(*map(double, Moments._fields, data))
    return LayerStatistics(
        path=path,
        mean=double("mean", layer.mean),
        var=double("var", layer.var),
        scale=None if layer.scale is None else double("scale", layer.scale),
        data=data if data is not None and _usable(data).any() else None,
        epsilon=layer.epsilon,
    )


def _usable(data: Moments) -> np.ndarray:
    counted = np.asarray(data.num_elements) > 0
    return counted & np.isfinite(data.mean) & np.isfinite(data.var)


def _where(condition: np.ndarray) -> list[Channel]:
    return [tuple(map(int, index)) for index in np.argwhere(condition)]
