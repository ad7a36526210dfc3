"""Timing one group: every contender once in each round, in an order that changes."""

import contextlib
import ctypes
import functools
import itertools
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.cli.bench import programs
from jaxbn.cli.bench.cases import FLOOR_IN_COPIES, GRADIENT_MODES, Case, Group
from jaxbn.cli.bench.layers import OURS, PEERS

COPY = "copy"  # the yardstick among the contenders

# More than the last-level cache of any GPU or TPU: inputs that do not fill it take
# turns. On a CPU they stay in the cache, if they fit: so do those of a real layer.
CACHE_BYTES = 2**27

MAX_CALLS, MIN_ROUNDS = 200, 3  # in a sample; in a group

# Quartiles further apart than this share of the median: something else was running.
MAX_SPREAD = 1 / 3

Timer = Callable[[int], float]  # makes so many calls and returns the seconds they take
Dict = dict[str, Any]


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, as a GPU's allocator does; call it before JAX runs.

    By default a large array is new pages from Linux each time: 60 ms for 100 MB on the
    machine where this was written, where a copy takes 10.
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
    show: Callable[[str], None] = lambda text: None,
) -> tuple[list[Dict], list[Dict]]:
    """Compile and time the copy and the peers, for so many rounds or seconds.

    Returns:
      A row, as `summarize` describes it, for each contender that failed in no round;
      and the failures.
    """
    timers: dict[str, Timer] = {}
    compiled: dict[str, programs.Program] = {}
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
                compiled[name] = _program(name, group, *pairs[0])
            timers[name] = timer(compiled[name], pairs)
            timers[name](1)
        except Exception as error:  # anything that a library may raise
            failed(name, error)

    calls = calls_per_sample(timers[COPY]) if COPY in timers else 1
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


def _program(name: str, group: Group, x: Any, dy: Any) -> programs.Program:
    if name == COPY:
        return programs.copy(x)
    build = PEERS[name].build
    if build is None:
        return programs.torch_program(group, x, dy)
    return programs.program(build, group, x)


@functools.lru_cache(maxsize=1)  # the next group mostly has the same
def inputs(case: Case, dtype: str) -> list[tuple[jax.Array, jax.Array]]:
    """Return pairs of x and dy: one on a CPU, else enough to fill a cache."""
    num_bytes = 2 * math.prod(case.shape) * jnp.dtype(dtype).itemsize
    on_cpu = jax.default_backend() == "cpu"
    num_sets = 1 if on_cpu else math.ceil(CACHE_BYTES / num_bytes)
    draw = np.random.default_rng(0).standard_normal

    def pair() -> tuple[jax.Array, jax.Array]:
        x, dy = (draw(case.shape, np.float32) for _ in range(2))
        return jnp.asarray(2 * x + 1, dtype), jnp.asarray(dy, dtype)

    return [pair() for _ in range(num_sets)]


def timer(program: programs.Program, pairs: Sequence[tuple[Any, Any]]) -> Timer:
    """Return the timer of a compiled program."""
    turns = itertools.cycle(pairs)
    # A CPU would run several calls at a time; other devices run them one after another,
    # and are kept busy by calls that wait in line.
    wait_each = jax.default_backend() == "cpu"

    def seconds(calls: int) -> float:
        result = None
        begun = time.perf_counter()
        for _ in range(calls):
            result = program.call(*next(turns))
            if wait_each:
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        elapsed = time.perf_counter() - begun
        del result  # freed outside the clock
        return elapsed

    return seconds


def calls_per_sample(copy: Timer) -> int:
    """Return how many calls make a sample that the clock resolves."""
    wanted = 0.5e-3 if jax.default_backend() == "cpu" else 5e-3  # seconds
    one = statistics.median(copy(3) / 3 for _ in range(3))
    return min(max(math.ceil(wanted / one), 1), MAX_CALLS)


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
        floor = FLOOR_IN_COPIES if group.mode in GRADIENT_MODES else 0
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
