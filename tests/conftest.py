"""Strict JAX, and eight devices, for every test."""

import os
import tempfile

# A "+" keeps what the caller has set.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import pytest
from jax._src.lru_cache import LRUCache
from tpu import chips as chips

# Run by hand: each script says what it needs and how.
collect_ignore = ["clients"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# What one worker of this run has compiled, the others read.
COMPILED = "JAXBN_TESTS_COMPILED"
if COMPILED not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="jaxbn-tests-")
    os.environ[COMPILED] = folder.name
jax.config.update("jax_compilation_cache_dir", os.environ[COMPILED])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def put_whole(self, key, value):
    """As JAX's, but no worker can read the half of a file."""
    path = os.path.join(self.path, f"{key}-cache")
    if not os.path.exists(path):
        with tempfile.NamedTemporaryFile(dir=self.path, delete=False) as file:
            file.write(value)
        os.replace(file.name, path)


LRUCache.put = put_whole


@pytest.fixture
def near(monkeypatch):
    """Programs without the CPU's branch for means that are far from 0.

    XLA counts what is in a branch as if it were run.
    """
    monkeypatch.setattr(
        "jaxbn._moments.corrected",
        lambda x, mean, var, *_: (mean, var, jnp.zeros_like(mean)),
    )
