"""Ghost batches: small parts of a batch, each normalized by its own moments."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _axes, _checks
from jaxbn._axes import Features, is_int
from jaxbn._core.devices import (
    ONE_DEVICE,
    all_over,
    replicate_rows,
    shard_as,
    split_rows,
    varying_beyond,
)
from jaxbn._core.kernel import Config, normalize_batch
from jaxbn._core.moments import Moments, from_rows, to_rows
from jaxbn._core.running import Averaging, State, blend


def check_axes(features: Features) -> None:
    """Refuse features on axis 0, which is split into ghost batches."""
    if 0 in features:
        raise ValueError(
            "`axis` must leave axis 0 of x to the batch, which is split into ghost "
            f"batches; got {features}"
        )


def check_rows(x: jax.Array, features: Features, size: int) -> None:
    """Refuse ghost batches of `size` rows that the batch does not consist of."""
    check_size(size)
    if size < 1 or x.shape[0] % size:
        raise ValueError(
            f"`ghost_batch_size` must divide the {x.shape[0]} rows of x; got {size} "
            "(pad x to a multiple, and give a `mask` that is False for the padding)"
        )
    hint = "take a larger `ghost_batch_size`"
    _checks.check_count((size, *x.shape[1:]), features, 1, "each ghost batch", hint)


def check_size(size: int) -> int:
    """Return `size` as a Python int; in inference it need not divide the batch."""
    if not is_int(size):
        raise TypeError(f"`ghost_batch_size` must be an int; got {size!r}")
    return int(size)


def normalize_ghosts(
    config: Config,
    size: int,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
) -> tuple[jax.Array, Moments]:
    """Return y, and the moments (batches, features) of all devices' ghost batches.

    The ghost batches are one more feature axis, the first.
    """
    rows, number = x.shape[0], x.shape[0] // size
    features = (0, *(i + 1 for i in config.features))
    ghosts = dataclasses.replace(config, features=features, devices=ONE_DEVICE)

    def for_each(param: jax.Array | None) -> jax.Array | None:
        return (
            None if param is None else jnp.broadcast_to(param, (number, *param.shape))
        )

    if mask is not None:
        mask = jnp.broadcast_to(mask, (rows, *mask.shape[1:]))
        mask = split_rows(mask, size)
    x_split = split_rows(x, size)
    y, batches = normalize_batch(ghosts, x_split, for_each(scale), for_each(bias), mask)
    y = shard_as(y.reshape(x.shape), x)

    table = to_rows(batches).swapaxes(0, 1)
    if config.devices.names is None:
        table = replicate_rows(table)
    else:
        table = config.devices.gather(table, config.devices.axis_index())
        table = table.reshape(-1, *table.shape[2:])
    return y, Moments(*from_rows(table.swapaxes(0, 1)))


def update_in_turn(state: State, batches: Moments, averaging: Averaging) -> State:
    """Return the running statistics after `batches`, moments (batches, features).

    One step is s <- keep s + (1 - keep) b, with keep = 1 where the batch is passed
    over. Many steps in turn are one weighted sum: the weight of b is its own 1 - keep
    times the keep of all batches after it.
    """
    enough, var = averaging.variance(batches)
    took = enough & jnp.isfinite(batches.mean) & jnp.isfinite(var)
    shards = varying_beyond(state.num_updates, state.mean)
    others = tuple(range(1, took.ndim))
    if averaging.counts:
        all_took = all_over(shards, jnp.all(took, others, keepdims=True))
        took = jnp.broadcast_to(all_took, took.shape)
    real = _axes.accumulation_dtype(state.var.dtype)
    counted = ~all_over(shards, ~jnp.any(took, others, keepdims=True))
    counted = counted.astype(real)
    earlier = lax.cumsum(counted) - counted
    keep = averaging.keep(state.num_updates.astype(real) + earlier)
    keep = jnp.where(took, keep, 1).astype(real)
    after = jnp.concatenate([keep[1:], jnp.ones_like(keep[:1])])
    weight = (1 - keep) * lax.cumprod(after, reverse=True)

    def total(values: jax.Array) -> jax.Array:
        dtype = _axes.accumulation_dtype(values.dtype)
        return (weight.astype(dtype) * jnp.where(took, values, 0).astype(dtype)).sum(0)

    mean, var = total(batches.mean), total(var)
    keep, took = jnp.prod(keep, axis=0), jnp.any(took, axis=0)
    return blend(state, averaging, keep, 1, mean, var, took, counted.sum())
