"""Weight decay: which parameters of an NNX model to spare."""

from typing import Any

from flax import nnx

from jaxbn._flax_rules import PlainRules
from jaxbn._model_nnx import check_module
from jaxbn._weight_decay import SPARED


def weight_decay_mask(
    model: nnx.Module, *, wrt: Any = nnx.Param
) -> nnx.State[Any, Any]:
    """Which parameters of an NNX model to decay: all but those of batch norms.

    As `jaxbn.linen.weight_decay_mask`: the batch norms are found by their class, which
    is jaxbn's or `flax.nnx.BatchNorm`; names do not matter. A Linen module in
    `nnx.bridge.ToNNX` is not looked into, and is decayed as a whole.

    Args:
        model: An NNX module, abstract (`nnx.eval_shape`) or not.
        wrt: What is optimized, as for `nnx.Optimizer`.

    Returns:
        A state like `nnx.state(model, wrt)`: False at the scale and bias of each batch
        norm, True elsewhere. As `mask` of `optax.adamw` and `optax.masked`.

    Raises:
        TypeError: `model` is not an NNX module.

    Examples:
        >>> import optax
        >>> from flax import nnx
        >>> from jaxbn.nnx import BatchNorm, weight_decay_mask
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), BatchNorm(3, rngs=rngs))
        >>> mask = weight_decay_mask(model)
        >>> print(mask["layers"][0]["kernel"], mask["layers"][1]["scale"])
        True False
        >>> adamw = optax.adamw(1e-3, weight_decay=1e-4, mask=mask)
        >>> optimizer = nnx.Optimizer(model, adamw, wrt=nnx.Param)
    """
    check_module(model)
    spared = {
        (*path, name)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm | PlainRules)
        for name in SPARED
    }
    params = nnx.to_flat_state(nnx.state(model, wrt))
    return nnx.from_flat_state([(path, path not in spared) for path, _ in params])
