"""Graph networks of jraphx (Flax NNX), with `jaxbn.nnx.BatchNorm` in place of its own.

    python tests/clients/graphs.py

The graph joins each of scikit-learn's 1,797 handwritten digits to its nearest others by
their pixels; GraphSAGE is trained on the labels of one digit in ten, and tested on the
rest. jraphx's layer keeps the unbiased variance, as ours does when asked. Both networks
begin with the same numbers. In float64 they must stay equal: the loss of every step,
and the logits of inference in the end. In float32 the accuracies are shown.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import _report
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jraphx.nn import norm
from jraphx.nn.models import GraphSAGE, basic_gnn
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph

import jaxbn.nnx
from jaxbn.cli.common import Parser, integer_from

NEIGHBOURS, HIDDEN, LAYERS, CLASSES, SHARE_KNOWN = 8, 64, 3, 10, 0.1
# A bias before a batch norm has no gradient but rounding, 1e-17 or so, which Adam
# divides by 1e-8. A running variance that is biased shows at 3e-4 in logits.
EQUAL = 1e-9


class BatchNorm(jaxbn.nnx.BatchNorm):
    """Ours, by the arguments of jraphx's."""

    def __init__(self, num_features: int, *, rngs: nnx.Rngs):
        super().__init__(num_features, running_variance="unbiased", rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        batch: Any = None,
        *,
        use_running_average: bool | None = None,
        mask: Any = None,
    ) -> jax.Array:
        del batch  # of which graph a node is, does not matter there either
        return super().__call__(x, use_running_average, mask=mask)


NORMS = {"jraphx": norm.BatchNorm, "jaxbn": BatchNorm}


class Graph(NamedTuple):
    x: jax.Array
    edges: jax.Array
    labels: jax.Array
    known: jax.Array


def graph(dtype: Any) -> Graph:
    pixels, labels = load_digits(return_X_y=True)
    joined = kneighbors_graph(pixels, NEIGHBOURS).tocoo()
    known = np.random.default_rng(0).random(len(labels)) < SHARE_KNOWN
    return Graph(
        jnp.asarray(pixels / 16, dtype),
        jnp.asarray(np.stack([joined.col, joined.row])),
        jnp.asarray(labels),
        jnp.asarray(known),
    )


def build(norm_class: Any, seed: int, dtype: Any) -> nnx.Module:
    """GraphSAGE; every number of it in `dtype`."""
    with mock.patch.object(basic_gnn, "BatchNorm", norm_class):
        model = GraphSAGE(
            64, HIDDEN, LAYERS, CLASSES, norm="batch_norm", rngs=nnx.Rngs(seed)
        )
    numbers = nnx.state(model, (nnx.Param, nnx.BatchStat))
    nnx.update(model, jax.tree.map(lambda a: cast(a, dtype), numbers))
    return model


def cast(a: jax.Array, dtype: Any) -> jax.Array:
    return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a


@nnx.jit
def train_step(model: Any, optimizer: nnx.Optimizer, graph: Graph) -> jax.Array:
    def loss(model):
        logits = model(graph.x, graph.edges)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, graph.labels)
        return (entropy * graph.known).sum() / graph.known.sum()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


class Trained(NamedTuple):
    losses: np.ndarray
    logits: np.ndarray  # of inference
    accuracy: float  # on the digits whose labels were not trained on


def train(norm_class: Any, seed: int, dtype: Any, steps: int) -> Trained:
    model, data = build(norm_class, seed, dtype), graph(dtype)
    with mock.patch.object(basic_gnn, "BatchNorm", norm_class):  # `isinstance` there
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        model.train()
        losses = [float(train_step(model, optimizer, data)) for _ in range(steps)]
        model.eval()
        logits = np.asarray(model(data.x, data.edges))
    right = (logits.argmax(1) == data.labels)[~data.known]
    return Trained(np.asarray(losses), logits, float(right.mean()))


def rows(args: argparse.Namespace) -> Iterator[_report.Row]:
    with jax.enable_x64(True):
        theirs, ours = (
            train(each, 0, "float64", args.steps) for each in NORMS.values()
        )
    for name in ("losses", "logits"):
        expected, found = (getattr(each, name) for each in (theirs, ours))
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        label = f"{name} in float64: difference"
        yield {"what": label, "jraphx": 0.0, "jaxbn": error, "holds": error < EQUAL}
    for seed in range(args.seeds):
        accuracies = {
            name: train(each, seed, "float32", args.steps).accuracy
            for name, each in NORMS.items()
        }
        yield {"what": f"accuracy, seed {seed}", **accuracies}


def main() -> int:
    parser = Parser(description=__doc__)
    count = integer_from(2)
    parser.add_argument("--steps", type=count, metavar="N", default=100)
    parser.add_argument("--seeds", type=integer_from(1), metavar="N", default=3)
    args = parser.parse_args()
    title = f"GraphSAGE of jraphx on digits, {args.steps} steps"
    return _report.report(title, ["jraphx", "scikit-learn"], rows(args))


if __name__ == "__main__":
    sys.exit(main())
