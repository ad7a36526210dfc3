"""Batch norm for Flax Linen: the modules, and the tools for models that hold them."""

from jaxbn._models.inspection import LayerStatistics
from jaxbn.linen.batch_norm import BatchNorm, BatchRenorm
from jaxbn.linen.pairs import find_pairs, folded
from jaxbn.linen.replace import replace_batch_norm
from jaxbn.linen.tools import inspect_statistics, recalibrate, weight_decay_mask

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "LayerStatistics",
    "find_pairs",
    "folded",
    "inspect_statistics",
    "recalibrate",
    "replace_batch_norm",
    "weight_decay_mask",
]

# So that pickles name what is public, and outlive a move of the files.
for _class in (BatchNorm, BatchRenorm):
    _class.__module__ = __name__


def __dir__() -> list[str]:
    return __all__
