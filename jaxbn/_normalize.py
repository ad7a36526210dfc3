"""The kernel: y = (x - mean) rstd scale + bias, and its only derivative rule.

With n elements per feature, rstd = (var + epsilon)^(-1/2), x_hat = (x - mean) rstd and
g the cotangent of y, the document's six backward steps (batch-norm-formulas) are

    dbias  = sum g                     dscale = sum g x_hat                     (1, 2)
    dx_hat = scale g                                                               (3)
    dvar   = sum dx_hat (x - mean) (-1/2) rstd^3 = -1/2 scale rstd^2 dscale        (4)
    dmean  = -rstd sum dx_hat + dvar (-2/n) sum (x - mean) = -scale rstd dbias     (5)
    dx     = dx_hat rstd + dvar 2 (x - mean) / n + dmean / n                       (6)

In (5) `sum (x - mean)` is 0. With a = scale rstd put into (6) they collapse into

    dx = a g - (a dbias) / n - (a dscale) x_hat / n

g less its projections on 1 and on x_hat, the two directions that a batch norm cannot
see. Over several devices both sums are global; scale stands inside them, as it may
differ from device to device, while dscale and dbias stay local (`vary_together` makes
JAX sum them where a parameter is replicated). For complex x, where var is real, x_hat
in dx is conjugated and its factor is Re(a dscale).

The mean comes in two parts, head + tail (`_moments`). Passes over x subtract the head;
what the tail adds is one number per feature, and goes into the bias in y, the sum in
dscale and the constant in dx.

The memory traffic, in sizes of x, beside the part of x whose mean is the shift. GPU and
TPU: forward 3 (both moments; x to y), backward 5 (dbias and dscale; x and dy to dx).
CPU, where no pass takes two sums: forward 4, backward 6. There, each pass takes its big
operands through `apart_on_cpu`; `_barriers` says why.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _checks, _devices, _shapes
from jaxbn._affine import Config, affine, cast, check_arguments, rstd_of
from jaxbn._barriers import apart_on_cpu
from jaxbn._centered import centered, zero_masked
from jaxbn._moments import Moments, SplitMoments, moments
from jaxbn._pair_sum import pair_sum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What `backward` needs: x in its own dtype, the mask, and per-feature vectors."""

    x: jax.Array
    scale: jax.Array | None
    mask: jax.Array | None
    moments: SplitMoments
    index: jax.Array | None
    bias_dtype: Any = dataclasses.field(metadata={"static": True})
    config: Config = dataclasses.field(metadata={"static": True})


def forward(
    x: Any,
    scale: Any,
    bias: Any,
    *,
    epsilon: float = 1e-5,
    axis: _shapes.Axis = -1,
    mask: Any = None,
) -> tuple[jax.Array, Cache]:
    r"""The document's `batchnorm_forward` in training mode, pure.

    With the n elements that one feature has in the batch, γ the scale and β the bias:

    $$\mu = \frac{1}{n} \sum x \qquad \sigma^2 = \frac{1}{n} \sum (x - \mu)^2 \qquad
    \hat{x} = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \qquad
    y = \gamma \hat{x} + \beta$$

    Args:
        x: Floating point or complex, of any rank >= 1.
        scale: One entry per feature, or None.
        bias: One entry per feature, or None.
        epsilon: Added to the variance; in the squared unit of x.
        axis: The feature axis or axes.
        mask: Boolean, of x's rank, broadcasting to x; True where an element counts.

    Returns:
        y, with the shape and dtype of x, and the cache that `backward` takes, a
        pytree: both functions can be jitted. The running statistics are not here but
        in `batch_norm`, which is this pair as one differentiable function.

    Raises:
        ValueError: A shape does not fit x, `epsilon` is not positive, or there is one
            element per feature.
        TypeError: A dtype does not fit, or `epsilon` is traced.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
        >>> y, cache = jaxbn.forward(x, jnp.array([1.0, 2.0]), jnp.zeros(2))
        >>> print(y.round(3))
        [[-1. -2.]
         [ 1.  2.]]

    Source: batch-norm-formulas, "forward pass"; Ioffe & Szegedy 2015, algorithm 1.
    """
    x, scale, bias, mask, config = check_arguments(x, scale, bias, mask, epsilon, axis)
    hint = "over an `axis_name` there is `batch_norm`"
    _shapes.check_count(x.shape, config.features, 1, "`forward`", hint)
    return _forward(config, x, scale, bias, mask)


def backward(
    dy: Any, cache: Cache
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    r"""The document's `batchnorm_backward`, its six steps in one (see the module).

    In the notation of `forward`, with sums over the batch:

    $$d\beta = \sum dy \qquad d\gamma = \sum dy \, \hat{x} \qquad
    dx = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \left(
    dy - \frac{d\beta}{n} - \hat{x} \, \frac{d\gamma}{n} \right)$$

    Args:
        dy: The cotangent of y, of its shape.
        cache: What `forward` returned beside y.

    Returns:
        dx, dscale and dbias, each with the dtype of what it is the gradient of; None
        for a scale or bias that was None. dx is 0 under the mask.

    Raises:
        ValueError: `dy` does not have the shape of y.
        TypeError: `dy` is complex where x is not, or one of the two is something else.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> x = jnp.array([[1.0], [2.0], [6.0]])
        >>> y, cache = jaxbn.forward(x, jnp.ones(1), jnp.zeros(1))
        >>> dx, dscale, dbias = jaxbn.backward(jnp.array([[0.0], [1.0], [0.0]]), cache)
        >>> print(dx.round(2).T, f"{dscale[0]:.2f}", dbias)
        [[-0.22  0.28 -0.06]] -0.46 [1.]

    Source: batch-norm-formulas, "backward pass"; Ioffe & Szegedy 2015, section 3.
    """
    _checks.check_instance("cache", cache, Cache, "what `forward` returned")
    config, x, mask = cache.config, cache.x, cache.mask
    dy = _shapes.check_array("dy", dy)
    if dy.shape != x.shape:
        raise ValueError(f"`dy` must have the shape of y, {x.shape}; got {dy.shape}")
    if jnp.iscomplexobj(dy) and not jnp.iscomplexobj(x):
        raise TypeError(f"`dy` must be real for x of dtype {x.dtype}; got {dy.dtype}")
    reduced = _shapes.reduction_axes(config.features, x.ndim)
    expand = functools.partial(_shapes.expand, features=config.features, ndim=x.ndim)
    dtype = _shapes.accumulation_dtype(x.dtype)
    num_elements, head, tail, var = cache.moments
    rstd = _rstd(config, var, dtype)

    if dy.dtype != dtype:  # or XLA:CPU writes out the float32 copy of dy
        (dy,) = apart_on_cpu(dy)
    g = zero_masked(dy.astype(dtype), mask)
    x, dy, head = apart_on_cpu(x, dy, head)
    products = zero_masked(dy.astype(dtype), mask)
    products = products * centered(x, head, mask, config.features)
    dbias, dscale = pair_sum(g, products, reduced)
    dscale = (dscale - tail * dbias) * rstd

    a = rstd if cache.scale is None else rstd * cast(cache.scale, dtype)
    sums = jnp.stack([a * dbias, (a * dscale).real.astype(dtype)])
    sums = _devices.group_sum(sums, config.axis_name, config.groups, cache.index)
    divisor = jnp.maximum(num_elements, 1).astype(dtype)
    on_one, on_x_hat = (total / divisor for total in sums)

    x, dy, head, on_x_hat = apart_on_cpu(x, dy, head, on_x_hat)
    g = zero_masked(dy.astype(dtype), mask)
    slope = rstd * on_x_hat
    level = on_one - slope * tail.conj()
    conj = centered(x, head, mask, config.features).conj()
    dx = expand(a) * g - expand(level) - expand(slope) * conj
    return (
        # Rounded once: bfloat16 parts that are added up lose 4 % where it matters.
        zero_masked(dx, mask).astype(x.dtype),
        None if cache.scale is None else cast(dscale, cache.scale.dtype),
        None if cache.bias_dtype is None else cast(dbias, cache.bias_dtype),
    )


def normalize_batch(
    config: Config, derivative: str, x: Any, scale: Any, bias: Any, mask: Any
) -> tuple[jax.Array, Moments]:
    """Normalizes x by its own moments; these come back as constants, for the state."""
    x, scale, bias, mask = _devices.vary_together(
        config.axis_name, x, scale, bias, mask
    )
    scale, bias = (
        _devices.lay_out_as_features(param, x, config.features)
        for param in (scale, bias)
    )
    rule = _analytic if derivative == "vjp" else _native
    y, batch = rule(config, x, scale, bias, mask)
    return y, lax.stop_gradient(batch)


def _forward(
    config: Config, x: Any, scale: Any, bias: Any, mask: Any
) -> tuple[jax.Array, Cache]:
    batch = moments(x, mask, config.features, config.axis_name, config.groups)
    rstd = _rstd(config, batch.var, batch.head.dtype)
    x_apart, head, tail = apart_on_cpu(x, batch.head, batch.tail)
    y = affine(config, x_apart, head, rstd, scale, bias, mask, tail)
    bias_dtype = None if bias is None else bias.dtype
    index = _devices.position(config.axis_name)
    return y, Cache(x, scale, mask, batch, index, bias_dtype, config)


def _rstd(config: Config, var: jax.Array, dtype: Any) -> jax.Array:
    """1 / std of a batch, NaN where the variance overflows: 0 would give y = bias."""
    # In this order, since XLA:CPU computes all that follows an rsqrt for each element.
    return rstd_of(jnp.where(jnp.isinf(var), jnp.nan, var), config.epsilon, dtype)


# The rule wraps the whole map from x, so that the moments are computed inside it:
# handed in as constants they would make every second derivative silently wrong.
def _normalize_batch(config, x, scale, bias, mask):
    y, cache = _forward(config, x, scale, bias, mask)
    return y, cache.moments.rounded


def _normalize_batch_fwd(config, x, scale, bias, mask):
    y, cache = _forward(config, x, scale, bias, mask)
    return (y, cache.moments.rounded), cache


def _normalize_batch_bwd(config, cache, cotangents):
    del config  # in the cache
    dy, _ = cotangents  # the moments leave as constants: `normalize_batch`
    return *backward(dy, cache), None


_analytic = jax.custom_vjp(_normalize_batch, nondiff_argnums=(0,))
_analytic.defvjp(_normalize_batch_fwd, _normalize_batch_bwd)


def _native(config, x, scale, bias, mask):
    """The same numbers by JAX's own differentiation, which has forward mode too."""

    @jax.checkpoint
    def stage_moments(x):
        return moments(x, mask, config.features, config.axis_name, config.groups)

    @jax.checkpoint
    def stage_affine(x, batch, scale, bias):
        rstd = _rstd(config, batch.var, batch.head.dtype)
        return affine(config, x, batch.head, rstd, scale, bias, mask, batch.tail)

    batch = stage_moments(x)
    return stage_affine(x, batch, scale, bias), batch.rounded
