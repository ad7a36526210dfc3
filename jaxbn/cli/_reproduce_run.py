"""One experiment, from the first network to the table and the file."""

import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
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

from jaxbn.cli import _digits, _files
from jaxbn.cli._reproduce_settings import EXPERIMENTS, Experiment, Variant
from jaxbn.cli._reproduce_training import Accuracies, train
from jaxbn.cli._run import deferred_interrupts


@dataclasses.dataclass(frozen=True)
class Row:
    """What a variant reached after some epoch."""

    variant: Variant
    epoch: int
    accuracies: Accuracies


def execute(name: str, seeds: int, epochs: int | None, file: Path) -> int:
    """Train all networks of an experiment, print and write.

    Returns:
      The exit code: 0, or 130 after Ctrl-C.

    Raises:
      CommandError: The file cannot be written.
    """
    _files.make_room(file)
    experiment = EXPERIMENTS[name]
    if epochs is not None:
        variants = (
            dataclasses.replace(each, epochs=min(epochs, each.epochs))
            for each in experiment.variants
        )
        experiment = dataclasses.replace(experiment, variants=tuple(variants))

    console = Console()
    say = functools.partial(
        console.print, markup=False, highlight=False, soft_wrap=True
    )
    with deferred_interrupts() as interrupted:
        rows = _train(experiment, seeds, console, interrupted)
        if rows:
            console.print(_table(experiment, rows, seeds))
            say(experiment.paper)
            say("Other networks, other data: compare the order of rows, not values.")
            _files.write(file, _to_json(name, experiment, seeds, rows))
            say(f"written: {file}")
        if not interrupted():
            return 0
        say("interrupted: that is what was finished until then")
        return 130


def _train(
    experiment: Experiment,
    seeds: int,
    console: Console,
    interrupted: Callable[[], bool],
) -> list[Row]:
    """The rows, until all is done or Ctrl-C."""
    digits = _digits.load()
    rows = []
    with Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
    ) as bar:
        total = sum(variant.epochs for variant in experiment.variants)
        task = bar.add_task("", total=total)
        for variant in experiment.variants:
            bar.update(task, description=f"{variant.group}: {variant.name}")
            measured = train(variant, digits, seeds, experiment.every_epoch)
            for epoch, accuracies in enumerate(measured, 1):
                bar.advance(task)
                if accuracies is not None:
                    rows.append(Row(variant, epoch, accuracies))
                if interrupted():
                    return rows
    return rows


def _cell(shares: Sequence[float]) -> str:
    """Mean, least and greatest, in per cent."""
    mean, least, most = (100 * f(shares) for f in (statistics.fmean, min, max))
    return f"{mean:.1f} ({least:.1f}–{most:.1f})"


def _table(experiment: Experiment, rows: Sequence[Row], seeds: int) -> Table:
    """One line for each row, a section for each group."""
    table = Table(
        title=experiment.title,
        caption=f"test accuracy in %: mean (least–greatest) of {seeds} seeds",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    table.add_column("epoch" if experiment.every_epoch else "")
    for heading in Accuracies._fields:
        table.add_column(heading, justify="right", no_wrap=True)
    for group, members in itertools.groupby(rows, lambda row: row.variant.group):
        table.add_section()
        table.add_row(group, style="bold")
        for row in members:
            label = row.variant.name
            if experiment.every_epoch:
                label = str(row.epoch)
            table.add_row(f"  {label}", *map(_cell, row.accuracies))
    return table


def _to_json(
    name: str, experiment: Experiment, seeds: int, rows: Sequence[Row]
) -> bytes:
    """All figures, those of each seed too."""

    def summary(shares: list[float]) -> dict[str, Any]:
        return {
            "mean": statistics.fmean(shares),
            "min": min(shares),
            "max": max(shares),
            "of_each_seed": shares,
        }

    expected = len(experiment.variants)
    if experiment.every_epoch:
        expected = sum(variant.epochs for variant in experiment.variants)
    content = {
        "experiment": name,
        "title": experiment.title,
        "paper": experiment.paper,
        "seeds": seeds,
        "complete": len(rows) == expected,
        "versions": {"jax": jax.__version__, "flax": flax.__version__},
        "device": jax.devices()[0].device_kind,
        "rows": [
            {
                "variant": dataclasses.asdict(row.variant),
                "epoch": row.epoch,
                "test_accuracy": {
                    name: summary(shares)
                    for name, shares in row.accuracies._asdict().items()
                },
            }
            for row in rows
        ],
    }
    return json.dumps(content, indent=1, allow_nan=False).encode()
