"""One run, from its first file to its last; the computing is left to `_training`."""

import contextlib
import dataclasses
import functools
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxbn.cli import _digits, _files, _report, _results
from jaxbn.cli._arguments import CommandError
from jaxbn.cli._settings import Settings, settle
from jaxbn.cli._training import Network, Trainer


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


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a run needs, checked, before it writes anything."""

    folder: Path
    resumed: bool
    settings: Settings
    digits: _digits.Digits
    trainers: dict[str, Trainer]  # by norm, as is the next
    networks: dict[str, Network]


def prepare(given: Mapping[str, Any], folder: Path, *, resume: bool) -> Run:
    """Put together the run that was asked for.

    Args:
      given: The settings that were named on the command line.
      folder: Where the run is written.
      resume: Whether to take up the run that is there, if any.

    Raises:
      CommandError: The run cannot begin.
    """
    digits = _digits.load()
    stored = _files.load_checkpoints(folder) if resume else {}
    settings = settle(given, [content["settings"] for content in stored.values()])
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
        networks[norm] = _files.restore(path, content, networks[norm])
    epoch_steps = num_images // settings.batch_size
    done = max(network.step for network in networks.values()) / epoch_steps
    if done > settings.epochs:
        raise CommandError(
            f"--epochs {settings.epochs} contradicts the run to resume, "
            f"which has {done:.4g} of them behind it"
        )
    return Run(folder, bool(stored), settings, digits, trainers, networks)


def execute(run: Run) -> int:
    """Train one network for each norm, and write what came of it.

    Returns:
      The exit code: 0, or 130 after Ctrl-C.
    """
    console = Console()
    say = functools.partial(
        console.print, markup=False, highlight=False, soft_wrap=True
    )
    metrics = run.folder / _files.METRICS
    results = {}
    with deferred_interrupts() as interrupted:
        if run.resumed:
            say(f"going on with the run in {run.folder}")
        elif aside := _files.move_aside(run.folder):
            say(f"the earlier run is now in {aside}")
        run.folder.mkdir(parents=True, exist_ok=True)
        earlier_ms = _results.earlier_ms_per_step(metrics)
        with _report.Bars(console) as bars:
            for norm, network in run.networks.items():
                if not interrupted():
                    _train(run, norm, bars, interrupted)
                if network.step:
                    result = _results.summarize(run.trainers[norm], network, run.digits)
                    if result.median_ms_per_step is None:
                        ms = earlier_ms.get(norm)
                        result = dataclasses.replace(result, median_ms_per_step=ms)
                    results[norm] = result
                _files.write(metrics, _results.to_json(run.settings, results))
        if results:
            curves = _report.curves(run.settings, results)
            _files.write(run.folder / _files.CURVES, curves)
            console.print(_report.table(results))
        names = sorted(path.name for path in run.folder.iterdir())
        say(f"{run.folder} holds {', '.join(names)}")
        if not interrupted():
            return 0
        folder = shlex.quote(str(run.folder))
        say(f"interrupted; go on with: python -m jaxbn train --resume --out {folder}")
        return 130


def _train(
    run: Run, norm: str, bars: _report.Bars, interrupted: Callable[[], bool]
) -> None:
    """Train one network until its last step or Ctrl-C; save it after every epoch."""
    trainer, network = run.trainers[norm], run.networks[norm]
    path = _files.checkpoint(run.folder, norm)
    epoch_steps = trainer.steps_per_epoch(run.digits)
    _files.save_checkpoint(path, run.settings, network)  # the run can be resumed now
    show = bars.add(norm, run.settings.epochs * epoch_steps)
    show(network)
    for _ in trainer.advance(network, run.digits):
        show(network)
        stop = interrupted()
        if stop or network.step % epoch_steps == 0:
            _files.save_checkpoint(path, run.settings, network)
        if stop:
            return
