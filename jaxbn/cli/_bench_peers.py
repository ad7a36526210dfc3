"""The contenders, and which of them are installed."""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from jaxbn.cli import _bench_layers
from jaxbn.cli._bench_layers import Build

OURS = "jaxbn"  # among the peers, and always measured


class Peer(NamedTuple):
    """A contender.

    Attributes:
      module: What is imported.
      distribution: What is installed.
      build: How a layer is made; None for PyTorch, whose process is `_bench_torch`.
    """

    module: str
    distribution: str
    build: Build | None


PEERS = {
    "jaxbn": Peer("jaxbn", "jaxbn", _bench_layers.jaxbn_layer),
    "jaxbn-linen": Peer(
        "flax", "jaxbn", functools.partial(_bench_layers.linen_layer, kind="jaxbn")
    ),
    "flax-fast": Peer(
        "flax", "flax", functools.partial(_bench_layers.linen_layer, kind="fast")
    ),
    "flax-stable": Peer(
        "flax", "flax", functools.partial(_bench_layers.linen_layer, kind="stable")
    ),
    "nnx": Peer("flax", "flax", _bench_layers.nnx_layer),
    "haiku": Peer("haiku", "dm-haiku", _bench_layers.haiku_layer),
    "equinox": Peer("equinox", "equinox", _bench_layers.equinox_layer),
    "keras": Peer("keras", "keras", _bench_layers.keras_layer),
    "torch": Peer("torch", "torch", None),
}


def find(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Which of these peers are here, and why the others are not."""
    if "keras" in names:
        os.environ["KERAS_BACKEND"] = "jax"  # read when it is imported
    found, missing = [], {}
    for name in names:
        module, distribution, build = PEERS[name]
        if importlib.util.find_spec(module) is None:
            missing[name] = f"{distribution} is not installed"
            continue
        try:
            if build is not None:  # PyTorch is imported elsewhere
                with warnings.catch_warnings(action="ignore"):
                    importlib.import_module(module)
        except Exception as error:  # an import can fail in any way
            missing[name] = f"{distribution} cannot be imported: {error!r}"
        else:
            found.append(name)
    return found, missing
