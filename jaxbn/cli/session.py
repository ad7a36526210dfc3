"""One run of `train`, from the processes that join it to the files it leaves."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import shlex
import signal
import statistics
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from matplotlib.figure import Figure

from jaxbn.cli import common
from jaxbn.cli.common import CommandError
from jaxbn.cli.training import MEASURE_EVERY, Mesh, Settings, Trainer, load_digits

# Okabe & Ito's colours, which differ for the colour-blind too; and line styles, for
# print in grey and for two curves that coincide (jaxbn and flax do).
STYLES = {"jaxbn": ("#0072B2", "-"), "none": ("#D55E00", "--"), "flax": ("black", ":")}

# By heading: how the table writes the first figures of a row of metrics.json.
COLUMNS = {
    "test accuracy,\nrunning statistics": ".2%",
    "test accuracy,\nbatch statistics": ".2%",
    "steps\nto 90 %": "d",
    "median ms\nper step": ".2f",
}


def _be_quiet(hook: Any = sys.unraisablehook) -> None:
    """Let Orbax say an error once, where it raises it."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # After an error the other reads and writes fail too, where nobody listens.
    late = ("Event loop is closed", "Encountered error while reading array index")
    sys.unraisablehook = lambda each: str(each.exc_value).startswith(late) or hook(each)


_be_quiet()


class Checkpoints:
    """The checkpoints of a run: whenever it is killed, the last complete one stays."""

    def __init__(self, folder: Path, *, writes: bool = False):
        self._path = (folder / "checkpoints").absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            create=writes,
            cleanup_tmp_directories=writes,
            enable_async_checkpointing=False,  # the next step overwrites the arrays
        )
        with self._one_line(f"{folder} cannot hold checkpoints"):
            self._manager: Any = ocp.CheckpointManager(self._path, options=options)
        self.step: int | None = self._manager.latest_step()

    def save(self, settings: Settings, trainers: Mapping[str, Trainer]) -> None:
        """Write all that the next step depends on, and what was seen so far."""
        seen = {
            name: {norm: getattr(each, name) for norm, each in trainers.items()}
            for name in ("losses", "accuracies")
        }
        step = len(seen["losses"][settings.norm[0]])
        if step == self.step:
            return
        states = {norm: trainer.state for norm, trainer in trainers.items()}
        seen["settings"] = dataclasses.asdict(settings)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(states), seen=ocp.args.JsonSave(seen)
        )
        with self._one_line(f"cannot write the checkpoint {self._path / str(step)}"):
            self._manager.save(step, args=args)
        self.step = step

    def load(self) -> tuple[Settings, dict[str, Any]]:
        """Return the settings in the last checkpoint, and what was seen until then."""
        with self._reading():
            args = ocp.args.Composite(seen=ocp.args.JsonRestore())
            seen = self._manager.restore(self.step, args=args)["seen"]
            values = seen["settings"]
            return Settings(**{**values, "norm": tuple(values["norm"])}), seen

    def restore(self, trainers: Mapping[str, Trainer], seen: Mapping[str, Any]) -> None:
        """Bring the networks where the last checkpoint is."""
        states = {norm: trainer.abstract() for norm, trainer in trainers.items()}
        with self._reading():
            args = ocp.args.Composite(state=ocp.args.StandardRestore(states))
            states = self._manager.restore(self.step, args=args)["state"]
            for norm, trainer in trainers.items():
                trainer.state = states[norm]
                trainer.losses = seen["losses"][norm]
                trainer.accuracies = seen["accuracies"][norm]
                if len(trainer.losses) != self.step:
                    raise ValueError("it does not have a loss for each step")

    def _reading(self) -> contextlib.AbstractContextManager[None]:
        path = self._path / str(self.step)
        return self._one_line(f"{path} is not an intact checkpoint of these networks")

    @contextlib.contextmanager
    def _one_line(self, what: str) -> Iterator[None]:
        """Say in one line what Orbax says in many, in errors of any type."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            if len(text) > 300:  # the reason is the last that tensorstore names
                text = f"... {text[-200:]}"
            raise CommandError(f"{what}: {text}") from error


def join(coordinator: str, num_processes: int, process_id: int) -> None:
    """Bring the processes together: they end a minute after one has died, or sooner."""
    # gRPC would go through a proxy, even to 127.0.0.1.
    os.environ["no_grpc_proxy"] = coordinator.rpartition(":")[0]  # noqa: SIM112
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Ctrl-C ends it at once: while it waits, no handler of Python's would be called.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        cluster_detection_method="deactivate",  # do not ask a cloud who we are
        coordinator_bind_address=coordinator,  # on no other network
        initialization_timeout=60,
        heartbeat_timeout_seconds=60,
        shutdown_timeout_seconds=60,
    )


def execute(
    given: dict[str, Any], defaults: Settings, folder: Path, num_devices: int | None
) -> int:
    """Train the networks of all norms, step by step, and write what came of it.

    `given` are the settings that were named on the command line, `defaults` all those
    of a new run; `num_devices` is that of each process, 1 where it is None.
    """
    mesh, kept = Mesh(_devices(num_devices or 1)), Checkpoints(folder, writes=True)
    digest = zlib.crc32(repr((kept.step, defaults, given)).encode()) >> 1
    if len(set(gathered(digest))) > 1:
        raise CommandError("the processes differ in flags, or in what --out holds")
    settings, seen = (defaults, None) if kept.step is None else kept.load()
    settings = resumed(given, settings)
    data = load_digits(settings.data)
    num_images, size = len(data.train_labels), settings.batch_size
    if size > num_images or size % mesh.size:
        need = f"must be at most {num_images} and a multiple of {mesh.size}"
        have = f"the number of devices; got {size}"
        raise CommandError(f"argument --batch-size: {need}, {have}")
    epoch_steps = num_images // size
    step, last = kept.step or 0, settings.epochs * epoch_steps
    if step > last:
        there = f"{step} steps are there, and {last} wanted"
        raise CommandError(f"--epochs contradicts the run to resume: {there}")

    leads = jax.process_index() == 0
    console = common.console(quiet=not leads)
    say = functools.partial(console.print, soft_wrap=True)
    if seen:
        say(f"going on with the run in {folder} at step {step}")
    trainers = {norm: Trainer(settings, norm, data, mesh) for norm in settings.norm}
    pairs = trainers.items()
    with common.deferred_interrupts() as interrupted:
        with common.progress(console) as bar:
            task = bar.add_task("compiling", total=None, seen="")
            if seen:
                kept.restore(trainers, seen)
            for _, each in itertools.takewhile(lambda _: not interrupted(), pairs):
                if not seen:
                    each.start()
                if step < last and not interrupted():
                    each.compile()
            bar.update(task, description="training", total=last)
            if code := max(gathered(interrupted())):
                raise KeyboardInterrupt(code)
            while not code and step < last:
                for trainer in trainers.values():
                    trainer.advance()
                step += 1
                if step % epoch_steps == 0:
                    kept.save(settings, trainers)
                tests = [f"{x} {each.accuracies[-1]:.1%}" for x, each in pairs]
                bar.update(task, completed=step, seen=", ".join(tests))
                code = max(gathered(interrupted()))  # all ask after the same steps
        kept.save(settings, trainers)
        if leads:
            metrics = summarize(settings, trainers)
            common.write_json(folder / "metrics.json", metrics)
            common.write_png(folder / "curves.png", curves(metrics))
            table = common.table("norm", *COLUMNS)
            for norm, row in metrics["results"].items():
                table.add_row(norm, *map(common.cell, row.values(), COLUMNS.values()))
            console.print(table)
            say(f"{folder} holds checkpoints, curves.png and metrics.json")
    if code:
        where = shlex.quote(str(folder))
        say(f"interrupted at step {step}; go on: jaxbn train --resume --out {where}")
    return code


def _devices(count: int) -> list[Any]:
    """Return the first `count` devices of each process."""
    own = jax.local_devices()
    if len(own) < count:
        have = f"there are {len(own)} {own[0].platform} devices"
        raise CommandError(f"argument --devices: {have}; got {count}")
    everywhere = itertools.groupby(jax.devices(), lambda device: device.process_index)
    return [device for _, group in everywhere for device in list(group)[:count]]


def gathered(number: int) -> list[int]:
    """Return this number, of 31 bits, of every process; all of them must call this."""
    return np.ravel(multihost_utils.process_allgather(np.int32(number))).tolist()


def resumed(given: dict[str, Any], stored: Settings) -> Settings:
    """Return the settings of a run that is resumed: `epochs` alone may change."""
    for name, value in given.items():
        if name != "epochs" and value != getattr(stored, name):
            differ = f"{value} here, {getattr(stored, name)} there"
            flag = "--" + name.replace("_", "-")
            raise CommandError(f"{flag} contradicts the run to resume: {differ}")
    return dataclasses.replace(stored, epochs=given.get("epochs", stored.epochs))


def summarize(settings: Settings, trainers: dict[str, Trainer]) -> dict[str, Any]:
    """Return the content of metrics.json."""
    rows = {}
    for norm, trainer in trainers.items():
        state, shares = trainer.state, trainer.accuracies
        batch = trainer.test_accuracy(state, batch=True) if state.batch_stats else None
        good = [MEASURE_EVERY * i for i, share in enumerate(shares) if share >= 0.9]
        times, running = trainer.seconds, trainer.test_accuracy(state)
        rows[norm] = {  # in the order of COLUMNS, and then others
            "test_accuracy_running_statistics": running,
            "test_accuracy_batch_statistics": batch,
            "steps_to_90_percent": min(good, default=None),
            "median_ms_per_step": 1000 * statistics.median(times) if times else None,
            "steps": len(trainer.losses),
            "training_loss": trainer.losses,
            "test_accuracy": shares,
        }
    return {
        "settings": dataclasses.asdict(settings),
        "versions": {"jax": jax.__version__, "flax": flax.__version__},
        "device": jax.devices()[0].device_kind,
        "test_accuracy_every": MEASURE_EVERY,
        "results": rows,
    }


def curves(metrics: dict[str, Any]) -> Figure:
    """Draw test accuracy and training loss against steps."""
    settings, every = metrics["settings"], metrics["test_accuracy_every"]
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for norm, row in metrics["results"].items():
        color, line = STYLES[norm]
        style: Any = {"color": color, "linestyle": line, "label": norm}
        shares = 100 * np.asarray(row["test_accuracy"])
        above.plot(every * np.arange(len(shares)), shares, **style)
        losses = np.asarray(row["training_loss"])
        losses = losses[: len(losses) // every * every].reshape(-1, every).mean(1)
        below.plot(every * (np.arange(len(losses)) + 0.5), losses, **style)
    above.axhline(90, color="0.6", linewidth=0.8)
    title = "{model} on {data}, seed {seed}".format_map(settings)
    above.set(title=title, ylabel="test accuracy (%)", ylim=(0, 102))
    below.set(xlabel=f"steps (batches of {settings['batch_size']})")
    below.set(ylabel=f"training loss (nats, mean of {every} steps)", ylim=(0, None))
    above.legend(title="norm")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
