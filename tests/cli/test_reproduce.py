"""`jaxbn reproduce`: batches are what they claim, networks are what the tables say."""

import dataclasses
import json
import signal
from collections import Counter

import numpy as np
import pytest

from jaxbn.__main__ import main
from jaxbn.cli import reproduce, training
from jaxbn.cli.reproduce import EXPERIMENTS, batches

EVERY_VARIANT = [variant for each in EXPERIMENTS.values() for variant in each.variants]


def run(*words):
    return main(["reproduce", *map(str, words)])


@pytest.fixture(scope="module")
def digits():
    return training.load_digits()


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("epoch", [0, 7])
def test_batches_have_so_many_classes_in_no_order(digits, classes, epoch):
    labels, variant = digits.train_labels, EVERY_VARIANT[0]
    variant = dataclasses.replace(variant, batch_size=32, classes=classes)
    indices = batches(labels, variant, 3, epoch)
    assert indices.shape == batches(labels, variant, 4, 0).shape
    assert indices.shape[1] == 32
    assert len(np.unique(indices)) == indices.size  # no example twice
    rows = labels[indices]
    for row in rows:
        assert list(Counter(row.tolist()).values()) == [32 // classes] * classes
        # Both halves hold both classes: ghost batches are no poorer.
        assert len(np.unique(row[:16])) == classes
    assert (np.diff(rows[:, 0]) == 0).mean() < 0.3
    # Every class, and nearly all examples.
    assert set(rows.ravel()) == set(range(10))
    assert indices.size > 0.85 * len(labels)
    np.testing.assert_array_equal(indices, batches(labels, variant, 3, epoch))
    assert (indices != batches(labels, variant, 3, epoch + 1)).any()
    assert (indices != batches(labels, variant, 4, epoch)).any()


def test_renorm_and_ghost_batches_differ_from_batch_norm_in_nothing_else():
    for variant in EVERY_VARIANT:
        assert variant.batch_size % (variant.ghost_batch_size or 1) == 0
    for name in ("small-batches", "one-class"):
        by_name = {(v.group, v.name): v for v in EXPERIMENTS[name].variants}
        renorms = [v for v in by_name.values() if v.norm == "renorm"]
        assert len(renorms) == 2
        for variant in renorms:
            plain = dataclasses.replace(variant, name="batch norm", norm="batch")
            assert plain == by_name[plain.group, plain.name]


def test_ramps_are_shares_of_the_run():
    variant = next(each for each in EVERY_VARIANT if each.norm == "renorm")
    layer = reproduce.norm_layer(variant, 3200)()
    at = np.array([0, 100, 500, 800, 3200])
    np.testing.assert_allclose(layer.d_max(at), [0, 0, 5, 5, 5])
    want = [1, 1, 1 + 2 * 400 / 700, 3, 3]
    np.testing.assert_allclose(layer.r_max(at), want, rtol=1e-6)


def test_momentum_decides_on_running_statistics_alone(tmp_path, capsys):
    file = tmp_path / "new" / "momentum.json"
    assert run("momentum", "--seeds", 2, "--epochs", 2, "--json", file) == 0
    content = json.loads(file.read_text())
    assert content["complete"]
    rows = content["rows"]
    assert [row["variant"]["momentum"] for row in rows] == [0.9, 0.9, 0.99, 0.99]
    assert [row["epoch"] for row in rows] == [1, 2, 1, 2]
    for how in ("recalibrated", "batch"):
        columns = [row["test_accuracy"][how] for row in rows]
        assert columns[:2] == columns[2:]
        assert min(columns[1]["of_each_seed"]) > 0.7
    out = capsys.readouterr().out
    assert out.startswith("training 2 networks at once")
    first = rows[0]["test_accuracy"]["running"]
    assert first["min"] <= first["mean"] <= first["max"]
    assert f"{100 * first['mean']:.1f} ({100 * first['min']:.1f}–" in out
    assert "Wu & Johnson" in out


def test_one_class_shows_in_its_first_epochs(digits):
    """What the whole run is for: renorm at least 10 points above batch norm."""
    shares = {}
    for variant in EXPERIMENTS["one-class"].variants[:2]:
        short = dataclasses.replace(variant, epochs=12)
        *_, last = reproduce.train(short, digits, seeds=1, every_epoch=False)
        [shares[variant.norm]] = last["running"]
    assert shares["renorm"] >= shares["batch"] + 0.1


def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    def fake(variant, digits, seeds, every_epoch):
        if "renorm" in variant.name:
            signal.raise_signal(signal.SIGINT)
            yield None
            raise AssertionError("went on after Ctrl-C")
        yield {how: [0.5, 0.75] for how in reproduce.HOW}

    monkeypatch.setattr(reproduce, "train", fake)
    assert run("one-class", "--seeds", 2, "--json", tmp_path / "kept.json") == 130
    content = json.loads((tmp_path / "kept.json").read_text())
    assert not content["complete"]
    [row] = content["rows"]
    assert row["test_accuracy"]["running"]["of_each_seed"] == [0.5, 0.75]
    out = capsys.readouterr().out
    assert "62.5 (50.0–75.0)" in out
    assert "interrupted" in out
