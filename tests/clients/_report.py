"""What the scripts share: the flag --json, a progress bar, a table, and Ctrl-C."""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from jaxbn.cli.common import Parser

# One line of the table. The entry "holds", where there is one, says whether what is
# claimed of this line is so.
Row = Mapping[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flag that all scripts have."""
    parser = Parser(description=description)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to write the figures, too"
    )
    return parser


def report(
    rows: Iterable[Row],
    args: argparse.Namespace,
    *,
    total: int,
    title: str,
    packages: Iterable[str],
) -> int:
    """Show `rows` as they come, and then all in a table and in the file.

    Args:
        rows: Computed one by one; Ctrl-C ends that.
        args: What `parser` has read.
        total: How many rows there will be.
        title: Of the table.
        packages: Whose versions the file is to name, beside those of JAX and Flax.

    Returns:
        The exit code: 0; 1 if something claimed does not hold; 130 after Ctrl-C.
    """
    console, done, interrupted = Console(), [], False
    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    label = TextColumn("{task.description}", markup=False)
    try:
        with Progress(*columns, label, console=console) as bar:
            task = bar.add_task("", total=total)
            for row in rows:
                done.append(row)
                bar.update(task, advance=1, description=_line(row))
    except KeyboardInterrupt:
        interrupted = True
    if done:
        console.print(_table(title, done))
    if args.json:
        names = ("jax", "flax", *packages)
        content = {
            "title": title,
            "command": sys.argv,
            "complete": not interrupted,
            "versions": {name: importlib.metadata.version(name) for name in names},
            "rows": done,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1))
    if interrupted:
        console.print("interrupted: that is what was finished until then")
        return 130
    return 0 if all(row.get("holds", True) for row in done) else 1


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        # As it is read: 1234, 330.6, 0.1234, 1.234e-07.
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _line(row: Row) -> str:
    return ", ".join(_cell(value) for value in row.values())


def _table(title: str, rows: list[Row]) -> Table:
    headings = dict.fromkeys(name for row in rows for name in row)
    headings = sorted(headings, key=lambda heading: heading == "holds")
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False)
    for heading in headings:
        table.add_column(
            heading, justify="left" if heading == "what" else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*(_cell(row[h]) if h in row else "" for h in headings))
    return table
