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
    local_loss,
    mesh,
    old_state,
    over_devices,
)
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen


def all_reduces(f, *args):
    text = jax.jit(f).lower(*args).compile().as_text()
    others = (" all-gather", " all-to-all", " collective-permute", " reduce-scatter")
    assert not any(name in text for name in others)
    return text.count(" all-reduce(") + text.count(" all-reduce-start(")


@pytest.mark.parametrize("grouped", [False, True], ids=["one batch", "two groups"])
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_one_all_reduce_forward_and_one_backward(kind, where, grouped):
    """The backward's holds the sums of the parameters' gradients too."""
    x, scale, bias, mask, dy, c = draw(lead_params=())
    args = x, jaxbn.Params(scale, bias), old_state(), mask, dy, c
    in_axes = (0, None, None, 0, 0, None)
    groups = GROUPS if grouped else None
    loss = functools.partial(local_loss, axis_name="d", axis_index_groups=groups)
    assert all_reduces(over_devices(kind, loss, in_axes), *args) == 1

    def inside(*args):
        grads, (y, *state) = jax.grad(loss, (0, 1), has_aux=True)(*args)
        if kind == "shard_map":  # JAX sums by itself where it tracks copies
            grads = grads[0], jax.lax.psum(grads[1], "d")
        return grads, y, state

    def outside(*args):
        def total(x, params):
            losses, aux = over_devices(kind, loss, in_axes)(x, params, *args[2:])
            return losses.sum(), aux

        return jax.grad(total, (0, 1), has_aux=True)(*args[:2])

    both = outside if where == "outside" else over_devices(kind, inside, in_axes)
    assert all_reduces(both, *args) == 2


SHAPES = {
    "800 rows": ((800, 4), -1),
    "4096 rows": ((4096, 4), -1),
    "4104 rows": ((4104, 4), -1),
    "77 rows a device": ((NUM * 77, 256), -1),
    "images": ((16, 8, 8, 4), -1),
    "channel first": ((16, 4, 8, 8), 1),
}


# `all_reduces` lets no other collective pass. A mask costs one more, for its count.
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
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
    of_x = NamedSharding(over, P(("d", "rest")))
    x = jax.device_put(jnp.ones((NUM * rows, 256)), of_x)
    params, state = jaxbn.init(256)

    @functools.partial(
        jax.shard_map, mesh=over, in_specs=P("d"), out_specs=P("d"), axis_names={"d"}
    )
    def layer(x):
        return jaxbn.batch_norm(x, params, state, train=True, axis_name="d")[0]

    assert all_reduces(layer, x)


@pytest.mark.parametrize("kind", KINDS)
def test_large_mean_over_uneven_shards(kind):
    """At mean/std 1e4 a sum of squares would be wrong by a factor of ten."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(NUM, 64, 3)) + 1e4).astype(np.float32)
    mask = np.arange(64)[:, None] < rng.integers(1, 64, (NUM, 1, 1))

    def moments(x, mask):
        return jaxbn.batch_moments(x, mask=mask, axis_name="d")

    count, mean, var = jax.jit(over_devices(kind, moments, (0, 0)))(x, mask)
    want_count, want_mean, want_var = oracle.moments(
        x.reshape(-1, 3), mask=mask.reshape(-1, 1)
    )
    np.testing.assert_array_equal(count, np.tile(want_count, (NUM, 1)))
    np.testing.assert_allclose(mean, np.tile(want_mean, (NUM, 1)), rtol=1e-6)
    np.testing.assert_allclose(var, np.tile(want_var, (NUM, 1)), rtol=2e-6)


flax_fails = pytest.mark.xfail(
    raises=AssertionError, reason="Flax averages the means of unequal counts"
)


@pytest.mark.parametrize(
    "norm", [jaxbn.linen.BatchNorm, pytest.param(nn.BatchNorm, marks=flax_fails)]
)
@pytest.mark.parametrize("counts", [(4, 1), (4, 0)], ids=str)
def test_unequal_counts_where_flax_fails(norm, counts):
    """Two shards: shares of the batch that differ, and one with no share at all."""
    x = np.array([[[1.0], [2.0], [3.0], [6.0]], [[9.0], [5.0], [7.0], [8.0]]])
    x = jnp.array(x, jnp.float32)
    mask = jnp.arange(4)[None, :, None] < jnp.array(counts)[:, None, None]
    module = norm(use_running_average=False, momentum=0.0, axis_name="d")

    def train(x, mask):
        variables = {"params": {"scale": jnp.ones(1), "bias": jnp.zeros(1)}}
        variables["batch_stats"] = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
        return module.apply(variables, x, mask=mask, mutable=["batch_stats"])

    y, updated = jax.jit(jax.vmap(train, axis_name="d"))(x, mask)
    rows, counted = np.reshape(x, (8, 1)), np.reshape(mask, (8, 1))
    _, mean, var = oracle.moments(rows, mask=counted)
    for got, want in zip(("mean", "var"), (mean, var), strict=True):
        for shard in updated["batch_stats"][got]:
            np.testing.assert_allclose(shard, want, rtol=1e-5)
    want = oracle.forward(rows, mask=counted)
    # Flax leaves numbers under the mask, which are not what is compared here.
    got = np.where(counted, np.reshape(y, (8, 1)), 0)
    np.testing.assert_allclose(got, want, atol=1e-5)
