import pytest


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """A finished run to look at or to copy; nothing is written to it."""
    from runs import SHORT, train  # its hook for errors is to come after pytest's

    folder = tmp_path_factory.mktemp("short") / "run"
    assert train(*SHORT, "--out", folder) == 0
    return folder
