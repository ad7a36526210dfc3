"""The chips of a TPU that is described, not there: XLA compiles, and nothing runs."""

import importlib.util
import os

import numpy as np
import pytest
from jax.experimental import topologies

CHIPS = 8

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install 'jaxbn[tpu]'",
)

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no question to a cloud's metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else one process of pytest-xdist, alone
    "TPU_LOG_DIR": "disabled",
}


def describe_chips():
    """The devices of a v5e slice."""
    os.environ.update(ENVIRONMENT)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    assert len(topology.devices) == CHIPS
    return np.array(topology.devices)


@pytest.fixture(scope="module")
def chips():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield describe_chips()
