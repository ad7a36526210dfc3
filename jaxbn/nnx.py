"""Batch norm for Flax NNX: the modules, and what looks after them in a model."""

from jaxbn._batch_norm_nnx import BatchNorm
from jaxbn._inspect_nnx import inspect_statistics
from jaxbn._layer_statistics import LayerStatistics
from jaxbn._recalibrate_nnx import recalibrate
from jaxbn._renorm_nnx import BatchRenorm
from jaxbn._weight_decay_nnx import weight_decay_mask

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "LayerStatistics",
    "inspect_statistics",
    "recalibrate",
    "weight_decay_mask",
]
