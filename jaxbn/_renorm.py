"""Batch renormalization: batch norm that trains on what inference will use."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _affine, _normalize, _shapes
from jaxbn._affine import Config
from jaxbn._batch_norm import Params, apply_batch_norm
from jaxbn._moments import Moments, moments
from jaxbn._renorm_limits import (
    Limit,
    check_limit,
    limit_now,
    ramp_d_max,
    ramp_r_max,
)
from jaxbn._running import State


def batch_renorm(
    x: Any,
    params: Params,
    state: State,
    *,
    train: bool,
    r_max: Limit = ramp_r_max,
    d_max: Limit = ramp_d_max,
    momentum: Any = 0.9,
    epsilon: float = 1e-5,
    axis: _shapes.Axis = -1,
    mask: Any = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    running_variance: _shapes.RunningVariance = "biased",
    debias: bool = False,
    derivative: _shapes.Derivative = "vjp",
) -> tuple[jax.Array, State]:
    r"""Batch renormalization: y = (x_hat r + d) scale + bias in training.

    $$y = \gamma \left(r \, \frac{x - \mu}{\sigma} + d\right) + \beta \qquad
    r = \frac{\sigma}{\sigma_\text{run}} \qquad
    d = \frac{\mu - \mu_\text{run}}{\sigma_\text{run}}$$

    r, the ratio of the batch's std and the running one, clipped to [1 / r_max, r_max],
    and d, the way between their means, clipped to [-d_max, d_max], are constants to the
    gradient. Where nothing is clipped, training computes what inference computes, so
    that small batches and batches of a few classes train as large mixed ones. Equals
    `batch_norm` for r_max=1, d_max=0, and always in inference.

    Args:
        x: As for `batch_norm`.
        params: As for `batch_norm`.
        state: As for `batch_norm`.
        train: True normalizes by the batch, corrected towards `state`.
        r_max: At least 1: a number, an array, or a schedule (any function, such as
            optax's, of `state.num_updates`). The paper's ramp unless said.
        d_max: At least 0; likewise.
        momentum: As for `batch_norm`.
        epsilon: As for `batch_norm`; std is sqrt(var + epsilon) here too.
        axis: As for `batch_norm`.
        mask: As for `batch_norm`.
        axis_name: As for `batch_norm`.
        axis_index_groups: As for `batch_norm`.
        running_variance: As for `batch_norm`.
        debias: As for `batch_norm`.
        derivative: As for `batch_norm`.

    Returns:
        y, with x's shape and dtype, and the new state, updated as by `batch_norm`.

    Raises:
        ValueError: `r_max` is a number below 1, `d_max` one below 0, one of them does
            not broadcast to the features, or as for `batch_norm`.
        TypeError: `r_max` or `d_max` is not made of real numbers, or as for
            `batch_norm`.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.init(1)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, _ = jaxbn.batch_renorm(x, params, state, train=True, r_max=3, d_max=5)
        >>> print(y.round(2).T)  # as with the running mean 0 and variance 1
        [[1. 3.]]

    Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models", 2017, algorithm 1.
    """
    return apply_batch_norm(
        x,
        params,
        state,
        train=train,
        momentum=momentum,
        epsilon=epsilon,
        axis=axis,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        running_variance=running_variance,
        debias=debias,
        derivative=derivative,
        **as_renorm(r_max, d_max),
    )


def as_renorm(r_max: Limit, d_max: Limit) -> dict[str, Any]:
    """The arguments that make `apply_batch_norm` renormalize."""
    limits = {
        "r_max": check_limit("r_max", r_max, 1),
        "d_max": check_limit("d_max", d_max, 0),
    }
    return {"normalize": functools.partial(renormalize, **limits)}


def renormalize(
    config: Config,
    derivative: str,
    x: jax.Array,
    scale: Any,
    bias: Any,
    mask: Any,
    state: State,
    *,
    r_max: Limit,
    d_max: Limit,
) -> tuple[jax.Array, Moments]:
    """A `Normalize`: the kernel with scale r and bias + scale d."""
    batch = moments(x, mask, config.features, config.axis_name, config.groups)
    batch, state = lax.stop_gradient((batch.rounded, state))
    dtype = _shapes.accumulation_dtype(x.dtype)
    rstd = _affine.rstd_of(state.var, config.epsilon, dtype)
    r = rstd / _affine.rstd_of(batch.var, config.epsilon, dtype)
    d = (batch.mean - _affine.cast(state.mean, dtype)) * rstd

    largest = limit_now("r_max", r_max, state.num_updates, r.real)
    furthest = limit_now("d_max", d_max, state.num_updates, r.real)
    r = jnp.clip(r.real, 1 / largest, largest).astype(dtype)
    # By its length, as d is complex where x is; the same as a clip where d is real.
    length = jnp.maximum(abs(d), jnp.finfo(r.real.dtype).tiny)
    d = d * jnp.where(length > furthest, furthest / length, 1).astype(dtype)
    scale = jnp.ones_like(r) if scale is None else _affine.cast(scale, dtype)
    shift = scale * d
    bias = shift if bias is None else _affine.cast(bias, dtype) + shift
    return _normalize.normalize_batch(config, derivative, x, scale * r, bias, mask)
