"""What a person reads of an inspection: the table, the verdict and the JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from jaxbn._models.inspection import (
    DEAD,
    EPSILON,
    LARGEST_KL,
    SCALE_NEAR_ZERO,
    STD_IS_LOST,
    Channel,
    LayerStatistics,
)
from jaxbn.cli._arguments import printable


def _channel(channel: Channel | None) -> str:
    return "–" if channel is None else ", ".join(map(str, channel))


def name_of(layer: LayerStatistics) -> str:
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
            Text(name_of(layer)),  # no markup
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
            f"worst: {name_of(layers[0])}, whose running statistics are "
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
                f"{name_of(layer)}: running statistics not finite in "
                f"{len(layer.not_finite)} of {layer.num_features} channels"
            )
        elif lost := [name for name, limit in STD_IS_LOST.items() if ratio > limit]:
            lines.append(f"{name_of(layer)}: not for {' or '.join(lost)} as it is")
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
