"""Conversion of batch norms from and to PyTorch, Keras, Haiku and Equinox.

No framework is imported: state dicts are read as mappings, layers by their attributes,
tensors as arrays. Results are copies, so that further training there changes none.
"""

from jaxbn.convert.equinox import from_equinox, to_equinox
from jaxbn.convert.haiku import from_haiku, to_haiku
from jaxbn.convert.keras import from_keras, to_keras
from jaxbn.convert.torch import from_torch, load_torch, to_torch

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
