"""Strict JAX, and eight devices, for every test."""

import os
from importlib.metadata import version

# A "+" keeps what the caller has set.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Half of the suite's time was LLVM's and MLIR's. XLA fuses as it always does.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0" and version("jax") < "0.11":
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # gone since

import compiled as compiled
import guess
import jax
import pytest
from tpu import chips as chips

# Run by hand: each script says what it needs and how.
collect_ignore = ["clients"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

if "JAXBN_GUESS" in os.environ:
    guess.force()


QUICK = jax.config.read("jax_disable_most_optimizations")
# They keep LLVM's optimizations: what they hold to is digits.
OPTIMIZED = {
    "batch_norm",
    "kernel",
    "moments",
    "numerics",
    "peer_vectors",
}


@pytest.fixture(autouse=True, scope="module")
def optimizations(request):
    """Let LLVM optimize where the tests of a module need it."""
    needed = QUICK and request.path.stem.removeprefix("test_") in OPTIMIZED
    if needed:
        optimize(True)
    yield
    if needed:
        optimize(False)


def optimize(on):
    jax.config.update("jax_disable_most_optimizations", not on)
    jax.clear_caches()  # JAX would take what it has, whichever it is


@pytest.fixture
def lenient():
    """Let other people's code promote dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """A finished run to look at or to copy; nothing is written to it."""
    from runs import SHORT, train  # its hook for errors is to come after pytest's

    folder = tmp_path_factory.mktemp("short") / "run"
    assert train(*SHORT, "--out", folder) == 0
    return folder
