"""What a person sees: the machine, the tables and the chart."""

import datetime
import functools
import importlib.metadata
import io
import itertools
import os
import pathlib
import platform
import re
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from jaxbn.cli.bench.cases import FLOOR_IN_COPIES, GRADIENT_MODES
from jaxbn.cli.bench.layers import OURS
from jaxbn.cli.bench.measure import COPY

Rows = Sequence[Mapping[str, Any]]  # as `measure.summarize` describes them

COLUMNS = {  # heading: key of a row
    "ms": "median_ms",
    "copies": "copies",
    "over\njaxbn": "over_jaxbn",
    "sizes\naccessed": "sizes_accessed",
    "sizes\ntemp.": "sizes_temp",
    "sizes\nkept": "sizes_residual",
}
TOP = 16  # in copies; a bar that is longer ends here


def machine(distributions: Iterable[str]) -> dict[str, Any]:
    """Return what the figures were made on; None for a version that is not known."""
    versions: dict[str, str | None] = {}
    for name in ("jaxbn", "jax", "jaxlib", *distributions):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None  # run from a folder, say
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
    ratios: dict[str, Any] = {}
    for row in rows:
        ours = row["contender"] in (COPY, OURS) or not row["over_jaxbn"]
        if row["mode"] in GRADIENT_MODES and not ours:
            of_mode = ratios.setdefault(row["contender"], {}).setdefault(
                row["mode"], {}
            )
            of_mode.setdefault(row["dtype"], []).append(row["over_jaxbn"])
    mean = functools.partial(jax.tree.map, statistics.geometric_mean)
    return mean(ratios, is_leaf=lambda node: isinstance(node, list))


def summary(content: Mapping[str, Any]) -> Iterator[Table | str]:
    """Yield what is printed of the content of bench.json: the tables, then lines."""
    rows, all_reduces = content["rows"], content["all_reduces"]
    for layer, of_layer in itertools.groupby(
        rows, lambda row: f"{row['suite']}  {row['case']}  {row['dtype']}"
    ):
        table = _table(layer, ("mode", "contender", *COLUMNS))
        for mode, group in itertools.groupby(of_layer, lambda row: row["mode"]):
            table.add_section()
            for row in group:
                cells = [_cell(row[key], 2) for key in COLUMNS.values()]
                cells[0] = _cell(row["median_ms"], 3) + ("" if row["trusted"] else "?")
                style = "bold" if row["contender"] == OURS else ""
                table.add_row(mode, row["contender"], *cells, style=style)
        yield table

    if any(way for ways in all_reduces.values() for way in ways.values()):
        modes = ("forward", "forward+backward")
        columns = [*itertools.product(("jit", "axis_name"), modes)]
        title = "all-reduces over 2 devices that share a batch, in float32"
        table = _table(title, ("contender", *map("\n".join, columns)))
        for name, ways in all_reduces.items():
            counts = ((ways[way] or {}).get(mode) for way, mode in columns)
            table.add_row(name, *(_cell(count, 0) for count in counts))
        yield table

    columns = dict.fromkeys((row["mode"], row["dtype"]) for row in rows)
    columns = [each for each in columns if each[0] in GRADIENT_MODES]
    if means := geometric_means(rows):
        title = "time over jaxbn's, mean over layers"
        table = _table(title, ("contender", *map("\n".join, columns)))
        for name, of_name in means.items():
            ratios = (of_name.get(mode, {}).get(dtype) for mode, dtype in columns)
            table.add_row(name, *(_cell(each, 2) for each in ratios))
        yield table

    for failure in content["failures"]:
        yield "{contender} failed in {group}: {error}".format_map(failure)
    if busy := sum(not row["trusted"] for row in rows):
        yield (
            f"{busy} of {len(rows)} rows have a ?: the machine was too busy to trust "
            "them. Times differ from round to round by more than a third, or are below "
            f"the floor of {FLOOR_IN_COPIES} copies."
        )


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(title: str, headings: Collection[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        text = heading in ("mode", "contender")
        table.add_column(heading, justify="left" if text else "right")
    return table


def chart(rows: Rows, machine: Mapping[str, Any]) -> bytes | None:
    """Draw forward + backward in copies as a PNG, or None if there is none of it."""
    rows = [row for row in rows if row["mode"] == "forward+backward"]
    if not rows:
        return None
    dtypes, layers, names = (
        [*dict.fromkeys(row[key] for row in rows)]
        for key in ("dtype", "case", "contender")
    )
    size = (max(8, 1 + 0.9 * len(layers)), 1.8 + 2.7 * len(dtypes))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(dtypes), 1, squeeze=False)[:, 0]
    pale = []
    ticks = [layer.replace(", ", "\n") for layer in layers]
    for dtype, axes in zip(dtypes, panels, strict=True):
        for i, name in enumerate(names[1:]):  # without the copy
            some = [r for r in rows if (r["dtype"], r["contender"]) == (dtype, name)]
            at = [
                layers.index(row["case"]) + (i + 1) / len(names) - 0.5 for row in some
            ]
            heights = [row["copies"] for row in some]
            bars = axes.bar(at, heights, 0.9 / len(names), color=f"C{i}", label=name)
            pale += [bar for bar, r in zip(bars, some, strict=True) if not r["trusted"]]
        axes.axhline(FLOOR_IN_COPIES, color="0.3", linestyle="--")
        axes.set(ylim=(0, TOP), ylabel=f"{dtype}: time in copies of x")
        axes.set_xticks(range(len(layers)), ticks, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    device = machine["cpu" if machine["backend"] == "cpu" else "device"]
    title = f"batch norm, forward + backward, on {device}\n"
    title += f"dashed: the floor; pale: the machine was busy; above {TOP}: cut"
    handles = panels[0].get_legend_handles_labels()
    place = {"loc": "outside upper center", "ncols": 5, "frameon": False}
    figure.legend(*handles, **place, title=title)
    for bar in pale:  # after the legend, which copies the bars
        bar.set_alpha(0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()
