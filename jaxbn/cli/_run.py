"""One run, from its first file to its last; the computing is left to `_training`."""

import contextlib
import dataclasses
import functools
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxbn.cli import _digits, _files, _report, _results
from jaxbn.cli._arguments import CommandError
from jaxbn.cli._mesh import Mesh
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
class Plan:
    """What a run needs, checked, before it computes or writes anything."""

    folder: Path
    settings: Settings
    digits: _digits.Digits
    stored: Mapping[str, dict[str, Any]]  # checkpoints to go on from, by norm

    def in_common(self) -> dict[str, Any]:
        """What the processes of a run must agree on."""
        named = dataclasses.asdict(self.settings)
        flags = {"--" + name.replace("_", "-"): named[name] for name in named}
        steps = {norm: content["step"] for norm, content in self.stored.items()}
        return flags | {"steps to resume from": steps}


def prepare(
    given: Mapping[str, Any], folder: Path, *, resume: bool, num_devices: int
) -> Plan:
    """Put together the run that was asked for.

    Args:
      given: The settings that were named on the command line.
      folder: Where the run is written.
      resume: Whether to take up the run that is there, if any.
      num_devices: Over how many each batch is split.

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
    if settings.batch_size % num_devices:
        raise CommandError(
            f"argument --batch-size: must be a multiple of {num_devices}, the number "
            f"of devices; got {settings.batch_size}"
        )
    epoch_steps = num_images // settings.batch_size
    done = max((content["step"] for content in stored.values()), default=0)
    if done > settings.epochs * epoch_steps:
        raise CommandError(
            f"--epochs {settings.epochs} contradicts the run to resume, "
            f"which has {done / epoch_steps:.4g} of them behind it"
        )
    return Plan(folder, settings, digits, stored)


@dataclasses.dataclass(frozen=True)
class Run:
    """A plan on its way, in one of the processes that carry it out."""

    plan: Plan
    mesh: Mesh
    trainers: dict[str, Trainer]  # by norm, as is the next
    networks: dict[str, Network]
    writes: bool  # the first process alone does, and prints

    def save(self, norm: str) -> None:
        """Write the checkpoint of one norm."""
        if self.writes:
            path = _files.checkpoint(self.plan.folder, norm)
            _files.save_checkpoint(path, self.plan.settings, self.networks[norm])


def begin(plan: Plan, mesh: Mesh) -> Run:
    """Networks at step 0, or where the run that is resumed had brought them.

    Raises:
      CommandError: A checkpoint is of another network.
    """
    trainers = {norm: Trainer(plan.settings, norm, mesh) for norm in plan.settings.norm}
    networks = {norm: trainer.start() for norm, trainer in trainers.items()}
    for norm, content in plan.stored.items():
        path = _files.checkpoint(plan.folder, norm)
        networks[norm] = _files.restore(path, content, networks[norm])
    for network in networks.values():
        network.state = mesh.replicate(network.state)
    return Run(plan, mesh, trainers, networks, writes=jax.process_index() == 0)


def execute(run: Run) -> int:
    """Train one network for each norm, and write what came of it.

    Returns:
      The exit code: 0, or 130 after Ctrl-C.
    """
    plan = run.plan
    console = Console(quiet=not run.writes)
    say = functools.partial(
        console.print, markup=False, highlight=False, soft_wrap=True
    )
    metrics = plan.folder / _files.METRICS
    results, earlier_ms = {}, {}
    with deferred_interrupts() as pressed:

        def interrupted() -> bool:
            return run.mesh.any(pressed())  # all processes ask after the same steps

        if run.writes:
            if plan.stored:
                say(f"going on with the run in {plan.folder}")
            elif aside := _files.move_aside(plan.folder):
                say(f"the earlier run is now in {aside}")
            plan.folder.mkdir(parents=True, exist_ok=True)
            earlier_ms = _results.earlier_ms_per_step(metrics)
        with _report.Bars(console) as bars:
            for norm, network in run.networks.items():
                if not interrupted():
                    _train(run, norm, bars, interrupted)
                if network.step:
                    trainer = run.trainers[norm]
                    result = _results.summarize(trainer, network, plan.digits)
                    if result.median_ms_per_step is None:
                        ms = earlier_ms.get(norm)
                        result = dataclasses.replace(result, median_ms_per_step=ms)
                    results[norm] = result
                if run.writes:
                    _files.write(metrics, _results.to_json(plan.settings, results))
        if run.writes:
            if results:
                curves = _report.curves(plan.settings, results)
                _files.write(plan.folder / _files.CURVES, curves)
                console.print(_report.table(results))
            names = sorted(path.name for path in plan.folder.iterdir())
            say(f"{plan.folder} holds {', '.join(names)}")
        if not interrupted():
            return 0
        folder = shlex.quote(str(plan.folder))
        say(f"interrupted; go on with: python -m jaxbn train --resume --out {folder}")
        return 130


def _train(
    run: Run, norm: str, bars: _report.Bars, interrupted: Callable[[], bool]
) -> None:
    """Train one network until its last step or Ctrl-C; save it after every epoch."""
    trainer, network = run.trainers[norm], run.networks[norm]
    epoch_steps = trainer.steps_per_epoch(run.plan.digits)
    run.save(norm)  # the run can be resumed now
    show = bars.add(norm, run.plan.settings.epochs * epoch_steps)
    show(network)
    for _ in trainer.advance(network, run.plan.digits):
        show(network)
        stop = interrupted()
        if stop or network.step % epoch_steps == 0:
            run.save(norm)
        if stop:
            return
