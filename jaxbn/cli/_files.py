"""The run's folder: it is never overwritten, and no file in it is ever half written."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from jaxbn.cli._arguments import CommandError
from jaxbn.cli._settings import Settings
from jaxbn.cli._training import Progress

METRICS = "metrics.json"
CURVES = "curves.png"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step: whenever we are killed, it is the old or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def checkpoint(folder: Path, norm: str) -> Path:
    """Where the checkpoint of one norm is."""
    return folder / f"{norm}.msgpack"


def move_aside(folder: Path) -> Path | None:
    """Give an earlier run the first free name `<folder>.1`, `<folder>.2`, ...

    Returns:
      Where it is now, or None where there was none.

    Raises:
      CommandError: The folder holds something that is not a run.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--out {folder} is not a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    # A checkpoint is the first file of a run; it may have been killed at that.
    if not any(folder.glob("*.msgpack*")):
        raise CommandError(f"--out {folder} holds files that are not a run's")
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(aside)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(serialization.msgpack_serialize(content)).hexdigest()


def save_checkpoint(path: Path, settings: Settings, progress: Progress) -> None:
    """Write all that the next step depends on, and what was seen so far.

    The file is plain `flax.serialization` msgpack and holds no clock's time: two runs
    that did the same have the same file.
    """
    content = {
        "settings": dataclasses.asdict(settings) | {"norm": list(settings.norm)},
        "step": progress.step,
        "losses": np.asarray(progress.losses),
        "accuracies": np.asarray(progress.accuracies),
        "state": serialization.to_state_dict(jax.device_get(progress.state)),
    }
    content["sha256"] = _digest(content)
    write_atomically(path, serialization.msgpack_serialize(content))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, with its `settings` as `Settings`.

    Raises:
      CommandError: The file is not one that `save_checkpoint` wrote.
    """
    data = path.read_bytes()
    try:
        content = serialization.msgpack_restore(data)
        if content.pop("sha256") != _digest(content):
            raise ValueError("the digest differs")
        settings = content["settings"]
        settings["norm"] = tuple(settings["norm"])
        return content | {"settings": Settings(**settings)}
    # Bytes that are not ours can fail in any way, inside msgpack and NumPy too.
    except Exception as error:
        raise CommandError(f"{path} cannot be read as a checkpoint ({error})") from error


def restore(content: dict[str, Any], start: Progress, path: Path) -> Progress:
    """The progress that a loaded checkpoint holds.

    Args:
      content: From `load_checkpoint`.
      start: The same network's step 0, for the structure of its state.
      path: The checkpoint's, for the message.

    Raises:
      CommandError: The checkpoint is of another network (an older jaxbn's, say).
    """

    def loaded(old: jax.Array, new: np.ndarray) -> jax.Array:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(f"{new.shape} {new.dtype} for {old.shape} {old.dtype}")
        return jnp.array(new)  # a copy: the first step donates it

    try:
        state = serialization.from_state_dict(start.state, content["state"])
        state = jax.tree.map(loaded, start.state, state)
    except (KeyError, ValueError) as error:
        raise CommandError(f"{path} is of another network ({error})") from error
    return Progress(state, content["losses"].tolist(), content["accuracies"].tolist())
