"""What all that runs a Linen model needs: that it is one, and that it does run."""

import itertools
from typing import Any

from flax import linen as nn
from flax.core.scope import DenyList

from jaxbn._checks import check_instance

_CALLS = itertools.count()


def check_module(model: Any) -> None:
    """Refuses what is no Linen module."""
    hint = "for NNX there is jaxbn.nnx"
    check_instance("model", model, nn.Module, "a flax.linen.Module", hint)


def unseen(*collections: str) -> DenyList:
    """A `mutable` that is all but these collections, and different in each call.

    nn.jit runs a module but once for each `mutable`; after that nothing that the module
    does beside its outputs, such as to note its path, is done.
    """
    return DenyList((*collections, f"jaxbn_{next(_CALLS)}"))
