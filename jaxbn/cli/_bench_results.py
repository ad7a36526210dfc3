"""What came out: one row for each contender in each group, and bench.json."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxbn.cli._bench_peers import OURS, PEERS
from jaxbn.cli._bench_programs import Program
from jaxbn.cli._bench_suite import FLOOR_IN_COPIES, Group

COPY = "copy"

# What the chart shows and the summary averages.
AVERAGED_MODES = ("forward+backward", "chain")


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender in one group. The time is of a call, which may hold `num_layers`.

    Sizes are bytes over the bytes of x, and like `copies` for each layer. None is what
    is not known: XLA's counts for PyTorch, residuals where there is no gradient.
    """

    suite: str
    case: str
    shape: tuple[int, ...]
    axis: int
    dtype: str
    mode: str
    num_layers: int
    contender: str
    rounds: int
    calls_per_round: int
    median_ms: float
    quartiles_ms: tuple[float, float]
    copies: float | None
    over_jaxbn: float | None
    bytes_accessed: float | None
    sizes_accessed: float | None
    temp_bytes: int | None
    sizes_temp: float | None
    residual_bytes: int | None
    sizes_residual: float | None


class Failure(NamedTuple):
    """A contender that raised an error in a group, and is missing there."""

    contender: str
    group: str
    error: str


@dataclasses.dataclass
class Results:
    """All that is known so far."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    missing: dict[str, str]
    rows: list[Row] = dataclasses.field(default_factory=list)
    failures: list[Failure] = dataclasses.field(default_factory=list)
    # contender: {"jit": {mode: count}, "axis_name": {mode: count} or None}
    all_reduces: dict[str, Any] = dataclasses.field(default_factory=dict)
    interrupted: bool = False

    def to_json(self) -> bytes:
        """The content of bench.json."""
        content = dataclasses.asdict(self) | {
            "floor_in_copies": FLOOR_IN_COPIES,
            "geometric_means": geometric_means(self.rows),
            "failures": [failure._asdict() for failure in self.failures],
        }
        return json.dumps(content, indent=1, allow_nan=False).encode()


def rows(
    group: Group,
    samples: Sequence[Mapping[str, float]],
    calls: int,
    programs: Mapping[str, Program],
) -> list[Row]:
    """Summarize the rounds of a group.

    Args:
      group: The group.
      samples: Seconds per call by contender, round by round.
      calls: The number of calls in each.
      programs: Those of XLA, by contender.
    """
    # In the order of all tables, without those that failed on the way.
    names = [name for name in (COPY, *PEERS) if all(name in each for each in samples)]
    times = {name: sorted(each[name] for each in samples) for name in names}
    medians = {name: statistics.median(times[name]) for name in names}
    case = group.case
    x_bytes = math.prod(case.shape) * {"float32": 4, "bfloat16": 2}[group.dtype]

    def row(name: str) -> Row:
        found = programs.get(name)
        layers = 1 if name == COPY else group.num_layers

        def ratio(value: float | None, to: float | None) -> float | None:
            return None if value is None or to is None else value / to / layers

        accessed = found and found.bytes_accessed
        temp = found and found.temp_bytes
        residual = found and found.residual_bytes
        quarter = (len(samples) - 1) // 4
        over_jaxbn = None
        if OURS in medians:
            over_jaxbn = medians[name] / medians[OURS]
        return Row(
            suite=case.suite,
            case=case.name,
            shape=case.shape,
            axis=case.axis,
            dtype=group.dtype,
            mode=group.mode,
            num_layers=layers,
            contender=name,
            rounds=len(samples),
            calls_per_round=calls,
            median_ms=1000 * medians[name],
            quartiles_ms=(
                1000 * times[name][quarter],
                1000 * times[name][-1 - quarter],
            ),
            copies=ratio(medians[name], medians.get(COPY)),
            over_jaxbn=over_jaxbn,
            bytes_accessed=accessed,
            sizes_accessed=ratio(accessed, x_bytes),
            temp_bytes=temp,
            sizes_temp=ratio(temp, x_bytes),
            residual_bytes=residual,
            sizes_residual=ratio(residual, x_bytes),
        )

    return [row(name) for name in names]


def geometric_means(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Times over that of jaxbn, averaged over the layers.

    Returns:
      By contender, mode and dtype.
    """
    logs: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row.mode in AVERAGED_MODES and row.contender not in (COPY, OURS):
            key = row.contender, row.mode, row.dtype
            if row.over_jaxbn is not None:
                logs.setdefault(key, []).append(math.log(row.over_jaxbn))
    means: dict[str, dict[str, dict[str, float]]] = {}
    for (name, mode, dtype), each in logs.items():
        by_mode = means.setdefault(name, {})
        by_mode.setdefault(mode, {})[dtype] = math.exp(statistics.mean(each))
    return means
