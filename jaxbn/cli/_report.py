"""What a person sees: the progress bar, the table and the learning curves."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from jaxbn.cli._results import Result
from jaxbn.cli._settings import Settings
from jaxbn.cli._training import MEASURE_EVERY, Network

# Okabe & Ito's colours, which differ for the colour-blind too; and line styles, for
# print in grey and for two curves that coincide (jaxbn and flax do).
STYLES = {
    "jaxbn": {"color": "#0072B2", "linestyle": "-"},
    "none": {"color": "#D55E00", "linestyle": "--"},
    "flax": {"color": "#000000", "linestyle": ":"},
}


class Bars(Progress):
    """Live bars, one for each norm, with loss and accuracy beside the steps."""

    def __init__(self, console: Console):
        super().__init__(
            TextColumn("{task.description:>5}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[seen]}"),
            TimeElapsedColumn(),
            console=console,
        )

    def add(self, norm: str, steps: int) -> Callable[[Network], None]:
        """Add a bar.

        Args:
          norm: Its name.
          steps: The number of steps at which it is full.

        Returns:
          A function that shows in it how far a network has come.
        """
        task = self.add_task(norm, total=steps, seen="compiling")

        def show(network: Network) -> None:
            if network.losses:
                loss, share = network.losses[-1], network.accuracies[-1]
                self.update(task, seen=f"loss {loss:.3f}  test {share:.1%}")
            self.update(task, completed=network.step)

        return show


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
            cell(result.test_accuracy_running_statistics, ".2%"),
            cell(result.test_accuracy_batch_statistics, ".2%"),
            cell(result.steps_to_90_percent, "d"),
            cell(result.median_ms_per_step, ".2f"),
        )
    return rows


def curves(settings: Settings, results: Mapping[str, Result]) -> bytes:
    """Test accuracy and training loss against steps, as the bytes of a PNG."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for norm, result in results.items():
        style: dict[str, Any] = {**STYLES[norm], "label": norm, "linewidth": 1.8}
        above.plot(
            MEASURE_EVERY * np.arange(len(result.test_accuracy)),
            100 * np.asarray(result.test_accuracy),
            **style,
        )
        whole = len(result.training_loss) // MEASURE_EVERY
        losses = np.asarray(result.training_loss[: whole * MEASURE_EVERY])
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
