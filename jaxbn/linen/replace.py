"""Into Linen models that others wrote: Flax's batch norms compute as ours."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Never

from flax import linen as nn

from jaxbn import _checks
from jaxbn._models.rules import BatchNormBase
from jaxbn.linen.batch_norm import CHANGES, BatchNorm, compute_as_ours


@contextlib.contextmanager
def replace_batch_norm(*model: Never, **changes: object) -> Iterator[None]:
    """Let every `flax.linen.BatchNorm` compute as `BatchNorm`: a context around a call.

    For a model whose code is not yours: variables, their names and so checkpoints stay
    as they are. It acts while the model is traced, under nn.jit, nn.scan, nn.vmap and
    nn.remat too: enter it around `model.init` and `model.apply`, inside the function
    that is jitted. What was traced outside it is not used inside it, nor the reverse.

    `recalibrate`, `inspect_statistics` and `weight_decay_mask` need no such context.

    Limits:
        * A subclass of Flax's with a `__call__` of its own is left alone, and a warning
          names it.
        * `momentum=None` and `debias` need `num_updates`, which `model.init` makes in
          this context. Old variables lack it: take it from there.

    Args:
        *model: Nothing. An NNX model is for `jaxbn.nnx.replace_batch_norm`.
        **changes: Fields of `BatchNorm` that get another value, which is hashable, such
            as `axis_name` or `ghost_batch_size`. A context inside another adds to them.

    Raises:
        TypeError: A model is given, a name is no field of `BatchNorm`, or a value
            cannot be hashed.
        ValueError: `num_updates` is missing.

    Warns:
        UserWarning: Linen modules were called, but no batch norm.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxbn.linen import replace_batch_norm
        >>> x = jnp.array([[10000.0], [10001.0], [10002.0]])
        >>> model = nn.BatchNorm(use_running_average=False)
        >>> variables = model.init(jax.random.key(0), x)
        >>> @jax.jit
        ... def apply(variables, x):
        ...     with replace_batch_norm(momentum=0.9):
        ...         return model.apply(variables, x, mutable=["batch_stats"])
        >>> y, updates = apply(variables, x)
        >>> print(y.round(2).ravel(), updates["batch_stats"]["mean"].round())
        [-1.22  0.    1.22] [1000.]
    """
    if model:
        raise TypeError(
            "`replace_batch_norm` must get no model: it is a context around calls of a "
            f"Linen model; got {_checks.kind(model[0])} (for NNX there is jaxbn.nnx)"
        )
    fields = BatchNorm.__dataclass_fields__.keys() - {"parent", "name"}
    _checks.check_changes(changes, fields, "fields of jaxbn.linen.BatchNorm")
    token = dict(CHANGES.value or ()) | {k: _frozen(v) for k, v in changes.items()}
    for name, value in token.items():
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"`{name}` must be hashable, as a part of jit's key; got "
                f"{_checks.kind(value)}"
            ) from None
    called = found = False

    def look(method, args, kwargs, context: nn.module.InterceptorContext):
        nonlocal called, found
        module = context.module
        if not found:  # `variables` is a copy, made anew
            variables = {} if module.scope is None else module.variables
            called |= bool(variables)
            # A norm may be hidden in what nn.jit has traced before.
            found = "batch_stats" in variables
            found |= isinstance(module, nn.BatchNorm | BatchNormBase)
        return compute_as_ours(method, args, kwargs, context)

    with CHANGES(tuple(sorted(token.items()))), nn.intercept_methods(look):
        yield
    if called and not found:  # not an error: a jitted function may hide them
        warnings.warn(
            "`replace_batch_norm` must be around calls of a flax.linen.BatchNorm; got "
            "a model without (if a jitted function hides them, enter it in there)",
            stacklevel=3,
        )


def _frozen(value: object) -> object:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
