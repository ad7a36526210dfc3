"""The contenders: batch norm layers of several libraries, each as one pure function.

Momentum is 0.9 and epsilon 1e-5 everywhere; parameters and running statistics are
float32 whatever the dtype of x, and y has the dtype of x. No library but JAX is
imported before it is asked for.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxbn

OURS = "jaxbn"  # among the peers, and always measured
COPY = "copy"  # the yardstick beside them
OPTIONS: dict[str, Any] = {"momentum": 0.9, "epsilon": 1e-5}


class Layer(NamedTuple):
    """What is learned and the running statistics, both pytrees, and a pure function.

    `apply(x, params, state, train)` returns y and the new state.
    """

    params: Any
    state: Any
    apply: Callable[[Any, Any, Any, bool], tuple[Any, Any]]


# `build(sample, axis, axis_name)` returns the layer for inputs with the rank, dtype and
# features of `sample`; its statistics are merged over the devices of `axis_name`.
Build = Callable[[jax.Array, int, str | None], Layer]


def _jaxbn(sample: Any, axis: int, axis_name: str | None) -> Layer:
    options = OPTIONS | {"axis": axis, "axis_name": axis_name}

    def apply(x: Any, params: Any, state: Any, train: bool) -> tuple[Any, Any]:
        return jaxbn.batch_norm(x, params, state, train=train, **options)

    return Layer(*jaxbn.init(sample.shape[axis]), apply)


def _linen(sample: Any, axis: int, axis_name: str | None, fast: bool) -> Layer:
    """Return `flax.linen.BatchNorm`, with its fast variance or the stable one."""
    from flax import linen

    options = OPTIONS | {"dtype": sample.dtype, "use_fast_variance": fast}
    module: Any = linen.BatchNorm(axis=axis, axis_name=axis_name, **options)

    def apply(x: Any, params: Any, state: Any, train: bool) -> tuple[Any, Any]:
        variables = {"params": params, "batch_stats": state}
        y, updates = module.apply(
            variables, x, use_running_average=not train, mutable=["batch_stats"]
        )
        return y, updates["batch_stats"]

    variables = module.init(jax.random.key(0), sample, use_running_average=False)
    return Layer(variables["params"], variables["batch_stats"], apply)


def _nnx(sample: Any, axis: int, axis_name: str | None) -> Layer:
    """Return `flax.nnx.BatchNorm`, which by default takes Flax's fast variance."""
    from flax import nnx

    options = OPTIONS | {"dtype": sample.dtype, "rngs": nnx.Rngs(0)}
    size = sample.shape[axis]
    module: Any = nnx.BatchNorm(size, axis=axis, axis_name=axis_name, **options)
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def apply(x: Any, params: Any, state: Any, train: bool) -> tuple[Any, Any]:
        module: Any = nnx.merge(graph, params, state, copy=True)
        y = module(x, use_running_average=not train)
        return y, nnx.state(module, nnx.BatchStat)

    return Layer(params, state, apply)


def _haiku(sample: Any, axis: int, axis_name: str | None) -> Layer:
    haiku = importlib.import_module("haiku")

    def norm(x: Any, train: bool, axis_name: str | None = None) -> Any:
        layer = haiku.BatchNorm(
            *(True, True, 0.9, 1e-5),  # scale, offset, decay_rate, eps
            data_format="channels_last" if axis == -1 else "channels_first",
            cross_replica_axis=axis_name,
        )
        # It computes in the dtype of x. Here that is float32, as in the others.
        return layer(x.astype(jnp.float32), train).astype(x.dtype)

    init, run = haiku.without_apply_rng(haiku.transform_with_state(norm))

    def apply(x: Any, params: Any, state: Any, train: bool) -> tuple[Any, Any]:
        return run(params, state, x, train, axis_name)

    params, state = init(jax.random.key(0), sample, True)
    return Layer(params, state, apply)


def _equinox(sample: Any, axis: int, axis_name: str | None) -> Layer:
    """Return `equinox.nn.BatchNorm`, in the mode that is batch norm."""
    equinox = importlib.import_module("equinox")
    make = equinox.nn.make_with_state(equinox.nn.BatchNorm)
    axes = "batch" if axis_name is None else ("batch", axis_name)
    module, state = make(sample.shape[axis], axes, eps=1e-5, momentum=0.9, mode="batch")
    params, static = equinox.partition(module, equinox.is_inexact_array)

    def apply(x: Any, params: Any, state: Any, train: bool) -> tuple[Any, Any]:
        norm = functools.partial(equinox.combine(params, static), inference=not train)
        # A layer sees one example, features first; the others are beside it in a vmap.
        # With the features last, all other axes are examples, which moves nothing.
        examples = x.reshape(-1, x.shape[-1]) if axis == -1 else x
        norm = jax.vmap(norm, (0, None), (0, None), axis_name="batch")
        # It computes in the dtype of x, like Haiku's.
        y, state = norm(examples.astype(jnp.float32), state)
        return y.astype(x.dtype).reshape(x.shape), state

    return Layer(params, state, apply)


def _keras(sample: Any, axis: int, axis_name: str | None) -> Layer:
    """Return `keras.layers.BatchNormalization`, on JAX."""
    keras = importlib.import_module("keras")
    if keras.backend.backend() != "jax" or axis_name is not None:
        raise NotImplementedError("Keras must run on JAX, and has no named axes there")
    dtype = "float32" if sample.dtype == jnp.float32 else "mixed_bfloat16"
    layer = keras.layers.BatchNormalization(axis=axis, dtype=dtype, **OPTIONS)
    layer.build(sample.shape)
    params, state = layer.trainable_variables, layer.non_trainable_variables

    def apply(x: Any, params: Any, state: Any, train: bool) -> tuple[Any, Any]:
        return layer.stateless_call(params, state, x, training=train)

    return Layer([each.value for each in params], [each.value for each in state], apply)


class Peer(NamedTuple):
    """A contender: what is imported, what is installed, and how a layer is built."""

    module: str
    distribution: str
    build: Build | None  # PyTorch's is no function of JAX


PEERS = {
    OURS: Peer("jaxbn", "jaxbn", _jaxbn),
    "flax-fast": Peer("flax", "flax", functools.partial(_linen, fast=True)),
    "flax-stable": Peer("flax", "flax", functools.partial(_linen, fast=False)),
    "nnx": Peer("flax", "flax", _nnx),
    "haiku": Peer("haiku", "dm-haiku", _haiku),
    "equinox": Peer("equinox", "equinox", _equinox),
    "keras": Peer("keras", "keras", _keras),
    "torch": Peer("torch", "torch", None),
}

# PyTorch and Keras read this when they are imported. PyTorch's idle threads then sleep,
# whichever OpenMP it has; by default they spin, and slow down what runs beside them.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "KERAS_BACKEND": "jax",
}


def find(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return which of these peers can be imported, and why the others cannot."""
    os.environ.update(ENVIRONMENT)
    found, missing = [], {}
    for name in names:
        module, distribution, _ = PEERS[name]
        try:
            with warnings.catch_warnings(action="ignore"):
                importlib.import_module(module)
            found.append(name)
        except Exception as error:  # an import can fail in any way
            absent = getattr(error, "name", "") == module
            why = "is not installed" if absent else f"cannot be imported: {error}"
            missing[name] = f"{distribution} {why}"
    return found, missing
