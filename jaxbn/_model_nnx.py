"""What all that runs an NNX model needs: that it is one, and its batch norms."""

from typing import Any

from flax import nnx

from jaxbn._checks import check_instance
from jaxbn._flax_rules import PlainRules
from jaxbn._measure import Path


def check_module(model: Any) -> None:
    """Refuses what is no NNX module."""
    check_instance(
        "model",
        model,
        nnx.Module,
        "a flax.nnx.Module",
        "for Linen there is jaxbn.linen",
    )


def batch_norms(model: nnx.Module) -> dict[Path, Any]:
    """Those of jaxbn, each by its first path."""
    modules = nnx.iter_modules(model)
    return {path: module for path, module in modules if isinstance(module, PlainRules)}
