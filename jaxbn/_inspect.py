"""Inspection: which batch norm of a model is unwell, and in which way."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from jaxbn import _checks
from jaxbn._measure import Path
from jaxbn._moments import Moments
from jaxbn._recalibrate import Measurement

# An index into the layer's `mean`: `(5,)`, or longer in a stack (nn.scan) of layers.
Channel = tuple[int, ...]

# That of Flax's layers and ours, unless said.
EPSILON = 1e-5

# A variance of this share of epsilon leaves y a tenth of its standard deviation: it is
# epsilon that normalizes, not the data.
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
            no batches, or one of `model` and `batches` is missing.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxbn._inspect import inspect_statistics
        >>> from jaxbn.linen import BatchNorm
        >>> x = jnp.array([[-1.0, 2.0], [1.0, 4.0]])  # means 0 and 3, variance 1
        >>> norm = BatchNorm(use_running_average=True)
        >>> variables = norm.init(jax.random.key(0), x)  # running mean 0, variance 1
        >>> [layer] = inspect_statistics(variables, norm, [x])
        >>> print(layer.kl.round(3), layer.worst_channel)
        [0.  4.5] (1,)
    """
    if (model is None) != (batches is None):
        given, missing = (
            ("model", "batches") if batches is None else ("batches", "model")
        )
        raise ValueError(f"`{missing}` must be given with `{given}`; got None")
    epsilon = _checks.check_epsilon(epsilon)
    _checks.check_mapping("variables", variables)
    variables = nn.meta.unbox(dict(variables))
    stats, params = (
        _flat(variables.get(name, {})) for name in ("batch_stats", "params")
    )
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
        scale = params.get((*path, "scale"))
        data = moments.get(path)
        if data is not None:
            data = Moments(*map(_double, data))
        return LayerStatistics(
            path=path,
            mean=_double(stats[*path, "mean"]),
            var=_double(stats[*path, "var"]),
            scale=None if scale is None else _double(scale),
            data=data if data is not None and _usable(data).any() else None,
            epsilon=epsilon,
        )

    layers = [record(path) for path in paths]
    # Of layers with the same divergence, the one that is called first.
    return sorted(layers, key=lambda layer: -(layer.mean_kl or 0))


def _flat(tree: Any) -> dict[Any, Any]:
    return dict(flatten_dict(tree))


def _double(array: Any) -> Any:
    array = np.asarray(jax.device_get(array))
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _usable(data: Moments) -> np.ndarray:
    counted = np.asarray(data.num_elements) > 0
    return counted & np.isfinite(data.mean) & np.isfinite(data.var)


def _where(condition: np.ndarray) -> list[Channel]:
    return [tuple(map(int, index)) for index in np.argwhere(condition)]
