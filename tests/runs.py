"""Runs of `jaxbn train`, in this process and in others."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxbn.__main__ import main
from jaxbn.cli.session import Checkpoints
from jaxbn.cli.training import Mesh, Settings, Trainer, load_digits

HERE = Path(__file__).parent

# Two networks, 2 epochs of 22 steps each: a second or two, most of it compilation.
SHORT = ("--model", "mlp", "--batch-size", 64, "--epochs", 2)


def train(*flags: object) -> int:
    return main(["train", *map(str, flags)])


def start(code: str, *flags: object, **env: str) -> subprocess.Popen[str]:
    """`train` in a process of its own, after some code, with more environment."""
    # What it compiles, the next one reads: see `compiled.py`.
    script = f"import os, signal, sys\nsys.path.insert(0, {str(HERE)!r})\n"
    script += f"import compiled\n{code}\nfrom jaxbn.__main__ import main\n"
    words = [sys.executable, "-c", script + "sys.exit(main(sys.argv[1:]))", "train"]
    return subprocess.Popen(
        [*words, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    )


def refusal(
    capsys: pytest.CaptureFixture[str], *flags: object, command: str = "train"
) -> str:
    """The one line with which a command refuses these flags."""
    with pytest.raises(SystemExit) as caught:
        main([command, *map(str, flags)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"jaxbn {command}: error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert len(error) < 1000
    return error


def interrupted(
    capsys: pytest.CaptureFixture[str], command: str, *flags: object, code: int = 130
) -> None:
    """What a command ends with that was stopped before it had anything to write."""
    with pytest.raises(SystemExit) as caught:
        main([command, *map(str, flags)])
    assert caught.value.code == code
    line = f"jaxbn {command}: interrupted; nothing was written yet\n"
    assert capsys.readouterr().err == line


def metrics(folder: Path) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def restored(folder: Path) -> tuple[Settings, dict[str, Any], dict[str, Trainer]]:
    """The last checkpoint: the settings, what was seen, and the networks by norm."""
    kept = Checkpoints(folder)
    settings, seen = kept.load()
    data, mesh = load_digits(settings.data), Mesh(jax.local_devices()[:1])
    trainers = {norm: Trainer(settings, norm, data, mesh) for norm in settings.norm}
    kept.restore(trainers, seen)
    return settings, seen, trainers


def checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that the last checkpoint holds: what was seen, and the states by norm."""
    _, seen, trainers = restored(folder)
    return seen, {norm: trainer.state for norm, trainer in trainers.items()}


def steps(folder: Path) -> int:
    """The step of the last checkpoint, 0 where there is none."""
    names = (path.name for path in folder.glob("checkpoints/*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def assert_same_bits(folder: Path, other: Path) -> None:
    (seen, states), (other_seen, other_states) = map(checkpoint, (folder, other))
    assert seen == other_seen
    jax.tree.map(np.testing.assert_array_equal, states, other_states)
