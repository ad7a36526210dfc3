"""Running statistics: the state of a batch norm and its one update rule."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _axes, _checks
from jaxbn._axes import Features
from jaxbn._checks import RunningVariance
from jaxbn._core.devices import all_over, shard_as, varying_beyond
from jaxbn._core.moments import Moments, check_moments

Momentum = ArrayLike | None


class State(NamedTuple):
    """Running statistics. No update changes a dtype, a shape or the structure.

    Attributes:
        mean: `(features,)`; complex for complex x.
        var: `(features,)`, real; biased unless `running_variance="unbiased"`.
        num_updates: How many updates took effect, an int32 scalar.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> state = jaxbn.State(jnp.zeros(3), jnp.ones(3), num_updates=jnp.int32(0))
        >>> state._fields
        ('mean', 'var', 'num_updates')
    """

    mean: jax.Array
    var: jax.Array
    num_updates: jax.Array


def update_state(
    state: State,
    moments: Moments,
    *,
    momentum: Momentum = 0.9,
    running_variance: RunningVariance = "biased",
    debias: bool = False,
) -> State:
    """One update of the running statistics by given moments, as `batch_norm` does it.

    For gradient accumulation: normalize each microbatch, merge the moments of all with
    `merge_moments`, and update once. The state is then that of the whole batch.

    Args:
        state: Running statistics.
        moments: Of the batch, from `batch_moments` or `merge_moments`.
        momentum, running_variance, debias: As for `batch_norm`.

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
    state = check_state(state, moments.mean, features, "`moments.mean`")
    return update(
        state, moments, Averaging(momentum, running_variance, debias).checked()
    )


@dataclasses.dataclass(frozen=True)
class Averaging:
    """How the running statistics follow the batches; see `batch_norm`."""

    momentum: Momentum = 0.9
    running_variance: RunningVariance = "biased"
    debias: bool = False

    def checked(self) -> "Averaging":
        """Return the same options, each of which is allowed."""
        return Averaging(
            _checks.check_momentum(self.momentum),
            _checks.check_choice(
                "running_variance", self.running_variance, RunningVariance
            ),
            _checks.check_static_bool("debias", self.debias),
        )

    @property
    def counts(self) -> bool:
        """Whether the weights depend on the number of updates, one for all features."""
        return self.momentum is None or self.debias

    def keep(self, num_updates: jax.Array) -> jax.Array:
        """Return the weight of the old value after `num_updates`, a float array."""
        average = num_updates / (num_updates + 1)  # of all updates so far
        if self.momentum is None:
            return average
        # In a lesser dtype, the weights of a traced one would not add up to 1.
        momentum = jnp.asarray(self.momentum, average.dtype)
        return jnp.minimum(momentum, average) if self.debias else momentum

    def variance(self, batch: Moments) -> tuple[jax.Array, jax.Array]:
        """Return whether a batch counted enough for a variance, and that variance."""
        n = batch.num_elements
        if self.running_variance == "biased":
            return n > 0, batch.var
        return n > 1, batch.var * (n / jnp.maximum(n - 1, 1))


DEFAULT_AVERAGING = Averaging()


def update(state: State, batch: Moments, averaging: Averaging) -> State:
    """Return the running statistics after one batch: s <- keep s + (1 - keep) b.

    A feature keeps its statistics where the batch counted nothing for it (fewer than 2
    elements, if "unbiased"), or where what comes of it is not finite.
    """
    enough, var = averaging.variance(batch)
    real = _axes.accumulation_dtype(state.var.dtype)
    keep = averaging.keep(state.num_updates.astype(real))
    return blend(state, averaging, keep, 1 - keep, batch.mean, var, enough)


def blend(
    state: State,
    averaging: Averaging,
    keep: jax.Array,
    take: ArrayLike,
    mean: jax.Array,
    var: jax.Array,
    took: jax.Array,
    num_batches: ArrayLike = 1,
) -> State:
    """Return keep * state + take * (mean, var) where `took`, and where that is finite.

    Where the averaging counts, all features are updated or none is, since one count has
    to be right for all of them. In a shard_map with `check_vma` whose features are
    sharded, the count is one for all shards: a batch counts if any of them took it.
    """
    keep, mean, var, took = (
        shard_as(a, state.mean) if a.ndim else a for a in (keep, mean, var, took)
    )

    def blended(old: jax.Array, new: jax.Array) -> jax.Array:
        dtype = _axes.accumulation_dtype(old.dtype)
        kept = jnp.asarray(keep, dtype) * old.astype(dtype)
        taken = jnp.asarray(take, dtype) * new.astype(dtype)
        return (kept + taken).astype(old.dtype)

    new_mean, new_var = blended(state.mean, mean), blended(state.var, var)
    took = took & jnp.isfinite(new_mean) & jnp.isfinite(new_var)
    # Axes of a shard_map over which the features are sharded, and the count is not.
    shards = varying_beyond(state.num_updates, state.mean)
    if averaging.counts:
        took = all_over(shards, jnp.all(took))
    any_took = ~all_over(shards, ~jnp.any(took))
    added = jnp.where(any_took, num_batches, 0).astype(state.num_updates.dtype)
    return State(
        jnp.where(took, new_mean, state.mean),
        jnp.where(took, new_var, state.var),
        state.num_updates + added,
    )


def check_state(
    state: State, x: jax.Array, features: Features, x_name: str = "x"
) -> State:
    """Return `state` with arrays that fit x, so that its dtypes can be kept."""
    _checks.check_instance("state", state, State, "a jaxbn.State")
    mean, var = _checks.check_statistics(
        "state.", state.mean, state.var, x, features, x_name
    )
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(mean):
        raise TypeError(
            f"`state.mean` must be complex for {x_name} of dtype {x.dtype}; got "
            f"{mean.dtype} (make it with param_dtype=jnp.complex64)"
        )
    num_updates = _checks.as_array("state.num_updates", state.num_updates)
    if num_updates.shape != () or num_updates.dtype not in (jnp.int32, jnp.int64):
        raise TypeError(
            "`state.num_updates` must be an int32 scalar; got "
            f"{num_updates.dtype} of shape {num_updates.shape}"
        )
    return State(mean, var, num_updates)


def new_state(shape: tuple[int, ...], dtype: DTypeLike) -> State:
    """Return mean 0, variance 1 and no updates; `dtype` is that of the mean."""
    return State(
        jnp.zeros(shape, dtype),
        jnp.ones(shape, _axes.real_dtype(dtype)),
        jnp.zeros((), jnp.int32),
    )
