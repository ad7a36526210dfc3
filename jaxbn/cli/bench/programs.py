"""Compiled programs: one call of a layer in one mode, and what XLA says of it."""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxbn.cli.bench.cases import GRADIENT_MODES, Case, Group
from jaxbn.cli.bench.layers import Build, Layer


class Program(NamedTuple):
    """A compiled function of (x, dy), with parameters and state in place.

    It returns all that a training step would use. What XLA does not tell is None.
    """

    call: Callable[[Any, Any], Any]
    bytes_accessed: float | None = None  # by all operations
    temp_bytes: int | None = None  # allocated beside arguments and results
    # Kept for the backward pass, in arrays of at least half the size of x.
    residual_bytes: int | None = None


def infer(layer: Layer, x: Any, dy: Any, params: Any, state: Any) -> Any:
    """Return y from the running statistics."""
    return layer.apply(x, params, state, False)[0]


def forward(layer: Layer, x: Any, dy: Any, params: Any, state: Any) -> Any:
    """Return y and the new state."""
    return layer.apply(x, params, state, True)


def forward_backward(layer: Layer, x: Any, dy: Any, params: Any, state: Any) -> Any:
    """Return y, the new state, and the gradients of x and of the parameters."""
    y, vjp, state = _vjp(layer, x, params, state)
    # In a network dy comes from y: no sum over dy can join the forward pass.
    y, dy = lax.optimization_barrier((y, dy))
    return y, state, vjp(dy)


def _vjp(layer: Layer, x: Any, params: Any, state: Any) -> Any:
    def train(x: Any, params: Any) -> Any:
        return layer.apply(x, params, state, True)

    return jax.vjp(train, x, params, has_aux=True)


def sample(case: Case, dtype: str) -> jax.Array:
    """Return a small input: 2 along every axis but that of the features."""
    shape = [2] * len(case.shape)
    shape[case.axis] = case.shape[case.axis]
    return jnp.ones(shape, dtype)


def copy(x: jax.Array) -> Program:
    """Return the yardstick, x a + b in float32: it reads x once and writes as much."""

    def apply(x: Any, a: Any, b: Any, train: bool) -> tuple[Any, Any]:
        return (x.astype(jnp.float32) * a + b).astype(x.dtype), b

    return _compile(infer, Layer(jnp.ones(()), jnp.zeros(()), apply), x)


def program(build: Build, group: Group, x: jax.Array) -> Program:
    """Return what is timed: one peer's layer, for inputs like x."""
    layer = build(sample(group.case, group.dtype), group.case.axis, None)
    if group.mode == "chain":
        layer = _chain(layer, group.num_layers)
    if group.mode in GRADIENT_MODES:
        compiled = _compile(forward_backward, layer, x)
        return compiled._replace(residual_bytes=_residual_bytes(layer, x))
    return _compile({"forward": forward, "inference": infer}[group.mode], layer, x)


def _compile(step: Callable[..., Any], layer: Layer, x: jax.Array) -> Program:
    # Flat, so that no library is charged for its containers.
    leaves, tree = jax.tree.flatten((layer.params, layer.state))

    def flat(x: Any, dy: Any, *leaves: Any) -> list[Any]:
        return jax.tree.leaves(step(layer, x, dy, *jax.tree.unflatten(tree, leaves)))

    compiled = jax.jit(flat).lower(x, x, *leaves).compile()
    cost: Any = compiled.cost_analysis() or {}
    return Program(
        lambda x, dy: compiled(x, dy, *leaves),
        cost.get("bytes accessed"),
        getattr(compiled.memory_analysis(), "temp_size_in_bytes", None),
    )


def _residual_bytes(layer: Layer, x: jax.Array) -> int:
    def residuals(x: Any, params: Any, state: Any) -> list[Any]:
        _, vjp, _ = _vjp(layer, x, params, state)
        # An array that is kept by two operations is one array.
        return list({id(leaf): leaf for leaf in jax.tree.leaves(vjp)}.values())

    kept = jax.eval_shape(residuals, x, layer.params, layer.state)
    return sum(a.size * a.dtype.itemsize for a in kept if a.size >= x.size / 2)


def _chain(layer: Layer, num_layers: int) -> Layer:
    """Return the layer after itself, with parameters and statistics for each."""

    def apply(x: Any, params: Any, states: Any, train: bool) -> tuple[Any, Any]:
        updated = []
        for one, state in zip(params, states, strict=True):
            x, state = layer.apply(x, one, state, train)
            updated.append(state)
        return x, updated

    return Layer([layer.params] * num_layers, [layer.state] * num_layers, apply)


def torch_program(group: Group, x: Any, dy: Any) -> Program:
    """Return PyTorch's layers for these inputs, of which XLA says nothing.

    The call returns y, in modes with gradients followed by those of x and of the
    parameters. The running statistics are updated in place, as PyTorch does.
    """
    torch: Any = importlib.import_module("torch")
    x, dy = (torch.tensor(np.asarray(a, np.float32)) for a in (x, dy))
    x, dy = (a.to(getattr(torch, group.dtype)) for a in (x, dy))
    if group.case.axis == -1:
        # As PyTorch's users have it: a channels-last tensor whose features are on axis
        # 1 all the same. The bytes stay where they are.
        order = (0, x.ndim - 1, *range(1, x.ndim - 1))
        x, dy = x.permute(order), dy.permute(order)
    norm = getattr(torch.nn, f"BatchNorm{max(x.ndim - 2, 1)}d")
    options = {"eps": 1e-5, "momentum": 0.1}  # the share of the new value
    layers = [norm(x.shape[1], **options) for _ in range(group.num_layers)]
    net = torch.nn.Sequential(*layers).train(group.mode != "inference")
    gradients = group.mode in GRADIENT_MODES
    inputs = (x.requires_grad_(gradients), *net.parameters())

    def call(*_: Any) -> tuple[Any, ...]:
        with torch.set_grad_enabled(gradients):
            y = net(x)
            return (y, *torch.autograd.grad(y, inputs, dy)) if gradients else (y,)

    return Program(call)


def all_reduces(build: Build, *, named: bool) -> dict[str, int] | None:
    """Count the all-reduces in a layer's optimized programs on two devices.

    A layer that is `named` is told the devices' axis, under `shard_map`; else the batch
    is a sharded array under plain jit.

    Returns:
      How many are in each mode; None where the layer has no named axes, or where there
      are no two devices.
    """
    devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
    if len(devices) < 2:
        return None
    mesh = jax.make_mesh((2,), ("devices",), (AxisType.Auto,), devices=devices[:2])
    split, whole = PartitionSpec("devices"), PartitionSpec()
    x, inputs = jnp.ones((64, 8)), (split, split, whole, whole)

    def count(step: Callable[..., Any], *outputs: Any) -> int:
        run: Callable[..., Any] = functools.partial(step, layer._replace(apply=squared))
        if named:
            run = jax.shard_map(run, mesh=mesh, in_specs=inputs, out_specs=outputs)
        placed = jax.tree.map(functools.partial(NamedSharding, mesh), (inputs, outputs))
        jitted = jax.jit(run, in_shardings=placed[0], out_shardings=placed[1])
        shapes = jax.eval_shape(lambda *args: args, x, x, layer.params, layer.state)
        text = jitted.lower(*shapes).compile().as_text() or ""
        return text.count(" all-reduce(") + text.count(" all-reduce-start(")

    def squared(x: Any, params: Any, state: Any, train: bool) -> tuple[Any, Any]:
        # The cotangent then depends on y, as in a network: the sums over one that is
        # known beforehand could join those over x.
        y, state = layer.apply(x, params, state, train)
        return jnp.square(y), state

    try:
        with warnings.catch_warnings(action="ignore"):
            layer = build(x[:2], -1, "devices" if named else None)
            backward = count(forward_backward, split, whole, (split, whole))
            return {
                "forward": count(forward, split, whole),
                "forward+backward": backward,
            }
    except Exception:  # a library without named axes fails in a way of its own
        return None
