"""TPU without a TPU: libtpu compiles for eight described chips, and nothing runs.

    pip install 'jaxbn[tpu]' && pytest -m tpu

The bytes that a program moves, fusion by fusion, are in sizes of x what the kernel's
docstring says: forward 3 and backward 5. What is in a branch counts nothing: it runs
where the running mean is far from that of the batch.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from described import (
    DTYPES,
    FEATURES,
    LOCAL,
    arguments,
    batch_norm,
    both,
    compiled,
    forward,
    with_relu,
)
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from kernels import SUMS, collectives, traffic
from tpu import CHIPS, needs_libtpu

import jaxbn.linen

pytestmark = [pytest.mark.tpu, needs_libtpu]
RELU = functools.partial(with_relu, batch_norm)


def sizes(program, dtype):
    """Bytes moved and bytes of temporaries, on each chip, in sizes of x."""
    nbytes = math.prod(LOCAL) * jnp.dtype(dtype).itemsize
    moved = traffic(program).nbytes
    return moved / nbytes, program.memory_analysis().temp_size_in_bytes / nbytes


def assert_passes(program, passes, dtype):
    """So many reads and writes of x's size, and no temporary: no float32 copy."""
    moved, temporary = sizes(program, dtype)
    assert moved == pytest.approx(passes, abs=0.1)
    assert temporary < 0.1


@DTYPES
@pytest.mark.parametrize("norm", [batch_norm, RELU], ids=["alone", "relu"])
def test_one_chip(chips, norm, dtype):
    _, args = arguments(chips[:1], dtype)
    for step, passes in ((forward, 3), (both, 8)):
        program = compiled(functools.partial(step, norm), args)
        assert not collectives(program)
        assert_passes(program, passes, dtype)


@DTYPES
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_eight_chips_by_name(chips, masked, dtype):
    """One all-reduce forward, and one backward, with that of the parameters in it."""
    mesh, args = arguments(chips, dtype)

    def norm(x, params, state):
        mask = None
        if masked:  # of another count on each chip
            rows = jnp.arange(LOCAL[0]).reshape(-1, 1, 1, 1)
            mask = rows > jax.lax.axis_index("chips")
        return batch_norm(x, params, state, axis_name="chips", mask=mask)

    def over_chips(step, out_specs):
        in_specs = P("chips"), P("chips"), P(), P()
        return jax.shard_map(
            functools.partial(step, norm),
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
        )

    specs = P("chips"), P()  # y, state; dx, dparams
    for step, number in ((forward, 1), (both, 2)):
        program = compiled(over_chips(step, specs * number), args)
        assert collectives(program) == {"all-reduce": number}
        assert_passes(program, 3 if step is forward else 8, dtype)


@DTYPES
def test_eight_chips_by_sharding(chips, dtype):
    """Plain jit: XLA adds an all-reduce to the pass for the moments, and backward."""
    _, args = arguments(chips, dtype)
    for step, number in ((forward, 1), (both, 2)):
        program = compiled(functools.partial(step, batch_norm), args)
        assert collectives(program) == {"all-reduce": number}
        assert_passes(program, 3 if step is forward else 8, dtype)


class Layers(nn.Module):
    """Two of convolution, norm and relu."""

    norm: type[nn.Module]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            conv = nn.Conv(FEATURES, (3, 3), use_bias=False, dtype=self.dtype)
            norm = self.norm(use_running_average=False, dtype=self.dtype)
            x = nn.relu(norm(conv(x)))
        return x


@DTYPES
@pytest.mark.parametrize("number", [1, CHIPS])
@jax.numpy_dtype_promotion("standard")  # Flax needs it
@jax.numpy_rank_promotion("allow")
def test_layers_move_what_flax_moves(chips, number, dtype):
    """Both moments are taken in the epilogues of the convolutions."""
    _, (x, dy, *_) = arguments(chips[:number], dtype, images=128)

    def sums(norm):
        net = Layers(norm, dtype)
        variables = jax.eval_shape(net.init, jax.random.key(0), x)

        def layers(x, params, state):
            variables = {"params": params, "batch_stats": state}
            return net.apply(variables, x, mutable="batch_stats")

        args = x, dy, variables["params"], variables["batch_stats"]
        program = compiled(functools.partial(both, layers), args)
        return traffic(program, SUMS).nbytes, collectives(program)

    ours, flax = sums(jaxbn.linen.BatchNorm), sums(nn.BatchNorm)
    assert ours[0] <= 1.01 * flax[0]
    assert ours[1] == flax[1]
