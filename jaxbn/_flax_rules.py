"""Flax's rules on dtypes and masks, and what else both of its modules share."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import _checks, _devices, _shapes
from jaxbn._batch_norm import Params, apply_batch_norm
from jaxbn._ghost import as_ghosts
from jaxbn._renorm import as_renorm
from jaxbn._running import State


class PlainRules:
    """A base of the modules `BatchNorm`, of which every argument is an attribute."""

    def _keeps_count(self: Any) -> bool:
        """Whether there is a `num_updates`."""
        debias = _checks.check_static_bool("debias", self.debias)
        return self.momentum is None or debias

    def _variant(self: Any, x: jax.Array, features: tuple[int, ...]) -> dict[str, Any]:
        """What `apply_batch_norm` is to do otherwise in training."""
        if self.ghost_batch_size is None:
            return {}
        return as_ghosts(x, features, self.ghost_batch_size)


class RenormRules(PlainRules):
    """A base of the modules `BatchRenorm`."""

    def _keeps_count(self: Any) -> bool:
        return True

    def _variant(self: Any, x: jax.Array, features: tuple[int, ...]) -> dict[str, Any]:
        if self.ghost_batch_size is not None:
            raise ValueError(
                "`ghost_batch_size` must be None for BatchRenorm, whose statistics are "
                f"those of the whole batch; got {self.ghost_batch_size}"
            )
        return as_renorm(self.r_max, self.d_max)


def apply(
    norm: Any,
    x: jax.Array,
    params: Params,
    state: State,
    *,
    features: tuple[int, ...],
    mask: jax.Array | None,
    dtype: Any,
    use_running_average: bool,
    updating: bool,
) -> tuple[jax.Array, State]:
    """`apply_batch_norm` as the module `norm` would have it.

    In training without `updating`, a batch may be small, and no axis need be bound.
    """
    return apply_batch_norm(
        x,
        params,
        state,
        train=not use_running_average,
        momentum=norm.momentum,
        epsilon=norm.epsilon,
        axis=features,
        mask=mask,
        axis_name=norm.axis_name,
        axis_index_groups=norm.axis_index_groups,
        running_variance=norm.running_variance,
        debias=norm.debias,
        derivative=norm.derivative,
        dtype=dtype,
        initializing=not updating,
        **(norm._variant(x, features) if updating else {}),
    )


def prepare(
    norm: Any, x: jax.Array, mask: Any, param_dtypes: list[Any]
) -> tuple[jax.Array, jax.Array | None, tuple[int, ...], Any]:
    """X and mask as `apply` needs them, the feature axes, and the dtype of y."""
    dtype = result_dtype(norm.dtype, x, param_dtypes)
    x = promote(x, dtype)
    mask = broadcast_mask(mask, x)
    return x, mask, _shapes.feature_axes(norm.axis, x.ndim), dtype


def warns_of_one_element(norm: Any, x: jax.Array, features: tuple[int, ...]) -> bool:
    """Whether each feature has one element, in all, to train on: then with a warning.

    For NNX, which cannot tell initializing from training.
    """
    names, groups = _devices.check_axis_name(norm.axis_name, norm.axis_index_groups)
    together = names if norm.ghost_batch_size is None else None
    devices = _devices.group_size(together, groups)
    try:
        _shapes.check_count(x.shape, features, devices, "training")
    except ValueError as error:
        message = f"{error}; y is the bias, and the running statistics stay"
        warnings.warn(message, stacklevel=3)
        return True
    return False


def keep_dtypes(arrays: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """A `promote_dtype` of NNX that has nothing to do: `apply` is precise as it is."""
    del dtype, inexact
    return arrays


def result_dtype(dtype: Any, x: jax.Array, param_dtypes: list[Any]) -> Any:
    """The dtype of y: the one asked for, else that of x and the parameters together."""
    for param_dtype in param_dtypes:
        if param_dtype is not None:  # JAX's default
            _checks.check_inexact("param_dtype", param_dtype)
    if dtype is not None:
        return _checks.check_inexact("dtype", dtype)
    with jax.numpy_dtype_promotion("standard"):
        result = jnp.result_type(x, *param_dtypes)
        return result if jnp.issubdtype(result, jnp.inexact) else jnp.dtype(jnp.float32)


def promote(x: jax.Array, dtype: Any) -> jax.Array:
    """X in a dtype whose arithmetic is precise enough for y in `dtype`.

    A bfloat16 x stays as it is for a float32 y: its arithmetic is in float32 already.
    """
    with jax.numpy_dtype_promotion("standard"):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x.astype(jnp.promote_types(dtype, jnp.float32))
        if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
            return x.real  # as a cast to `dtype` would have it
        arithmetic = _shapes.accumulation_dtype(x.dtype)
        wanted = jnp.promote_types(arithmetic, dtype)
    return x if wanted == arithmetic else x.astype(wanted)


def broadcast_mask(mask: Any, x: jax.Array) -> jax.Array | None:
    """`mask` of any dtype, broadcasting to x as in NumPy, as a boolean of x's rank."""
    if mask is None:
        return None
    mask = _shapes.as_array("mask", mask).astype(bool)
    if not _shapes.broadcasts(mask.shape, x.shape):
        raise ValueError(
            f"`mask` must broadcast to the shape of x, {x.shape}, as in NumPy; got "
            f"{mask.shape}{_shapes.row_mask_hint(mask)}"
        )
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
