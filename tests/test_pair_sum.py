"""Two sums that are one on a GPU, under any transformation."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn._core.platforms import _sum_as_complex, pair_sum

X = jnp.arange(24.0).reshape(2, 3, 4)
WEIGHT = X - 2


def ours(x):
    return jnp.stack(pair_sum(x, x * WEIGHT, (0, 1)))


def plain(x):
    return jnp.stack([x.sum((0, 1)), (x * WEIGHT).sum((0, 1))])


@pytest.mark.parametrize(("platform", "sums"), {"cpu": 2, "cuda": 1, "tpu": 2}.items())
def test_platforms(platform, sums):
    module = jax.export.export(jax.jit(ours), platforms=[platform])(X).mlir_module()
    assert module.count("stablehlo.reduce(") == sums
    assert ("stablehlo.complex" in module) == (sums == 1)


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
        lambda f: lambda x: jax.jvp(f, (x,), (WEIGHT,)),
        lambda f: jax.grad(lambda x: (f(x) ** 3).sum()),
        lambda f: jax.hessian(lambda x: (f(x) ** 3).sum()),
    ],
    ids=["eager", "jit", "vmap", "vmap 2", "checkpoint", "jvp", "grad", "hessian"],
)
def test_transformations(transform):
    got, wanted = transform(ours)(X), transform(plain)(X)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, wanted)


def test_vmap_of_one_operand():
    rows = jnp.stack([X, 2 * X])
    for in_axes, args in (((0, None), (rows, X)), ((None, 0), (X, rows))):
        got = jax.vmap(lambda a, b: pair_sum(a, b, (0, 1)), in_axes)(*args)
        wanted = [np.broadcast_to(a.sum((-3, -2)), (2, 4)) for a in args]
        np.testing.assert_allclose(got, wanted)
