"""Ghost batch norm: each small part of a batch is normalized by its own moments."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _checks, _devices, _shapes
from jaxbn._affine import Config
from jaxbn._batch_norm import Params, apply_batch_norm
from jaxbn._moments import Moments, from_rows, to_rows
from jaxbn._normalize import normalize_batch
from jaxbn._running import State, blend, share_to_keep, variance_to_keep


def ghost_batch_norm(
    x: Any,
    params: Params,
    state: State,
    *,
    train: bool,
    ghost_batch_size: int,
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
    """Batch norm of ghost batches: `ghost_batch_size` rows share statistics, not all.

    Large batches then keep the noise that small batches have, which generalizes better
    (Hoffer, Hubara & Soudry 2017); "virtual batch size" elsewhere. Equivalent to
    `batch_norm` of the ghost batches one after the other, with the running statistics
    handed on, and to `batch_norm` where one ghost batch holds all rows.

    Under plain jit over a sharded batch nothing is communicated for y and dx, if the
    ghost batches lie within the shards.

    Args:
        x: As for `batch_norm`; axis 0 is the batch, and no feature axis.
        params: As for `batch_norm`.
        state: As for `batch_norm`.
        train: True normalizes by the ghost batches, False by `state`.
        ghost_batch_size: Rows, along axis 0, of one ghost batch; divides the batch. (A
            batch that it does not divide can be padded, with a mask for the padding.)
        momentum: As for `batch_norm`, for each ghost batch.
        epsilon: As for `batch_norm`.
        axis: As for `batch_norm`.
        mask: As for `batch_norm`.
        axis_name: Named axes whose devices merge their running statistics: as if their
            ghost batches had come in turn, device after device. The ghost batches stay
            on their devices.
        axis_index_groups: As for `batch_norm`, of the running statistics.
        running_variance: As for `batch_norm`.
        debias: As for `batch_norm`.
        derivative: As for `batch_norm`.

    Returns:
        y, with x's shape and dtype, and the new state; its count rises by the number
        of ghost batches that counted anything.

    Raises:
        ValueError: `ghost_batch_size` does not divide the batch, axis 0 is a feature
            axis, or as for `batch_norm`.
        TypeError: `ghost_batch_size` is not an int, or as for `batch_norm`.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.init(1)
        >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
        >>> y, state = jaxbn.ghost_batch_norm(
        ...     x, params, state, train=True, ghost_batch_size=2
        ... )
        >>> print(y.round(3).T, state.num_updates)
        [[-1.  1. -1.  1.]] 2

    Source: Hoffer, Hubara & Soudry, "Train longer, generalize better", 2017,
    algorithm 1.
    """
    x = _shapes.check_x(x)
    train = _checks.check_static_bool("train", train)
    size = _check_size(ghost_batch_size)
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
        **(as_ghosts(x, axis, size) if train else {}),
    )


def as_ghosts(x: jax.Array, axis: _shapes.Axis, size: Any) -> dict[str, Any]:
    """The arguments that make `apply_batch_norm` split the rows of x."""
    size = _check_size(size)
    if 0 in _shapes.feature_axes(axis, x.ndim):
        raise ValueError(
            "`axis` must leave axis 0 of x to the batch, which is split into ghost "
            f"batches; got {axis!r}"
        )
    if size < 1 or x.shape[0] % size:
        raise ValueError(
            f"`ghost_batch_size` must divide the {x.shape[0]} rows of x; got {size} "
            "(pad x to a multiple, and give a `mask` that is False for the padding)"
        )
    normalize = functools.partial(normalize_ghosts, size=size)
    return {
        "normalize": normalize,
        "update": update_in_turn,
        "ghost_batch_size": size,
    }


def _check_size(size: Any) -> int:
    """`size` as a Python int; whether it divides the batch, inference need not know."""
    if not _checks.is_int(size):
        raise TypeError(f"`ghost_batch_size` must be an int; got {size!r}")
    return int(size)


def normalize_ghosts(
    config: Config,
    derivative: str,
    x: jax.Array,
    scale: Any,
    bias: Any,
    mask: Any,
    state: State,
    *,
    size: int,
) -> tuple[jax.Array, Moments]:
    """A `Normalize`: y, and the moments of all ghost batches, on all devices."""
    del state
    rows = x.shape[0]
    # The ghost batches are one more feature axis, the first.
    alone = Config((0, *(i + 1 for i in config.features)), config.epsilon)
    alone = dataclasses.replace(alone, dtype=config.dtype)

    def split(array: jax.Array) -> jax.Array:
        return _devices.split_rows(array, rows // size)

    def for_each(param: Any) -> Any:
        if param is None:
            return None
        return jnp.broadcast_to(param, (rows // size, *param.shape))

    if mask is not None:
        mask = split(jnp.broadcast_to(mask, (rows, *mask.shape[1:])))
    y, batches = normalize_batch(
        alone, derivative, split(x), for_each(scale), for_each(bias), mask
    )
    y = _devices.lay_out_as(y.reshape(x.shape), x)
    table = to_rows(batches).swapaxes(0, 1)
    if config.axis_name is None:
        table = _devices.replicate_rows(table)
    else:
        index = _devices.position(config.axis_name)
        table = _devices.gather(table, config.axis_name, config.groups, index)
        table = table.reshape(-1, *table.shape[2:])
    return y, Moments(*from_rows(table.swapaxes(0, 1)))


def update_in_turn(
    state: State,
    batches: Moments,
    *,
    momentum: Any,
    running_variance: str,
    debias: bool,
) -> State:
    """The running statistics after `batches`, moments (batches, features), in turn.

    One step is s <- keep s + (1 - keep) b, with keep = 1 where the batch is passed
    over. Many steps in turn are one weighted sum: the weight of b is its own 1 - keep
    times the keep of all batches after it.
    """
    enough, var = variance_to_keep(batches, running_variance)
    took = enough & jnp.isfinite(batches.mean) & jnp.isfinite(var)
    one_count = momentum is None or debias
    shards = _devices.varying_beyond(state.num_updates, state.mean)
    others = tuple(range(1, took.ndim))
    if one_count:
        all_took = _devices.all_over(shards, jnp.all(took, others, keepdims=True))
        took = jnp.broadcast_to(all_took, took.shape)
    real = _shapes.accumulation_dtype(state.var.dtype)
    counted = jnp.any(took, others, keepdims=True)
    counted = (~_devices.all_over(shards, ~counted)).astype(real)
    earlier = lax.cumsum(counted) - counted
    keep = share_to_keep(state.num_updates.astype(real) + earlier, momentum, debias)
    keep = jnp.where(took, keep, 1).astype(real)
    after = lax.cumprod(
        jnp.concatenate([keep[1:], jnp.ones_like(keep[:1])]), reverse=True
    )
    weight = (1 - keep) * after

    def total(values: jax.Array) -> jax.Array:
        dtype = _shapes.accumulation_dtype(values.dtype)
        return (weight.astype(dtype) * jnp.where(took, values, 0).astype(dtype)).sum(0)

    return blend(
        state,
        jnp.prod(keep, axis=0),
        1,
        total(batches.mean),
        total(var),
        jnp.any(took, axis=0),
        one_count=one_count,
        num_batches=counted.sum(),
    )
