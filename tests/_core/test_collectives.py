"""What sync costs, in all-reduces of the compiled program, and how exact it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from devices import (
    GROUPS,
    KINDS,
    NUM,
    draw,
    gradients_of_all,
    local_loss,
    mesh,
    old_state,
    over_devices,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from kernels import collectives

import jaxbn


def all_reduces(f, *args):
    found = collectives(jax.jit(f).lower(*args).compile())
    assert set(found) == {"all-reduce"}
    return found["all-reduce"]


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["one batch", "two groups"])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_one_all_reduce_forward_and_one_backward(kind, groups):
    """The backward's holds the sums of the parameters' gradients too."""
    x, scale, bias, mask, dy, c = draw(lead_params=())
    args = x, jaxbn.Params(scale, bias), old_state(), mask, dy, c
    loss = functools.partial(local_loss, axis_name="d", axis_index_groups=groups)

    def inside(*args):
        grads, (y, *state) = jax.grad(loss, (0, 1), has_aux=True)(*args)
        if kind == "shard_map":  # JAX sums by itself where it tracks copies
            grads = grads[0], jax.lax.psum(grads[1], "d")
        return grads, y, state

    over = functools.partial(over_devices, kind, in_axes=(0, None, None, 0, 0, None))
    assert all_reduces(over(loss), *args) == 1
    assert all_reduces(gradients_of_all(over(loss)), *args) == 2
    assert all_reduces(over(inside), *args) == 2


# A mask costs one more, for its count.
@pytest.mark.parametrize(
    ("shape", "axis", "masked"),
    [
        ((800, 4), -1, True),
        ((4096, 4), -1, False),
        ((4104, 4), -1, False),
        ((NUM * 77, 256), -1, False),
        ((NUM * 77, 256), -1, True),
        ((16, 8, 8, 4), -1, False),
        ((16, 4, 8, 8), 1, True),
    ],
    ids=str,
)
def test_plain_jit_over_shards(shape, axis, masked):
    of_x = NamedSharding(mesh(d=NUM), P("d"))
    x, dy = (jax.device_put(jnp.ones(shape), of_x) for _ in range(2))
    mask = jax.device_put(jnp.ones(shape, bool), of_x) if masked else None
    params, state = jaxbn.init(shape[axis])

    def train(x, params, mask):
        return jaxbn.batch_norm(x, params, state, train=True, axis=axis, mask=mask)

    def train_and_back(x, params, mask, dy):
        y, back, new = jax.vjp(lambda *a: train(*a, mask), x, params, has_aux=True)
        return y, new, back(dy)

    assert all_reduces(train, x, params, mask) <= 2 + masked
    assert all_reduces(train_and_back, x, params, mask, dy) <= 3 + masked


@pytest.mark.parametrize("rows", [77, 1000])
def test_shard_map_over_one_axis_gathers_no_rows(rows):
    """What it leaves to XLA, the other axis, may have them, too."""
    over = mesh(d=2, rest=NUM // 2)
    x = jnp.ones((NUM * rows, 256))
    x = jax.device_put(x, NamedSharding(over, P(("d", "rest"))))
    params, state = jaxbn.init(256)

    @functools.partial(
        jax.shard_map, mesh=over, in_specs=P("d"), out_specs=P("d"), axis_names={"d"}
    )
    def layer(x):
        return jaxbn.batch_norm(x, params, state, train=True, axis_name="d")[0]

    assert all_reduces(layer, x)


@pytest.mark.parametrize("kind", KINDS)
def test_large_mean_over_uneven_shards(kind):
    """At mean/std 1e4 a sum of squares would be wrong by a factor of ten.

    Flax averages the means of unequal counts.
    """
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(NUM, 64, 3)) + 1e4).astype(np.float32)
    mask = np.arange(64)[:, None] < rng.integers(0, 64, (NUM, 1, 1))
    mask[3] = False

    def moments(x, mask):
        return jaxbn.batch_moments(x, mask=mask, axis_name="d")

    count, mean, var = jax.jit(over_devices(kind, moments, (0, 0)))(x, mask)
    wanted = oracle.moments(x.reshape(-1, 3), mask=mask.reshape(-1, 1))
    np.testing.assert_array_equal(count, np.tile(wanted[0], (NUM, 1)))
    np.testing.assert_allclose(mean, np.tile(wanted[1], (NUM, 1)), rtol=1e-6)
    np.testing.assert_allclose(var, np.tile(wanted[2], (NUM, 1)), rtol=2e-6)
