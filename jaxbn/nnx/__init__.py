"""Batch norm for Flax NNX: the modules, and the tools for models that hold them."""

from jaxbn._models.inspection import LayerStatistics
from jaxbn.nnx.batch_norm import BatchNorm, BatchRenorm
from jaxbn.nnx.pairs import find_pairs, fold, load_torch
from jaxbn.nnx.replace import replace_batch_norm
from jaxbn.nnx.tools import inspect_statistics, recalibrate, weight_decay_mask

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "LayerStatistics",
    "find_pairs",
    "fold",
    "inspect_statistics",
    "load_torch",
    "recalibrate",
    "replace_batch_norm",
    "weight_decay_mask",
]

# So that pickles name what is public, and outlive a move of the files.
for _class in (BatchNorm, BatchRenorm):
    _class.__module__ = __name__


def __dir__() -> list[str]:
    return __all__
