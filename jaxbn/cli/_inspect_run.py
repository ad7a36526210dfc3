"""One inspection, from the file to the table and the picture."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console

from jaxbn._models.inspection import LayerStatistics
from jaxbn.cli import _digits, _files, _inspect_picture, _inspect_report
from jaxbn.cli._arguments import CommandError
from jaxbn.cli._settings import from_checkpoint
from jaxbn.cli._training import Network, Trainer
from jaxbn.linen import inspect_statistics

# Those of `train --norm` that have statistics, the one to prefer first.
NORMALIZED = ("jaxbn", "flax")


class Inspection(NamedTuple):
    """What is known of a checkpoint."""

    layers: list[LayerStatistics]
    # By what the layers normalize with; None where there are no data.
    test_accuracy: dict[str, float] | None = None
    changed: bool = False  # since `train` wrote it


def execute(checkpoint: Path, json: Path | None, png: Path | None) -> int:
    """Inspect, print and write.

    Returns:
      The exit code, 0.

    Raises:
      CommandError: The checkpoint cannot be inspected.
    """
    path = find(checkpoint)
    json = json or path.with_name(f"{path.stem}.inspect.json")
    png = png or path.with_name(f"{path.stem}.inspect.png")
    if json == png:
        raise CommandError(f"--json and --png are the same file {json}")
    if path in (json, png):
        raise CommandError(f"{path} would be overwritten")
    found = inspect(path)

    console = Console()
    say = functools.partial(
        console.print, markup=False, highlight=False, soft_wrap=True
    )
    if found.changed:
        say(f"{path} was changed after training: its digest differs")
    if found.test_accuracy is None:
        say(f"{path} is not of `train`: without a model and data, no divergence")
    console.print(_inspect_report.table(found.layers))
    if lines := _inspect_report.verdict(found.layers, found.test_accuracy):
        say(lines)
    figures = _inspect_report.to_json(str(path), found.layers, found.test_accuracy)
    picture = _inspect_picture.picture(path.name, found.layers)
    for file, data in ((json, figures), (png, picture)):
        file.parent.mkdir(parents=True, exist_ok=True)
        _files.write(file, data)
    say(f"written: {json} and {png}")
    return 0


def find(checkpoint: Path) -> Path:
    """The file; in a run's folder, that of a norm which has statistics.

    Raises:
      CommandError: There is none in this folder.
    """
    if not checkpoint.is_dir():
        return checkpoint
    for norm in NORMALIZED:
        if (path := _files.checkpoint(checkpoint, norm)).exists():
            return path
    raise CommandError(
        f"{checkpoint} holds no checkpoint of a network with batch norm "
        f"({' or '.join(f'{norm}.msgpack' for norm in NORMALIZED)})"
    )


def inspect(path: Path) -> Inspection:
    """Look at a checkpoint; at one of `train` with the digits.

    Raises:
      CommandError: The file is damaged, or holds no batch norm.
    """
    data = path.read_bytes()
    # Bytes that are not a checkpoint can fail in any way, in msgpack and NumPy too.
    try:
        content: Any = serialization.msgpack_restore(data)
        if not isinstance(content, Mapping):
            raise ValueError(f"it holds one {type(content).__name__}, not variables")
    except Exception as error:
        # Not its `repr`, which may hold the whole file.
        what = f"{type(error).__name__}: {error!s:.200}"
        raise CommandError(f"{path} is not a Flax checkpoint: {what}") from error
    if {"norm", "settings", "state"} <= content.keys():
        return _of_train(path, dict(content))
    try:
        return Inspection(inspect_statistics(content))
    except Exception as error:
        raise CommandError(f"{path} has no batch norm to inspect: {error}") from error


def _of_train(path: Path, content: dict[str, Any]) -> Inspection:
    norm = content["norm"]
    if norm not in NORMALIZED:
        raise CommandError(f"{path} has no batch norm to inspect: its norm is {norm}")
    try:
        # A digest that differs is no reason to refuse: whoever suspects a checkpoint
        # wants to see what is in it.
        digest = content.pop("sha256", None)
        changed = digest != _files._digest(content)
        settings = from_checkpoint(content["settings"])
        # Our layers have the variables of Flax's, and record what they are given.
        trainer = Trainer(settings, "jaxbn")
        state = _files.restore(path, content, trainer.start()).state
    except CommandError:
        raise
    except Exception as error:
        raise _files.not_intact(path, error) from error
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    digits = _digits.load()
    # In one batch: the statistics of each layer are then exactly those of the digits.
    layers = inspect_statistics(
        variables, trainer.model, [digits.train_images], train=True
    )

    def accuracy(corrected: Sequence[LayerStatistics]) -> float:
        stats = _corrected(state.batch_stats, corrected)
        network = Network(state._replace(batch_stats=stats))
        return trainer.measure(network, digits)

    test_accuracy = {
        "running statistics": accuracy([]),
        "true ones in the worst layer": accuracy(layers[:1]),
        "true ones in all layers": accuracy(layers),
    }
    return Inspection(layers, test_accuracy, changed)


def _corrected(batch_stats: Any, layers: Sequence[LayerStatistics]) -> Any:
    """The statistics of these layers replaced by those of the data."""
    flat: dict[Any, Any] = dict(flatten_dict(batch_stats))
    for layer in layers:
        if layer.data is not None:
            for name, value in (("mean", layer.data.mean), ("var", layer.data.var)):
                flat[*layer.path, name] = jnp.asarray(value, jnp.float32)
    return unflatten_dict(flat)
