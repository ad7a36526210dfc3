"""A GPU that is described, not there: XLA compiles for it, and nothing runs."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from jax.experimental import topologies

DESCRIPTION = Path(__file__).parent / "data" / "h200.txtpb"
# Autotuning runs kernels.
OPTIONS = {"xla_gpu_autotune_level": 0}

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs JAX's CUDA plugin: pip install 'jaxbn[gpu]'",
)


def describe_gpus(number):
    """So many H200."""
    topology = topologies.get_topology_desc(
        "described",
        "cuda",
        target_config=DESCRIPTION.read_text(),
        topology=f"1x1x{number}",
    )
    return np.array(topology.devices)
