"""The notebooks: each runs from a clean kernel, and shows what it showed when stored.

    python tests/test_notebooks.py [notebooks/1-backward-by-hand.ipynb ...]

runs them (all, if none is named) in the same way, and stores their outputs.
"""

import os
import platform
import re
import sys
import tempfile
from pathlib import Path

# Builds matplotlib's font cache, which a cell would otherwise tell about, once.
import matplotlib.font_manager  # noqa: F401
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TEST_FILES = {path.name for path in Path(__file__).parent.glob("*.py")}

# All that a notebook says about itself: a version or a date would change by itself.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MOST_LINES, MOST_BYTES = 12, 500_000
# A folder of the machine that ran it, or the address of an object.
LOCAL = re.compile(r"(?<![\w.:/])/(home|root|tmp|Users|opt|mnt|work)/|[A-Z]:\\|0x\w{6}")


def execute(notebook, folder=FOLDER):
    """Runs all cells, in place, in a new kernel of this interpreter, on the CPU.

    With JAX's default configuration and IPython's default profile.
    """
    ours = ("XLA_FLAGS", "JAX_", "MPL", "PYTHONWARNINGS", "PYTEST")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    with tempfile.TemporaryDirectory() as scratch:
        manager = AsyncKernelManager(
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            connection_file=f"{scratch}/kernel.json",
            transport="ipc",
        )
        env |= {"JAX_PLATFORMS": "cpu", "IPYTHONDIR": scratch}
        client = NotebookClient(
            notebook,
            km=manager,
            resources={"metadata": {"path": str(folder)}},
            timeout=240,
            record_timing=False,  # seconds would differ from run to run, and so would
            coalesce_streams=True,  # where printed text is cut into pieces
        )
        client.execute(env=env, cleanup_kc=True)
    return notebook


def store(path):
    notebook = execute(nbformat.read(path, as_version=4), path.parent)
    notebook.metadata = METADATA
    nbformat.write(notebook, path)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(output):
    return output.get("data", {}).get("text/plain", output.get("text", ""))


def shown(cell):
    """The words of a cell's outputs, and their kinds.

    Not the numbers, as the last digits depend on the version of JAX, nor the pixels.
    """
    number = r"[-+]?(\d[\d.,]*(e[-+]?\d+)?|nan|inf)"
    return [
        (
            output.get("name", sorted(output.get("data", {}))),
            "".join(re.sub(number, "#", text(output)).split()),
        )
        for output in cell.outputs
    ]


notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.notebooks
@notebooks
def test_runs_and_shows_what_is_stored(path):
    """No cell fails, hence no claim in one; what is stored is not stale."""
    stored = nbformat.read(path, as_version=4)
    fresh = execute(nbformat.read(path, as_version=4))
    here = str(FOLDER.parent), str(Path.home()), sys.prefix, platform.node()
    local = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, here))})(?!\w)")
    for old, new in zip(code_cells(stored), code_cells(fresh), strict=True):
        assert shown(old) == shown(new), new.source
        assert not any(local.search(text(output)) for output in new.outputs)


@notebooks
def test_what_is_stored_is_clean(path):
    """Nothing of the machine in it, short cells, and for every picture a claim."""
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert path.stat().st_size < MOST_BYTES
    assert notebook.metadata == METADATA
    assert not any(cell.metadata for cell in notebook.cells)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    since, pictures = "", 0  # a claim is asserted since the picture before
    for cell in cells:
        assert len(cell.source.splitlines()) <= MOST_LINES, cell.source
        private = re.search(r"jaxbn(\.\w+)*\._|jaxbn\.cli|sys\.path", cell.source)
        assert private is None, cell.source
        imported = re.findall(r"^\s*(?:import|from) (\w+)", cell.source, re.M)
        assert not {f"{name}.py" for name in imported} & TEST_FILES, cell.source
        for output in cell.outputs:
            assert output.get("name") != "stderr", output.text
            assert not LOCAL.search(text(output))
        since += cell.source
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert "assert " in since, cell.source
            since, pictures = "", pictures + 1
    assert pictures


if __name__ == "__main__":
    for path in [Path(name).resolve() for name in sys.argv[1:]] or NOTEBOOKS:
        print(path.name)
        store(path)
