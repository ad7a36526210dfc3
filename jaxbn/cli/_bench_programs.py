"""Compiled programs: one call of a layer in one mode, and what XLA says of it."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn.cli._bench_layers import Build, Layer
from jaxbn.cli._bench_suite import Case, Group


class Program(NamedTuple):
    """A compiled function of (x, dy), with parameters and state in place.

    It returns all that a training step would use. What XLA does not tell is None.

    Attributes:
      call: The function.
      bytes_accessed: By all its operations.
      temp_bytes: Allocated beside arguments and results.
      residual_bytes: Kept for the backward pass, counting arrays as large as x or half
        of it; None where there is none.
    """

    call: Callable[[jax.Array, jax.Array], list[jax.Array]]
    bytes_accessed: float | None
    temp_bytes: int | None
    residual_bytes: int | None


def sample(case: Case, dtype: str) -> jax.Array:
    """A small input: 2 along every axis but that of the features."""
    shape = [2] * len(case.shape)
    shape[case.axis] = case.shape[case.axis]
    return jnp.ones(shape, dtype)


def copy(x: jax.Array) -> Program:
    """The yardstick, x a + b: it reads x once and writes as much."""
    layer = Layer(jnp.ones((), x.dtype), jnp.zeros((), x.dtype), _no_train, _copy)
    return _compile(_infer, layer, x)


def program(build: Build, group: Group, x: jax.Array) -> Program:
    """What is timed: one peer's layer, for inputs like x."""
    layer = build(sample(group.case, group.dtype), group.case.axis, None)
    if group.mode == "conv":
        layer = _between_convolutions(layer, group.case, x.dtype)
    if group.mode == "chain":
        layer = _chain(layer, group.num_layers)
    if not group.has_backward:
        step = {"forward": forward, "inference": _infer}[group.mode]
        return _compile(step, layer, x)
    compiled = _compile(forward_backward, layer, x)
    return compiled._replace(residual_bytes=_residual_bytes(layer, x))


def _copy(x, a, b):
    return x * a + b


def _no_train(x, params, state):
    raise NotImplementedError("a copy has no training step")


def _infer(layer, x, dy, params, state):
    del dy
    return layer.infer(x, params, state)


def forward(layer, x, dy, params, state):
    del dy
    return layer.train(x, params, state)


def forward_backward(layer, x, dy, params, state):
    train = functools.partial(_swapped, layer, state)
    y, vjp, state = jax.vjp(train, x, params, has_aux=True)
    # In a network dy comes from y: no sum over dy can join the forward pass.
    y, dy = lax.optimization_barrier((y, dy))
    return y, state, vjp(dy)


def _swapped(layer, state, x, params):
    return layer.train(x, params, state)


def _compile(step: Callable[..., Any], layer: Layer, x: jax.Array) -> Program:
    # Flat, so that no library is charged for its containers.
    leaves, tree = jax.tree.flatten((layer.params, layer.state))

    def flat(x, dy, *leaves):
        return jax.tree.leaves(step(layer, x, dy, *jax.tree.unflatten(tree, leaves)))

    compiled = jax.jit(flat).lower(x, x, *leaves).compile()
    cost: Any = compiled.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    return Program(
        lambda x, dy: compiled(x, dy, *leaves),
        cost.get("bytes accessed"),
        getattr(memory, "temp_size_in_bytes", None),
        None,
    )


def _residual_bytes(layer: Layer, x: jax.Array) -> int:
    def residuals(x, params, state):
        train = functools.partial(_swapped, layer, state)
        _, vjp, _ = jax.vjp(train, x, params, has_aux=True)
        # An array that is kept by two operations is one array.
        return list({id(leaf): leaf for leaf in jax.tree.leaves(vjp)}.values())

    kept = jax.eval_shape(residuals, x, layer.params, layer.state)
    return sum(a.size * a.dtype.itemsize for a in kept if a.size >= x.size / 2)


def _between_convolutions(layer: Layer, case: Case, dtype: Any) -> Layer:
    """1 x 1 convolution, batch norm, relu, 1 x 1 convolution."""
    features, rank = case.shape[case.axis], len(case.shape)
    space = "DHW"[-(rank - 2) :]
    form = f"N{space}C" if case.axis == -1 else f"NC{space}"
    shape = (1,) * (rank - 2) + (features, features)
    kernels = [
        (jax.random.normal(key, shape) / math.sqrt(features)).astype(dtype)
        for key in jax.random.split(jax.random.key(0))
    ]

    def convolve(x, kernel):
        numbers = (form, f"{space}IO", form)
        strides = (1,) * (rank - 2)
        return lax.conv_general_dilated(
            x, kernel, strides, "SAME", dimension_numbers=numbers
        )

    def train(x, params, state):
        (first, second), params = params
        y, state = layer.train(convolve(x, first), params, state)
        return convolve(jax.nn.relu(y), second), state

    return Layer((kernels, layer.params), layer.state, train, layer.infer)


def _chain(layer: Layer, num_layers: int) -> Layer:
    """The layer after itself, with parameters and statistics for each."""

    def train(x, params, states):
        updated = []
        for one, state in zip(params, states, strict=True):
            x, state = layer.train(x, one, state)
            updated.append(state)
        return x, updated

    params, states = [layer.params] * num_layers, [layer.state] * num_layers
    return Layer(params, states, train, layer.infer)
