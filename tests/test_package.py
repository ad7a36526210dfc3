"""What `import jaxbn` brings, and what the README shows, run as it stands."""

import importlib.metadata
import os
import pathlib
import pickle
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT.joinpath("README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_import_brings_no_flax():
    code = "import sys, jaxbn; assert 'flax' not in sys.modules, 'flax'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    """Those of DESIGN.md, and three beside them; nothing else by accident."""
    import jaxbn

    named = {"Moments", "Params", "State", "init", "batch_norm", "batch_moments"}
    named |= {"merge_moments", "normalize", "forward", "backward", "convert"}
    named |= {"ghost_batch_norm", "batch_renorm", "fold", "fold_before", "fold_tree"}
    named |= {"update_state", "ramp_r_max", "ramp_d_max", "Cache"}
    named |= {"step_limits"}
    assert set(jaxbn.__all__) == named
    assert all(hasattr(jaxbn, name) for name in named)


def test_version():
    import jaxbn

    assert jaxbn.__version__ == importlib.metadata.version("jaxbn")


def test_pickles_name_what_is_public():
    """So that a pickle outlives a move of the files."""
    import jax
    import numpy as np

    import jaxbn

    params, state = jaxbn.init(3)
    x = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    moments, (_, cache) = jaxbn.batch_moments(x), jaxbn.forward(x, *params)
    for value in (params, state, moments, cache):
        assert type(value).__module__ == "jaxbn"
        pickled = pickle.dumps(value)
        loaded = pickle.loads(pickled)
        assert type(loaded) is type(value)
        jax.tree.map(np.testing.assert_array_equal, loaded, value)
        assert b"jaxbn._" not in pickled or value is cache


def test_pickles_of_nnx_modules_name_what_is_public():
    import jax
    import numpy as np
    from flax import nnx

    from jaxbn.nnx import BatchNorm, BatchRenorm

    for cls in (BatchNorm, BatchRenorm):
        assert cls.__module__ == "jaxbn.nnx"
        norm = cls(3, rngs=nnx.Rngs(0))
        loaded = pickle.loads(pickle.dumps(norm))
        assert type(loaded) is cls
        jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(norm))


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_dir_shows_what_is_ours(name):
    module = importlib.import_module(f"jaxbn.{name}")
    assert sorted(dir(module)) == sorted(module.__all__)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_block_runs(number):
    """In a process of its own, as a reader would, in JAX's default configuration."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", BLOCKS[number]]
    subprocess.run(words, check=True, cwd=ROOT, env=env)


@pytest.mark.parametrize("command", ["jaxbn train", "pytest"])
def test_readme_has_one_line_commands(command):
    fenced = re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.DOTALL)
    lines = [line for block in fenced for line in block.splitlines()]
    assert any(command in line and "pip install" in line for line in lines)
