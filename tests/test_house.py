"""The house: who imports whom, how deep, and how long the files are; without cli."""

import ast
import functools
from pathlib import Path

import pytest

import jaxbn

ROOT = Path(jaxbn.__file__).parent
FILES = {
    ".".join(path.relative_to(ROOT.parent).parts)[:-3].removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if "cli" not in path.parts and path.name != "__main__.py"
}


@functools.cache
def imports(module):
    """Full names of what a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor(module, above=()):
    """1 for what imports nothing of ours, else one more than what it imports."""
    assert module not in above, f"imports upwards: {' -> '.join((*above, module))}"
    names = imports(module) | {name.rpartition(".")[0] for name in imports(module)}
    below = names & set(FILES)
    # `from jaxbn import _axes` needs that file alone, not what jaxbn itself imports.
    below -= {"jaxbn"} | {name.rpartition(".")[0] for name in below}
    return 1 + max((floor(name, (*above, module)) for name in below), default=0)


def test_imports_point_downwards_over_nine_floors_at_most():
    assert max(map(floor, FILES)) <= 9


@pytest.mark.parametrize("module", FILES)
def test_a_file_is_short_and_imports_what_has_its_place_there(module):
    """What differs between JAX's versions and platforms is in one file alone."""
    assert len(FILES[module].read_text().splitlines()) <= 380
    foreign = ["jax._src"]
    if module != "jaxbn._core.platforms":
        foreign += ["jax.extend", "jax.interpreters"]
    if module.startswith("jaxbn._models"):
        foreign += ["flax.linen", "flax.nnx"]
    assert not [name for name in imports(module) if name.startswith(tuple(foreign))]
