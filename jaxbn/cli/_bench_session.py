"""Measuring: one group after another, in two processes."""

import dataclasses
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import jax

from jaxbn.cli import _bench_collectives, _bench_measure, _bench_programs
from jaxbn.cli._bench_measure import Limits, Pairs, Timer
from jaxbn.cli._bench_peers import PEERS
from jaxbn.cli._bench_programs import Program
from jaxbn.cli._bench_results import COPY, Failure, Results, rows
from jaxbn.cli._bench_suite import Case, Group
from jaxbn.cli._bench_worker import Worker

# Shows what is being done, and how far it is, in groups.
Show = Callable[[str, float], None]


@dataclasses.dataclass
class _Contenders:
    """What was made ready for one group."""

    timers: dict[str, Timer] = dataclasses.field(default_factory=dict)
    programs: dict[str, Program] = dataclasses.field(default_factory=dict)


class Session:
    """Adds rows to `results`, until all is done or Ctrl-C.

    A context manager, for the process of PyTorch that may belong to it.
    """

    def __init__(
        self,
        peers: Sequence[str],
        results: Results,
        limits: Limits,
        seed: int,
        interrupted: Callable[[], bool],
    ):
        self.peers = peers
        self.results = results
        self.limits = limits
        self.seed = seed
        self.interrupted = interrupted
        self.order = random.Random(seed)
        self.last_inputs = None
        self.worker = Worker() if "torch" in peers else None

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.worker is not None:
            self.worker.close()

    def run(self, groups: Sequence[Group], show: Show) -> Iterator[None]:
        """Measure these groups, then count all-reduces; stop after each of them."""
        for done, group in enumerate(groups):
            if self.interrupted():
                return
            # The module is the function in another dress: one layer shows it.
            peers = [
                name
                for name in self.peers
                if name != "jaxbn-linen" or group.case == groups[0].case
            ]
            self._measure(group, peers, done, show)
            yield
        show("all-reduces", len(groups))
        self._count_all_reduces()
        yield

    def _measure(
        self, group: Group, peers: Sequence[str], done: int, show: Show
    ) -> None:
        def failed(name: str, error: Exception) -> None:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            self.results.failures.append(Failure(name, str(group), message[:300]))

        pairs = self._inputs(group.case, group.dtype)
        ready = _Contenders()
        for i, name in enumerate([COPY, *peers]):
            if self.interrupted():
                return
            show(f"{group}: {name}", done + 0.5 * i / (1 + len(peers)))
            try:
                self._prepare(name, group, pairs, ready)
            except Exception as error:  # anything that a library may raise
                failed(name, error)

        calls = 1
        if COPY in ready.timers:
            calls = _bench_measure.calls_per_sample(ready.timers[COPY])
        samples = []
        for sample in _bench_measure.rounds(
            ready.timers, calls, self.limits, self.order, self.interrupted, failed
        ):
            samples.append(sample)
            share = len(samples) / self.limits.rounds
            show(f"{group}: round {len(samples)}", done + 0.5 + 0.5 * share)
        if samples:
            self.results.rows += rows(group, samples, calls, ready.programs)

    def _prepare(
        self, name: str, group: Group, pairs: Pairs, ready: _Contenders
    ) -> None:
        """Compile a contender and call it once."""
        if name == "torch":
            if self.worker is not None and self.worker.alive:
                self.worker.build(group, self.seed)
                ready.timers[name] = self.worker.seconds
            return
        x, dy = pairs[0]
        with warnings.catch_warnings(action="ignore"):
            program = _program(name, group, x)
        jax.block_until_ready(program.call(x, dy))
        ready.programs[name] = program
        ready.timers[name] = _bench_measure.timer(program, pairs)

    def _inputs(self, case: Case, dtype: str) -> Pairs:
        """Those of the group before, if it has the same."""
        if self.last_inputs is None or self.last_inputs[:2] != (case, dtype):
            self.last_inputs = None  # freed before there are others
            pairs = _bench_measure.inputs(case, dtype, self.seed)
            self.last_inputs = case, dtype, pairs
        return self.last_inputs[2]

    def _count_all_reduces(self) -> None:
        mesh = _bench_collectives.two_devices()
        if mesh is None:
            return
        for name in self.peers:
            build = PEERS[name].build
            if build is None or self.interrupted():
                continue
            with warnings.catch_warnings(action="ignore"):
                self.results.all_reduces[name] = {
                    way: _bench_collectives.all_reduces(build, mesh, named=named)
                    for way, named in (("jit", False), ("axis_name", True))
                }


def _program(name: str, group: Group, x: jax.Array) -> Program:
    if name == COPY:
        return _bench_programs.copy(x)
    build = PEERS[name].build
    assert build is not None
    return _bench_programs.program(build, group, x)
