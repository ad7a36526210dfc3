"""The primitives whose lowering differs between platforms: barrier and pair of sums."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from devices import mesh
from jax.sharding import PartitionSpec as P

from jaxbn._core.platforms import _sum_as_complex, barrier_on_cpu, pair_sum

# Barriers

X = jnp.arange(6.0).reshape(2, 3)
WEIGHT = X - 2


def twice(x):
    x, mean = barrier_on_cpu(x, x.mean(0))
    return x * mean[None]


BARRIERS = {"cpu": 1, "tpu": 0, "cuda": 0}


@pytest.mark.parametrize("platform", BARRIERS)
def test_a_barrier_is_for_the_cpu(platform):
    module = jax.export.export(jax.jit(twice), platforms=[platform])(X).mlir_module()
    assert module.count("stablehlo.optimization_barrier") == BARRIERS[platform]


def test_a_barrier_in_one_program_for_several_platforms():
    exported = jax.export.export(jax.jit(twice), platforms=["cpu", "tpu"])(X)
    np.testing.assert_array_equal(exported.call(X), X * X.mean(0)[None])


def twice_without_barrier(x):
    return x * x.mean(0)[None]


def loss(function, x):
    return (function(x) ** 2 * WEIGHT).sum()


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        jax.jit,
        lambda f: lambda x: jax.vmap(f)(x[None]),
        lambda f: jax.jit(jax.checkpoint(f)),
        lambda f: lambda x: jax.jvp(f, (x,), (WEIGHT,)),
        lambda f: jax.grad(functools.partial(loss, f)),
        lambda f: jax.hessian(functools.partial(loss, f)),
    ],
    ids=["eager", "jit", "vmap", "checkpoint", "jvp", "grad", "hessian"],
)
def test_transformations_of_a_barrier(transform):
    got, wanted = transform(twice)(X), transform(twice_without_barrier)(X)
    jax.tree.map(np.testing.assert_allclose, got, wanted)


def test_a_barrier_keeps_types_under_spmd_axis_name():
    """What `lax.platform_dependent` loses: that a vmap's rows lie over "model"."""

    def body(x):
        x, mean = barrier_on_cpu(x, x.mean(0))
        return jnp.stack([mean, x.sum(0)])[None]

    rows = jax.shard_map(
        body,
        mesh=mesh(data=4, model=2),
        in_specs=P("data"),
        out_specs=P("data"),
    )
    models = jax.vmap(rows, spmd_axis_name="model")

    x = jnp.arange(48.0).reshape(2, 8, 3)
    y = jax.jit(models)(x)
    np.testing.assert_allclose(y[:, :, 1], x.reshape(2, 4, 2, 3).sum(2))
    # Of the sum of squares of means and sums of two: 2 (1/4 + 1) times the sum.
    sums = x.reshape(2, 4, 2, 3).sum(2).repeat(2, 1)
    np.testing.assert_allclose(
        jax.jit(jax.grad(lambda x: (models(x) ** 2).sum()))(x), 2.5 * sums
    )


# Pairs of sums

PAIR = jnp.arange(24.0).reshape(2, 3, 4)
PAIR_WEIGHT = PAIR - 2


def sums(x):
    return jnp.stack(pair_sum(x, x * PAIR_WEIGHT, (0, 1)))


def plain_sums(x):
    return jnp.stack([x.sum((0, 1)), (x * PAIR_WEIGHT).sum((0, 1))])


@pytest.mark.parametrize(("platform", "count"), {"cpu": 2, "cuda": 1, "tpu": 2}.items())
def test_two_sums_are_one_on_a_gpu(platform, count):
    module = jax.export.export(jax.jit(sums), platforms=[platform])(PAIR).mlir_module()
    assert module.count("stablehlo.reduce(") == count
    assert ("stablehlo.complex" in module) == (count == 1)


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan, 3e38])
def test_one_sum_leaves_the_other_alone(bad):
    """What a GPU runs, on the CPU: no number in one part, or an overflow."""
    a, b = jnp.full((9, 1), bad), jnp.arange(9.0)[:, None]
    got = jax.jit(functools.partial(_sum_as_complex, axes=(0,)))(a, b)
    np.testing.assert_array_equal(got, [a.sum(0), b.sum(0)])


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        jax.jit,
        lambda f: lambda x: jax.vmap(f)(x[None]),
        lambda f: lambda x: jax.vmap(f, 2, 1)(x[..., None, :]),
        lambda f: jax.jit(jax.checkpoint(f)),
        lambda f: lambda x: jax.jvp(f, (x,), (PAIR_WEIGHT,)),
        lambda f: jax.grad(lambda x: (f(x) ** 3).sum()),
        lambda f: jax.hessian(lambda x: (f(x) ** 3).sum()),
    ],
    ids=["eager", "jit", "vmap", "vmap 2", "checkpoint", "jvp", "grad", "hessian"],
)
def test_transformations_of_a_pair_sum(transform):
    got, wanted = transform(sums)(PAIR), transform(plain_sums)(PAIR)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, wanted)


def test_vmap_of_one_operand_of_a_pair_sum():
    rows = jnp.stack([PAIR, 2 * PAIR])
    for in_axes, args in (((0, None), (rows, PAIR)), ((None, 0), (PAIR, rows))):
        got = jax.vmap(lambda a, b: pair_sum(a, b, (0, 1)), in_axes)(*args)
        wanted = [np.broadcast_to(a.sum((-3, -2)), (2, 4)) for a in args]
        np.testing.assert_allclose(got, wanted)
