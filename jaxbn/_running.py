"""Running statistics: the state of a batch norm and its one update rule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import _shapes
from jaxbn._moments import Moments


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


def update(
    state: State,
    batch: Moments,
    *,
    momentum: Any,
    running_variance: str = "biased",
    debias: bool = False,
) -> State:
    """One step of the running statistics towards the moments of a batch.

    A feature keeps its old statistics where the batch counted nothing for it (fewer
    than 2 elements, if "unbiased"), or where the new ones would not be finite. With
    `momentum=None` or `debias` all features are updated or none is, as one count has
    to be right for all of them.
    """
    new_var, enough = batch.var, batch.num_elements > 0
    if running_variance == "unbiased":
        enough = batch.num_elements > 1
        freedom = jnp.maximum(batch.num_elements - 1, 1)
        new_var = batch.var * (batch.num_elements / freedom)
    keep = _share_kept(state.num_updates, momentum, debias)
    mean = _blend(state.mean, batch.mean, keep)
    var = _blend(state.var, new_var, keep)
    took = enough & jnp.isfinite(mean) & jnp.isfinite(var)
    if momentum is None or debias:
        took = jnp.all(took)
    return State(
        jnp.where(took, mean, state.mean),
        jnp.where(took, var, state.var),
        state.num_updates + jnp.any(took).astype(state.num_updates.dtype),
    )


def _share_kept(num_updates: jax.Array, momentum: Any, debias: bool) -> Any:
    """The weight of the old value: t / (t + 1) gives the average of all so far."""
    t = num_updates.astype(jnp.float32)
    if momentum is None:
        return t / (t + 1)
    if debias:
        return jnp.minimum(jnp.asarray(momentum, t.dtype), t / (t + 1))
    return momentum


def _blend(old: jax.Array, new: jax.Array, keep: Any) -> jax.Array:
    dtype = _shapes.accumulation_dtype(old.dtype)
    if isinstance(keep, jax.Array):
        keep = keep.astype(dtype)
    return (keep * old.astype(dtype) + (1 - keep) * new.astype(dtype)).astype(old.dtype)


def check_state(state: Any, x: jax.Array, features: tuple[int, ...]) -> State:
    """`state` with arrays that fit x, so that its dtypes can be kept."""
    if not isinstance(state, State):
        raise TypeError(f"`state` must be a jaxbn.State; got {type(state).__name__}")
    mean = _shapes.check_per_feature("state.mean", state.mean, x, features)
    var = _shapes.check_per_feature("state.var", state.var, x, features)
    if mean is None or var is None:
        raise TypeError("`state.mean` and `state.var` must be arrays; got None")
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(mean):
        raise TypeError(
            f"`state.mean` must be complex for x of dtype {x.dtype}; got {mean.dtype} "
            "(jaxbn.init(..., param_dtype=jnp.complex64) makes it so)"
        )
    num_updates = jnp.asarray(state.num_updates)
    if num_updates.shape != () or not jnp.issubdtype(num_updates.dtype, jnp.integer):
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
