"""Runs of `jaxbn train` to look at or to copy: nothing is written to them."""

import pytest
from runs import SHORT, train


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "run"
    assert train(*SHORT, "--out", folder) == 0
    return folder


@pytest.fixture(scope="session")
def diverged_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diverged") / "run"
    flags = ("--model", "mlp", "--epochs", 1, "--learning-rate", 3e38)
    assert train(*flags, "--out", folder) == 0
    return folder
