"""y = (x - mean) rstd scale + bias, with the moments given: plain JAX, no rule."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _checks, _devices, _shapes
from jaxbn._centered import centered, zero_masked


@dataclasses.dataclass(frozen=True)
class Config:
    """What is static in one batch norm; `dtype` is that of y, None for that of x."""

    features: tuple[int, ...]
    epsilon: float
    axis_name: _devices.AxisName = None
    groups: _devices.Groups = None
    dtype: Any = None


def normalize(
    x: Any,
    mean: Any,
    var: Any,
    scale: Any = None,
    bias: Any = None,
    *,
    epsilon: float = 1e-5,
    axis: _shapes.Axis = -1,
    mask: Any = None,
) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, with the moments given.

    This is batch norm in inference, and frozen batch norm. Equivalent to
    `jax.nn.standardize` with `mean` and `variance` given, then scale and bias, except
    that the arithmetic is in float32 at least and masked elements give 0.

    Args:
        x: Floating point or complex, of any rank >= 1.
        mean: One entry per feature; complex only where x is.
        var: The biased variance, real, of the same shape.
        scale: Of the same shape, or None.
        bias: Of the same shape, or None.
        epsilon: Added to `var`; in the squared unit of x.
        axis: The feature axis or axes.
        mask: Boolean, of x's rank, broadcasting to x; y is 0 where it is False.

    Returns:
        y, with the shape and dtype of x. Plain JAX: differentiable in every argument,
        mean and var too, in reverse and forward mode.

    Raises:
        ValueError: A shape does not fit x, or `epsilon` is not positive.
        TypeError: A dtype does not fit, or `epsilon` is traced.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> y = jaxbn.normalize(x, jnp.array([2.0, 20.0]), jnp.array([1.0, 100.0]))
        >>> print(y.round(3))
        [[-1. -1.]
         [ 1.  1.]]

    Source: Ioffe & Szegedy, "Batch Normalization", 2015, algorithms 1 and 2.
    """
    x, scale, bias, mask, config = check_arguments(x, scale, bias, mask, epsilon, axis)
    mean = _shapes.check_per_feature("mean", mean, x, config.features)
    var = _shapes.check_per_feature("var", var, x, config.features)
    if mean is None or var is None:
        raise TypeError("`mean` and `var` must be arrays; got None")
    rstd = rstd_of(var, config.epsilon, _shapes.accumulation_dtype(x.dtype))
    return affine(config, x, mean, rstd, scale, bias, mask)


def check_arguments(
    x: Any, scale: Any, bias: Any, mask: Any, epsilon: Any, axis: _shapes.Axis
) -> tuple[jax.Array, Any, Any, Any, Config]:
    """The arguments that every batch norm has, as arrays that fit, and the Config."""
    x = _shapes.check_x(x)
    dtype = _shapes.real_dtype(_shapes.accumulation_dtype(x.dtype))
    epsilon = _checks.check_epsilon(epsilon, dtype)
    config = Config(_shapes.feature_axes(axis, x.ndim), epsilon)
    scale = _shapes.check_per_feature("scale", scale, x, config.features)
    bias = _shapes.check_per_feature("bias", bias, x, config.features)
    return x, scale, bias, _shapes.check_mask(mask, x), config


def affine(
    config: Config,
    x: Any,
    mean: Any,
    rstd: Any,
    scale: Any,
    bias: Any,
    mask: Any,
    tail: Any = None,
) -> jax.Array:
    """(x - mean - tail) rstd scale + bias, of arguments that were checked.

    The tail's share goes into the bias: one operation less for each element.
    """
    dtype = _shapes.accumulation_dtype(x.dtype)
    a = rstd if scale is None else rstd * cast(scale, dtype)
    shift = None if bias is None else cast(bias, dtype)
    if tail is not None:
        shift = -a * tail if shift is None else shift - a * tail
    y = centered(x, mean, mask, config.features)
    y = y * _shapes.expand(a, config.features, x.ndim)
    if shift is not None:
        y = y + _shapes.expand(shift, config.features, x.ndim)
    return zero_masked(y, mask).astype(config.dtype or x.dtype)


def rstd_of(var: jax.Array, epsilon: float, dtype: Any) -> jax.Array:
    return lax.rsqrt(cast(var, _shapes.real_dtype(dtype)) + epsilon).astype(dtype)


def cast(per_feature: jax.Array, dtype: Any) -> jax.Array:
    """To `dtype`, by way of the real part where only that one is complex."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return per_feature.astype(dtype)
    return per_feature.real.astype(dtype)
