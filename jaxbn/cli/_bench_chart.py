"""The chart: forward + backward against the floor."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxbn.cli._bench_results import AVERAGED_MODES, COPY, Row
from jaxbn.cli._bench_suite import FLOOR_IN_COPIES

# Okabe & Ito's colours, which differ for the colour-blind too, and a grey.
COLORS = {
    "jaxbn": "#0072B2",
    "jaxbn-linen": "#56B4E9",
    "flax-fast": "#E69F00",
    "flax-stable": "#D55E00",
    "nnx": "#F0E442",
    "haiku": "#009E73",
    "equinox": "#CC79A7",
    "keras": "#BBBBBB",
    "torch": "#777777",
}

# Legible on white and on black, as the background is transparent.
INK = "#808080"

# In copies; a bar that is longer ends here, with its value on it.
TOP = 16

WIDTH = 0.095  # of a bar; there is room for ten in a layer
FLOOR: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": "--"}


def chart(rows: Sequence[Row], device: str) -> bytes | None:
    """Bars in copies, one panel for each dtype, as the bytes of a PNG.

    Returns:
      The PNG; None where no gradients were timed beside a copy.
    """
    rows = [
        row
        for row in rows
        if row.mode in AVERAGED_MODES and row.contender != COPY and row.copies
    ]
    if not rows:
        return None
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    layers = list(dict.fromkeys(_label(row) for row in rows))
    figure = Figure(
        figsize=(max(7, 1 + 0.85 * len(layers)), 1.4 + 2.7 * len(dtypes)),
        layout="constrained",
        facecolor="none",
    )
    panels = figure.subplots(len(dtypes), 1, sharex=True, squeeze=False)[:, 0]
    for dtype, axes in zip(dtypes, panels, strict=True):
        of_dtype = [row for row in rows if row.dtype == dtype]
        _draw(axes, of_dtype, layers)
        axes.set_ylabel(f"{dtype}: time in copies of x", color=INK)
    panels[-1].set_xticks(range(len(layers)), layers, fontsize=8)
    panels[-1].set_xlabel("layer: shape of x (features last unless said)", color=INK)
    names = [name for name in COLORS if any(row.contender == name for row in rows)]
    handles: list[Artist] = [Patch(color=COLORS[name], label=name) for name in names]
    handles.append(Line2D([], [], **FLOOR, label=f"floor: {FLOOR_IN_COPIES} copies"))
    legend = figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=5 if len(layers) < 9 else len(handles),
        frameon=False,
        labelcolor=INK,
        title=f"batch norm, forward + backward, on {device}",
    )
    legend.get_title().set_color(INK)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def _draw(axes: Axes, rows: Sequence[Row], layers: Sequence[str]) -> None:
    """The bars of one panel, side by side for each layer."""
    top = min(max(1.08 * (row.copies or 0) for row in rows), TOP)
    for at, layer in enumerate(layers):
        beside = [row for row in rows if _label(row) == layer]
        for i, row in enumerate(beside):
            middle = at + WIDTH * (i - (len(beside) - 1) / 2)
            copies = row.copies or 0
            axes.bar(middle, min(copies, top), WIDTH, color=COLORS[row.contender])
            if copies > top:
                how = {
                    "color": INK,
                    "fontsize": 7,
                    "ha": "center",
                    "va": "bottom",
                    "rotation": 90,
                }
                axes.text(middle, top, f"{copies:.0f}", **how)
    axes.axhline(FLOOR_IN_COPIES, **FLOOR)
    axes.set(xlim=(-0.6, len(layers) - 0.4), ylim=(0, top))
    axes.set_facecolor("none")
    axes.tick_params(colors=INK)
    axes.spines[:].set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)


def _label(row: Row) -> str:
    """The shape in two lines, and what is special."""
    sizes = [str(size) for size in row.shape]
    half = (len(sizes) + 1) // 2
    lines = ["×".join(sizes[:half]) + "×", "×".join(sizes[half:])]
    if row.axis != -1:
        lines.append(f"axis {row.axis}")
    if row.num_layers > 1:
        lines.append(f"each of {row.num_layers}")
    return "\n".join(lines)
