"""Running statistics: the state of a batch norm and its one update rule."""

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

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
        Moments(*(m[None] for m in moments)),
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
    batches: Moments,
    *,
    momentum: Any,
    running_variance: str = "biased",
    debias: bool = False,
) -> State:
    """The running statistics after `batches`, moments (batches, features), in turn.

    A feature keeps its statistics where a batch counted nothing for it (fewer than 2
    elements, if "unbiased"), or where its moments or what comes of them is not finite.
    With `momentum=None` or `debias` all features are updated or none is, as one count
    has to be right for all of them. In a shard_map with `check_vma` whose features are
    sharded, the count is one for all shards: a batch counts if any of them took it.

    One step is s <- keep s + (1 - keep) b, with keep = 1 where the batch is passed
    over. Many steps in turn are one weighted sum: the weight of b is its own 1 - keep
    times the keep of all batches after it.
    """
    var, num_elements = batches.var, batches.num_elements
    missing = (1,) * (var.ndim - num_elements.ndim)  # one count for all features
    num_elements = num_elements.reshape(num_elements.shape + missing)
    enough = num_elements > 0
    if running_variance == "unbiased":
        enough = num_elements > 1
        var = var * (num_elements / jnp.maximum(num_elements - 1, 1))
    took = enough & jnp.isfinite(batches.mean) & jnp.isfinite(var)
    one_count = momentum is None or debias
    # Axes of a shard_map over which the features are sharded, and the count is not.
    shards = _devices.varying_beyond(state.num_updates, state.mean)
    if one_count:
        all_took = _devices.all_over(shards, _all_features(took))
        took = jnp.broadcast_to(all_took, took.shape)
    real = _shapes.accumulation_dtype(state.var.dtype)
    keep, take = (
        jnp.where(took, share, passed).astype(real)
        for share, passed in zip(
            _shares(state.num_updates, took, momentum, debias, real),
            (1, 0),
            strict=True,
        )
    )
    after = lax.cumprod(
        jnp.concatenate([keep[1:], jnp.ones_like(keep[:1])]), reverse=True
    )
    weight = take * after

    def blend(old: jax.Array, new: jax.Array) -> jax.Array:
        dtype = _shapes.accumulation_dtype(old.dtype)
        new = jnp.where(took, new, 0).astype(dtype)
        kept = jnp.prod(keep, axis=0).astype(dtype) * old.astype(dtype)
        blended = kept + (weight.astype(dtype) * new).sum(0)
        return _devices.lay_out_as(blended.astype(old.dtype), old)

    new = blend(state.mean, batches.mean), blend(state.var, var)
    fits = jnp.isfinite(new[0]) & jnp.isfinite(new[1])  # the dtype of the state, too
    if one_count:
        fits = jnp.broadcast_to(_devices.all_over(shards, jnp.all(fits)), fits.shape)
    any_took = jnp.any(took & fits[None], axis=tuple(range(1, took.ndim)))
    num_taken = (~_devices.all_over(shards, ~any_took)).sum()
    return State(
        jnp.where(fits, new[0], state.mean),
        jnp.where(fits, new[1], state.var),
        state.num_updates + num_taken.astype(state.num_updates.dtype),
    )


def _shares(
    num_updates: jax.Array, took: jax.Array, momentum: Any, debias: bool, dtype: Any
) -> tuple[Any, Any]:
    """In the update by each batch, the weight of the old value and that of the new."""
    if isinstance(momentum, jax.Array):
        # Traced: in a lesser dtype, the two weights would not add up to 1.
        momentum = momentum.astype(dtype)
    if momentum is not None and not debias:
        return momentum, 1 - momentum
    taken = _all_features(took).astype(dtype)
    t = num_updates.astype(dtype) + lax.cumsum(taken) - taken
    keep = t / (t + 1)  # the average of all so far
    if momentum is not None:
        keep = jnp.minimum(jnp.asarray(momentum, keep.dtype), keep)
    return keep, 1 - keep


def _all_features(took: jax.Array) -> jax.Array:
    return jnp.all(took, axis=tuple(range(1, took.ndim)), keepdims=True)


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
