"""What a person sees: the machine and the tables."""

import contextlib
import datetime
import importlib.metadata
import itertools
import os
import pathlib
import platform
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from jaxbn.cli.bench.cases import FLOOR_IN_COPIES, GRADIENT_MODES
from jaxbn.cli.bench.layers import OURS
from jaxbn.cli.bench.measure import COPY
from jaxbn.cli.common import cell, table

if TYPE_CHECKING:
    from rich.table import Table

Rows = Sequence[Mapping[str, Any]]  # as `measure.summarize` describes them

COLUMNS = {  # heading: key of a row, and how it is written
    "ms": ("median_ms", ".3f"),
    "copies": ("copies", ".2f"),
    "over\njaxbn": ("over_jaxbn", ".2f"),
    "sizes\naccessed": ("sizes_accessed", ".2f"),
    "sizes\ntemp.": ("sizes_temp", ".2f"),
    "sizes\nkept": ("sizes_residual", ".2f"),
}


def machine(distributions: Iterable[str]) -> dict[str, Any]:
    """Return what the figures were made on; None for a version that is not known."""
    versions: dict[str, str | None] = dict.fromkeys(["jaxbn", "jax", "jaxlib"])
    for name in (*versions, *distributions):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    cpu = re.findall(r"model name\s*: (.*)", text) or [platform.processor()]
    return {
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


def machine_line(machine: Mapping[str, Any]) -> str:
    """Return the same for people."""
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    line = "{cpu}, {cores} cores; JAX on {backend} ({device}); Python {python}"
    return f"{line.format_map(machine)}, {versions}; {machine['date'][:10]}"


def geometric_means(rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """Return times over that of jaxbn, averaged over layers: contender, mode, dtype."""
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        others = row["contender"] not in (COPY, OURS) and row["over_jaxbn"]
        if others and row["mode"] in GRADIENT_MODES:
            key = row["contender"], row["mode"], row["dtype"]
            ratios.setdefault(key, []).append(row["over_jaxbn"])
    means: dict[str, Any] = {}
    for (name, mode, dtype), values in ratios.items():
        mean = statistics.geometric_mean(values)
        means.setdefault(name, {}).setdefault(mode, {})[dtype] = mean
    return means


def summary(content: Mapping[str, Any]) -> Iterator["Table | str"]:
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
