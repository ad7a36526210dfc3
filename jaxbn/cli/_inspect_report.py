"""What a person sees of an inspection: the table, the verdict and the picture."""

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from jaxbn._layer_statistics import (
    DEAD,
    EPSILON,
    LARGEST_KL,
    SCALE_NEAR_ZERO,
    STD_IS_LOST,
    Channel,
    LayerStatistics,
)
from jaxbn.cli._arguments import printable

# Okabe & Ito's colours, which differ for the colour-blind too.
BLUE, VERMILION, BLACK = "#0072B2", "#D55E00", "#000000"
LINES = ("--", ":")


def _channel(channel: Channel | None) -> str:
    return "–" if channel is None else ", ".join(map(str, channel))


def _name(layer: LayerStatistics) -> str:
    """As in the file, which may be anybody's."""
    return printable(layer.name)


def _flagged(text: str, flagged: bool) -> Text:
    return Text(text, style="bold red" if flagged else "")


def table(layers: Sequence[LayerStatistics]) -> Table:
    """One row for each layer, in their order."""
    lost = ", ".join(f"{limit:.0f} in {name}" for name, limit in STD_IS_LOST.items())
    rows = Table(
        caption=f"where |mean|/std is above {lost}, the std is lost",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    rows.add_column("batch norm", overflow="fold")
    for heading in (
        "channels",
        "dead",
        "scale\nnear 0",
        "worst\n|mean|/std",
        "KL\n(nats)",
        "in\nchannel",
    ):
        rows.add_column(heading, justify="right")
    for i, layer in enumerate(layers):
        ratio, kl = layer.worst_mean_over_std, layer.mean_kl
        rows.add_row(
            Text(_name(layer)),  # no markup
            str(layer.num_features),
            _flagged(str(len(layer.dead)), bool(layer.dead)),
            _flagged(str(len(layer.scale_near_zero)), bool(layer.scale_near_zero)),
            _flagged(f"{ratio:.3g}", ratio > min(STD_IS_LOST.values())),
            "–" if kl is None else f"{kl:.3g}",
            _channel(layer.worst_channel),
            style="bold" if i == 0 and kl is not None else "",
        )
    return rows


def verdict(
    layers: Sequence[LayerStatistics], test_accuracy: Mapping[str, float] | None
) -> str:
    """In a line each: the worst layer, what it does to evaluation, what else is wrong.

    Args:
      layers: The worst first.
      test_accuracy: From `_inspect_run`, if it could be measured.
    """
    lines = []
    if layers[0].mean_kl is not None:
        lines.append(
            f"worst: {_name(layers[0])}, whose running statistics are "
            f"{layers[0].mean_kl:.3g} nats from those of the data, channel "
            f"{_channel(layers[0].worst_channel)} furthest"
        )
    if test_accuracy is not None:
        shares = (f"{share:.2%} with {how}" for how, share in test_accuracy.items())
        lines.append(f"test accuracy: {', '.join(shares)}")
    for layer in layers:
        ratio = layer.worst_mean_over_std
        if layer.not_finite:
            lines.append(
                f"{_name(layer)}: running statistics not finite in "
                f"{len(layer.not_finite)} of {layer.num_features} channels"
            )
        elif lost := [name for name, limit in STD_IS_LOST.items() if ratio > limit]:
            lines.append(f"{_name(layer)}: not for {' or '.join(lost)} as it is")
    return "\n".join(lines)


def to_json(
    checkpoint: str,
    layers: Sequence[LayerStatistics],
    test_accuracy: Mapping[str, float] | None,
) -> bytes:
    """All figures, in the order of the table; null is what is not known or finite."""
    content = {
        "checkpoint": checkpoint,
        "test_accuracy": test_accuracy,
        "thresholds": {
            "dead_variance": DEAD * EPSILON,
            "scale_near_zero": SCALE_NEAR_ZERO,
            "mean_over_std": STD_IS_LOST,
            "kl_in_place_of_infinity": LARGEST_KL,
        },
        "layers": [
            {
                "path": list(layer.path),
                "num_features": layer.num_features,
                "dead": layer.dead,
                "scale_near_zero": layer.scale_near_zero,
                "not_finite": layer.not_finite,
                "worst_mean_over_std": layer.worst_mean_over_std,
                "mean_kl": layer.mean_kl,
                "worst_channel": layer.worst_channel,
                "mean_over_std": layer.mean_over_std.tolist(),
                "kl": None if layer.kl is None else layer.kl.tolist(),
            }
            for layer in layers
        ],
    }
    return json.dumps(_finite(content), indent=1, allow_nan=False).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
    names = [_name(layer) for layer in layers]
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
