"""The kernel: y = (x - mean) rstd scale + bias, and its only derivative rule.

With n elements per feature, rstd = (var + epsilon)^(-1/2), x_hat = (x - mean) rstd and
g the cotangent of y, the chain rule through the forward pass of Ioffe & Szegedy 2015,
section 3, has six steps:

    dbias  = sum g                     dscale = sum g x_hat                     (1, 2)
    dx_hat = scale g                                                               (3)
    dvar   = sum dx_hat (x - mean) (-1/2) rstd^3 = -1/2 scale rstd^2 dscale        (4)
    dmean  = -rstd sum dx_hat + dvar (-2/n) sum (x - mean) = -scale rstd dbias     (5)
    dx     = dx_hat rstd + dvar 2 (x - mean) / n + dmean / n                       (6)

In (5) `sum (x - mean)` is 0. With a = scale rstd put into (6) they collapse into

    dx = a g - (a dbias) / n - (a dscale) x_hat / n

g less its projections on 1 and on x_hat, the two directions that a batch norm cannot
see. Over several devices both sums are global; scale stands inside them, as it may
differ from device to device, while dscale and dbias stay local: JAX sums them where a
parameter is replicated (`devices.cast_to_one_varying_set`). For complex x, where var is
real, x_hat in dx is conjugated and its factor is Re(a dscale).

The mean comes in two parts, head + tail (`moments`). Passes over x subtract the head;
what the tail adds is one number per feature, and goes into the bias in y, the sum in
dscale and the constant in dx.

The memory traffic, in sizes of x, beside the part of x whose mean is the shift. GPU and
TPU: forward 3 (both moments; x to y), backward 5 (dbias and dscale; x and dy to dx).
CPU, where no pass takes two sums: forward 4, backward 6. There each pass takes its big
operands through a fusion barrier (`platforms.barrier_on_cpu`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _axes, _checks
from jaxbn._axes import Axis, Features, cast, centered, zero_masked
from jaxbn._core import devices as _devices
from jaxbn._core.devices import ONE_DEVICE, Devices
from jaxbn._core.moments import Moments, SplitMoments, moments
from jaxbn._core.normalize import affine, check_arguments, rstd_of_batch
from jaxbn._core.platforms import barrier_on_cpu, pair_sum


@dataclasses.dataclass(frozen=True)
class Config:
    """What is static in one batch norm.

    Attributes:
        features: The feature axes, ascending.
        epsilon: Added to the variance.
        devices: Those that share the batch.
        dtype: Of y; None for that of x.
        derivative: "vjp" is the analytic rule, "jvp" JAX's own differentiation.
    """

    features: Features
    epsilon: float
    devices: Devices = ONE_DEVICE
    dtype: DTypeLike | None = None
    derivative: str = "vjp"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What `forward` keeps for `backward`: nothing else is as large as x.

    Attributes:
        x: In its own dtype.
        scale: `(features,)` or None.
        mask: Boolean, or None.
        moments: Of the batch; vectors.
        axis_index: The index of this device on named axes, or None.
        bias_dtype: That of the bias, None where there is none.
        config: What is static.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> y, cache = jaxbn.forward(x, jnp.ones(2), jnp.zeros(2))
        >>> cache.x is x
        True
    """

    x: jax.Array
    scale: jax.Array | None
    mask: jax.Array | None
    moments: SplitMoments
    axis_index: jax.Array | None
    bias_dtype: DTypeLike | None = dataclasses.field(metadata={"static": True})
    config: Config = dataclasses.field(metadata={"static": True})


def forward(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    epsilon: float = 1e-5,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
) -> tuple[jax.Array, Cache]:
    r"""Normalize a training batch, and keep what `backward` needs: a pure function.

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

    Source: Ioffe & Szegedy, "Batch Normalization", 2015, algorithm 1.
    """
    x, scale, bias, mask, features, epsilon = check_arguments(
        x, scale, bias, mask, epsilon, axis
    )
    hint = "over an `axis_name` there is `batch_norm`"
    _checks.check_count(x.shape, features, 1, "`forward`", hint)
    return _forward(Config(features, epsilon), x, scale, bias, mask)


def backward(
    dy: ArrayLike, cache: Cache
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    r"""Return the gradients of `forward`: the six steps of the chain rule as one.

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

    Source: Ioffe & Szegedy, "Batch Normalization", 2015, section 3.
    """
    _checks.check_instance("cache", cache, Cache, "what `forward` returned")
    config, x, mask = cache.config, cache.x, cache.mask
    dy = _checks.check_array("dy", dy)
    if dy.shape != x.shape:
        raise ValueError(f"`dy` must have the shape of y, {x.shape}; got {dy.shape}")
    if jnp.iscomplexobj(dy) and not jnp.iscomplexobj(x):
        raise TypeError(f"`dy` must be real for x of dtype {x.dtype}; got {dy.dtype}")
    reduced = _axes.reduced_axes(config.features, x.ndim)
    expand = functools.partial(_axes.expand, features=config.features, ndim=x.ndim)
    dtype = _axes.accumulation_dtype(x.dtype)
    num_elements, head, tail, var = cache.moments
    rstd = rstd_of_batch(var, config.epsilon, dtype)

    if dy.dtype != dtype:  # or XLA:CPU writes out the float32 copy of dy
        (dy,) = barrier_on_cpu(dy)
    g = zero_masked(dy.astype(dtype), mask)
    x, dy, head = barrier_on_cpu(x, dy, head)
    products = zero_masked(dy.astype(dtype), mask)
    products = products * centered(x, head, mask, config.features)
    dbias, dscale = pair_sum(g, products, reduced)
    dscale = (dscale - tail * dbias) * rstd

    a = rstd if cache.scale is None else rstd * cast(cache.scale, dtype)
    sums = jnp.stack([a * dbias, (a * dscale).real.astype(dtype)])
    sums = config.devices.sum(sums, cache.axis_index)
    # Divided last, and by no constant (0 * NaN is NaN): XLA stores a quotient. It would
    # compute a product for each element of x.
    divisor = jnp.maximum(num_elements, 1).astype(dtype) + 0 * rstd
    on_one, on_centered = sums[0], rstd * sums[1]
    level = (on_one - on_centered * tail.conj()) / divisor
    slope = on_centered / divisor

    x, dy, head, slope = barrier_on_cpu(x, dy, head, slope)
    g = zero_masked(dy.astype(dtype), mask)
    conj = centered(x, head, mask, config.features).conj()
    dx = expand(a) * g - expand(level) - expand(slope) * conj
    return (
        # Rounded once: bfloat16 parts that are added up lose 4 % where it matters.
        zero_masked(dx, mask).astype(x.dtype),
        None if cache.scale is None else cast(dscale, cache.scale.dtype),
        None if cache.bias_dtype is None else cast(dbias, cache.bias_dtype),
    )


def normalize_batch(
    config: Config,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    guess: jax.Array | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalize x by its own moments, and return these as constants, for the state."""
    x, scale, bias, mask = _devices.cast_to_one_varying_set(
        config.devices, x, scale, bias, mask
    )
    scale = _devices.shard_as_features(scale, x, config.features)
    bias = _devices.shard_as_features(bias, x, config.features)
    rule = _analytic if config.derivative == "vjp" else _native
    y, batch = rule(config, x, scale, bias, mask, guess)
    return y, lax.stop_gradient(batch)


def _forward(config, x, scale, bias, mask, guess=None):
    batch = moments(x, mask, config.features, config.devices, guess)
    x_apart, head, tail = barrier_on_cpu(x, batch.head, batch.tail)
    y = _affine(
        config, x_apart, batch._replace(head=head, tail=tail), scale, bias, mask
    )
    bias_dtype = None if bias is None else bias.dtype
    index = config.devices.axis_index()
    return y, Cache(x, scale, mask, batch, index, bias_dtype, config)


def _affine(config, x, batch, scale, bias, mask):
    rstd = rstd_of_batch(batch.var, config.epsilon, x.dtype)
    features, tail, dtype = config.features, batch.tail, config.dtype
    return affine(
        x, batch.head, rstd, scale, bias, mask, features, tail=tail, dtype=dtype
    )


# The rule wraps the whole map from x to y, so that the moments are computed inside it:
# given as constants, they would make every second derivative silently wrong.
def _normalize_batch(config, x, scale, bias, mask, guess):
    y, cache = _forward(config, x, scale, bias, mask, guess)
    return y, cache.moments.rounded


def _normalize_batch_fwd(config, x, scale, bias, mask, guess):
    y, cache = _forward(config, x, scale, bias, mask, guess)
    return (y, cache.moments.rounded), cache


def _normalize_batch_bwd(config, cache, cotangents):
    del config  # in the cache
    dy, _ = cotangents  # `normalize_batch` makes the moments constants
    return *backward(dy, cache), None, None


_analytic = jax.custom_vjp(_normalize_batch, nondiff_argnums=(0,))
_analytic.defvjp(_normalize_batch_fwd, _normalize_batch_bwd)


def _native(config, x, scale, bias, mask, _):
    """Return the same by JAX's own differentiation, which has forward mode too."""

    @jax.checkpoint
    def stage_moments(x):
        return moments(x, mask, config.features, config.devices)

    @jax.checkpoint
    def stage_affine(x, batch, scale, bias):
        return _affine(config, x, batch, scale, bias, mask)

    batch = stage_moments(x)
    return stage_affine(x, batch, scale, bias), batch.rounded
