"""One run, from what is installed to the tables and files."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxbn.cli import (
    _bench_chart,
    _bench_collectives,
    _bench_machine,
    _bench_memory,
    _bench_report,
)
from jaxbn.cli._bench_measure import Limits
from jaxbn.cli._bench_peers import PEERS, find
from jaxbn.cli._bench_results import Results
from jaxbn.cli._bench_session import Session
from jaxbn.cli._bench_suite import Group
from jaxbn.cli._files import make_room, write
from jaxbn.cli._run import deferred_interrupts


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked for."""

    groups: list[Group]
    peers: list[str]
    limits: Limits
    seed: int
    json: Path
    png: Path
    settings: dict[str, Any]  # the flags, for bench.json


def execute(plan: Plan) -> int:
    """Measure, print and write.

    Returns:
      The exit code: 0, or 130 after Ctrl-C.

    Raises:
      CommandError: A file cannot be written.
    """
    for path in (plan.json, plan.png):
        make_room(path)
    _bench_memory.keep_freed_memory()
    _bench_collectives.ask_for_two_cpu_devices()
    found, missing = find(plan.peers)
    if "torch" in found and jax.default_backend() != "cpu":
        found.remove("torch")
        missing["torch"] = "timed on the CPU only, and JAX is not on the CPU here"
    machine = _bench_machine.describe(PEERS[name].distribution for name in found)
    results = Results(machine, plan.settings, missing)

    console = Console()
    say = functools.partial(
        console.print, markup=False, highlight=False, soft_wrap=True
    )
    say(_bench_machine.line(machine))
    for name, reason in missing.items():
        say(f"without {name}: {reason}")
    with deferred_interrupts() as interrupted:
        with (
            Session(found, results, plan.limits, plan.seed, interrupted) as session,
            _bench_report.progress(console) as bar,
        ):
            task = bar.add_task("", total=len(plan.groups))

            def show(description: str, completed: float) -> None:
                bar.update(task, description=description, completed=completed)

            for _ in session.run(plan.groups, show):
                results.interrupted = interrupted()
                if results.rows:
                    write(plan.json, results.to_json())
        for table in _bench_report.tables(results):
            console.print(table)
        for failure in _bench_report.failures(results):
            say(failure)
        if png := _bench_chart.chart(results.rows, machine["device"]):
            write(plan.png, png)
            say(f"the chart is {plan.png}")
        if results.rows:
            say(f"all figures are in {plan.json}")
        if not results.interrupted:
            return 0
        say("interrupted: that is what was measured until then")
        return 130
