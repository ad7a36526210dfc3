"""Other people's weights: batch norms of PyTorch, Keras, Haiku and Equinox, and back.

No framework is imported: state dicts are read as mappings, layers by their attributes,
tensors as arrays. What comes out is a copy, so that training there moves nothing here.
"""

from jaxbn._convert_equinox import from_equinox as from_equinox
from jaxbn._convert_equinox import to_equinox as to_equinox
from jaxbn._convert_haiku import from_haiku as from_haiku
from jaxbn._convert_haiku import to_haiku as to_haiku
from jaxbn._convert_keras import from_keras as from_keras
from jaxbn._convert_keras import to_keras as to_keras
from jaxbn._convert_model import load_torch as load_torch
from jaxbn._convert_torch import from_torch as from_torch
from jaxbn._convert_torch import to_torch as to_torch
