"""`python -m jaxbn train`: what it reaches, what it leaves behind, what it refuses."""

import dataclasses
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import serialization
from runs import SHORT, checkpoints, files, metrics, refusal, start, train

from jaxbn import cli
from jaxbn.__main__ import DEMO
from jaxbn.cli import _digits, _files
from jaxbn.cli._settings import DEFAULTS, NORMS
from jaxbn.cli._training import Trainer


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to compare with; nothing is written to it."""
    folder = tmp_path_factory.mktemp("short") / "run"
    assert train(*SHORT, "--out", folder) == 0
    return folder


# What it reaches


def test_default_run_recognizes_97_percent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train() == 0
    row = metrics(tmp_path / "runs" / "cnn")["results"]["jaxbn"]
    assert row["test_accuracy_running_statistics"] >= 0.97
    assert row["test_accuracy_batch_statistics"] >= 0.97
    table = capsys.readouterr().out
    assert f"{row['test_accuracy_running_statistics']:.2%}" in table
    assert f"{row['median_ms_per_step']:.2f}" in table
    png = tmp_path / "runs" / "cnn" / "curves.png"
    assert png.read_bytes().startswith(b"\x89PNG")


def test_normalized_mlp_needs_a_third_of_the_steps(tmp_path):
    train("--model", "mlp", "--norm", "jaxbn", "none", "--out", tmp_path / "run")
    rows = metrics(tmp_path / "run")["results"]
    with_norm = rows["jaxbn"]["steps_to_90_percent"]
    without = rows["none"]["steps_to_90_percent"]
    assert with_norm is not None
    assert without is None or with_norm <= without / 3
    assert rows["none"]["test_accuracy_batch_statistics"] is None


def test_steps_to_90_percent_is_the_first_measurement_there(short_run):
    content = metrics(short_run)
    for row in content["results"].values():
        shares = row["test_accuracy"]
        assert len(row["training_loss"]) == row["steps"] == 46
        assert len(shares) == 1 + 46 // content["test_accuracy_every"]
        steps = [content["test_accuracy_every"] * i for i in range(len(shares))]
        good = [s for s, share in zip(steps, shares, strict=True) if share >= 0.9]
        assert row["steps_to_90_percent"] == min(good, default=None)


# The same data, weights and batches for every norm


def test_split_is_stratified_and_fixed():
    digits, again = _digits.load(), _digits.load()
    assert (len(digits.train_labels), len(digits.test_labels)) == (1437, 360)
    np.testing.assert_array_equal(digits.test_images, again.test_images)
    share = np.bincount(digits.train_labels) / np.bincount(digits.test_labels)
    np.testing.assert_allclose(share, 1437 / 360, rtol=0.05)


def test_batches_are_a_function_of_seed_and_epoch():
    first = _digits.batches(1437, 60, seed=3, epoch=5)
    assert first.shape == (23, 60)
    assert len(np.unique(first)) == first.size
    np.testing.assert_array_equal(first, _digits.batches(1437, 60, seed=3, epoch=5))
    assert (first != _digits.batches(1437, 60, seed=3, epoch=6)).any()
    assert (first != _digits.batches(1437, 60, seed=4, epoch=5)).any()


@pytest.mark.parametrize("model", DEFAULTS)
def test_every_norm_starts_with_the_same_kernels(model):
    networks = [Trainer(DEFAULTS[model], norm).start() for norm in NORMS]
    kernels = [
        {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree.leaves_with_path(network.state.params)
            if "kernel" in jax.tree_util.keystr(path)
        }
        for network in networks
    ]
    assert len(kernels[0]) >= 4
    for other in kernels[1:]:
        jax.tree.map(np.testing.assert_array_equal, kernels[0], other)


def test_every_norm_sees_the_same_batches(monkeypatch):
    digits, seen = _digits.load(), {}
    for norm in NORMS:
        trainer = Trainer(DEFAULTS["mlp"], norm)
        seen[norm], step = [], trainer.step

        def spy(state, images, labels, log=seen[norm], step=step):
            log.append(images)
            return step(state, images, labels)

        monkeypatch.setattr(trainer, "step", spy)
        steps = trainer.advance(trainer.start(), digits)
        for _ in range(3):
            next(steps)
    np.testing.assert_array_equal(seen["jaxbn"], seen["none"])
    np.testing.assert_array_equal(seen["jaxbn"], seen["flax"])


# Interrupted and resumed


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Press Ctrl-C, twice, after some steps of the whole run."""
    advance, left = Trainer.advance, [steps]

    def interrupted(self, network, digits):
        for _ in advance(self, network, digits):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            yield

    monkeypatch.setattr(Trainer, "advance", interrupted)


# Within an epoch, at its end, and in the second network.
@pytest.mark.parametrize("steps", [13, 23, 46 + 7])
def test_resumed_after_ctrl_c_ends_in_the_same_bits(
    steps, short_run, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        assert train(*SHORT, "--out", folder) == 130
    assert f"--resume --out {folder}" in capsys.readouterr().out
    rows = metrics(folder)["results"]
    assert sum(row["steps"] for row in rows.values()) == steps
    kept = _files.load_checkpoints(folder)
    assert {norm: content["step"] for norm, content in kept.items()} == {
        norm: row["steps"] for norm, row in rows.items()
    }
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    # The rest, the second norm among it, is known from the checkpoint.
    assert train("--resume", "--out", folder) == 0
    assert checkpoints(folder) == checkpoints(short_run)
    timeless = {"median_ms_per_step": None}
    for norm, row in metrics(folder)["results"].items():
        assert row["median_ms_per_step"] > 0
        assert row | timeless == metrics(short_run)["results"][norm] | timeless


def test_killed_while_writing_a_checkpoint(short_run, tmp_path):
    folder = tmp_path / "run"
    # Checkpoints 1 and 2 are in place; the third is complete, under its other name.
    process = start(
        """
replace, calls = os.replace, []
def kill(*paths):
    calls.append(paths)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = kill
""",
        *SHORT,
        "--out",
        folder,
    )
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert sorted(files(folder)) == ["jaxbn.msgpack", "jaxbn.msgpack.tmp"]
    assert train("--resume", "--out", folder) == 0
    assert checkpoints(folder) == checkpoints(short_run)
    assert not list(folder.glob("*.tmp"))


def test_real_ctrl_c_leaves_a_run_that_can_be_read(tmp_path):
    folder = tmp_path / "run"
    process = start("", "--model", "mlp", "--epochs", 10**6, "--out", folder)
    try:
        while not (folder / "jaxbn.msgpack").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "")
    assert "interrupted" in out
    content: Any = serialization.msgpack_restore(
        (folder / "jaxbn.msgpack").read_bytes()
    )
    assert content["step"] == len(content["losses"]) >= 1
    assert set(content["state"]) == {"params", "batch_stats", "opt_state"}
    assert metrics(folder)["results"]["jaxbn"]["steps"] == content["step"]


def test_longer_run_is_the_shorter_one_resumed(short_run, tmp_path):
    folder = tmp_path / "run"
    assert train("--model", "mlp", "--epochs", 1, "--out", folder) == 0
    extended = ("--resume", "--epochs", 2, "--norm", "none")
    assert train(*extended, "--out", folder) == 0
    assert checkpoints(folder) == checkpoints(short_run)


def test_checkpoint_holds_all_that_the_next_step_depends_on(tmp_path):
    # With `cnn`, whose optimizer has a state.
    trainer, digits = Trainer(DEFAULTS["cnn"], "jaxbn"), _digits.load()
    whole, path = trainer.start(), tmp_path / "jaxbn.msgpack"
    steps = trainer.advance(whole, digits)
    for _ in range(3):
        next(steps)
    _files.save_checkpoint(path, trainer.settings, whole)
    loaded = _files.load_checkpoints(tmp_path)["jaxbn"]
    assert loaded["settings"] == trainer.settings
    resumed = _files.restore(path, loaded, trainer.start())
    resumed_steps = trainer.advance(resumed, digits)
    for _ in range(3):
        next(steps)
        next(resumed_steps)
    assert resumed.losses == whole.losses
    assert jax.tree.leaves(whole.state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)


def test_resume_without_a_run_begins_one(short_run, tmp_path):
    assert train(*SHORT, "--resume", "--out", tmp_path / "run") == 0
    assert checkpoints(tmp_path / "run") == checkpoints(short_run)


def test_finished_run_resumed_is_the_same_run(short_run, tmp_path):
    folder = shutil.copytree(short_run, tmp_path / "run")
    assert train("--resume", "--out", folder) == 0
    assert checkpoints(folder) == checkpoints(short_run)
    assert metrics(folder) == metrics(short_run)  # the times too


def test_loss_that_is_not_finite_is_reported(tmp_path):
    flags = ("--model", "mlp", "--norm", "none", "--learning-rate", 3e38)
    assert train(*flags, "--epochs", 1, "--out", tmp_path / "run") == 0
    assert None in metrics(tmp_path / "run")["results"]["none"]["training_loss"]


# Nothing is overwritten


def test_earlier_runs_are_moved_aside(tmp_path, capsys):
    folder, kept = tmp_path / "run", []
    for number in range(3):
        flags = ("--model", "mlp", "--norm", "none", "--epochs", 1, "--seed", number)
        assert train(*flags, "--out", folder) == 0
        kept.append(files(folder))
    assert f"the earlier run is now in {folder}.2" in capsys.readouterr().out
    assert files(tmp_path / "run.1") == kept[0]
    assert files(tmp_path / "run.2") == kept[1]
    assert files(folder) == kept[2]


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_folder_of_other_things_is_left_alone(resume, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years")
    assert "not a run's" in refusal(capsys, "--out", tmp_path, *resume)
    assert files(tmp_path) == {"thesis.tex": b"years"}


# What it refuses


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--model", "resnet"), "--model"),
        (("--norm", "layer"), "--norm"),
        (("--norm",), "--norm"),
        (("--norm", "none", "none"), "--norm"),
        (("--epochs", "0"), "--epochs"),
        (("--epochs", "2.5"), "--epochs"),
        (("--batch-size", "1"), "--batch-size"),
        (("--batch-size", "1438"), "--batch-size"),
        (("--learning-rate", "0"), "--learning-rate"),
        (("--learning-rate", "nan"), "--learning-rate"),
        (("--learning-rate", "fast"), "--learning-rate"),
        (("--seed", "-1"), "--seed"),
        (("--seed", "2147483648"), "--seed"),
        (("--resume", "yes"), "yes"),
        (("--epoch", "3"), "--epoch"),
        (("--out", __file__), "--out"),
        (("--out", f"{__file__}/run"), __file__),
    ],
)
def test_bad_flag_is_one_line(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert named in refusal(capsys, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        ("--model", "cnn"),
        ("--batch-size", "64"),
        ("--learning-rate", "0.3"),
        ("--seed", "1"),
        ("--epochs", "1"),
    ],
)
def test_flag_that_contradicts_the_run_is_named(flags, short_run, capsys):
    before = files(short_run)
    line = refusal(capsys, "--resume", "--out", short_run, *flags)
    assert f"{' '.join(flags)} contradicts the run to resume" in line
    assert files(short_run) == before


def test_damaged_checkpoint_is_one_line(short_run, tmp_path, capsys):
    whole = (short_run / "none.msgpack").read_bytes()
    some = np.random.default_rng(0).integers(len(whole), size=20)
    flipped = [bytes([*whole[:i], whole[i] ^ 1, *whole[i + 1 :]]) for i in some]
    for data in (b"", b"garbage", b"\xc0", whole[:-1], whole[:9], whole * 2, *flipped):
        (tmp_path / "none.msgpack").write_bytes(data)
        line = refusal(capsys, "--resume", "--model", "mlp", "--out", tmp_path)
        assert f"{tmp_path}/none.msgpack is not an intact checkpoint" in line
        assert files(tmp_path) == {"none.msgpack": data}


def test_checkpoint_of_another_norm_is_one_line(short_run, tmp_path, capsys):
    data = (short_run / "none.msgpack").read_bytes()
    (tmp_path / "flax.msgpack").write_bytes(data)
    assert "the one of norm none" in refusal(capsys, "--resume", "--out", tmp_path)


def test_checkpoint_of_another_network_is_one_line(tmp_path, capsys):
    # As an older jaxbn might have written it, with fewer features.
    network = Trainer(DEFAULTS["mlp"], "jaxbn").start()
    state = jax.tree.map(lambda leaf: leaf[..., :5], network.state)
    other = dataclasses.replace(network, state=state)
    _files.save_checkpoint(tmp_path / "jaxbn.msgpack", DEFAULTS["mlp"], other)
    assert "another network" in refusal(capsys, "--resume", "--out", tmp_path)


@pytest.mark.parametrize("package", sorted(DEMO))
def test_missing_demo_package_is_one_line(package, tmp_path, monkeypatch, capsys):
    for name in list(sys.modules):
        parent, _, child = name.rpartition(".")
        if parent == "jaxbn.cli" and child not in ("train", "_arguments"):
            monkeypatch.delitem(sys.modules, name)  # as if not imported yet
            monkeypatch.delattr(cli, child)
        elif parent.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as caught:
        train("--out", tmp_path / "run")
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        f"jaxbn train: error: {package} is not installed; "
        "run: pip install 'jaxbn[demo]'\n"
    )
    assert not list(tmp_path.iterdir())


def test_help_needs_no_demo_package():
    code = "".join(f"sys.modules[{package!r}] = None\n" for package in DEMO)
    process = start(code, "--help")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    for word in ("--model", "--norm", "--resume", "metrics.json", "exit code"):
        assert word in out
