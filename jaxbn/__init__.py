"""Batch normalization for JAX.

The functions here know no framework. `jaxbn.linen` and `jaxbn.nnx`, imported by name,
hold the Flax modules, `jaxbn.convert` what reads other people's weights.
"""

from jaxbn import convert
from jaxbn._affine import normalize
from jaxbn._batch_norm import Params, batch_norm, init
from jaxbn._fold import fold
from jaxbn._fold_before import fold_before
from jaxbn._fold_tree import fold_tree
from jaxbn._ghost import ghost_batch_norm
from jaxbn._moments import Moments, batch_moments, merge_moments
from jaxbn._normalize import backward, forward
from jaxbn._renorm import batch_renorm
from jaxbn._renorm_limits import ramp_d_max, ramp_r_max
from jaxbn._running import State, update_state

__all__ = [
    "Moments",
    "Params",
    "State",
    "backward",
    "batch_moments",
    "batch_norm",
    "batch_renorm",
    "convert",
    "fold",
    "fold_before",
    "fold_tree",
    "forward",
    "ghost_batch_norm",
    "init",
    "merge_moments",
    "normalize",
    "ramp_d_max",
    "ramp_r_max",
    "update_state",
]
