"""GPU without a GPU: XLA compiles for H200 that are described, and nothing runs.

    pip install 'jaxbn[gpu]' && pytest -m gpu

Bytes are counted in sizes of x, as `kernels` reads them from the optimized HLO. What
the kernel's docstring says is held here, and Flax's `BatchNorm` is counted beside ours.
"""

import functools

import jax
import pytest
from described import DTYPES, FEATURES, arguments, both, compiled, forward, with_relu
from flax import linen as nn
from gpu import OPTIONS, describe_gpus, needs_plugin
from kernels import collectives, traffic

from jaxbn.linen import BatchNorm

pytestmark = [pytest.mark.gpu, needs_plugin]

LAYERS = 10


def normalize(layer, x, params, state):
    """In training, by `layer`, a class of Linen."""
    stats = {"mean": state.mean, "var": state.var}
    variables = {"params": params._asdict(), "batch_stats": stats}
    module = layer(use_running_average=False, dtype=x.dtype)
    with jax.numpy_dtype_promotion("standard"):  # Flax needs it for bfloat16
        y, updates = module.apply(variables, x, mutable=["batch_stats"])
    return y, updates["batch_stats"]


OURS, FLAX = (
    functools.partial(normalize, layer) for layer in (BatchNorm, nn.BatchNorm)
)


def layers(norm, x, params, states):
    """Ten times convolution, batch norm and relu."""
    numbers = ("NHWC", "HWIO", "NHWC")
    new = []
    for (kernel, param), state in zip(params, states, strict=True):
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", None, None, numbers)
        x, state = with_relu(norm, x, param, state)
        new.append(state)
    return x, new


@pytest.fixture(scope="module")
def gpu():
    return describe_gpus(1)


def count(step, norm, args):
    """Bytes moved and bytes of temporaries, in sizes of x, and kernels."""
    program = compiled(functools.partial(step, norm), args, OPTIONS)
    kernels, moved = traffic(program)
    nbytes = args[0].size * args[0].dtype.itemsize
    temporary = program.memory_analysis().temp_size_in_bytes
    return moved / nbytes, temporary / nbytes, kernels


@DTYPES
@pytest.mark.parametrize("relu", [False, True], ids=["alone", "relu"])
def test_one_norm(gpu, relu, dtype):
    """Forward 3 and backward 5 sizes, beside the part whose mean is the shift.

    Flax moves 8 or 9 alone, by the order of its cotangents, and 8.5 to 10 with a relu.
    """
    _, args = arguments(gpu, dtype)
    ours, flax = OURS, FLAX
    if relu:
        ours, flax = (functools.partial(with_relu, norm) for norm in (ours, flax))
    moved, temporary, _ = count(forward, ours, args)
    assert moved <= 3.15
    assert temporary < 0.1
    moved, temporary, kernels = count(both, ours, args)
    assert moved <= 8.15
    assert temporary < 0.1
    assert kernels <= 13
    assert moved <= (1 if relu else 1.01) * count(both, flax, args)[0]


@DTYPES
def test_eight_gpus_by_sharding(dtype):
    """Plain jit: an all-reduce for each pass that sums."""
    _, args = arguments(describe_gpus(8), dtype)
    for step, number in ((forward, 2), (both, 3)):
        program = compiled(functools.partial(step, OURS), args, OPTIONS)
        assert collectives(program) == {"all-reduce": number}


@DTYPES
@pytest.mark.parametrize("images", [128, 512])
def test_layers(gpu, images, dtype):
    """Over Flax's. XLA's choice, to recompute or to write out, depends on the size."""
    _, (x, dy, params, state) = arguments(gpu, dtype, images)
    kernel = jax.ShapeDtypeStruct(
        (3, 3, FEATURES, FEATURES), dtype, sharding=params.scale.sharding
    )
    args = x, dy, [(kernel, params)] * LAYERS, [state] * LAYERS
    ours, flax = (
        count(both, functools.partial(layers, norm), args) for norm in (OURS, FLAX)
    )
    moved, temporary, kernels = (a / b for a, b in zip(ours, flax, strict=True))
    assert moved <= 0.98
    assert temporary <= 1.01
    assert kernels <= 1.1
