"""One run from its first file to its last; computing is left to `_training`."""

import contextlib
import dataclasses
import functools
import json
import math
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
from rich.console import Console

from jaxbn.cli import _digits, _files, _report
from jaxbn.cli._arguments import CommandError
from jaxbn.cli._settings import NORMS, Settings, settle
from jaxbn.cli._training import Progress, Trainer


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C be asked about, not raised, so that no step or file is cut in two.

    Yields:
      A function that says whether Ctrl-C was pressed, once or more often.
    """
    presses = []
    before = signal.signal(signal.SIGINT, lambda *_: presses.append(True))
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, before)


def train(given: Mapping[str, Any], folder: Path, *, resume: bool) -> int:
    """Train one network for each norm.

    Args:
      given: The settings that were named on the command line.
      folder: Where the run is written.
      resume: Whether to take up the run that is there.

    Returns:
      The exit code: 0, or 130 after Ctrl-C.

    Raises:
      CommandError: Nothing was written, for the reason that is given.
    """
    console = Console()
    say = functools.partial(
        console.print, markup=False, highlight=False, soft_wrap=True
    )
    stored = _files.load_checkpoints(folder, NORMS) if resume else {}
    settings = settle(given, [content["settings"] for content in stored.values()])
    digits = _digits.load()
    num_images = len(digits.train_labels)
    if settings.batch_size > num_images:
        raise CommandError(
            f"argument --batch-size: must be at most {num_images}, the number of "
            f"training images; got {settings.batch_size}"
        )

    trainers = {norm: Trainer(settings, norm) for norm in settings.norm}
    networks = {norm: trainer.start() for norm, trainer in trainers.items()}
    for norm, content in stored.items():
        path = _files.checkpoint(folder, norm)
        networks[norm] = _files.restore(content, networks[norm], path)
    epoch_steps = num_images // settings.batch_size
    done = max(network.step for network in networks.values())
    if done > settings.epochs * epoch_steps:
        raise CommandError(
            f"--epochs {settings.epochs} contradicts the run to resume, "
            f"which has {done / epoch_steps:.4g} epochs already"
        )

    if stored:
        say(f"going on with the run in {folder}")
    elif aside := _files.move_aside(folder):
        say(f"the earlier run is now in {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    earlier_ms = _files.earlier_ms_per_step(folder)

    results = {}
    with deferred_interrupts() as interrupted:
        with _report.progress_bars(console) as bars:
            for norm, trainer in trainers.items():
                ...
    return 0
