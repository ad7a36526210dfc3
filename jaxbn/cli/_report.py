"""What a person sees: the progress bar, the table and the learning curves."""

import dataclasses
import io
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as ProgressBars
from rich.table import Table

from jaxbn.cli._digits import Digits
from jaxbn.cli._settings import Settings
from jaxbn.cli._training import MEASURE_EVERY, Progress, Trainer

# Okabe & Ito's colours, which differ for the colour-blind too; and line styles, for
# print in grey and for two curves that coincide (jaxbn and flax do).
STYLES = {
    "jaxbn": {"color": "#0072B2", "linestyle": "-"},
    "none": {"color": "#D55E00", "linestyle": "--"},
    "flax": {"color": "#000000", "linestyle": ":"},
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table, and its curves."""

    steps: int
    test_accuracy_running: float
    test_accuracy_batch: float | None
    steps_to_90_percent: int | None
    ms_per_step: float | None
    losses: list[float]
    accuracies: list[float]


def summarize(trainer: Trainer, progress: Progress, digits: Digits) -> Result:
    """Measure a network that has come as far as it will."""
    batch = None
    if progress.state.batch_stats:
        batch = trainer.measure(progress, digits, batch=True)
    good = [i for i, accuracy in enumerate(progress.accuracies) if accuracy >= 0.9]
    seconds = progress.seconds[1:]  # the first step compiles
    return Result(
        steps=progress.step,
        test_accuracy_running=trainer.measure(progress, digits),
        test_accuracy_batch=batch,
        steps_to_90_percent=MEASURE_EVERY * good[0] if good else None,
        ms_per_step=1000 * statistics.median(seconds) if seconds else None,
        losses=progress.losses,
        accuracies=progress.accuracies,
    )


def progress_bars(console: Console) -> ProgressBars:
    """Bars that show loss and accuracy beside the steps."""
    columns: list[ProgressColumn] = [
        TextColumn("{task.description:>5}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  test {task.fields[accuracy]:.1%}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    return ProgressBars(*columns, console=console)


def table(results: Mapping[str, Result]) -> Table:
    """One row for each norm."""

    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    rows = Table(caption="ms per step: the median, without compilation")
    rows.add_column("norm")
    for heading in (
        "steps",
        "test accuracy,\nrunning statistics",
        "test accuracy,\nbatch statistics",
        "steps\nto 90 %",
        "ms per\nstep",
    ):
        rows.add_column(heading, justify="right")
    for norm, result in results.items():
        rows.add_row(
            norm,
            str(result.steps),
            cell(result.test_accuracy_running, ".2%"),
            cell(result.test_accuracy_batch, ".2%"),
            cell(result.steps_to_90_percent, "d"),
            cell(result.ms_per_step, ".2f"),
        )
    return rows


def curves(settings: Settings, results: Mapping[str, Result]) -> bytes:
    """Test accuracy and training loss against steps, as the bytes of a PNG."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for norm, result in results.items():
        style: dict[str, Any] = {**STYLES[norm], "label": norm, "linewidth": 1.8}
        above.plot(
            MEASURE_EVERY * np.arange(len(result.accuracies)),
            100 * np.asarray(result.accuracies),
            **style,
        )
        whole = len(result.losses) // MEASURE_EVERY
        losses = np.asarray(result.losses[: whole * MEASURE_EVERY])
        below.plot(
            MEASURE_EVERY * (np.arange(whole) + 0.5),
            losses.reshape(whole, MEASURE_EVERY).mean(1),
            **style,
        )
    above.axhline(90, color="0.6", linewidth=0.8)
    above.set(
        title=f"{settings.model} on 8 x 8 digits, seed {settings.seed}",
        ylabel="test accuracy (%)",
        ylim=(0, 102),
    )
    below.set(
        xlabel=f"steps (batches of {settings.batch_size})",
        ylabel=f"training loss (nats, mean of {MEASURE_EVERY} steps)",
    )
    below.set_ylim(bottom=0)
    above.legend(title="norm")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()
