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

X = jnp.arange(24.0).reshape(2, 3, 4)
WEIGHT = X - 2


def with_barrier(x):
    x, mean = barrier_on_cpu(x, x.mean(0))
    return x * mean[None]


def without_barrier(x):
    return x * x.mean(0)[None]


def paired(x):
    return jnp.stack(pair_sum(x, x * WEIGHT, (0, 1)))


def unpaired(x):
    return jnp.stack([x.sum((0, 1)), (x * WEIGHT).sum((0, 1))])


def count(f, platform, name):
    module = jax.export.export(jax.jit(f), platforms=[platform])(X).mlir_module()
    return module.count(f"stablehlo.{name}")


@pytest.mark.parametrize(
    ("platform", "barriers", "sums"), [("cpu", 1, 2), ("cuda", 0, 1), ("tpu", 0, 2)]
)
def test_what_each_platform_gets(platform, barriers, sums):
    assert count(with_barrier, platform, "optimization_barrier") == barriers
    assert count(paired, platform, "reduce(") == sums
    assert bool(count(paired, platform, "complex")) == (platform == "cuda")


def test_one_program_for_several_platforms():
    exported = jax.export.export(jax.jit(with_barrier), platforms=["cpu", "tpu"])(X)
    np.testing.assert_array_equal(exported.call(X), X * X.mean(0)[None])


TRANSFORMS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda x: jax.vmap(f)(x[None]),
    "vmap of another axis": lambda f: lambda x: jax.vmap(f, 2, 1)(x[..., None, :]),
    "checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
    "jvp": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (WEIGHT,))),
    "grad": lambda f: jax.jit(jax.grad(lambda x: (f(x) ** 3).sum())),
    "hessian": lambda f: jax.jit(jax.hessian(lambda x: (f(x) ** 3).sum())),
}
PAIRS = [(with_barrier, without_barrier), (paired, unpaired)]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("special", "plain"), PAIRS, ids=["barrier", "pair_sum"])
def test_transformations(special, plain, transform):
    got, wanted = (TRANSFORMS[transform](f)(X) for f in (special, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, wanted)


def test_a_barrier_keeps_types_under_spmd_axis_name():
    """What `lax.platform_dependent` loses: that a vmap's rows lie over "model"."""

    def body(x):
        x, mean = barrier_on_cpu(x, x.mean(0))
        return jnp.stack([mean, x.sum(0)])[None]

    devices = mesh(data=4, model=2)
    rows = jax.shard_map(body, mesh=devices, in_specs=P("data"), out_specs=P("data"))
    models = jax.vmap(rows, spmd_axis_name="model")

    x = jnp.arange(48.0).reshape(2, 8, 3)
    sums = x.reshape(2, 4, 2, 3).sum(2)
    np.testing.assert_allclose(jax.jit(models)(x)[:, :, 1], sums)
    # Of the sum of squares of means and sums of two: 2 (1/4 + 1) times the sum.
    gradient = jax.jit(jax.grad(lambda x: (models(x) ** 2).sum()))(x)
    np.testing.assert_allclose(gradient, 2.5 * sums.repeat(2, 1))


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan, 3e38])
def test_one_sum_leaves_the_other_alone(bad):
    """What a GPU runs, on the CPU: no number in one part, or an overflow."""
    a, b = jnp.full((9, 1), bad), jnp.arange(9.0)[:, None]
    got = jax.jit(functools.partial(_sum_as_complex, axes=(0,)))(a, b)
    np.testing.assert_array_equal(got, [a.sum(0), b.sum(0)])


def test_vmap_of_one_operand_of_a_pair_sum():
    rows = jnp.stack([X, 2 * X])
    for in_axes, args in (((0, None), (rows, X)), ((None, 0), (X, rows))):
        got = jax.vmap(lambda a, b: pair_sum(a, b, (0, 1)), in_axes)(*args)
        wanted = [np.broadcast_to(a.sum((-3, -2)), (2, 4)) for a in args]
        np.testing.assert_allclose(got, wanted)
