"""What is known of a network when its training ends, and metrics.json."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

import flax
import jax

from jaxbn.cli._digits import Digits
from jaxbn.cli._settings import Settings
from jaxbn.cli._training import MEASURE_EVERY, Network, Trainer


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table, and its curves."""

    steps: int
    test_accuracy_running_statistics: float
    test_accuracy_batch_statistics: float | None  # None without batch norm
    steps_to_90_percent: int | None  # None where it was not reached
    median_ms_per_step: float | None  # None where no more than one was timed
    training_loss: list[float]  # of each step
    test_accuracy: list[float]  # at step 0, MEASURE_EVERY, ...


def summarize(trainer: Trainer, network: Network, digits: Digits) -> Result:
    """Measure a network that has come as far as it will."""
    batch = None
    if network.state.batch_stats:
        batch = trainer.measure(network, digits, batch=True)
    good = [i for i, share in enumerate(network.accuracies) if share >= 0.9]
    seconds = network.seconds[1:]  # the first step compiles
    return Result(
        steps=network.step,
        test_accuracy_running_statistics=trainer.measure(network, digits),
        test_accuracy_batch_statistics=batch,
        steps_to_90_percent=MEASURE_EVERY * good[0] if good else None,
        median_ms_per_step=1000 * statistics.median(seconds) if seconds else None,
        training_loss=network.losses,
        test_accuracy=network.accuracies,
    )


def to_json(settings: Settings, results: Mapping[str, Result]) -> bytes:
    """The content of metrics.json; a loss that is not finite is null there."""
    rows = {norm: dataclasses.asdict(result) for norm, result in results.items()}
    for row in rows.values():
        losses = row["training_loss"]
        row["training_loss"] = [x if math.isfinite(x) else None for x in losses]
    content = {
        "settings": dataclasses.asdict(settings),
        "versions": {"jax": jax.__version__, "flax": flax.__version__},
        "device": jax.devices()[0].device_kind,
        "test_accuracy_every": MEASURE_EVERY,
        "results": rows,
    }
    return json.dumps(content, indent=1, allow_nan=False).encode()


def earlier_ms_per_step(path: Path) -> dict[str, float | None]:
    """The times in a metrics.json, which no checkpoint holds; empty if unreadable."""
    try:
        rows = json.loads(path.read_bytes())["results"]
        return {norm: row["median_ms_per_step"] for norm, row in rows.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
