"""reproduce: batches are what they claim, networks are those of `train`."""

import dataclasses
import json
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxbn.__main__ import main
from jaxbn.cli import _digits, _reproduce_run
from jaxbn.cli._reproduce_batches import batches
from jaxbn.cli._reproduce_settings import EXPERIMENTS
from jaxbn.cli._reproduce_training import Accuracies, norm_layer, train
from jaxbn.cli._settings import DEFAULTS
from jaxbn.cli._training import Trainer

EVERY_VARIANT = [variant for each in EXPERIMENTS.values() for variant in each.variants]


def reproduce(*words: object) -> int:
    return main(["reproduce", *map(str, words)])


def figures(file: Path) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def digits() -> _digits.Digits:
    return _digits.load()


# Batches


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_batches_have_so_many_classes(digits, classes, epoch):
    labels = digits.train_labels
    indices = batches(labels, 32, classes, 3, epoch)
    assert indices.shape == batches(labels, 32, classes, 4, 0).shape
    assert indices.shape[1] == 32
    assert len(np.unique(indices)) == indices.size  # no example twice
    for row in labels[indices]:
        assert list(Counter(row.tolist()).values()) == [32 // classes] * classes
    # Every class, and nearly all examples.
    assert set(labels[indices].ravel()) == set(range(10))
    assert indices.size > 0.85 * len(labels)
    np.testing.assert_array_equal(indices, batches(labels, 32, classes, 3, epoch))
    assert (indices != batches(labels, 32, classes, 3, epoch + 1)).any()
    assert (indices != batches(labels, 32, classes, 4, epoch)).any()


def test_batches_of_few_classes_come_in_no_order(digits):
    rows = digits.train_labels[batches(digits.train_labels, 32, 1, 0, 0)][:, 0]
    assert (np.diff(rows) == 0).mean() < 0.3
    # Both halves of a batch hold both classes: ghost batches are no poorer.
    rows = digits.train_labels[batches(digits.train_labels, 32, 2, 0, 0)]
    assert all(len(set(row[:16].tolist())) == 2 for row in rows)


def test_batches_of_any_class_are_those_of_train(digits):
    for size in (2, 4, 60):
        indices = batches(digits.train_labels, size, None, 3, 5)
        np.testing.assert_array_equal(indices, _digits.batches(1437, size, 3, 5))
        assert indices.shape == (1437 // size, size)


def test_impossible_batches_are_refused():
    labels = np.repeat([0, 1, 2], [60, 4, 4])
    with pytest.raises(ValueError, match="do not divide"):
        batches(labels, 5, 2, 0, 0)
    with pytest.raises(ValueError, match="too few classes"):
        batches(labels, 4, 2, 0, 0)


# Settings


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_ghost_batches_divide_their_batch(variant):
    assert variant.batch_size % (variant.ghost_batch_size or 1) == 0


@pytest.mark.parametrize("name", ["small-batches", "one-class"])
def test_renorm_differs_from_batch_norm_in_nothing_else(name):
    variants = EXPERIMENTS[name].variants
    pairs = [
        (a, b)
        for a in variants
        for b in variants
        if a.group == b.group and (a.name, b.name) == ("batch norm", "batch renorm")
    ]
    assert len(pairs) == 2
    for a, b in pairs:
        assert dataclasses.replace(a, name=b.name, norm=b.norm) == b


def test_ramps_are_shares_of_the_run():
    [variant] = [each for each in EVERY_VARIANT if each.norm == "renorm"][:1]
    layer = norm_layer(variant, 3200)()
    at = np.array([0, 100, 500, 800, 3200])
    np.testing.assert_allclose(layer.d_max(at), [0, 0, 5, 5, 5])
    np.testing.assert_allclose(
        layer.r_max(at), [1, 1, 1 + 2 * 400 / 700, 3, 3], rtol=1e-6
    )


# Networks


def test_momentum_rows_are_those_of_train(tmp_path, capsys, digits):
    """Of all seeds at once, in one program, as of one after the other."""
    file = tmp_path / "new" / "momentum.json"
    flags = ("--seeds", 2, "--epochs", 2, "--json", file)
    assert reproduce("momentum", *flags) == 0
    content = figures(file)
    assert content["complete"]
    rows = content["rows"]
    assert [row["variant"]["momentum"] for row in rows] == [0.9, 0.9, 0.99, 0.99]
    assert [row["epoch"] for row in rows] == [1, 2, 1, 2]

    # Momentum decides on running statistics alone.
    for how in ("recalibrated", "batch"):
        columns = [row["test_accuracy"][how] for row in rows]
        assert columns[:2] == columns[2:]
    settings = dataclasses.replace(DEFAULTS["mlp"], epochs=1)
    for seed in range(2):
        trainer = Trainer(dataclasses.replace(settings, seed=seed), "jaxbn")
        network = trainer.start()
        for _ in trainer.advance(network, digits):
            pass
        got = rows[0]["test_accuracy"]
        for how, batch in (("running", False), ("batch", True)):
            want = trainer.measure(network, digits, batch)
            assert got[how]["of_each_seed"][seed] == pytest.approx(want, abs=0.01)

    out = capsys.readouterr().out
    first = rows[0]["test_accuracy"]["running"]
    assert first["min"] <= first["mean"] <= first["max"]
    cells = f"{100 * first['mean']:.1f} ({100 * first['min']:.1f}–"
    assert cells in out
    assert "of 2 seeds" in out
    assert "Wu & Johnson" in out


@pytest.mark.parametrize(
    ("name", "row", "paper"),
    [
        ("small-batches", "ghost batches of 2 in 60", ["74.2 %", "76.5 %"]),
        ("one-class", "batch renorm", ["78.5 %"]),
        ("large-batch", "ghost batches of 64 in 704", ["Hoffer"]),
    ],
)
def test_experiments_run(tmp_path, monkeypatch, capsys, name, row, paper):
    experiment = EXPERIMENTS[name]
    variant = next(each for each in experiment.variants if each.name == row)
    short = dataclasses.replace(experiment, variants=(variant,))
    monkeypatch.setitem(EXPERIMENTS, name, short)
    monkeypatch.chdir(tmp_path)
    assert reproduce(name, "--seeds", 1, "--epochs", 1) == 0
    [result] = figures(tmp_path / "runs" / "reproduce" / f"{name}.json")["rows"]
    assert result["variant"] == dataclasses.asdict(variant) | {"epochs": 1}
    for shares in result["test_accuracy"].values():
        assert 0 <= shares["mean"] == shares["min"] == shares["max"] <= 1
    out = capsys.readouterr().out
    assert all(text in out for text in [row, *paper])


def test_one_class_shows_in_a_tenth_of_its_epochs(digits):
    """What the whole run is for: renorm at least 10 points above batch norm."""
    shares = {}
    for variant in EXPERIMENTS["one-class"].variants[:2]:
        short = dataclasses.replace(variant, epochs=16)
        *_, last = train(short, digits, seeds=2, every_epoch=False)
        assert last is not None
        shares[variant.norm] = np.mean(last.running)
    assert shares["renorm"] >= shares["batch"] + 0.1


# What it leaves behind, and refuses


def test_interrupt_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    def fake(variant, digits, seeds, every_epoch):
        if "renorm" in variant.name:
            signal.raise_signal(signal.SIGINT)
            yield None
            raise AssertionError("went on after Ctrl-C")
        yield Accuracies(*([0.5, 0.75] for _ in range(3)))

    monkeypatch.setattr(_reproduce_run, "train", fake)
    file = tmp_path / "kept.json"
    assert reproduce("one-class", "--seeds", 2, "--json", file) == 130
    content = figures(file)
    assert not content["complete"]
    [row] = content["rows"]
    assert row["test_accuracy"]["running"]["of_each_seed"] == [0.5, 0.75]
    out = capsys.readouterr().out
    assert "62.5 (50.0–75.0)" in out
    assert "interrupted" in out


def test_interrupt_before_anything_writes_nothing(tmp_path, monkeypatch):
    def fake(*_args):
        signal.raise_signal(signal.SIGINT)
        yield None

    monkeypatch.setattr(_reproduce_run, "train", fake)
    assert reproduce("momentum", "--json", tmp_path / "kept.json") == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["two-class"],
        ["one-class", "--seeds", "0"],
        ["one-class", "--epochs", "x"],
        ["one-class", "--json", "."],
    ],
)
def test_refusals_are_one_line(capsys, words):
    with pytest.raises(SystemExit) as caught:
        reproduce(*words)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("jaxbn reproduce: error: ")
    assert error.count("\n") == 1
