"""The picture of an inspection: a dot for each channel of each batch norm."""

import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxbn._models.inspection import (
    DEAD,
    EPSILON,
    SCALE_NEAR_ZERO,
    STD_IS_LOST,
    LayerStatistics,
)
from jaxbn.cli._inspect_report import name_of

# Okabe & Ito's colours, which differ for the colour-blind too.
BLUE, VERMILION, BLACK = "#0072B2", "#D55E00", "#000000"
LINES = ("--", ":")


class _Panel(NamedTuple):
    """One quantity of all layers: what is left of `floor` is drawn on it."""

    label: str
    values: Callable[[LayerStatistics], np.ndarray | None]
    floor: float
    limits: dict[str, float]


PANELS = (
    _Panel("KL(data || running), nats", lambda layer: layer.kl, 1e-6, {}),
    _Panel("|mean| / std", lambda layer: layer.mean_over_std, 1e-3, STD_IS_LOST),
    _Panel("running variance", lambda layer: layer.var, 1e-9, {"dead": DEAD * EPSILON}),
    _Panel(
        "|scale|",
        lambda layer: None if layer.scale is None else abs(layer.scale),
        1e-5,
        {"near 0": SCALE_NEAR_ZERO},
    ),
)


def picture(title: str, layers: Sequence[LayerStatistics]) -> bytes:
    """A dot for each channel, a row for each layer, as the bytes of a PNG."""
    panels = [
        panel
        for panel in PANELS
        if any(panel.values(layer) is not None for layer in layers)
    ]
    figure = Figure(
        figsize=(2 + 3 * len(panels), 1.8 + 0.3 * len(layers)), layout="constrained"
    )
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(columns, panels, strict=True):
        _draw(axes, panel, layers)
    names = [name_of(layer) for layer in layers]
    columns[0].set_yticks(range(len(layers)), names, parse_math=False)
    columns[0].set_ylim(len(layers) - 0.5, -0.5)  # the first row on top
    title = f"batch norms of {title}: a dot is a channel, a bar their mean"
    figure.suptitle(title, parse_math=False)  # a `$` is a `$`
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def _draw(axes: Axes, panel: _Panel, layers: Sequence[LayerStatistics]) -> None:
    # Only finite numbers have a place on an axis.
    for row, layer in enumerate(layers):
        values = panel.values(layer)
        if values is None:
            continue
        values = values[np.isfinite(values)]
        if values.size:
            shown = np.maximum(values, panel.floor)
            place = np.full(shown.shape, row)
            axes.scatter(shown, place, s=14, color=BLUE, alpha=0.45, linewidths=0)
            middle = max(float(values.mean()), panel.floor)
            axes.plot(middle, row, "|", color=BLACK, markersize=13, markeredgewidth=2)
    for (name, limit), line in zip(panel.limits.items(), LINES, strict=False):
        axes.axvline(limit, color=VERMILION, linestyle=line, label=name)
    axes.set(xlabel=panel.label, xscale="log")
    if panel.limits:
        axes.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=len(panel.limits),
            fontsize=8,
            frameon=False,
        )
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
