"""Weight decay: which parameters to spare, being those of batch norms."""

from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbn._flax_rules import PlainRules
from jaxbn._model_linen import check_module, unseen

# Those parameters of a batch norm that are spared.
SPARED = ("scale", "bias")


def weight_decay_mask(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Which parameters of a Linen model to decay: all but those of batch norms.

    Decay there would pull at the outputs, while the kernel before a batch norm may be
    of any size without a change in them. The batch norms are found by running the
    model on shapes, and by their class, which is jaxbn's or `flax.linen.BatchNorm`;
    names do not matter.

    Args:
        model: A Linen module.
        *args: As for `model.init`, without the key; a `jax.ShapeDtypeStruct` does in
            place of an array. Nothing is computed.
        **kwargs: Likewise.

    Returns:
        A tree like the model's `params`: False at the scale and bias of each batch
        norm, True elsewhere. As `mask` of `optax.adamw` and `optax.masked`.

    Raises:
        TypeError: `model` is not a Linen module.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
        >>> from jaxbn.linen import BatchNorm, weight_decay_mask
        >>> model = nn.Sequential([nn.Dense(3), BatchNorm(use_running_average=False)])
        >>> mask = weight_decay_mask(model, jax.ShapeDtypeStruct((8, 2), jnp.float32))
        >>> print(mask["layers_0"]["kernel"], mask["layers_1"]["scale"])
        True False
        >>> optimizer = optax.adamw(1e-3, weight_decay=1e-4, mask=mask)
    """
    check_module(model)
    spared: set[tuple[str, ...]] = set()

    def note(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if issubclass(type(context.module), nn.BatchNorm | PlainRules):
            spared.update((*context.module.path, name) for name in SPARED)
        return method(*args, **kwargs)

    def init() -> Any:
        key, mutable = jax.random.key(0), unseen("intermediates")
        return model.lazy_init(key, *args, mutable=mutable, **kwargs)

    with nn.intercept_methods(note):
        variables = jax.eval_shape(init)
    params = flatten_dict(variables.get("params", {}))
    return unflatten_dict({path: path not in spared for path in params})
