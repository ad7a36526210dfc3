"""Runs of `python -m jaxbn train`, in this process and in others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxbn.__main__ import main

HERE = Path(__file__).parent

# Two networks, 2 epochs of 23 steps each: a second or two, most of it compilation.
SHORT = ("--model", "mlp", "--norm", "jaxbn", "none", "--epochs", 2)


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


def metrics(folder: Path) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def checkpoints(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.msgpack")}
