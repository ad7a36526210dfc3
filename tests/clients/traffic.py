"""The bytes that the training step of a ResNet moves, on a GPU or TPU not at hand.

    pip install -e '.[demo,gpu]' && python tests/clients/traffic.py gpu bfloat16
    pip install -e '.[demo,tpu]' && python tests/clients/traffic.py tpu bfloat16

XLA compiles for a described H200, or for chips of a v5e, and nothing runs. Model and
step are those of `resnet.py`, under plain `jit`, with the batch sharded over the chips;
figures are for one chip. A ResNet-50 takes minutes to compile. `--depth 14` has one
block a stage: all its shapes, in a quarter of the time.

Bytes are what `tests/kernels.py` counts: on a GPU those of all kernels, on a TPU those
of fusions with convolutions and sums, outside of branches. Ours must be at most 1.01 of
those of Flax's default.
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _report
import jax
import jax.numpy as jnp
import resnet
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn.cli.common import Parser, integer_from
from jaxbn.linen import BatchNorm

sys.path.append(str(Path(__file__).parents[1]))
from gpu import OPTIONS, describe_gpus
from kernels import SUMS, collectives, traffic
from tpu import CHIPS, describe_chips

NORMS = {
    "Flax": nn.BatchNorm,
    "Flax, stable": functools.partial(nn.BatchNorm, use_fast_variance=False),
    "jaxbn": BatchNorm,
}
MOST = 1.01  # over Flax


def unnamed(norm: Any) -> Any:
    """`norm` without the axis that the example's `jax.pmap` names."""
    return lambda *, axis_name, **options: norm(**options)


def train_step(state: resnet.State, batch: Any) -> resnet.State:
    grads, (_, stats) = jax.grad(resnet.loss, has_aux=True)(state.params, state, batch)
    return state.apply_gradients(grads=grads, batch_stats=stats)


def compile_step(args: argparse.Namespace, path: Path, norm: Any, mesh: Mesh) -> Any:
    model = resnet.build(path, unnamed(norm), 50, args.dtype)
    if args.depth == 14:
        model = model.clone(stage_sizes=(1, 1, 1, 1))
    images = (args.batch_size, args.image_size, args.image_size, 3)

    def initialize() -> tuple[resnet.State, Any]:
        image = jnp.zeros(images, args.dtype)
        variables = model.init(jax.random.key(0), image)
        batch = {"image": image, "label": jnp.zeros(args.batch_size, jnp.int32)}
        tx = resnet.OPTIMIZER
        return resnet.State.create(apply_fn=model.apply, tx=tx, **variables), batch

    shapes = jax.tree.map(
        lambda spec, tree: jax.tree.map(
            lambda a: a.update(sharding=NamedSharding(mesh, spec)), tree
        ),
        (P(), P("chips")),
        jax.eval_shape(initialize),
    )
    step = jax.jit(train_step, donate_argnums=0).lower(*shapes)
    return step.compile(compiler_options=OPTIONS if args.platform == "gpu" else None)


def rows(args: argparse.Namespace) -> Iterator[_report.Row]:
    describe = describe_gpus if args.platform == "gpu" else describe_some_chips
    mesh = Mesh(describe(args.chips), "chips", axis_types=(AxisType.Auto,))
    with tempfile.TemporaryDirectory() as folder:
        path = args.models or resnet.fetch(Path(folder))
        flax = None
        for name, norm in NORMS.items():
            begun = time.perf_counter()
            program = compile_step(args, path, norm, mesh)
            seconds = time.perf_counter() - begun
            kernels, nbytes = traffic(program, SUMS if args.platform == "tpu" else None)
            flax = flax or nbytes
            row = {
                "what": name,
                "GB": nbytes / 1e9,
                "over Flax": nbytes / flax,
                "kernels": kernels,
                "temp., GB": program.memory_analysis().temp_size_in_bytes / 1e9,
                "all-reduces": collectives(program).get("all-reduce", 0),
                "compiled, s": seconds,
            }
            if name == "jaxbn":
                row["holds"] = nbytes <= MOST * flax
            yield row


def describe_some_chips(number: int) -> Any:
    return describe_chips()[:number]


def main() -> int:
    parser = Parser(description=__doc__)
    count = integer_from(1)
    parser.add_argument("platform", choices=("gpu", "tpu"))
    parser.add_argument("dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--depth", type=int, choices=(14, 50), default=50)
    parser.add_argument("--batch-size", type=count, metavar="N", default=128)
    parser.add_argument("--image-size", type=count, metavar="N", default=224)
    parser.add_argument(
        "--chips", type=int, choices=range(1, CHIPS + 1), metavar="N", default=1
    )
    parser.add_argument(
        "--models",
        type=Path,
        metavar="FILE",
        help="the example's models.py, if it is not to be fetched",
    )
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    images = f"{args.batch_size} images of {args.image_size} x {args.image_size}"
    title = f"ResNet-{args.depth}, {args.dtype}, {images}, {args.chips} {args.platform}"
    return _report.report(title, ["optax"], rows(args))


if __name__ == "__main__":
    sys.exit(main())
