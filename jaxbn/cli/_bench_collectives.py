"""How often the devices that share a batch must wait for each other."""

import contextlib
import functools
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxbn.cli._bench_layers import Build, Layer
from jaxbn.cli._bench_programs import forward, forward_backward

SPLIT, WHOLE = PartitionSpec("devices"), PartitionSpec()


def ask_for_two_cpu_devices() -> None:
    """Have JAX split the CPU in two, if it has not begun and nobody decided otherwise.

    What runs on one of them still has all threads, and is as fast.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):  # JAX has begun
        if getattr(jax.config, "jax_num_cpu_devices", 2) < 2:
            jax.config.update("jax_num_cpu_devices", 2)


def two_devices() -> Mesh | None:
    """Two devices in a row: of this backend if it has them, else of the CPU."""
    for found in (jax.devices(), jax.devices("cpu")):
        if len(found) > 1:
            return Mesh(found[:2], ("devices",), axis_types=(AxisType.Auto,))
    return None


def all_reduces(build: Build, mesh: Mesh, *, named: bool) -> dict[str, int] | None:
    """Count all-reduces in the optimized programs, those of parameters included.

    Args:
      build: Of the peer.
      mesh: Two devices.
      named: Whether the layer is told their axis, under `shard_map`; else the batch is
        a sharded array under plain jit.

    Returns:
      How many are in `forward` and in `forward+backward`; None where the layer has no
      named axes.
    """
    x = jnp.ones((64, 8))
    try:
        layer = build(x[:2], -1, "devices" if named else None)
        return {
            "forward": _count(forward, layer, x, mesh, named),
            "forward+backward": _count(
                forward_backward, _squared(layer), x, mesh, named
            ),
        }
    except Exception:  # a library without them fails in a way of its own
        return None


def _squared(layer: Layer) -> Layer:
    """Makes the cotangent of y depend on y, as in a network.

    One that is known beforehand could be summed together with x.
    """

    def train(x: Any, params: Any, state: Any) -> tuple[Any, Any]:
        y, state = layer.train(x, params, state)
        return jnp.square(y), state

    return layer._replace(train=train)


def _count(
    step: Callable[..., Any],
    layer: Layer,
    x: jax.Array,
    mesh: Mesh,
    named: bool,
) -> int:
    run: Callable[..., Any] = functools.partial(step, layer)
    inputs = (SPLIT, SPLIT, WHOLE, WHOLE)  # x, dy, params, state
    outputs = (SPLIT, WHOLE)  # y, state
    if step is forward_backward:
        outputs = (*outputs, (SPLIT, WHOLE))  # dx, dparams
    if named:
        run = jax.shard_map(run, mesh=mesh, in_specs=inputs, out_specs=outputs)
    placed = functools.partial(
        jax.tree.map,
        functools.partial(NamedSharding, mesh),
        is_leaf=lambda spec: isinstance(spec, PartitionSpec),
    )
    shapes = jax.eval_shape(lambda *args: args, x, x, layer.params, layer.state)
    jitted = jax.jit(run, in_shardings=placed(inputs), out_shardings=placed(outputs))
    text = jitted.lower(*shapes).compile().as_text() or ""
    return len(re.findall(r" all-reduce(?:-start)?\(", text))
