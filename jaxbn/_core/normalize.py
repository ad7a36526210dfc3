"""y = (x - mean) rstd scale + bias, with the moments given: plain JAX, no rule."""

from typing import NamedTuple

import jax
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _axes, _checks
from jaxbn._axes import Axis, Features, cast, centered, zero_masked


class Params(NamedTuple):
    """Learned parameters.

    Attributes:
        scale: `(features,)` or None.
        bias: `(features,)` or None.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> params = jaxbn.Params(scale=jnp.ones(3), bias=None)
        >>> x = jnp.arange(6.0).reshape(2, 3)
        >>> y, _ = jaxbn.batch_norm(x, params, jaxbn.init(3)[1], train=False)
        >>> print(y.round(1))
        [[0. 1. 2.]
         [3. 4. 5.]]
    """

    scale: jax.Array | None
    bias: jax.Array | None


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Return (x - mean) / sqrt(var + epsilon) * scale + bias, with the moments given.

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
    x, scale, bias, mask, features, epsilon = check_arguments(
        x, scale, bias, mask, epsilon, axis
    )
    mean, var = _checks.check_statistics("", mean, var, x, features)
    rstd = rstd_of(var, epsilon, x.dtype)
    return affine(x, mean, rstd, scale, bias, mask, features)


def check_arguments(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    epsilon: float,
    axis: Axis,
) -> tuple[
    jax.Array, jax.Array | None, jax.Array | None, jax.Array | None, Features, float
]:
    """Return x, scale, bias and mask as arrays that fit; feature axes; epsilon."""
    x = _checks.check_x(x)
    features = _axes.feature_axes(axis, x.ndim)
    statistics = _axes.statistics_dtype(x.dtype)
    epsilon = _checks.check_epsilon(epsilon, statistics)
    scale = _checks.check_per_feature("scale", scale, x, features)
    bias = _checks.check_per_feature("bias", bias, x, features)
    return x, scale, bias, _checks.check_mask(mask, x), features, epsilon


def affine(
    x: jax.Array,
    mean: jax.Array,
    rstd: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    features: Features,
    *,
    tail: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Return (x - mean - tail) rstd scale + bias, of arguments that were checked.

    The tail's share goes into the bias: one operation less for each element. `dtype` is
    that of y, x's if None.
    """
    arithmetic = _axes.accumulation_dtype(x.dtype)
    a = rstd if scale is None else rstd * cast(scale, arithmetic)
    shift = None if bias is None else cast(bias, arithmetic)
    if tail is not None:
        shift = -a * tail if shift is None else shift - a * tail
    y = centered(x, mean, mask, features) * _axes.expand(a, features, x.ndim)
    if shift is not None:
        y = y + _axes.expand(shift, features, x.ndim)
    return zero_masked(y, mask).astype(dtype or x.dtype)


def rstd_of(var: jax.Array, epsilon: float, dtype: DTypeLike) -> jax.Array:
    """Return 1 / sqrt(var + epsilon), in the accumulation dtype of `dtype`."""
    dtype = _axes.accumulation_dtype(dtype)
    return lax.rsqrt(cast(var, _axes.real_dtype(dtype)) + epsilon).astype(dtype)


def rstd_of_batch(var: jax.Array, epsilon: float, dtype: DTypeLike) -> jax.Array:
    """Return `rstd_of`, but NaN where the variance overflowed: 0 would give y = bias.

    The NaN is that of 0 inf. It is put into `var`, since XLA:CPU computes what follows
    an rsqrt for each element.
    """
    return rstd_of(var + 0 * var, epsilon, dtype)
