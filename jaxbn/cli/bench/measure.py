"""Compiling and timing what is measured, and what XLA says of it."""

import contextlib
import ctypes
import functools
import importlib
import itertools
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxbn.cli.bench.cases import FLOOR_IN_COPIES, INFERENCE, Case, Group
from jaxbn.cli.bench.layers import COPY, OURS, PEERS, Build, Layer

# More than the last-level cache of any GPU or TPU: inputs that do not fill it take
# turns. On a CPU they stay in the cache, if they fit: so do those of a real layer.
CACHE_BYTES = 2**27

MAX_CALLS, MIN_ROUNDS = 200, 3  # in a sample; in a group

# Quartiles further apart than this share of the median: something else was running.
MAX_SPREAD = 1 / 3

Dict = dict[str, Any]


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


def copy(x: jax.Array) -> Program:
    """Return the yardstick, x a + b in float32: it reads x once and writes as much."""

    def apply(x: Any, a: Any, b: Any, train: bool) -> tuple[Any, Any]:
        return (x.astype(jnp.float32) * a + b).astype(x.dtype), b

    return _compile(infer, Layer(jnp.ones(()), jnp.zeros(()), apply), x)


def program(name: str, group: Group, x: Any, dy: Any) -> Program:
    """Return what is timed of a contender, for inputs like these."""
    if name == COPY:
        return copy(x)
    build = PEERS[name].build
    if build is None:
        return torch_program(group, x, dy)
    layer = build(x[:2], group.case.axis, None)
    if group.mode == INFERENCE:
        return _compile(infer, layer, x)
    if group.mode == "chain":
        layer = _chain(layer, group.num_layers)
    compiled = _compile(forward_backward, layer, x)
    return compiled._replace(residual_bytes=_residual_bytes(layer, x))


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

    The call returns y, followed by the gradients of x and of the parameters if there
    are any. The running statistics are updated in place, as PyTorch does.
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
    net = torch.nn.Sequential(*layers)
    gradients = group.mode != INFERENCE
    net.train(gradients)
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
    x = jax.device_put(jnp.ones((64, 8)), NamedSharding(mesh, split))

    def count(step: Callable[..., Any], *outputs: Any) -> int:
        run: Callable[..., Any] = functools.partial(step, layer._replace(apply=squared))
        if named:
            inputs = (split, split, whole, whole)
            run = jax.shard_map(run, mesh=mesh, in_specs=inputs, out_specs=outputs)
        lowered = jax.jit(run).lower(x, x, layer.params, layer.state)
        text = lowered.compile().as_text() or ""
        return text.count(" all-reduce(") + text.count(" all-reduce-start(")

    def squared(x: Any, params: Any, state: Any, train: bool) -> tuple[Any, Any]:
        # The cotangent then depends on y, as in a network: the sums over one that is
        # known beforehand could join those over x.
        y, state = layer.apply(x, params, state, train)
        return jnp.square(y), state

    try:
        with warnings.catch_warnings(action="ignore"):
            layer = build(jnp.ones((2, 8)), -1, "devices" if named else None)
            both = split, whole
            return {
                "forward": count(forward, *both),
                "forward+backward": count(forward_backward, *both, both),
            }
    except Exception:  # a library without named axes fails in a way of its own
        return None


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, as a GPU's allocator does; call it before JAX runs.

    Else Linux makes new pages for each large array: 60 ms for 100 MB, whose copy is 10.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        # By the numbers of malloc.h: one arena, no mmap, nothing trimmed.
        for parameter, value in {-8: 1, -4: 0, -1: 2**31 - 1}.items():
            mallopt(parameter, value)


def measure(
    group: Group,
    peers: Sequence[str],
    rounds: int,
    seconds: float,
    show: Callable[[str], None],
) -> tuple[list[Dict], list[Dict]]:
    """Compile the copy and the peers, and time them for so many rounds or seconds.

    Each is called once in every round, in an order that changes.

    Returns:
      A row, as `summarize` describes it, for each contender that failed in no round;
      and the failures.
    """
    timers: dict[str, Callable[[int], float]] = {}
    compiled: dict[str, Program] = {}
    failures: list[Dict] = []

    def failed(name: str, error: Exception) -> None:
        timers.pop(name, None)
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        failures.append({"contender": name, "group": str(group), "error": text})

    pairs = inputs(group.case, group.dtype)
    for name in (COPY, *peers):
        show(f"{group}: compiling {name}")
        try:
            with warnings.catch_warnings(action="ignore"):
                compiled[name] = program(name, group, *pairs[0])
            turns = itertools.cycle(pairs)
            timers[name] = functools.partial(time_calls, compiled[name], turns)
            timers[name](1)
        except Exception as error:  # anything that a library may raise
            failed(name, error)

    calls = 1
    if COPY in timers:  # so many that the clock resolves a sample
        least = 0.5e-3 if jax.default_backend() == "cpu" else 5e-3  # seconds
        one = statistics.median(timers[COPY](3) / 3 for _ in range(3))
        calls = min(max(math.ceil(least / one), 1), MAX_CALLS)
    order, samples = random.Random(0), []
    end = time.monotonic() + seconds
    while len(samples) < rounds:
        if len(samples) >= MIN_ROUNDS and time.monotonic() > end:
            break
        show(f"{group}: round {len(samples) + 1}")
        samples.append({})
        for name in order.sample([*timers], len(timers)):
            try:
                samples[-1][name] = timers[name](calls) / calls
            except Exception as error:  # out of memory, say: of no concern to others
                failed(name, error)
    rows = summarize(group, samples, calls, compiled) if COPY in timers else []
    return rows, failures


@functools.lru_cache(maxsize=1)  # the next group mostly has the same
def inputs(case: Case, dtype: str) -> list[tuple[jax.Array, jax.Array]]:
    """Return pairs of x and dy: one on a CPU, else enough to fill a cache."""
    num_bytes = 2 * math.prod(case.shape) * jnp.dtype(dtype).itemsize
    full = 1 if jax.default_backend() == "cpu" else math.ceil(CACHE_BYTES / num_bytes)
    shape = (full, 2, *case.shape)
    draws = np.random.default_rng(0).standard_normal(shape, np.float32)
    return [(jnp.asarray(2 * x + 1, dtype), jnp.asarray(y, dtype)) for x, y in draws]


def time_calls(program: Program, turns: Iterator[Any], calls: int) -> float:
    """Return the seconds that so many calls take."""
    # A CPU would run several calls at a time; other devices run them one after another,
    # and are kept busy by calls that wait in line.
    wait_each = jax.default_backend() == "cpu"
    result = None
    begun = time.perf_counter()
    for _ in range(calls):
        result = program.call(*next(turns))
        if wait_each:
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return time.perf_counter() - begun


def summarize(group: Group, samples: Any, calls: int, compiled: Any) -> list[Dict]:
    """Return the rows of a group, each for one contender, as bench.json holds them.

    The time is of a call, which may hold several layers. Sizes are bytes over the bytes
    of x, and like `copies` for each layer. What is not known is None: XLA's counts for
    PyTorch, residuals where there is no gradient. A row is not `trusted` if the machine
    was too busy: times differ from round to round, or are less than anything can take.
    """
    # In the order of all tables, without those that failed on the way.
    names = [name for name in (COPY, *PEERS) if all(name in each for each in samples)]
    times = {name: sorted(each[name] for each in samples) for name in names}
    medians = {name: statistics.median(times[name]) for name in names}
    case, quarter = group.case, (len(samples) - 1) // 4
    x_bytes = math.prod(case.shape) * jnp.dtype(group.dtype).itemsize

    def steady(name: str) -> bool:
        spread = times[name][-1 - quarter] - times[name][quarter]
        return spread <= MAX_SPREAD * medians[name]

    def row(name: str) -> Dict:
        layers = 1 if name == COPY else group.num_layers
        copies = medians[name] / medians[COPY] / layers
        floor = 0 if group.mode == INFERENCE else FLOOR_IN_COPIES
        above = name == COPY or copies >= floor
        _, *sizes = compiled[name]
        per_x = [None if size is None else size / x_bytes / layers for size in sizes]
        return {
            "suite": case.suite,
            "case": case.name,
            "shape": case.shape,
            "axis": case.axis,
            "dtype": group.dtype,
            "mode": group.mode,
            "num_layers": layers,
            "contender": name,
            "rounds": len(samples),
            "calls_per_round": calls,
            "median_ms": 1000 * medians[name],
            "quartiles_ms": [1000 * times[name][i] for i in (quarter, -1 - quarter)],
            "trusted": above and steady(name) and steady(COPY),
            "copies": copies,
            "over_jaxbn": medians[name] / medians[OURS] if OURS in medians else None,
            "sizes_accessed": per_x[0],
            "sizes_temp": per_x[1],
            "sizes_residual": per_x[2],
        }

    return [row(name) for name in names]
