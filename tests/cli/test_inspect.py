"""`jaxbn inspect`: it names the layer that was spoiled, and no other."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import serialization
from runs import checkpoint, files, refusal, train

from jaxbn.__main__ import main
from jaxbn.cli.session import Checkpoints
from jaxbn.cli.training import Mesh, Trainer, load_digits

LAYERS = [f"BatchNorm_{i}" for i in range(3)]

SPOILED = {
    "mean off": lambda mean, var: (mean + 2 * np.sqrt(var), var),
    "never updated": lambda mean, var: (mean * 0, var * 0 + 1),
    "not a number": lambda mean, var: (mean * np.nan, var),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, to copy from."""
    folder = tmp_path_factory.mktemp("inspect") / "run"
    flags = ("--model", "mlp", "--epochs", 2, "--norm", "jaxbn", "flax", "none")
    assert train(*flags, "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def variables(run) -> dict:
    """Those of its network with our norm, as NumPy arrays."""
    state = checkpoint(run)[1]["jaxbn"]
    return jax.tree.map(np.array, {"params": state[0], "batch_stats": state[1]})


def look(*words: object) -> int:
    return main(["inspect", *map(str, words)])


def figures(file: Path) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


def spoil(run: Path, folder: Path, name: str, how: str) -> None:
    """Write a run again, with other statistics in one layer."""
    kept, data = Checkpoints(run), load_digits()
    settings, seen = kept.load()
    mesh = Mesh(jax.local_devices()[:1])
    trainers = {norm: Trainer(settings, norm, data, mesh) for norm in settings.norm}
    kept.restore(trainers, seen)
    stats = trainers["jaxbn"].state.batch_stats[name]
    stats["mean"], stats["var"] = SPOILED[how](stats["mean"], stats["var"])
    Checkpoints(folder, writes=True).save(settings, trainers)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (LAYERS[0], "mean off"),
        (LAYERS[1], "not a number"),
        (LAYERS[2], "never updated"),
    ],
)
def test_command_names_the_spoiled_layer_first(run, tmp_path, capsys, name, how):
    spoil(run, tmp_path, name, how)
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
    png = (tmp_path / "jaxbn.inspect.png").read_bytes()
    assert png.startswith(b"\x89PNG")


def test_healthy_run_is_said_to_be(run, tmp_path, capsys, monkeypatch):
    before = files(run)
    flags = ("--json", tmp_path / "new" / "a.json", "--png", tmp_path / "b.png")
    for norm in ("flax", "jaxbn"):
        assert look(run, "--norm", norm, *flags) == 0
        out = capsys.readouterr().out
        assert "all healthy: 3 batch norms" in out
        assert all(name in out for name in LAYERS)
        assert figures(tmp_path / "new" / "a.json")["layers"][0]["mean_kl"] < 0.5
    assert (tmp_path / "b.png").exists()
    assert files(run) == before
    # Where it cannot write beside the run, the report is printed all the same.
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "jaxbn.inspect.json").mkdir()
    assert look(folder) == 0
    out = capsys.readouterr().out
    assert "all healthy" in out
    assert f"cannot write {folder}" in " ".join(out.split())


def test_network_that_diverged_is_not_healthy(tmp_path, capsys, recwarn):
    flags = ("--model", "mlp", "--epochs", 1, "--norm", "jaxbn")
    assert train(*flags, "--learning-rate", 1e30, "--out", tmp_path) == 0
    assert look(tmp_path) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: what it is given is not finite" in out for name in LAYERS)
    assert "healthy" not in out
    assert not [each for each in recwarn if "xlims" in str(each.message)]


@pytest.mark.parametrize("deep", [1, 12])
def test_narrow_terminal_has_whole_names(
    deep, variables, tmp_path, capsys, monkeypatch
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


def test_command_refuses_in_one_line(run, variables, tmp_path, capsys):
    old = {"format": 1, "norm": "jaxbn", "settings": {}, "state": {}}
    pack = serialization.msgpack_serialize
    words = {"batch_stats": {"norm": {"mean": "a", "var": "b"}}}
    odd = {
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
    for name, (data, _) in odd.items():
        (tmp_path / name).write_bytes(data)
    refused = {tmp_path / name: message for name, (_, message) in odd.items()} | {
        tmp_path / "missing.msgpack": "No such file",
        tmp_path / "old": "of an earlier jaxbn's train",
        tmp_path / "new": "holds no run",
        tmp_path / "killed": "holds no run",
    }
    for path, message in refused.items():
        assert message in refusal(capsys, path, command="inspect")
    damaged = shutil.copytree(run, tmp_path / "damaged")
    shutil.rmtree(damaged / "checkpoints" / "46" / "state")
    line = refusal(capsys, damaged, command="inspect")
    assert "is not an intact checkpoint" in line
    for flags, named in (
        (("--json", tmp_path / "x", "--png", tmp_path / "x"), "--json"),
        (("--json", "/proc/x/y"), "argument --json: cannot write to /proc/x"),
        (("--png", tmp_path), f"argument --png: {tmp_path} is a folder"),
    ):
        assert named in refusal(capsys, run, *flags, command="inspect")
    assert not [name for name in files(tmp_path) if ".inspect." in name]


def test_run_without_norms_is_one_line(tmp_path, capsys):
    flags = ("--model", "mlp", "--epochs", 1, "--norm", "none")
    assert train(*flags, "--out", tmp_path / "run") == 0
    line = refusal(capsys, tmp_path / "run", command="inspect")
    assert "its norm is none" in line
