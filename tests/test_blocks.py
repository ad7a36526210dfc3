"""Means that are near 0 for their standard deviation: sums of blocks, on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import _moments


def draw(shape, ratio, seed=0):
    """Of mean `ratio` and standard deviation 1."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + ratio).astype(np.float32)


LAYOUTS = {
    "few rows": ((100, 64), (1,)),
    "rows": ((10_000, 64), (1,)),
    "rows last": ((64, 10_000), (0,)),
    "wide": ((64, 1000), (1,)),
    "channels last": ((4, 48, 16, 64), (3,)),
    "channels first": ((32, 64, 12, 10), (1,)),
    "features around": ((8, 1600, 8), (0, 2)),
}


def mean_in_two(x, features, mask=None):
    batch, low = _moments.moments(x, mask, features, None, None)
    return batch.mean, low


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_mean_that_is_near_is_a_sum_of_blocks(layout, masked):
    """Off by less than half of what the mean by one float32 sum is off by."""
    shape, features = layout
    x = draw(shape, 7)
    mask = draw(shape, 0.5, seed=1) > 0 if masked else np.ones(shape, bool)
    axes = tuple(i for i in range(x.ndim) if i not in features)

    @jax.jit
    def means(x, mask):
        return *mean_in_two(x, features, mask), x.mean(axes, where=mask)

    mean, low, plain = (np.float64(a) for a in means(x, mask))
    exact = np.float64(x).mean(axes, where=mask)
    np.testing.assert_array_less(abs(low), np.spacing(np.float32(mean)))
    assert abs(mean + low - exact).mean() < abs(plain - exact).mean() / 2


@pytest.mark.parametrize("shape", [(32, 20500, 7), (64, 4096, 4), (8, 64, 6, 10)])
def test_a_long_run_of_memory_is_one_sum(shape):
    """Features first: the sum that XLA makes of it is better than that of pieces."""
    x = draw(shape, 7)
    parts = jax.jit(lambda x: (*mean_in_two(x, (0,)), x.mean((*range(1, x.ndim),))))(x)
    mean, low, plain = (np.float64(a) for a in parts)
    exact = np.float64(x).mean((*range(1, x.ndim),))
    rounding = np.spacing(np.float32(7)) / 2
    assert abs(mean + low - exact).max() <= abs(plain - exact).max() + rounding


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_is_lost_between_blocks(rows, masked):
    """Of one number each: what is added up is left, and what is divided."""
    x = draw((rows, 4), 5)
    mask = np.arange(rows) % 3 != 1 if masked else np.ones(rows, bool)
    parts = jax.jit(lambda x, mask: mean_in_two(x, (1,), mask))(x, mask[:, None])
    mean, low = (np.float64(a) for a in parts)
    np.testing.assert_allclose(mean + low, np.float64(x[mask]).mean(0), rtol=1e-8)


def test_a_mean_that_is_near_under_vmap():
    x = draw((3, 16, 4), 3)
    parts = jax.jit(jax.vmap(lambda x: mean_in_two(x, (1,))))(x)
    mean, low = (np.float64(a) for a in parts)
    np.testing.assert_allclose(mean + low, np.float64(x).mean(1), rtol=1e-8)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_mean_that_is_near_on_a_mesh_of_one_device(kind):
    x = draw((16, 4), 3)
    one = jax.make_mesh((1,), ("d",), (kind,), devices=jax.devices()[:1])
    with jax.set_mesh(one):
        sharded = jax.device_put(x, NamedSharding(one, P("d")))
        parts = jax.jit(lambda x: mean_in_two(x, (1,)))(sharded)
    mean, low = (np.float64(a) for a in parts)
    np.testing.assert_allclose(mean + low, np.float64(x).mean(0), rtol=1e-8)


def test_a_mean_that_is_near_in_a_shard_map():
    x = draw((3 * 16, 4), 3)
    over = jax.shard_map(
        lambda x: mean_in_two(x, (1,)),
        mesh=mesh(d=3),
        in_specs=P("d"),
        out_specs=P("d"),
    )
    mean, low = (np.float64(a).reshape(3, 4) for a in jax.jit(over)(x))
    exact = np.float64(x).reshape(3, 16, 4).mean(1)
    np.testing.assert_allclose(mean + low, exact, rtol=1e-8)


@pytest.mark.parametrize("axis", [(0, 1), (1,)])
def test_a_mean_of_one_number_is_that(axis):
    x = draw((1, 4), 3)
    batch = jax.jit(functools.partial(jaxbn.batch_moments, axis=axis))(x)
    np.testing.assert_array_equal(batch.mean.reshape(4), x[0])
    np.testing.assert_array_equal(batch.var, 0)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3.4e38])
def test_a_mean_that_is_no_number_is_what_jax_says(value):
    x = draw((100, 4), 1)
    x[3, 1] = x[4, 1] = value
    batch = jax.jit(jaxbn.batch_moments)(x)
    np.testing.assert_array_equal(np.isfinite(batch.mean), np.arange(4) != 1)
    np.testing.assert_array_equal(batch.mean[1], jnp.mean(x, 0)[1])


def test_a_size_that_is_not_known_has_no_blocks():
    (rows,) = jax.export.symbolic_shape("rows")
    argument = jax.ShapeDtypeStruct((rows, 4), jnp.float32)
    exported = jax.export.export(jax.jit(jaxbn.batch_moments))(argument)
    x = draw((100, 4), 3)
    np.testing.assert_allclose(exported.call(x).mean, x.mean(0), rtol=1e-6)
