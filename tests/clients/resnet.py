"""The ResNet of Flax's ImageNet example, with `jaxbn.linen.BatchNorm` in it.

    python tests/clients/resnet.py

pip fetches the model, which is in Flax's source distribution. It is built twice: as it
is, and with our class where it says `nn.BatchNorm`; a training step is the example's,
under `jax.pmap`, on noise. Both must begin with the same tree of variables. An error is
the distance from the same model in float64, over its norm, and the largest of all
arrays; ours may be twice Flax's, as it is chance which way a sum was rounded. The time
is the median of steps that take turns; temporaries are what XLA sets aside beside
arguments and results, and residuals what JAX keeps for the backward pass.
"""

import argparse
import importlib.util
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _report
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.flatten_util import ravel_pytree

import jaxbn.linen
from jaxbn.cli.common import Parser, integer_from

NORMS = {"flax": nn.BatchNorm, "jaxbn": jaxbn.linen.BatchNorm}
CLASSES, WEIGHT_DECAY = 1000, 1e-4  # the example's
OPTIMIZER = optax.sgd(0.1, momentum=0.9, nesterov=True)
# Before outputs are compared: at the start the last scale of each block is 0, and so
# are most gradients.
STEPS_BEFORE = 3


class State(TrainState):
    batch_stats: Any


def fetch(folder: Path) -> Path:
    """The file with the example's models, from Flax's source distribution."""
    flags = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder]
    download = [sys.executable, "-m", "pip", "download", *flags]
    subprocess.run([*download, f"flax=={flax.__version__}"], check=True)
    (archive,) = folder.glob("flax-*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    return source / "examples" / "imagenet" / "models.py"


def build(path: Path, norm: Any, depth: int, dtype: Any) -> nn.Module:
    """The model in which `nn.BatchNorm` is `norm`."""
    spec = importlib.util.spec_from_file_location("models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["nn"] = SimpleNamespace(**vars(nn) | {"BatchNorm": norm})
    return getattr(module, f"ResNet{depth}")(num_classes=CLASSES, dtype=dtype)


def loss(params: Any, state: State, batch: Any) -> Any:
    """The example's, and (logits, new statistics)."""
    logits, updates = state.apply_fn(
        {"params": params, "batch_stats": state.batch_stats},
        batch["image"],
        mutable=["batch_stats"],
    )
    labels = jax.nn.one_hot(batch["label"], CLASSES)
    entropy = optax.softmax_cross_entropy(logits, labels).mean()
    squares = sum((p**2).sum() for p in jax.tree.leaves(params) if p.ndim > 1)
    return entropy + WEIGHT_DECAY / 2 * squares, (logits, updates["batch_stats"])


def train_step(state: State, batch: Any) -> State:
    grads, (_, stats) = jax.grad(loss, has_aux=True)(state.params, state, batch)
    grads, stats = jax.lax.pmean((grads, stats), "batch")
    return state.apply_gradients(grads=grads, batch_stats=stats)


def outputs(state: State, batch: Any) -> dict[str, Any]:
    """What is compared."""
    grads, (logits, stats) = jax.grad(loss, has_aux=True)(state.params, state, batch)
    grads, stats = jax.lax.pmean((grads, stats), "batch")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    inferred = state.apply_fn(variables, batch["image"], train=False)
    return {
        "logits": logits,
        "logits of inference": inferred,
        # As one vector: a mean near 0 is known to a part of the standard deviation.
        "new statistics": ravel_pytree(stats)[0],
        "gradients": grads,
    }


def residuals(state: State, batch: Any) -> list[jax.Array]:
    """What is kept for the backward pass, but for the parameters."""
    _, vjp, _ = jax.vjp(
        lambda params: loss(params, state, batch), state.params, has_aux=True
    )
    known = {id(leaf) for leaf in jax.tree.leaves(state.params)}
    kept = {id(leaf): leaf for leaf in jax.tree.leaves(vjp)}
    return [leaf for i, leaf in kept.items() if i not in known]


def mapped(function: Any, out_axes: Any) -> Any:
    """Each device has its part of the batch, as in the example."""
    return jax.pmap(function, in_axes=(None, 0), out_axes=out_axes, axis_name="batch")


def error(found: Any, true: Any) -> float:
    """The largest of all arrays."""

    def one(found, true):
        found, true = (np.asarray(a, np.float64) for a in (found, true))
        return float(np.linalg.norm(found - true) / np.linalg.norm(true))

    return max(jax.tree.leaves(jax.tree.map(one, found, true)))


def data(args: argparse.Namespace) -> dict[str, jax.Array]:
    random = np.random.default_rng(args.seed)
    shape = (args.devices, args.batch_size, args.image_size, args.image_size, 3)
    return {
        "image": jnp.asarray(random.standard_normal(shape), args.dtype),
        "label": jnp.asarray(random.integers(CLASSES, size=shape[:2])),
    }


def rows(args: argparse.Namespace) -> Iterator[_report.Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = fetch(Path(folder))
        models = {
            name: build(path, norm, args.depth, args.dtype)
            for name, norm in NORMS.items()
        }
        exact = build(path, nn.BatchNorm, args.depth, "float64")
    batch, states = data(args), {}
    for name, model in models.items():
        variables = jax.jit(model.init)(jax.random.key(args.seed), batch["image"][0])
        states[name] = State.create(apply_fn=model.apply, tx=OPTIMIZER, **variables)
    yield variables_row(states)
    steps, kept = {}, {}
    for name, state in states.items():
        steps[name] = mapped(train_step, None).lower(state, batch).compile()
        kept[name] = jax.eval_shape(mapped(residuals, 0), state, batch)
    yield from memory_rows(steps, kept)
    state = states["flax"]
    for _ in range(STEPS_BEFORE):
        state = steps["flax"](state, batch)
    yield from error_rows(models, exact, state, batch)
    yield time_row(steps, states, batch, args.rounds)


def variables_row(states: dict[str, State]) -> _report.Row:
    trees = {name: (state.params, state.batch_stats) for name, state in states.items()}
    same = jax.tree.map(lambda a, b: bool((a == b).all()), *trees.values())
    counts = {name: len(jax.tree.leaves(tree)) for name, tree in trees.items()}
    return {"what": "variables", **counts, "holds": jax.tree.all(same)}


def memory_rows(steps: Any, kept: Any) -> Iterator[_report.Row]:
    sizes = {
        name: sum(a.size * a.dtype.itemsize for a in arrays) / 1e6
        for name, arrays in kept.items()
    }
    yield {"what": "residuals, MB", **sizes}
    temporaries = {n: s.memory_analysis().temp_size_in_bytes for n, s in steps.items()}
    yield {"what": "temporaries, MB", **{n: b / 1e6 for n, b in temporaries.items()}}


def error_rows(
    models: Any, exact: nn.Module, state: State, batch: Any
) -> Iterator[_report.Row]:
    axes = {"logits": 0, "logits of inference": 0}
    axes |= {"new statistics": None, "gradients": None}
    compare = mapped(outputs, axes)
    with jax.enable_x64(True):
        true = jax.device_get(compare(state.replace(apply_fn=exact.apply), batch))
    found = {
        name: jax.device_get(compare(state.replace(apply_fn=model.apply), batch))
        for name, model in models.items()
    }
    for what in axes:
        errors = {name: error(each[what], true[what]) for name, each in found.items()}
        holds = errors["jaxbn"] <= 2 * errors["flax"]
        yield {"what": f"error of {what}", **errors, "holds": holds}


def time_row(steps: Any, states: Any, batch: Any, rounds: int) -> _report.Row:
    order, seconds = random.Random(0), {name: [] for name in steps}
    for _ in range(rounds + 1):  # the first one warms up
        for name in order.sample(list(steps), len(steps)):
            begun = time.perf_counter()
            jax.block_until_ready(steps[name](states[name], batch))
            seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    return {"what": "step, ms", **{name: 1e3 * each for name, each in medians.items()}}


def main() -> int:
    parser = Parser(description=__doc__)
    count = integer_from(1)
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 101), default=50)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-size", type=count, metavar="N", default=16)
    parser.add_argument("--image-size", type=count, metavar="N", default=64)
    parser.add_argument("--devices", type=count, metavar="N", default=1)
    parser.add_argument("--rounds", type=count, metavar="N", default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    images = f"{args.batch_size} images of {args.image_size} x {args.image_size}"
    title = f"ResNet-{args.depth}, {args.dtype}, {args.devices} x {images}"
    return _report.report(title, ["optax"], rows(args))


if __name__ == "__main__":
    sys.exit(main())
