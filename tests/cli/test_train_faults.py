"""Faults: `train` killed at any moment, a full disk, a folder that is read only."""

import collections
import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import serialization
from runs import checkpoints, files, metrics, refusal, start, train

from jaxbn.cli import _files

# 30 epochs of 23 steps each: half a second, and what comes before it.
SHORT = ("--model", "mlp", "--epochs", 30)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to compare with; nothing is written to it."""
    folder = tmp_path_factory.mktemp("short") / "run"
    assert train(*SHORT, "--out", folder) == 0
    return folder


# Killed at any moment


def stamps(folder: Path) -> dict[str, int]:
    """When each file was last written; they come and go meanwhile."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            found[path.name] = path.stat().st_mtime_ns
    return found


def kill(folder: Path, flags: tuple[object, ...], changes: int, seconds: float) -> str:
    """Begin or take up a run, and kill -9 it.

    Args:
      folder: Of the run.
      flags: Of the run.
      changes: To wait for in the folder, at first: most of the time of a short run
        goes by before the second checkpoint. Each has two, the one to its temporary
        file and the one to its own name.
      seconds: Until it is killed, from then on.

    Returns:
      Where it was killed.
    """
    before = last = stamps(folder)
    process = start("", *flags, "--resume", "--out", folder)
    try:
        while changes > 0 and process.poll() is None:
            if (now := stamps(folder)) != last:
                last, changes = now, changes - 1
            time.sleep(0.0002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    finally:
        process.kill()
    _, err = process.communicate()
    assert err == ""
    if process.returncode == 0:
        return "after its end"
    after = stamps(folder)
    if after == before:
        return "before its first write"
    if new := [name for name in after.keys() - before.keys() if name.endswith(".tmp")]:
        return f"in the write of {new[0].removesuffix('.tmp')}"
    if "metrics.json" in after:
        return "between writes, after the first network"
    return "between writes, in the first network"


def kill_and_resume(
    folder: Path,
    flags: tuple[object, ...],
    whole: Path,
    moments: Iterator[tuple[int, float]],
    kills: int,
) -> collections.Counter[str]:
    """Kill a run until it has been killed so often; it must go on and end as `whole`.

    Whenever a run has come to its end in between, the next one begins from nothing.

    Returns:
      How many kills fell where.
    """
    where: collections.Counter[str] = collections.Counter()
    steps: dict[str, int] = {}
    while where.total() - where["after its end"] < kills:
        place = kill(folder, flags, *next(moments))
        where[place] += 1
        kept = _files.load_checkpoints(folder)  # all that are there can be read
        assert all(kept[norm]["step"] >= step for norm, step in steps.items())
        steps = {norm: content["step"] for norm, content in kept.items()}
        if (folder / _files.METRICS).exists():
            assert metrics(folder)["results"]
        if place == "after its end":
            assert checkpoints(folder) == checkpoints(whole)
            shutil.rmtree(folder)
            steps = {}
    assert train(*flags, "--resume", "--out", folder) == 0
    assert checkpoints(folder) == checkpoints(whole)
    assert not list(folder.glob("*.tmp"))
    return where


def test_killed_twice_and_resumed(short_run, tmp_path):
    moments = iter([(4, 0.01), (5, 0.0), *99 * [(1, 0.0)]])
    kill_and_resume(tmp_path / "run", SHORT, short_run, moments, 2)


@pytest.mark.long
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize(
    ("flags", "kills"),
    [
        (("--model", "mlp", "--norm", "jaxbn", "none", "--epochs", 30), 50),
        (("--model", "cnn", "--epochs", 12), 12),
    ],
    ids=["mlp", "cnn"],
)
def test_killed_at_random_moments(flags, kills, tmp_path, capsys, monkeypatch):
    """With `-s` it says where the kills fell."""
    # Each compiles by itself, to be killed there.
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    assert train(*flags, "--out", tmp_path / "whole") == 0
    rng = np.random.default_rng()

    def moments() -> Iterator[tuple[int, float]]:
        while True:
            # At the start and while it compiles; in the writes; anywhere.
            yield 0, rng.uniform(0, 8)
            for _ in range(4):
                yield int(rng.integers(1, 20)), 0.0
                yield int(rng.integers(1, 20)), rng.uniform(0, 0.1)

    where = kill_and_resume(
        tmp_path / "run", flags, tmp_path / "whole", moments(), kills
    )
    with capsys.disabled():
        print("\n" + json.dumps(where, indent=1))


# A disk that is full


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_the_first_checkpoint(tmp_path, capsys):
    folder = tmp_path / "run"
    with largest_file(10_000):
        line = refusal(capsys, *SHORT, "--out", folder)
    why = os.strerror(errno.EFBIG)
    assert line.endswith(f": cannot write {folder}/jaxbn.msgpack: {why}\n")
    assert files(folder) == {}  # what was written is not left to fill the disk


def test_no_room_for_a_later_checkpoint(short_run, tmp_path, capsys):
    folder = tmp_path / "run"
    # The last checkpoint of this network has 23 more losses than the one before.
    with largest_file(len(checkpoints(short_run)["jaxbn.msgpack"]) - 100):
        line = refusal(capsys, *SHORT, "--out", folder)
    assert f"cannot write {folder}/jaxbn.msgpack" in line
    assert list(files(folder)) == ["jaxbn.msgpack"]
    assert _files.load_checkpoints(folder)["jaxbn"]["step"] == 29 * 23
    assert train("--resume", "--out", folder) == 0
    assert checkpoints(folder) == checkpoints(short_run)


MOUNTED = """
import os, shutil, subprocess, sys
from jaxbn.__main__ import main
disk, out, *short = sys.argv[1:]

def train(*flags):
    try:
        code = main(["train", *flags])
    except SystemExit as error:
        code = error.code
    print("CODE", code, *sorted(os.listdir(disk + "/run")), flush=True)

def remount(option):
    subprocess.run(["mount", "-o", "remount," + option, disk], check=True)

train(*short, "--out", disk + "/run")
remount("size=10m")
train("--resume", "--out", disk + "/run")
shutil.copytree(disk + "/run", out)
remount("ro")
train("--resume", "--epochs", "31", "--out", disk + "/run")
train(*short, "--out", disk + "/run")
train(*short, "--out", disk + "/new")
"""


def can_mount() -> bool:
    """Whether a mount of our own, which nobody else sees, is allowed here."""
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_mount(), reason="needs `unshare` and leave to mount")
def test_disk_that_is_full_and_then_read_only(short_run, tmp_path):
    """On a file system of its own: root may write to any folder of another."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    # Two checkpoints do not fit: the second one, of step 23, cannot be written.
    script = 'mount -t tmpfs -o size=180k tmpfs "$0" && exec "$@"'
    words = [sys.executable, "-c", MOUNTED, disk, out, *SHORT]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, *map(str, [disk, *words])],
        capture_output=True,
        text=True,
        timeout=240,
    )
    full, read_only = os.strerror(errno.ENOSPC), os.strerror(errno.EROFS)
    lines = done.stderr.splitlines()
    assert lines[:2] == [
        f"jaxbn train: error: cannot write {disk}/run/jaxbn.msgpack: {full}",
        f"jaxbn train: error: cannot write {disk}/run/jaxbn.msgpack: {read_only}",
    ]
    for line, name in zip(lines[2:], ("run", "new"), strict=True):
        assert line.startswith("jaxbn train: error: ")
        assert read_only in line
        assert f"{disk}/{name}" in line
    everything = "curves.png jaxbn.msgpack metrics.json"
    assert [line for line in done.stdout.splitlines() if line.startswith("CODE")] == [
        "CODE 2 jaxbn.msgpack",
        f"CODE 0 {everything}",
        *3 * [f"CODE 2 {everything}"],
    ]
    assert checkpoints(out) == checkpoints(short_run)


# A checkpoint that is not one


def test_checkpoint_that_is_a_folder(tmp_path, capsys):
    path = tmp_path / "jaxbn.msgpack"
    path.mkdir()
    line = refusal(capsys, "--resume", "--out", tmp_path)
    assert f"cannot read {path}: {os.strerror(errno.EISDIR)}" in line
    assert list(tmp_path.rglob("*")) == [path]


def forged(content: dict[str, Any], *path: str, value: object) -> bytes:
    """A checkpoint with another value in one place, and a digest that is right."""
    content = serialization.msgpack_restore(serialization.msgpack_serialize(content))
    place = content
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    content["sha256"] = _files._digest(content)
    return serialization.msgpack_serialize(content)


ODD = (None, -1, "x", 2.5, [], {}, np.zeros((2, 3)))
PLACES = {
    **{(name,): ODD for name in ("format", "norm", "settings", "step", "losses")},
    ("accuracies",): ODD,
    ("state",): (None, np.zeros(3)),
    ("state", "params"): ({},),
    ("state", "params", "Dense_0", "kernel"): (2.5, np.zeros((2, 3))),
    ("settings", "model"): ("resnet", ["mlp"], *ODD),
    ("settings", "norm"): ("jaxbn", ["none"], ["jaxbn", "layer"], *ODD),
    ("settings", "epochs"): (0, True, *ODD),
    ("settings", "batch_size"): (0, 1, *ODD),
    ("settings", "learning_rate"): (0.0, np.inf, 1, "x", None, []),
    ("settings", "seed"): ODD,
    ("settings", "later"): (1,),
}


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_checkpoint_of_another_version_is_one_line(place, short_run, tmp_path, capsys):
    """Its digest is right, what it says is not what this jaxbn can go on from."""
    content: Any = serialization.msgpack_restore(files(short_run)["jaxbn.msgpack"])
    del content["sha256"]
    for value in PLACES[place]:
        data = forged(content, *place, value=value)
        (tmp_path / "jaxbn.msgpack").write_bytes(data)
        line = refusal(capsys, "--resume", "--out", tmp_path)
        assert f"{tmp_path}/jaxbn.msgpack is " in line
        assert files(tmp_path) == {"jaxbn.msgpack": data}


def test_format_of_a_later_version_is_named(short_run, tmp_path, capsys):
    content: Any = serialization.msgpack_restore(files(short_run)["jaxbn.msgpack"])
    (tmp_path / "jaxbn.msgpack").write_bytes(forged(content, "format", value=2))
    line = refusal(capsys, "--resume", "--out", tmp_path)
    assert line.endswith("its format is 2, that of this jaxbn 1\n")
