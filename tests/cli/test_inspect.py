"""`jaxbn inspect`: it names the layer that was spoiled, and no other."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import serialization
from runs import checkpoint, files, metrics, refusal, restored, train

from jaxbn.__main__ import main
from jaxbn.cli import inspect
from jaxbn.cli.session import Checkpoints

LAYERS = [f"BatchNorm_{i}" for i in range(3)]

SPOILED = {
    "mean off": lambda mean, var: (mean + 2 * np.sqrt(var), var),
    "not a number": lambda mean, var: (mean * np.nan, var),
    "never updated": lambda mean, var: (mean * 0, var * 0 + 1),
}


@pytest.fixture(scope="module")
def variables(short_run):
    """Those of its network with our norm, as NumPy arrays."""
    state = checkpoint(short_run)[1]["jaxbn"]
    return jax.tree.map(np.array, {"params": state[0], "batch_stats": state[1]})


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(inspect, "draw", lambda *args: None)


def look(*words):
    return main(["inspect", *map(str, words)])


def figures(file):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.mark.parametrize(("name", "how"), [*zip(LAYERS, SPOILED, strict=True)])
def test_command_names_the_spoiled_layer_first(
    name, how, short_run, tmp_path, monkeypatch, capsys
):
    if how != "not a number":  # of which no axis has a place
        monkeypatch.setattr(inspect, "draw", lambda *args: None)
    settings, _, trainers = restored(short_run)
    stats = trainers["jaxbn"].state.batch_stats[name]
    stats["mean"], stats["var"] = SPOILED[how](stats["mean"], stats["var"])
    Checkpoints(tmp_path, writes=True).save(settings, trainers)
    assert look(tmp_path) == 0
    out = capsys.readouterr().out
    assert f"{name}: running statistics " in out
    assert "healthy" not in out
    assert out.index(name) < min(out.index(x) for x in LAYERS if x != name)
    content = figures(tmp_path / "jaxbn.inspect.json")
    assert content["layers"][0]["path"] == [name]
    assert content["layers"][0]["mean_kl"] > 5 * content["layers"][1]["mean_kl"]
    accuracy = content["test_accuracy"]
    true_ones = accuracy["true ones in all layers"]
    assert accuracy["running statistics"] < true_ones - 0.1
    assert accuracy["true ones in the worst layer"] > true_ones - 0.1


def test_healthy_run_is_said_to_be(short_run, tmp_path, capsys):
    before = files(short_run)
    flags = ("--json", tmp_path / "new" / "a.json", "--png", tmp_path / "b.png")
    assert look(short_run, *flags) == 0
    out = capsys.readouterr().out
    assert "all healthy: 3 batch norms" in out
    assert all(name in out for name in LAYERS)
    assert figures(tmp_path / "new" / "a.json")["layers"][0]["mean_kl"] < 0.5
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert files(short_run) == before


def test_run_of_other_norms(short_run, no_picture, tmp_path, capsys):
    settings, _, trainers = restored(short_run)
    trainers["flax"] = trainers.pop("jaxbn")
    for norm in (("none",), ("none", "flax")):
        kept = {name: trainers[name] for name in norm}
        folder = tmp_path / norm[-1]
        other = dataclasses.replace(settings, norm=norm)
        Checkpoints(folder, writes=True).save(other, kept)
    line = refusal(capsys, tmp_path / "none", command="inspect")
    assert "has no batch norm: its norm is none" in line
    flags = (tmp_path / "flax", "--norm")
    line = refusal(capsys, *flags, "jaxbn", command="inspect")
    assert "has no jaxbn: its norm is none, flax" in line
    (tmp_path / "flax" / "flax.inspect.json").mkdir()
    assert look(*flags, "flax") == 0
    out = capsys.readouterr().out
    assert "all healthy" in out
    # Where it cannot write beside the run, the report is printed all the same.
    assert f"cannot write {tmp_path / 'flax'}" in " ".join(out.split())


def test_network_that_diverged_is_not_healthy(tmp_path, capsys):
    flags = ("--model", "mlp", "--epochs", 1, "--learning-rate", 3e38)
    assert train(*flags, "--out", tmp_path) == 0
    assert None in metrics(tmp_path)["results"]["none"]["training_loss"]
    assert train("--resume", "--out", tmp_path) == 0
    capsys.readouterr()
    assert look(tmp_path) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: what it is given is not finite" in out for name in LAYERS)
    assert "healthy" not in out
    png = (tmp_path / "jaxbn.inspect.png").read_bytes()
    assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize("deep", [1, 12])
def test_narrow_terminal_has_whole_names(
    deep, variables, no_picture, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "60")
    name = "/".join(["ResidualBlock_1"] * deep)
    stats = {name: variables["batch_stats"][LAYERS[0]]}
    file = tmp_path / "model.msgpack"
    file.write_bytes(serialization.to_bytes({"batch_stats": stats, "params": {}}))
    assert look(file) == 0
    out = capsys.readouterr().out
    if deep == 1:
        assert name in out
    assert name in out.replace("\n", "")
    lines = out.replace(str(tmp_path), "").splitlines()
    assert max(map(len, lines)) <= 60


def test_plain_variables_are_shown_without_divergence(variables, tmp_path, capsys):
    stats = {name: dict(each) for name, each in variables["batch_stats"].items()}
    stats[LAYERS[1]]["var"] = np.zeros(100, np.float32)
    file = tmp_path / "model[x].msgpack"
    file.write_bytes(serialization.to_bytes(variables | {"batch_stats": stats}))
    assert look(file) == 0
    out = capsys.readouterr().out
    assert "without a model and data" in out
    assert f"{LAYERS[1]}: dead in 100 channels" in out
    layers = figures(tmp_path / "model[x].inspect.json")["layers"]
    assert [each["path"] for each in layers] == [[name] for name in LAYERS]
    assert [len(each["dead"]) for each in layers] == [0, 100, 0]
    assert {each["mean_kl"] for each in layers} == {None}


def test_what_cannot_be_read_is_refused_in_one_line(
    short_run, variables, tmp_path, capsys
):
    pack = serialization.msgpack_serialize
    words = {"batch_stats": {"norm": {"mean": "a", "var": "b"}}}
    old = {"format": 1, "norm": "jaxbn", "settings": {}, "state": {}}
    written = {
        "cut.msgpack": (pack(variables)[:999], "not a Flax checkpoint"),
        "empty.msgpack": (b"", "not a Flax checkpoint"),
        "text.msgpack": (b"not a checkpoint", "not a Flax checkpoint"),
        "number.msgpack": (pack(3), "holds one int, not variables"),
        "params.msgpack": (pack({"params": variables["params"]}), "has no batch norm"),
        "words.msgpack": (pack(words), "has no batch norm to inspect"),
        "old/jaxbn.msgpack": (pack(old), "of an earlier jaxbn's train"),
    }
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "killed" / "checkpoints").mkdir(parents=True)  # before the first
    damaged = shutil.copytree(short_run, tmp_path / "damaged")
    shutil.rmtree(damaged / "checkpoints" / "44" / "state")
    for name, (data, _) in written.items():
        (tmp_path / name).write_bytes(data)
    refused = {name: message for name, (_, message) in written.items()} | {
        "missing.msgpack": "No such file",
        "old": "of an earlier jaxbn's train",
        "new": "holds no run",
        "killed": "holds no run",
        "damaged": "is not an intact checkpoint",
    }
    for name, message in refused.items():
        assert message in refusal(capsys, tmp_path / name, command="inspect")
    assert not [name for name in files(tmp_path) if ".inspect." in name]
