"""Batch normalization for JAX.

The functions here know no framework. `jaxbn.linen` and `jaxbn.nnx`, imported by name,
hold the Flax modules, `jaxbn.convert` what reads other people's weights.
"""

from jaxbn import convert
from jaxbn._core.batch_norm import init
from jaxbn._core.functional import batch_norm, batch_renorm, ghost_batch_norm
from jaxbn._core.kernel import Cache, backward, forward
from jaxbn._core.moments import Moments, batch_moments, merge_moments
from jaxbn._core.normalize import Params, normalize
from jaxbn._core.renorm import ramp_d_max, ramp_r_max, step_limits
from jaxbn._core.running import State, update_state
from jaxbn._fold import fold, fold_before
from jaxbn._fold_tree import fold_tree

__version__ = "0.1.0"

# So that pickles name what is public, and outlive a move of the files.
for _class in (Cache, Moments, Params, State):
    _class.__module__ = __name__

__all__ = [
    "Cache",
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
    "step_limits",
    "update_state",
]
