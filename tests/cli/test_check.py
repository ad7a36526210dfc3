"""`jaxbn check`: right here, and red where an error is planted."""

import json

import pytest

from jaxbn.__main__ import main
from jaxbn._core import kernel
from jaxbn.cli import check


@pytest.mark.exhaustive
def test_all_is_well_on_eight_devices(lenient, tmp_path, capsys):
    file = tmp_path / "new" / "check.json"
    assert main(["check", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("comparing this machine's batch norms")
    assert "FAILED" not in out
    assert "36 of 36 cases are right on 8 x cpu" in out
    rows = json.loads(file.read_text())["rows"]
    assert {row["dtype"] for row in rows} == set(check.DTYPES)
    for over in ("shard_map", "sharded jit"):
        assert sum(over in row["case"] for row in rows) == 5 * 2


def scaled(dy, cache):
    dx, dscale, dbias = backward(dy, cache)
    return dx * 1.01, dscale, dbias


def off(x, mask, *rest):
    batch = moments(x, mask, *rest)
    return batch._replace(head=batch.head * (1 + 1e-6))


def broken(x, mask, *rest):
    raise NotImplementedError("no such dtype\nhere")


backward, moments = kernel.backward, kernel.moments


@pytest.mark.parametrize(
    ("name", "planted", "setting", "message"),
    [
        ("backward", scaled, "plain", "plain: dx is off by"),
        ("moments", off, "large mean", "large mean: y is off by"),
        ("moments", broken, "plain", "NotImplementedError: no such dtype\n"),
    ],
)
def test_a_planted_error_is_found(monkeypatch, capsys, name, planted, setting, message):
    monkeypatch.setattr(kernel, name, planted)
    few = [check.Case("float32", each) for each in ("masked", setting)]
    monkeypatch.setattr(check, "cases", lambda num_devices: few)
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: float32" in out
    assert message in out
