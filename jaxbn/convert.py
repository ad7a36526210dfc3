"""Other people's weights: batch norms of PyTorch, Keras, Haiku and Equinox, and back.

No framework is imported: state dicts are read as mappings, layers by their attributes,
tensors as arrays. What comes out is a copy, so that training there moves nothing here.
"""

from jaxbn._convert_equinox import from_equinox, to_equinox
from jaxbn._convert_haiku import from_haiku, to_haiku
from jaxbn._convert_keras import from_keras, to_keras
from jaxbn._convert_model import load_torch
from jaxbn._convert_torch import from_torch, to_torch

__all__ = [
    "from_equinox",
    "from_haiku",
    "from_keras",
    "from_torch",
    "load_torch",
    "to_equinox",
    "to_haiku",
    "to_keras",
    "to_torch",
]
