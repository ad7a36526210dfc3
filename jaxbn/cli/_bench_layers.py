"""Batch norm layers of several libraries, each behind the same four names.

Momentum 0.9 and epsilon 1e-5 everywhere; parameters and running statistics in float32
whatever the dtype of x, and y in the dtype of x. No library but Flax is imported before
it is asked for.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxbn

MOMENTUM, EPSILON = 0.9, 1e-5


class Layer(NamedTuple):
    """A layer as pure functions.

    Attributes:
      params: What is learned, a pytree.
      state: The running statistics, a pytree.
      train: `(x, params, state) -> (y, state)`.
      infer: `(x, params, state) -> y`.
    """

    params: Any
    state: Any
    train: Callable[[Any, Any, Any], tuple[Any, Any]]
    infer: Callable[[Any, Any, Any], Any]


# `build(sample, axis, axis_name)`: the layer for inputs with the rank, the dtype and
# the features of `sample`, whose statistics are merged over the devices of `axis_name`.
Build = Callable[[jax.Array, int, str | None], Layer]


def jaxbn_layer(sample: jax.Array, axis: int, axis_name: str | None) -> Layer:
    """The functions of `jaxbn`."""
    norm = functools.partial(
        jaxbn.batch_norm, momentum=MOMENTUM, epsilon=EPSILON, axis=axis
    )
    return Layer(
        *jaxbn.init(sample.shape[axis]),
        functools.partial(norm, train=True, axis_name=axis_name),
        lambda x, params, state: norm(x, params, state, train=False)[0],
    )


def linen_layer(
    sample: jax.Array, axis: int, axis_name: str | None, kind: str
) -> Layer:
    """The Linen module of jaxbn, or Flax's with its "fast" or its "stable" variance."""
    from flax import linen

    from jaxbn.linen import BatchNorm

    module: Any = (BatchNorm if kind == "jaxbn" else linen.BatchNorm)(
        momentum=MOMENTUM,
        epsilon=EPSILON,
        axis=axis,
        dtype=sample.dtype,
        axis_name=axis_name,
        use_fast_variance=kind != "stable",
    )

    def train(x: Any, params: Any, state: Any) -> tuple[Any, Any]:
        y, updates = module.apply(
            {"params": params, "batch_stats": state},
            x,
            use_running_average=False,
            mutable=["batch_stats"],
        )
        return y, updates["batch_stats"]

    def infer(x: Any, params: Any, state: Any) -> Any:
        variables = {"params": params, "batch_stats": state}
        return module.apply(variables, x, use_running_average=True)

    key = jax.random.key(0)
    variables = module.init(key, sample, use_running_average=False)
    return Layer(variables["params"], variables["batch_stats"], train, infer)


def nnx_layer(sample: jax.Array, axis: int, axis_name: str | None) -> Layer:
    """`flax.nnx.BatchNorm`, which by default takes Flax's fast variance."""
    from flax import nnx

    module = nnx.BatchNorm(
        sample.shape[axis],
        momentum=MOMENTUM,
        epsilon=EPSILON,
        axis=axis,
        dtype=sample.dtype,
        axis_name=axis_name,
        rngs=nnx.Rngs(0),
    )
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def train(x: Any, params: Any, state: Any) -> tuple[Any, Any]:
        module = nnx.merge(graph, params, state, copy=True)
        y = module(x, use_running_average=False)
        return y, nnx.state(module, nnx.BatchStat)

    def infer(x: Any, params: Any, state: Any) -> Any:
        return nnx.merge(graph, params, state)(x, use_running_average=True)

    return Layer(params, state, train, infer)


def haiku_layer(sample: jax.Array, axis: int, axis_name: str | None) -> Layer:
    """`haiku.BatchNorm`."""
    haiku = importlib.import_module("haiku")

    def norm(x: Any, is_training: bool, axis_name: str | None = None) -> Any:
        layer = haiku.BatchNorm(
            create_scale=True,
            create_offset=True,
            decay_rate=MOMENTUM,
            eps=EPSILON,
            data_format="channels_last" if axis == -1 else "channels_first",
            cross_replica_axis=axis_name,
        )
        # It computes in the dtype of x. Here that is float32, as in the others.
        return layer(x.astype(jnp.float32), is_training).astype(x.dtype)

    init, apply = haiku.without_apply_rng(haiku.transform_with_state(norm))
    params, state = init(jax.random.key(0), sample, True)
    return Layer(
        params,
        state,
        lambda x, params, state: apply(params, state, x, True, axis_name),
        lambda x, params, state: apply(params, state, x, False)[0],
    )


def equinox_layer(sample: jax.Array, axis: int, axis_name: str | None) -> Layer:
    """`equinox.nn.BatchNorm`, in the mode that is batch norm."""
    equinox = importlib.import_module("equinox")
    # A layer sees one example, features first; the others are beside it in a vmap.
    # With the features last, all other axes are examples, which moves nothing.
    axes = "batch" if axis_name is None else ("batch", axis_name)
    module, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(
        sample.shape[axis], axes, eps=EPSILON, momentum=MOMENTUM, mode="batch"
    )
    params, static = equinox.partition(module, equinox.is_inexact_array)

    def apply(x: Any, params: Any, state: Any, inference: bool) -> tuple[Any, Any]:
        norm = functools.partial(equinox.combine(params, static), inference=inference)
        examples = x.reshape(-1, x.shape[-1]) if axis == -1 else x
        # It computes in the dtype of x, like Haiku's.
        y, state = jax.vmap(
            norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )(examples.astype(jnp.float32), state)
        return y.astype(x.dtype).reshape(x.shape), state

    return Layer(
        params,
        state,
        functools.partial(apply, inference=False),
        lambda *args: apply(*args, inference=True)[0],
    )


def keras_layer(sample: jax.Array, axis: int, axis_name: str | None) -> Layer:
    """`keras.layers.BatchNormalization`, on JAX."""
    keras = importlib.import_module("keras")
    if keras.backend.backend() != "jax":
        raise RuntimeError(f"Keras was imported with {keras.backend.backend()}")
    if axis_name is not None:
        raise NotImplementedError("Keras on JAX has no named axes")
    half = sample.dtype == jnp.bfloat16
    layer = keras.layers.BatchNormalization(
        axis=axis,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        dtype="mixed_bfloat16" if half else "float32",
    )
    layer.build(sample.shape)
    apply = layer.stateless_call
    return Layer(
        [variable.value for variable in layer.trainable_variables],
        [variable.value for variable in layer.non_trainable_variables],
        lambda x, params, state: apply(params, state, x, training=True),
        lambda x, params, state: apply(params, state, x, training=False)[0],
    )
