"""Batch norm for Flax Linen: the modules, and the tools for models that hold them."""

from jaxbn._models.inspection import LayerStatistics
from jaxbn.linen.batch_norm import BatchNorm, BatchRenorm
from jaxbn.linen.tools import inspect_statistics, recalibrate, weight_decay_mask

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "LayerStatistics",
    "inspect_statistics",
    "recalibrate",
    "weight_decay_mask",
]


def __dir__() -> list[str]:
    return __all__
