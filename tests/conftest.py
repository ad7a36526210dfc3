"""Strict JAX, and eight devices, for every test."""

import os

# A "+" keeps what the caller has set.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import compiled as compiled
import jax
import jax.numpy as jnp
import pytest
from tpu import chips as chips

# Run by hand: each script says what it needs and how.
collect_ignore = ["clients"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A fifth of the suite's time was LLVM's. These keep its optimizations: what they
# hold to are digits, bits or memory, or they start processes, which have them.
OPTIMIZED = {"barriers", "blocks", "faults", "moments", "normalize", "numerics"}
OPTIMIZED |= {"peer_vectors", "properties", "quotient", "reproduce", "rounding"}
OPTIMIZED |= {"cli_bench", "cli_devices", "cli_train", "security", "temporaries"}


@pytest.fixture(autouse=True, scope="module")
def optimizations(request):
    """Let LLVM optimize, or not; XLA fuses as it always does."""
    disable = request.path.stem.removeprefix("test_") not in OPTIMIZED
    if jax.config.read("jax_disable_most_optimizations") != disable:
        jax.config.update("jax_disable_most_optimizations", disable)
        jax.clear_caches()  # JAX would take what it has, whichever it is


@pytest.fixture
def near(monkeypatch):
    """Programs without the CPU's branch for means that are far from 0.

    XLA counts what is in a branch as if it were run.
    """
    monkeypatch.setattr(
        "jaxbn._moments.corrected",
        lambda x, mean, var, *_: (mean, var, jnp.zeros_like(mean)),
    )
