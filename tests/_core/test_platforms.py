"""Barriers on the CPU and nowhere else, and nothing of a type lost on the way."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from devices import mesh
from jax.sharding import PartitionSpec as P

from jaxbn._core.platforms import barrier_on_cpu

X = jnp.arange(6.0).reshape(2, 3)
WEIGHT = X - 2


def twice(x):
    x, mean = barrier_on_cpu(x, x.mean(0))
    return x * mean[None]


PLATFORMS = {"cpu": 1, "tpu": 0, "cuda": 0}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_platforms(platform):
    module = jax.export.export(jax.jit(twice), platforms=[platform])(X).mlir_module()
    assert module.count("stablehlo.optimization_barrier") == PLATFORMS[platform]


def test_one_program_for_several_platforms():
    exported = jax.export.export(jax.jit(twice), platforms=["cpu", "tpu"])(X)
    np.testing.assert_array_equal(exported.call(X), X * X.mean(0)[None])


def plain(x):
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
def test_transformations(transform):
    got, wanted = transform(twice)(X), transform(plain)(X)
    jax.tree.map(np.testing.assert_allclose, got, wanted)


def test_types_under_spmd_axis_name():
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
