"""`python -m jaxbn inspect`: it names the layer that was spoiled, and no other."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import serialization

from jaxbn.__main__ import main

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
    norms = ("jaxbn", "flax", "none")
    flags = ("--model", "mlp", "--epochs", "2", "--norm", *norms, "--out", str(folder))
    assert main(["train", *flags]) == 0
    return folder


def inspect(*words: object) -> int:
    return main(["inspect", *map(str, words)])


def figures(file: Path) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


def spoil(checkpoint: Path, name: str, how: str) -> None:
    """As a person would: with Flax's own functions, and no care for the digest."""
    content = serialization.msgpack_restore(checkpoint.read_bytes())
    stats = content["state"]["batch_stats"][name]
    stats["mean"], stats["var"] = SPOILED[how](stats["mean"], stats["var"])
    checkpoint.write_bytes(serialization.msgpack_serialize(content))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (LAYERS[0], "mean off"),
        (LAYERS[1], "not a number"),
        (LAYERS[2], "never updated"),
    ],
)
def test_command_names_the_spoiled_layer_first(run, tmp_path, capsys, name, how):
    checkpoint = shutil.copy(run / "jaxbn.msgpack", tmp_path / "jaxbn.msgpack")
    spoil(checkpoint, name, how)
    assert inspect(tmp_path) == 0
    out = capsys.readouterr().out
    assert "changed after training" in out
    assert f"worst: {name}, " in out
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


def test_healthy_run_says_nothing_of_change(run, tmp_path, capsys):
    files = tmp_path / "new" / "a.json", tmp_path / "b.png"
    flags = ("--json", files[0], "--png", files[1])
    assert inspect(run / "flax.msgpack", *flags) == 0
    out = capsys.readouterr().out
    assert "changed" not in out
    assert all(name in out for name in LAYERS)
    assert figures(files[0])["layers"][0]["mean_kl"] < 1
    assert files[1].exists()


def test_plain_variables_are_shown_without_divergence(run, tmp_path, capsys):
    content = serialization.msgpack_restore((run / "jaxbn.msgpack").read_bytes())
    variables = {key: content["state"][key] for key in ("params", "batch_stats")}
    variables["batch_stats"][LAYERS[1]]["var"] = np.zeros(100, np.float32)
    file = tmp_path / "model[x].msgpack"
    file.write_bytes(serialization.to_bytes(variables))
    assert inspect(file) == 0
    assert "without a model and data" in capsys.readouterr().out
    layers = figures(tmp_path / "model[x].inspect.json")["layers"]
    assert [each["path"] for each in layers] == [[name] for name in LAYERS]
    assert [len(each["dead"]) for each in layers] == [0, 100, 0]
    assert {each["mean_kl"] for each in layers} == {None}


def test_command_refuses_in_one_line(run, tmp_path, capsys):
    whole = (run / "jaxbn.msgpack").read_bytes()
    content = serialization.msgpack_restore(whole)
    odd = {
        "cut.msgpack": (whole[: len(whole) // 2], "not a Flax checkpoint"),
        "empty.msgpack": (b"", "not a Flax checkpoint"),
        "text.msgpack": (b"not a checkpoint", "not a Flax checkpoint"),
        "params.msgpack": (
            serialization.msgpack_serialize({"params": content["state"]["params"]}),
            "has no batch norm to inspect",
        ),
        "words.msgpack": (
            serialization.msgpack_serialize(
                {"batch_stats": {"norm": {"mean": "a", "var": "b"}}}
            ),
            "has no batch norm to inspect",
        ),
        "other.msgpack": (
            serialization.msgpack_serialize(content | {"state": {"params": {}}}),
            "is of another network",
        ),
        "settings.msgpack": (
            serialization.msgpack_serialize(content | {"settings": 3}),
            "is not an intact checkpoint",
        ),
    }
    for name, (data, _) in odd.items():
        (tmp_path / name).write_bytes(data)
    refused = {tmp_path / name: message for name, (_, message) in odd.items()} | {
        run / "none.msgpack": "its norm is none",
        tmp_path / "missing.msgpack": "No such file",
        tmp_path: "holds no checkpoint",
    }
    for path, message in refused.items():
        with pytest.raises(SystemExit) as caught:
            inspect(path)
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("jaxbn inspect: error: ")
        assert error.count("\n") == 1
        assert message in error
    with pytest.raises(SystemExit) as caught:
        inspect(run, "--json", tmp_path / "x", "--png", tmp_path / "x")
    assert caught.value.code == 2
    assert not list(tmp_path.glob("*.inspect.*"))
