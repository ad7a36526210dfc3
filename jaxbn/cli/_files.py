"""The run's folder: it is never overwritten, and no file in it is ever half written."""

import contextlib
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
from jaxbn.cli._settings import NORMS, Settings, from_checkpoint
from jaxbn.cli._training import Network

METRICS = "metrics.json"
CURVES = "curves.png"

# Of a checkpoint: another number for other fields, or another meaning of one.
FORMAT = 1


def write(path: Path, data: bytes) -> None:
    """Replace a file in one step: whenever we are killed, it is the old or the new.

    Raises:
      CommandError: It cannot be written; the old one is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # Half a file helps nobody, and may be what fills the disk.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CommandError(f"cannot write {path}: {error.strerror}") from error


def make_room(path: Path) -> None:
    """Make the folder of a file that is written at the end, and refuse it at once.

    Raises:
      CommandError: `write` could not write it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise CommandError(f"cannot write the file {path}")


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
    # A run's first file is a checkpoint, or after an early Ctrl-C its metrics; a
    # killed run may have left no more than the temporary file of one.
    if not (any(folder.glob("*.msgpack*")) or any(folder.glob(f"{METRICS}*"))):
        raise CommandError(f"--out {folder} holds files that are not a run's")
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(aside)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(serialization.msgpack_serialize(content)).hexdigest()


def save_checkpoint(path: Path, settings: Settings, network: Network) -> None:
    """Write all that the next step depends on, and what was seen so far.

    The file is plain `flax.serialization` msgpack and holds no clock's time: two runs
    that did the same have the same file.
    """
    content = {
        "format": FORMAT,
        "norm": path.stem,
        "settings": dataclasses.asdict(settings) | {"norm": list(settings.norm)},
        "step": network.step,
        "losses": np.asarray(network.losses),
        "accuracies": np.asarray(network.accuracies),
        "state": serialization.to_state_dict(jax.device_get(network.state)),
    }
    content["sha256"] = _digest(content)
    write(path, serialization.msgpack_serialize(content))


def load_checkpoints(folder: Path) -> dict[str, dict[str, Any]]:
    """The checkpoints in a folder, by norm: what was saved, settings as `Settings`.

    Raises:
      CommandError: A file cannot be read, or is not one that `save_checkpoint` wrote.
    """
    paths = {norm: checkpoint(folder, norm) for norm in NORMS}
    return {norm: _load(path) for norm, path in paths.items() if path.exists()}


def _load(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    # Bytes that are not ours can fail in any way, inside msgpack and NumPy too.
    try:
        content: Any = serialization.msgpack_restore(data)
        if content["format"] != FORMAT:
            found = content["format"]
            raise ValueError(f"its format is {found!r}, that of this jaxbn {FORMAT}")
        if content.pop("sha256") != _digest(content):
            raise ValueError("its digest differs")
        settings = from_checkpoint(content["settings"])
        if content["norm"] != path.stem or path.stem not in settings.norm:
            raise ValueError(f"it is the one of norm {content['norm']}")
        for name in ("losses", "accuracies"):
            if (content[name].ndim, content[name].dtype) != (1, np.float64):
                raise ValueError(f"its {name} are not one row of float64")
        if content["step"] != len(content["losses"]):
            raise ValueError("it has not one loss for each step")
        return content | {"settings": settings}
    except Exception as error:
        raise not_intact(path, error) from error


def not_intact(path: Path, error: Exception) -> CommandError:
    """What to say of a checkpoint in which something is wrong.

    The text of `error` only: its `repr` may hold the whole file.
    """
    what = f"{type(error).__name__}: {error!s:.200}"
    return CommandError(f"{path} is not an intact checkpoint: {what}")


def restore(path: Path, content: dict[str, Any], start: Network) -> Network:
    """The network that a loaded checkpoint holds.

    Args:
      path: The checkpoint's, for the message.
      content: From `load_checkpoints`.
      start: The same network at step 0, for the structure of its state.

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
        losses, accuracies = content["losses"], content["accuracies"]
        return Network(state, losses.tolist(), accuracies.tolist())
    except Exception as error:  # as in `_load`
        message = f"{path} is of another network: {error!s:.200}"
        raise CommandError(message) from error
