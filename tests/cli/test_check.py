"""`jaxbn check`: right here, and red where an error is planted."""

import json

import jax
import pytest

from jaxbn.__main__ import main
from jaxbn._core import kernel
from jaxbn.cli import _check_cases


def test_all_is_well_on_eight_devices(tmp_path, capsys):
    file = tmp_path / "new" / "check.json"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main(["check", "--json", str(file)]) == 0
    assert "FAILED" not in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert {row["dtype"] for row in rows} == {
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
    }
    assert sum("over devices" in row["case"] for row in rows) == 5 * 4


def no_projection(dy, cache):
    dx, dscale, dbias = backward(dy, cache)
    return dx * 1.01, dscale, dbias


def cancelling(x, mask, *rest):
    batch = moments(x, mask, *rest)
    return batch._replace(head=batch.head * (1 + 1e-4))


backward, moments = kernel.backward, kernel.moments


@pytest.mark.parametrize(
    ("name", "planted", "case", "quantity"),
    [
        ("backward", no_projection, "plain", "dx"),
        ("moments", cancelling, "large mean", "y"),
    ],
)
def test_a_planted_error_is_found(monkeypatch, capsys, name, planted, case, quantity):
    monkeypatch.setattr(kernel, name, planted)
    few = [_check_cases.Case(jax.numpy.float32, setting) for setting in ("plain", case)]
    monkeypatch.setattr(_check_cases, "cases", lambda: iter(few))
    assert main(["check"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert _check_cases.errors(few[1], 0)[quantity] > few[1].tolerance()


@pytest.mark.parametrize(
    "flags", [["--devices", "0"], ["--seed", "-1"], ["--what"], ["--json", "."]]
)
def test_wrong_flags_are_one_line(flags, capsys, monkeypatch):
    """Before anything is computed."""
    monkeypatch.delattr(_check_cases, "cases")
    with pytest.raises(SystemExit) as caught:
        main(["check", *flags])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
