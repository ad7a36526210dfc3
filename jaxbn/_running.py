"""Running statistics: the state of a batch norm and its one update rule."""

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxbn import _checks, _devices, _shapes
from jaxbn._moments import Moments, check_moments


class State(NamedTuple):
    """Running statistics. No update changes a dtype, a shape or the structure.

    Attributes:
        mean: `(features,)`; complex for complex x.
        var: `(features,)`, real; biased unless `running_variance="unbiased"`.
        num_updates: How many updates took effect, an int32 scalar.
    """

    mean: jax.Array
    var: jax.Array
    num_updates: jax.Array


def update_state(
    state: State,
    moments: Moments,
    *,
    momentum: Any = 0.9,
    running_variance: _shapes.RunningVariance = "biased",
    debias: bool = False,
) -> State:
    """One update of the running statistics by given moments, as `batch_norm` does it.

    For gradient accumulation: normalize each microbatch, merge the moments of all with
    `merge_moments`, and update once. The state is then that of the whole batch.

    Args:
        state: Running statistics.
        moments: Of the batch, from `batch_moments` or `merge_moments`.
        momentum: As for `batch_norm`.
        running_variance: As for `batch_norm`.
        debias: As for `batch_norm`.

    Returns:
        The new state; as it was where nothing was counted or something is not finite.

    Raises:
        ValueError: The shapes of `state` and `moments` differ, `momentum` is outside
            [0, 1], or `running_variance` no known word.
        TypeError: `state` or `moments` is something else, or `debias` no Python bool.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> x = jnp.array([[1.0], [3.0], [8.0]])
        >>> moments = jaxbn.merge_moments(
        ...     jaxbn.batch_moments(x[:2]), jaxbn.batch_moments(x[2:])
        ... )
        >>> jaxbn.update_state(jaxbn.init(1)[1], moments, momentum=0.5).mean
        Array([2.], dtype=float32)
    """
    moments = check_moments("moments", moments)
    features = tuple(range(moments.mean.ndim))
    return update(
        check_state(state, moments.mean, features, "`moments.mean`"),
        moments,
        momentum=_checks.check_momentum(momentum),
        running_variance=check_running_variance(running_variance),
        debias=_checks.check_static_bool("debias", debias),
    )


def check_running_variance(word: Any) -> str:
    """`word`, one of the two that there are."""
    words = get_args(_shapes.RunningVariance)
    return _checks.check_choice("running_variance", word, words)


def update(
    state: State,
    batch: Moments,
    *,
    momentum: Any,
    running_variance: str = "biased",
    debias: bool = False,
) -> State:
    """The running statistics after one batch: s <- keep s + (1 - keep) b.

    A feature keeps its statistics where the batch counted nothing for it (fewer than 2
    elements, if "unbiased"), or where what comes of it is not finite.
    """
    enough, var = variance_to_keep(batch, running_variance)
    real = _shapes.accumulation_dtype(state.var.dtype)
    keep = share_to_keep(state.num_updates.astype(real), momentum, debias)
    return blend(
        state,
        keep,
        1 - keep,
        batch.mean,
        var,
        enough,
        one_count=momentum is None or debias,
    )


def variance_to_keep(
    batch: Moments, running_variance: str
) -> tuple[jax.Array, jax.Array]:
    """Whether enough was counted for a variance, and that variance."""
    n = batch.num_elements
    if running_variance == "biased":
        return n > 0, batch.var
    return n > 1, batch.var * (n / jnp.maximum(n - 1, 1))


def share_to_keep(num_updates: jax.Array, momentum: Any, debias: bool) -> Any:
    """The weight of the old value, after that many updates."""
    if isinstance(momentum, jax.Array):
        # Traced: in a lesser dtype, the two weights would not add up to 1.
        momentum = momentum.astype(num_updates.dtype)
    if momentum is not None and not debias:
        return momentum
    average = num_updates / (num_updates + 1)  # of all so far
    if momentum is None:
        return average
    return jnp.minimum(jnp.asarray(momentum, average.dtype), average)


def blend(
    state: State,
    keep: Any,
    take: Any,
    mean: jax.Array,
    var: jax.Array,
    took: jax.Array,
    *,
    one_count: bool,
    num_batches: Any = 1,
) -> State:
    """Return keep * state + take * (mean, var) where `took`, and where that is finite.

    With `one_count` all features are updated or none is, as the count has to be right
    for all of them. In a shard_map with `check_vma` whose features are sharded, the
    count is one for all shards: a batch counts if any of them took it.
    """
    keep, mean, var, took = (
        _devices.lay_out_as(a, state.mean) if jnp.ndim(a) else a
        for a in (keep, mean, var, took)
    )

    def blended(old: jax.Array, new: jax.Array) -> jax.Array:
        dtype = _shapes.accumulation_dtype(old.dtype)
        kept = jnp.asarray(keep, dtype) * old.astype(dtype)
        taken = jnp.asarray(take, dtype) * new.astype(dtype)
        return (kept + taken).astype(old.dtype)

    new_mean, new_var = blended(state.mean, mean), blended(state.var, var)
    took = took & jnp.isfinite(new_mean) & jnp.isfinite(new_var)
    # Axes of a shard_map over which the features are sharded, and the count is not.
    shards = _devices.varying_beyond(state.num_updates, state.mean)
    if one_count:
        took = _devices.all_over(shards, jnp.all(took))
    any_took = ~_devices.all_over(shards, ~jnp.any(took))
    added = jnp.where(any_took, num_batches, 0).astype(state.num_updates.dtype)
    return State(
        jnp.where(took, new_mean, state.mean),
        jnp.where(took, new_var, state.var),
        state.num_updates + added,
    )


def check_state(
    state: Any, x: jax.Array, features: tuple[int, ...], x_name: str = "x"
) -> State:
    """`state` with arrays that fit x, so that its dtypes can be kept."""
    _checks.check_instance("state", state, State, "a jaxbn.State")
    mean, var = (
        _shapes.check_per_feature(f"state.{name}", value, x, features, x_name)
        for name, value in (("mean", state.mean), ("var", state.var))
    )
    if mean is None or var is None:
        raise TypeError("`state.mean` and `state.var` must be arrays; got None")
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(mean):
        raise TypeError(
            f"`state.mean` must be complex for {x_name} of dtype {x.dtype}; got "
            f"{mean.dtype} (jaxbn.init(..., param_dtype=jnp.complex64) makes it so)"
        )
    num_updates = _shapes.as_array("state.num_updates", state.num_updates)
    if num_updates.shape != () or num_updates.dtype not in (jnp.int32, jnp.int64):
        raise TypeError(
            "`state.num_updates` must be an int32 scalar; got "
            f"{num_updates.dtype} of shape {num_updates.shape}"
        )
    return State(mean, var, num_updates)


def new_state(shape: tuple[int, ...], dtype: Any) -> State:
    """Mean 0, variance 1 and no updates; `dtype` is that of the mean."""
    return State(
        jnp.zeros(shape, dtype),
        jnp.ones(shape, _shapes.real_dtype(dtype)),
        jnp.zeros((), jnp.int32),
    )
