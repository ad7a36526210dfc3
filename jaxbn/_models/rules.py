"""The base of both Flax modules `BatchNorm`: Flax's conventions on dtypes and masks."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _axes, _checks
from jaxbn._axes import Axis, Features
from jaxbn._checks import Derivative, RunningVariance
from jaxbn._core.devices import AxisIndexGroups, AxisName
from jaxbn._core.renorm import Limit
from jaxbn._core.running import Averaging, Momentum


class BatchNormBase:
    """The base of the modules `BatchNorm`, of which every option is an attribute."""

    if TYPE_CHECKING:
        axis: Axis
        momentum: Momentum
        epsilon: float
        dtype: DTypeLike | None
        axis_name: AxisName
        axis_index_groups: AxisIndexGroups
        running_variance: RunningVariance
        debias: bool
        derivative: Derivative
        ghost_batch_size: int | None

    def _averaging(self) -> Averaging:
        debias = _checks.check_static_bool("debias", self.debias)
        return Averaging(self.momentum, self.running_variance, debias)

    def _keeps_count(self) -> bool:
        """Whether the module has the variable `num_updates`."""
        return self._averaging().counts

    def _options(self, dtype: DTypeLike) -> dict[str, Any]:
        """Return the arguments of the functional API's `Options`, for a y of `dtype`.

        Not the `Options`: that would put this file above `_core.batch_norm`.
        """
        return {
            "epsilon": self.epsilon,
            "averaging": self._averaging(),
            "axis_name": self.axis_name,
            "axis_index_groups": self.axis_index_groups,
            "derivative": self.derivative,
            "ghost_batch_size": self.ghost_batch_size,
            "dtype": dtype,
        }


class BatchRenormBase(BatchNormBase):
    """The base of the modules `BatchRenorm`, with their two limits."""

    if TYPE_CHECKING:
        r_max: Limit
        d_max: Limit

    def _keeps_count(self) -> bool:
        return True

    def _options(self, dtype: DTypeLike) -> dict[str, Any]:
        return super()._options(dtype) | {"limits": (self.r_max, self.d_max)}


def warn_of_own_call(norm: object, flax_s: str) -> None:
    """Warn that a batch norm of Flax's is not replaced by ours."""
    name = type(norm).__name__
    message = f"{name} stays as it is: it is a {flax_s} with a __call__ of its own"
    warnings.warn(message, stacklevel=3)


def check_limit_fields(r_max: Limit, d_max: Limit) -> None:
    """Refuse limits of batch renorm that a module cannot keep as an attribute.

    An array cannot be hashed, as nn.jit needs it, and NNX would put it into the state.
    Their values are checked in the call.
    """
    for name, limit in (("r_max", r_max), ("d_max", d_max)):
        if isinstance(limit, jax.Array | np.ndarray):
            raise TypeError(
                f"`{name}` must be a Python number or a schedule in a module; got an "
                "array (write a schedule: lambda num_updates: array)"
            )


def as_input(
    norm: BatchNormBase,
    x: jax.Array,
    mask: ArrayLike | None,
    param_dtypes: Sequence[DTypeLike],
) -> tuple[jax.Array, jax.Array | None, Features, jnp.dtype]:
    """Return x and mask for the functional API, the feature axes, and y's dtype."""
    dtype = result_dtype(norm.dtype, x, param_dtypes)
    x = promote(x, dtype)
    mask = broadcast_mask(mask, x)
    return x, mask, _axes.feature_axes(norm.axis, x.ndim), dtype


def result_dtype(
    dtype: DTypeLike | None, x: jax.Array, param_dtypes: Sequence[DTypeLike]
) -> jnp.dtype:
    """Return y's dtype: the one asked for, else that of x and parameters together."""
    for param_dtype in param_dtypes:
        if param_dtype is not None:  # None is JAX's default
            _checks.check_inexact("param_dtype", param_dtype)
    if dtype is not None:
        return _checks.check_inexact("dtype", dtype)
    with jax.numpy_dtype_promotion("standard"):
        result = jnp.result_type(x, *param_dtypes)
        return result if jnp.issubdtype(result, jnp.inexact) else jnp.dtype(jnp.float32)


def promote(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return x in a dtype whose arithmetic is precise enough for y in `dtype`.

    A bfloat16 x stays as it is for a float32 y: its arithmetic is in float32 already.
    """
    with jax.numpy_dtype_promotion("standard"):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x.astype(jnp.promote_types(dtype, jnp.float32))
        if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
            return x.real  # as a cast to `dtype` would have it
        arithmetic = _axes.accumulation_dtype(x.dtype)
        wanted = jnp.promote_types(arithmetic, dtype)
    return x if wanted == arithmetic else x.astype(wanted)


def broadcast_mask(mask: ArrayLike | None, x: jax.Array) -> jax.Array | None:
    """Return a mask of any dtype and lower rank as booleans of x's rank."""
    if mask is None:
        return None
    mask = _checks.as_array("mask", mask).astype(bool)
    if not _axes.broadcasts(mask.shape, x.shape):
        raise ValueError(
            f"`mask` must broadcast to the shape of x, {x.shape}, as in NumPy; got "
            f"{mask.shape}{_checks.row_mask_hint(mask)}"
        )
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)


def keep_dtypes(arrays: Any, /, *, dtype: object = None, inexact: bool = True) -> Any:
    """Return `arrays`: a `promote_dtype` for NNX, which has nothing to do here."""
    del dtype, inexact
    return arrays
