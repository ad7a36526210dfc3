"""What `import jaxbn` brings."""

import importlib.metadata
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx


def test_import_brings_no_framework():
    others = {"flax", "torch", "keras", "haiku", "equinox", "tensorflow"}
    code = "import sys, jaxbn; jaxbn.convert.load_torch\n"
    code += f"found = {others} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    names = "Moments Params State Cache init batch_norm batch_moments merge_moments"
    names += " normalize forward backward convert ghost_batch_norm batch_renorm fold"
    names += " fold_before fold_tree update_state ramp_r_max ramp_d_max step_limits"
    assert set(jaxbn.__all__) == set(names.split())
    assert all(hasattr(jaxbn, name) for name in jaxbn.__all__)


def test_version():
    assert jaxbn.__version__ == importlib.metadata.version("jaxbn")


def assert_pickles(value, module):
    assert type(value).__module__ == module
    loaded = pickle.loads(pickle.dumps(value))
    assert type(loaded) is type(value)
    arrays = [v if isinstance(v, tuple) else nnx.state(v) for v in (loaded, value)]
    jax.tree.map(np.testing.assert_array_equal, *arrays)


def test_pickles_name_what_is_public():
    """So that a pickle outlives a move of the files."""
    params, state = jaxbn.init(3)
    x = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    moments, (_, cache) = jaxbn.batch_moments(x), jaxbn.forward(x, *params)
    for value in (params, state, moments, cache):
        assert_pickles(value, "jaxbn")
        assert b"jaxbn._" not in pickle.dumps(value) or value is cache
    for cls in (jaxbn.nnx.BatchNorm, jaxbn.nnx.BatchRenorm):
        assert_pickles(cls(3, rngs=nnx.Rngs(0)), "jaxbn.nnx")


@pytest.mark.parametrize("module", [jaxbn.linen, jaxbn.nnx])
def test_dir_shows_what_is_ours(module):
    assert sorted(dir(module)) == sorted(module.__all__)
