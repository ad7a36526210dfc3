"""Batch normalization for JAX.

The functions here know no framework; `jaxbn.linen` holds the Flax module.
"""

from jaxbn import convert as convert
from jaxbn._affine import normalize as normalize
from jaxbn._batch_norm import Params as Params
from jaxbn._batch_norm import batch_norm as batch_norm
from jaxbn._batch_norm import init as init
from jaxbn._fold import fold as fold
from jaxbn._fold_before import fold_before as fold_before
from jaxbn._fold_tree import fold_tree as fold_tree
from jaxbn._ghost import ghost_batch_norm as ghost_batch_norm
from jaxbn._moments import Moments as Moments
from jaxbn._moments import batch_moments as batch_moments
from jaxbn._moments import merge_moments as merge_moments
from jaxbn._normalize import backward as backward
from jaxbn._normalize import forward as forward
from jaxbn._renorm import batch_renorm as batch_renorm
from jaxbn._renorm import ramp_d_max as ramp_d_max
from jaxbn._renorm import ramp_r_max as ramp_r_max
from jaxbn._running import State as State
from jaxbn._running import update_state as update_state
