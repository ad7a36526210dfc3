"""`jaxbn bench`: beside other libraries, against a floor."""

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import os
import platform
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxbn.cli import common
from jaxbn.cli.bench import cases, layers, measure
from jaxbn.cli.bench.cases import FLOOR_IN_COPIES, INFERENCE
from jaxbn.cli.bench.layers import COPY, OURS, PEERS
from jaxbn.cli.common import cell, table

DESCRIPTION = """\
Measure jaxbn beside every batch norm that is installed, on the current backend, over
layers as they occur. All are compiled beforehand and called in turn, in an order that
changes from round to round. Medians are shown.

columns:
  ms        of one call, which returns all that a training step would use;
            with a ? the machine was too busy to trust the row
  copies    the time over that of x * a + b in the same rounds, for each layer. The
            floor of forward + backward is 4, where x does not fit a cache: x is read
            4 times, dy twice, y and dx are written, and a copy is one of each
  over jaxbn       the time over jaxbn's: more than 1 is slower than jaxbn
  sizes accessed   the bytes that XLA counts in all operations, over those of x (on the
                   CPU it counts a whole x for the part whose mean jaxbn takes first)
  sizes temp.      the bytes of temporaries, over those of x
  sizes kept       the bytes that JAX keeps for the backward pass, over those of x

examples:
  jaxbn bench --quick                         a minute or so
  jaxbn bench --suite critic --peers flax-fast --mode forward+backward inference

Ctrl-C prints and writes the layers that were measured until then.
"""

# Rounds, and the seconds after which a slow group gets no more.
QUICK_LIMITS, LIMITS = (9, 1.5), (25, 2.5)

COLUMNS = {  # heading: key of a row, and how it is written
    "ms": ("median_ms", ".3f"),
    "copies": ("copies", ".2f"),
    "over\njaxbn": ("over_jaxbn", ".2f"),
    "sizes\naccessed": ("sizes_accessed", ".2f"),
    "sizes\ntemp.": ("sizes_temp", ".2f"),
    "sizes\nkept": ("sizes_residual", ".2f"),
}


def add_arguments(parser: common.Parser) -> None:
    """Add the flags."""

    def several(flag: str, names: Iterable[str], default: Iterable[str], text: str):
        help = f"{text} (default: all): {', '.join(names)}"
        choices = {"nargs": "+", "choices": [*names], "default": [*default]}
        parser.add_argument(flag, metavar="NAME", help=help, **choices)

    peers = [name for name in PEERS if name != OURS]
    several("--suite", cases.SUITES, cases.SUITES[:-1], "layers, tiny only if named")
    several("--peers", peers, peers, "libraries beside jaxbn")
    several("--dtype", cases.DTYPES, cases.DTYPES, "dtypes of x")
    modes = "what one call computes; chain is eight layers, the nearest to a real model"
    several("--mode", cases.MODES, (), modes)
    parser.add_number("--rounds", "rounds of calls (default: as many as fit in 2.5 s)")
    text = "few layers, few rounds, and the modes with gradients"
    parser.add_argument("--quick", action="store_true", help=text)
    text = "where to write all figures (default: %(default)s)"
    file = Path("runs", "bench", "bench.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help=text, default=file)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    modes = [each for each in cases.MODES if each != INFERENCE or not args.quick]
    args.mode = args.mode or modes
    groups = cases.groups(args.suite, args.dtype, args.mode, quick=args.quick)
    if not groups:
        raise common.CommandError("there is nothing to measure: no layer has this mode")
    common.make_room("--json", args.json)
    common.first_line(f"measuring {len(groups)} groups: a layer, its dtype and a mode")
    measure.keep_freed_memory()
    common.virtual_devices(2)  # to count all-reduces; one of them has all threads
    found, missing = layers.find([OURS, *args.peers])
    out = common.console()
    machine = machine_of(out, {PEERS[name].distribution for name in found})
    if "torch" in found and machine["backend"] != "cpu":
        found.remove("torch")
        missing["torch"] = "timed on the CPU only, and JAX is not on the CPU here"
    for name, reason in missing.items():
        out.print(f"without {name}: {reason}")

    rounds, seconds = QUICK_LIMITS if args.quick else LIMITS
    if args.rounds:
        rounds, seconds = args.rounds, float("inf")
    content: dict[str, Any] = {"machine": machine, "missing": missing}
    content["settings"] = {
        name: getattr(args, name)
        for name in ("suite", "peers", "dtype", "mode", "quick", "rounds")
    }
    content |= {"floor_in_copies": FLOOR_IN_COPIES, "interrupted": False}
    content |= {"rows": [], "failures": [], "all_reduces": {}}
    # Ctrl-C counts at each `show`: raised inside JAX, it can crash the process.
    with common.deferred_interrupts() as interrupted, common.progress(out) as bar:
        task = bar.add_task("measuring", total=len(groups), seen="")

        def show(text: str) -> None:
            if interrupted():
                raise KeyboardInterrupt
            bar.update(task, seen=text)

        try:
            for group in groups:
                rows, failures = measure.measure(group, found, rounds, seconds, show)
                content["rows"] += rows
                content["failures"] += failures
                content["geometric_means"] = geometric_means(content["rows"])
                common.write_json(args.json, content)
                bar.advance(task)
            for name in found:
                show(f"counting all-reduces of {name}")
                if build := PEERS[name].build:
                    content["all_reduces"][name] = {
                        "jit": measure.all_reduces(build, named=False),
                        "axis_name": measure.all_reduces(build, named=True),
                    }
        except KeyboardInterrupt:
            if not content["rows"]:
                raise
    content["interrupted"] = bool(interrupted())
    common.write_json(args.json, content)
    out.print(*summary(content), sep="\n")
    out.print(f"all figures are in {args.json}")
    if content["interrupted"]:
        out.print("interrupted: that is what was measured until then")
    return interrupted()


def machine_of(console: Any, distributions: Iterable[str]) -> dict[str, Any]:
    """Print and return what figures are made on; None for an unknown version."""
    names = ("jaxbn", "jax", "jaxlib", *distributions)
    versions: dict[str, str | None] = dict.fromkeys(names)
    for name in versions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    cpu = re.findall(r"model name\s*: (.*)", text) or [platform.processor()]
    machine = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": cpu[0] or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # of the last minute
        "system": platform.platform(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": versions,
    }
    line = "{cpu}, {cores} cores; JAX on {backend} ({device}); Python {python}"
    packages = ", ".join(f"{k} {v}" for k, v in versions.items())
    console.print(f"{line.format_map(machine)}, {packages}; {machine['date'][:10]}")
    return machine


def geometric_means(rows: list[Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Return times over that of jaxbn, averaged over layers: contender, mode, dtype."""
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        others = row["contender"] not in (COPY, OURS) and row["over_jaxbn"]
        if others and row["mode"] != INFERENCE:
            key = row["contender"], row["mode"], row["dtype"]
            ratios.setdefault(key, []).append(row["over_jaxbn"])
    means: dict[str, Any] = {}
    for (name, mode, dtype), values in ratios.items():
        mean = statistics.geometric_mean(values)
        means.setdefault(name, {}).setdefault(mode, {})[dtype] = mean
    return means


def summary(content: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what is printed of the content of bench.json: the tables, then lines."""
    rows = content["rows"]
    for layer, of_layer in itertools.groupby(
        rows, lambda row: f"{row['suite']}  {row['case']}  {row['dtype']}"
    ):
        made = table("mode", "contender", *COLUMNS, words=2, title=layer)
        for mode, group in itertools.groupby(of_layer, lambda row: row["mode"]):
            made.add_section()
            for row in group:
                cells = [cell(row[key], form) for key, form in COLUMNS.values()]
                cells[0] += "" if row["trusted"] else "?"
                style = "bold" if row["contender"] == OURS else ""
                made.add_row(mode, row["contender"], *cells, style=style)
        yield made

    for title, figures, form in (
        ("all-reduces over 2 devices that share a batch", content["all_reduces"], "d"),
        ("time over jaxbn's, mean over layers", content["geometric_means"], ".2f"),
    ):
        columns = dict.fromkeys(
            (above, below)
            for of_name in figures.values()
            for above, inner in of_name.items()
            for below in inner or ()
        )
        made = table("contender", *map("\n".join, columns), title=title)
        for name, of_name in figures.items():
            found = ((of_name.get(above) or {}).get(below) for above, below in columns)
            made.add_row(name, *(cell(each, form) for each in found))
        if columns:
            yield made

    for failure in content["failures"]:
        yield "{contender} failed in {group}: {error}".format_map(failure)
    if busy := sum(not row["trusted"] for row in rows):
        yield (
            f"{busy} of {len(rows)} rows have a ?: the machine was too busy to trust "
            "them. Times differ from round to round by more than a third, or are below "
            f"the floor of {FLOOR_IN_COPIES} copies."
        )
