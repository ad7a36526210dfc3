"""Ten layers of convolution, batch norm and relu: the memory of one training step.

    python tests/test_temporaries.py        prints the table that is asserted here

What XLA sets aside for the step beside arguments and results, in sizes of one
activation. Unrolled, XLA sees all of Flax's derivative and recomputes what is cheap; in
a scan over the layers every residual is written out.
"""

import functools
import importlib.util
import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from cases import fuses_sums
from flax import linen as nn
from jax import lax
from jax.sharding import SingleDeviceSharding
from tpu import describe_chips, needs_libtpu

from jaxbn.linen import BatchNorm

# Too large for the 128 MiB beside the cores of a v5e, where memory is not counted.
LAYERS, SHAPE = 10, (1024, 32, 32, 64)
NORMS = {"jaxbn": BatchNorm, "flax": nn.BatchNorm}
DTYPES = ("float32", "bfloat16")


def layer(norm, h, variables):
    kernel, params, stats = variables
    numbers = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=numbers)
    y, updates = norm(False, dtype=h.dtype).apply(
        {"params": params, "batch_stats": stats}, h, mutable=["batch_stats"]
    )
    return nn.relu(y), updates["batch_stats"]


def unrolled(layer, x, stacked):
    stats = []
    for i in range(LAYERS):
        x, new = layer(x, jax.tree.map(lambda a, i=i: a[i], stacked))
        stats.append(new)
    return x, stats


LOOPS = {"unrolled": unrolled, "scan": lax.scan}


def step(norm, loop, x, dy, kernels, params, stats):
    def net(x, kernels, params):
        return loop(functools.partial(layer, norm), x, (kernels, params, stats))

    y, vjp, stats = jax.vjp(net, x, kernels, params, has_aux=True)
    return y, stats, vjp(dy)


def temporaries(norm, loop, dtype, device):
    """Of one step compiled for `device`, in sizes of x."""
    shaped = functools.partial(
        jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device)
    )
    x = shaped(SHAPE, jnp.dtype(dtype))
    kernels = shaped((LAYERS, 3, 3, SHAPE[-1], SHAPE[-1]), x.dtype)
    vector = shaped((LAYERS, SHAPE[-1]), jnp.float32)
    params, stats = {"scale": vector, "bias": vector}, {"mean": vector, "var": vector}
    training = jax.jit(functools.partial(step, NORMS[norm], LOOPS[loop]))
    with jax.numpy_dtype_promotion("standard"):  # Flax needs it for bfloat16
        compiled = training.lower(x, x, kernels, params, stats).compile()
    nbytes = math.prod(SHAPE) * x.dtype.itemsize
    return compiled.memory_analysis().temp_size_in_bytes / nbytes


def share(loop, dtype, device):
    """Temporaries with our batch norm over those with Flax's."""
    ours, flax = (temporaries(norm, loop, dtype, device) for norm in NORMS)
    return ours / flax


@fuses_sums
@pytest.mark.parametrize(("loop", "dtype"), [*zip(LOOPS, DTYPES, strict=True)])
def test_cpu(loop, dtype):
    assert share(loop, dtype, jax.devices("cpu")[0]) < 0.75


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.5), ("float32", 0.65)])
def test_tpu_scan(chips, dtype, most):
    assert share("scan", dtype, chips[0]) < most


def main():
    devices = {"cpu": jax.devices("cpu")[0]}
    if importlib.util.find_spec("libtpu"):
        devices["tpu"] = describe_chips()[0]
    print("temporaries, in activations:", *NORMS)
    for name, loop, dtype in itertools.product(devices, LOOPS, DTYPES):
        sizes = [temporaries(norm, loop, dtype, devices[name]) for norm in NORMS]
        print(f"{name} {loop:8} {dtype:8}", *(f"{size:6.1f}" for size in sizes))


if __name__ == "__main__":
    main()
