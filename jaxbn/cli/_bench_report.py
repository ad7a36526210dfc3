"""What a person sees: the progress bar and the tables."""

import itertools
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from jaxbn.cli._bench_peers import OURS
from jaxbn.cli._bench_results import AVERAGED_MODES, COPY, Results, Row, geometric_means


def progress(console: Console) -> Progress:
    """A bar over all groups, with what is being measured beside it."""
    return Progress(
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
    )


def tables(results: Results) -> Iterator[Table]:
    """All tables, the summaries last."""
    for (suite, case, dtype), rows in itertools.groupby(
        results.rows, lambda row: (row.suite, row.case, row.dtype)
    ):
        yield _case(f"{suite}  {case}  {dtype}", list(rows))
    if results.all_reduces:
        yield _all_reduces(results)
    if geometric_means(results.rows):
        yield _means(results)


def failures(results: Results) -> Iterator[str]:
    """A line for each contender that failed, with its first error."""
    for name in dict.fromkeys(failure.contender for failure in results.failures):
        first, *others = (each for each in results.failures if each.contender == name)
        more = f" (and in {len(others)} more)" if others else ""
        yield f"{name} failed in {first.group}{more}: {first.error}"


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _table(title: str, *headings: str, caption: str | None = None) -> Table:
    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in headings:
        table.add_column(
            heading, justify="left" if heading in ("mode", "contender") else "right"
        )
    return table


def _case(title: str, rows: Sequence[Row]) -> Table:
    table = _table(
        title,
        "mode",
        "contender",
        "ms",
        "copies",
        "over\njaxbn",
        "sizes\naccessed",
        "sizes\ntemp.",
        "sizes\nkept",
    )
    for mode, group in itertools.groupby(rows, lambda row: row.mode):
        table.add_section()
        for row in group:
            table.add_row(
                mode,
                row.contender,
                _cell(row.median_ms, ".3f"),
                _cell(row.copies, ".2f"),
                "" if row.contender == COPY else _cell(row.over_jaxbn, ".2f"),
                _cell(row.sizes_accessed, ".1f"),
                _cell(row.sizes_temp, ".1f"),
                _cell(row.sizes_residual, ".1f"),
                style="bold" if row.contender == OURS else "",
            )
    return table


def _all_reduces(results: Results) -> Table:
    table = _table(
        "all-reduces over 2 devices that share a batch, in float32",
        "contender",
        "jit\nforward",
        "jit\nforward+backward",
        "axis_name\nforward",
        "axis_name\nforward+backward",
    )
    for name, ways in results.all_reduces.items():
        counts = (
            (ways[way] or {}).get(mode)
            for way in ("jit", "axis_name")
            for mode in ("forward", "forward+backward")
        )
        table.add_row(name, *(_cell(count, "d") for count in counts))
    return table


def _means(results: Results) -> Table:
    means = geometric_means(results.rows)
    columns = {  # in the order of the rows
        (row.mode, row.dtype): f"{row.mode}\n{row.dtype}"
        for row in results.rows
        if row.mode in AVERAGED_MODES
    }
    table = _table(
        "time over that of jaxbn",
        "contender",
        *columns.values(),
        caption="geometric means over the layers above; above 1, jaxbn is faster",
    )
    for name, by_mode in means.items():
        cells = (by_mode.get(mode, {}).get(dtype) for mode, dtype in columns)
        table.add_row(name, *(_cell(each, ".2f") for each in cells))
    return table
