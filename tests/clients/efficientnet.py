"""EfficientNet of bonsai (Flax NNX), with `jaxbn.nnx.BatchNorm` put in by two ways.

    python tests/clients/efficientnet.py

"edited" says our class where bonsai says `nnx.BatchNorm`; "replaced" is bonsai's model
after `replace_batch_norm`. All train on the same noise, from the same variables; the
two must stay equal to the bit. In float64 they must also stay equal to Flax's. An error
in float32 is the distance from Flax's in float64, as in `resnet.py`, and ours may be
twice Flax's. In the end the batch norms of each model are folded.
"""

import dataclasses
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import _report
import jax
import numpy as np
import optax
from bonsai.models.efficientnet import modeling
from flax import nnx
from jax.flatten_util import ravel_pytree
from resnet import error

import jaxbn.nnx
from jaxbn.cli.common import Parser

WAYS = ("flax", "edited", "replaced")
# B0 with half of its layers and features, for a short run.
CONFIG = dataclasses.replace(
    modeling.ModelConfig.b0(), width_coefficient=0.5, depth_coefficient=0.5
)
BATCH_NORMS, STEPS, IMAGES = 31, 3, (8, 32, 32, 3)
EQUAL = 1e-9  # in float64
FOLDED = 1e-5  # of the largest output


def build(way: str, dtype: Any) -> Any:
    norm = jaxbn.nnx.BatchNorm if way == "edited" else nnx.BatchNorm
    names = SimpleNamespace(**vars(nnx) | {"BatchNorm": norm})
    with mock.patch.object(modeling, "nnx", names):
        model = modeling.EfficientNet(CONFIG, rngs=nnx.Rngs(0))
    model.dropout.rate = 0.0  # bonsai gives it no random numbers
    nnx.update(model, jax.tree.map(lambda a: a.astype(dtype), numbers(model)))
    return model


def numbers(model: Any) -> Any:
    return nnx.state(model, (nnx.Param, nnx.BatchStat))


@nnx.jit
def train_step(model: Any, optimizer: Any, images: Any, labels: Any) -> jax.Array:
    def loss(model):
        logits = model(images, training=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


@nnx.jit
def infer(model: Any, images: Any) -> jax.Array:
    return model(images)


def noise(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = random.integers(CONFIG.num_classes, size=IMAGES[0])
    return random.standard_normal(IMAGES).astype(dtype), labels


def train(way: str, dtype: Any) -> tuple[Any, Any]:
    """The model, and what is compared."""
    images, labels = noise(dtype)
    model = build(way, dtype)
    optimizer = nnx.Optimizer(model, optax.sgd(0.01, momentum=0.9), wrt=nnx.Param)
    if way == "replaced":  # the optimizer stays valid
        jaxbn.nnx.replace_batch_norm(model)
    losses = [train_step(model, optimizer, images, labels) for _ in range(STEPS)]
    found = {
        "losses": np.stack(losses),
        # As one vector: the gradient of a bias before a batch norm is but rounding.
        "variables": ravel_pytree(numbers(model))[0],
        "logits of inference": infer(model, images),
    }
    return model, jax.device_get(found)


def rows() -> Iterator[_report.Row]:
    with jax.enable_x64(True):
        double = {way: train(way, "float64")[1] for way in WAYS}
    models, single = {}, {}
    for way in WAYS:
        models[way], single[way] = train(way, "float32")
    for dtype, found in (("float64", double), ("float32", single)):
        for what, true in double["flax"].items():
            errors = {way: error(found[way][what], true) for way in WAYS}
            most = EQUAL if dtype == "float64" else 2 * errors["flax"]
            same = np.array_equal(found["edited"][what], found["replaced"][what])
            holds = same and errors["edited"] <= most
            yield {"what": f"{dtype}: error of {what}", **errors, "holds": holds}
    images, _ = noise("float32")
    counts, moves = {}, {}
    for way, model in models.items():
        pairs = jaxbn.nnx.find_pairs(model, images)
        before = infer(model, images)
        after = infer(jaxbn.nnx.fold(model, pairs), images)
        counts[way] = len(pairs)
        moves[way] = float(abs(after - before).max() / abs(before).max())
    holds = set(counts.values()) == {BATCH_NORMS}
    yield {"what": "batch norms folded", **counts, "holds": holds}
    holds = 0 < max(moves.values()) < FOLDED
    yield {"what": "folded: outputs move by", **moves, "holds": holds}


def main() -> int:
    Parser(description=__doc__).parse_args()
    jax.config.update("jax_disable_most_optimizations", True)  # most time is compiling
    title = f"EfficientNet of bonsai on noise, {STEPS} steps"
    return _report.report(title, ["jax-bonsai"], rows())


if __name__ == "__main__":
    sys.exit(main())
