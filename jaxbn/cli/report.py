"""What `train` shows at its end: the table and the learning curves."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

# Okabe & Ito's colours, which differ for the colour-blind too; and line styles, for
# print in grey and for two curves that coincide (jaxbn and flax do).
STYLES = {
    "jaxbn": {"color": "#0072B2", "linestyle": "-"},
    "none": {"color": "#D55E00", "linestyle": "--"},
    "flax": {"color": "#000000", "linestyle": ":"},
}


def table(metrics: Mapping[str, Any]) -> Table:
    """Return a row for each norm, with a dash for what is None."""
    columns = {
        "test accuracy,\nrunning statistics": ".2%",
        "test accuracy,\nbatch statistics": ".2%",
        "steps\nto 90 %": "d",
        "median ms\nper step": ".2f",
    }
    rows = Table("norm")
    for heading in columns:
        rows.add_column(heading, justify="right")
    for norm, row in metrics["results"].items():
        cells = zip(row.values(), columns.values(), strict=False)
        rows.add_row(norm, *("–" if x is None else f"{x:{form}}" for x, form in cells))
    return rows


def curves(metrics: Mapping[str, Any]) -> bytes:
    """Draw test accuracy and training loss against steps, as the bytes of a PNG."""
    settings, every = metrics["settings"], metrics["test_accuracy_every"]
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for norm, row in metrics["results"].items():
        style: dict[str, Any] = {**STYLES[norm], "label": norm, "linewidth": 1.8}
        shares = 100 * np.asarray(row["test_accuracy"])
        above.plot(every * np.arange(len(shares)), shares, **style)
        whole = len(row["training_loss"]) // every
        losses = np.asarray(row["training_loss"])[: whole * every]
        means = losses.reshape(whole, every).mean(1)
        below.plot(every * (np.arange(whole) + 0.5), means, **style)
    above.axhline(90, color="0.6", linewidth=0.8)
    title = "{model} on {data}, seed {seed}".format_map(settings)
    above.set(title=title, ylabel="test accuracy (%)", ylim=(0, 102))
    below.set(xlabel=f"steps (batches of {settings['batch_size']})")
    below.set(ylabel=f"training loss (nats, mean of {every} steps)")
    below.set_ylim(bottom=0)
    above.legend(title="norm")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()
