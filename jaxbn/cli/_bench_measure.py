"""Timing: every contender once in each round, in an order that changes."""

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.cli._bench_programs import Program
from jaxbn.cli._bench_suite import Case

# Times a number of calls; in seconds.
Timer = Callable[[int], float]

# Of x and dy.
Pairs = list[tuple[jax.Array, jax.Array]]

# More than the last-level cache of any GPU or TPU: inputs that do not fill it take
# turns with others that do. On a CPU they stay where they are, since what a layer reads
# was written just before; whether it is small enough for a cache is part of the case.
CACHE_BYTES = 2**27

# A sample is as many calls as take this long for the plain copy.
CPU_SAMPLE_SECONDS, DEVICE_SAMPLE_SECONDS = 0.5e-3, 5e-3
MAX_CALLS = 200

MIN_ROUNDS = 3


class Limits(NamedTuple):
    """When a group is done: after so many rounds, or seconds (and some rounds)."""

    rounds: int
    seconds: float


def inputs(case: Case, dtype: str, seed: int) -> Pairs:
    """Pairs of x and dy: one on a CPU, else enough not to find them in a cache."""
    num_sets = 1
    if jax.default_backend() != "cpu":
        num_bytes = 2 * math.prod(case.shape) * jnp.dtype(dtype).itemsize
        num_sets = math.ceil(CACHE_BYTES / num_bytes)
    generator = np.random.default_rng(seed)

    def draw() -> tuple[jax.Array, jax.Array]:
        x, dy = (generator.standard_normal(case.shape, np.float32) for _ in range(2))
        return jnp.asarray(2 * x + 1, dtype), jnp.asarray(dy, dtype)

    return [draw() for _ in range(num_sets)]


def timer(program: Program, pairs: Pairs) -> Timer:
    """The timer of a compiled program."""
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
    """How many calls make a sample that the clock resolves."""
    wanted = CPU_SAMPLE_SECONDS
    if jax.default_backend() != "cpu":
        wanted = DEVICE_SAMPLE_SECONDS
    copy(1)
    one = statistics.median(copy(3) / 3 for _ in range(3))
    return min(max(math.ceil(wanted / one), 1), MAX_CALLS)


def rounds(
    timers: Mapping[str, Timer],
    calls: int,
    limits: Limits,
    order: random.Random,
    interrupted: Callable[[], bool],
    failed: Callable[[str, Exception], None],
) -> Iterator[dict[str, float]]:
    """Seconds per call by contender, round by round; a round cut short is left out.

    A contender that fails is reported to `failed`, and is not asked again.
    """
    begun, names = time.monotonic(), list(timers)
    for done in range(limits.rounds):
        if done >= MIN_ROUNDS and time.monotonic() - begun > limits.seconds:
            return
        order.shuffle(names)
        sample = {}
        for name in tuple(names):
            if interrupted():
                return
            try:
                sample[name] = timers[name](calls) / calls
            except Exception as error:  # out of memory, say: of no concern to others
                names.remove(name)
                failed(name, error)
        yield sample
