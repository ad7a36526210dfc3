"""TPU without a TPU: libtpu compiles for eight described chips, and nothing runs.

    pip install 'jaxbn[tpu]' && pytest -m tpu

The bytes that a program moves, fusion by fusion, are in sizes of x what the kernel's
docstring says: forward 3 and backward 5. What is in a branch counts nothing: it runs
where the running mean is far from that of the batch.
"""

import functools
import math

import described
import jax
import jax.numpy as jnp
import pytest
from described import DTYPES, FEATURES, LOCAL, arguments, batch_norm, both, compiled
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from kernels import SUMS, collectives, traffic
from tpu import CHIPS, needs_libtpu

import jaxbn.linen

pytestmark = [pytest.mark.tpu, needs_libtpu]
RELU = functools.partial(described.with_relu, batch_norm)


def passes_of(norm):
    return [functools.partial(step, norm) for step in (described.forward, both)]


def assert_costs(passes, args, dtype, all_reduces):
    """The forward pass moves 3 sizes of x, both move 8; and no float32 copy of it."""
    nbytes = math.prod(LOCAL) * jnp.dtype(dtype).itemsize
    for step, sizes, number in zip(passes, (3, 8), all_reduces, strict=True):
        program = compiled(step, args)
        assert collectives(program) == ({"all-reduce": number} if number else {})
        assert traffic(program).nbytes / nbytes == pytest.approx(sizes, abs=0.1)
        assert program.memory_analysis().temp_size_in_bytes / nbytes < 0.1


@DTYPES
@pytest.mark.parametrize("norm", [batch_norm, RELU], ids=["alone", "relu"])
def test_one_chip(chips, norm, dtype):
    _, args = arguments(chips[:1], dtype)
    assert_costs(passes_of(norm), args, dtype, all_reduces=(0, 0))


@DTYPES
def test_eight_chips_by_sharding(chips, dtype):
    """Plain jit: XLA adds an all-reduce to the pass for the moments, and backward."""
    _, args = arguments(chips, dtype)
    assert_costs(passes_of(batch_norm), args, dtype, all_reduces=(1, 2))


@DTYPES
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_eight_chips_by_name(chips, masked, dtype):
    """One all-reduce forward, and one backward, with that of the parameters in it."""
    mesh, args = arguments(chips, dtype)

    def norm(x, params, state):
        # Another count on each chip.
        rows = jnp.arange(LOCAL[0]).reshape(-1, 1, 1, 1)
        mask = rows > jax.lax.axis_index("chips") if masked else None
        return batch_norm(x, params, state, axis_name="chips", mask=mask)

    over_chips = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("chips"), P("chips"), P(), P())
    )
    specs = P("chips"), P()  # y, state; dx, dparams
    passes = [
        over_chips(step, out_specs=specs * number)
        for number, step in enumerate(passes_of(norm), 1)
    ]
    assert_costs(passes, args, dtype, all_reduces=(1, 2))


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

        def layers(x, params, stats):
            variables = {"params": params, "batch_stats": stats}
            return net.apply(variables, x, mutable="batch_stats")

        args = x, dy, variables["params"], variables["batch_stats"]
        program = compiled(functools.partial(both, layers), args)
        return traffic(program, SUMS).nbytes, collectives(program)

    ours, flax = sums(jaxbn.linen.BatchNorm), sums(nn.BatchNorm)
    assert ours[0] <= 1.01 * flax[0]
    assert ours[1] == flax[1]
