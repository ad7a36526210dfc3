"""The checkpoints of a run, which Orbax keeps in <folder>/checkpoints/<step>."""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxbn.cli.common import CommandError
from jaxbn.cli.training import Settings, Trainer


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
