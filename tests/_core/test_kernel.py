"""The rule: complex numbers, rounding, and what it costs in traffic and residuals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxbn


def test_collapsed_rule_equals_the_six_steps_term_by_term():
    """The identities that stand above the rule, each on its own."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 11, 4)) * 3 + 5
    scale = rng.uniform(0.5, 2, 4)
    s = oracle.backward_steps(dy, x, scale)
    _, mean, var = oracle.moments(x)
    rstd = (var + 1e-5) ** -0.5
    x_hat = (x - mean) * rstd
    close = {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(s["dvar"], -0.5 * scale * rstd**2 * s["dscale"], **close)
    np.testing.assert_allclose(s["dmean"], -scale * rstd * s["dbias"], **close)
    parts = {
        "dx_hat / std": (s["dx_hat"] * rstd, scale * rstd * dy),
        "dvar": (
            s["dvar"] * 2 * (x - mean) / 11,
            -scale * rstd * x_hat * s["dscale"] / 11,
        ),
        "dmean": (s["dmean"] / 11, -scale * rstd * s["dbias"] / 11),
    }
    for six, one in parts.values():
        np.testing.assert_allclose(six, one, **close)
    with jax.enable_x64(True):
        _, cache = jaxbn.forward(x, scale, None)
        dx, dscale, _ = jaxbn.backward(dy, cache)
    np.testing.assert_allclose(dx, sum(one for _, one in parts.values()), **close)
    np.testing.assert_allclose(dx, s["dx"], **close)
    np.testing.assert_allclose(dscale, s["dscale"], **close)


@pytest.mark.parametrize("real_params", [True, False])
def test_complex(real_params):
    """Against JAX's own differentiation of the plain formula, in complex128."""
    rng = np.random.default_rng(2)
    x, dy = rng.normal(size=(2, 9, 3, 2)).view(np.complex128)[..., 0]
    scale, bias = rng.normal(size=(2, 3, 2)).view(np.complex128)[..., 0]
    if real_params:
        scale, bias = scale.real, bias.real
    mask = rng.random((9, 3)) < 0.7

    def plain(x, scale, bias):
        n = mask.sum(0)
        mean = jnp.where(mask, x, 0).sum(0) / n.astype(complex)
        centered = jnp.where(mask, x - mean[None], 0)
        var = (centered.real**2 + centered.imag**2).sum(0) / n.astype(float)
        x_hat = centered / jnp.sqrt(var + 1e-5)[None].astype(complex)
        y = x_hat * scale[None].astype(complex) + bias[None].astype(complex)
        return jnp.where(mask, y, 0)

    @jax.jit
    def both(x, dy, scale, bias):
        y, cache = jaxbn.forward(x, scale, bias, mask=mask)
        desired, vjp = jax.vjp(plain, x, scale, bias)
        moments = jaxbn.batch_moments(x, mask=mask)
        return y, desired, moments, jaxbn.backward(dy, cache), vjp(dy)

    with jax.enable_x64(True):
        y, desired, moments, gradients, wanted = both(x, dy, scale, bias)
    np.testing.assert_allclose(y, desired, rtol=1e-12)
    np.testing.assert_allclose(y, oracle.forward(x, scale, bias, mask=mask))
    for got, want in zip(gradients, wanted, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    for got, want in zip(moments, oracle.moments(x, mask=mask), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-14)
    assert moments.mean.dtype == x.dtype
    assert moments.var.dtype == jnp.float64


def test_bfloat16_dx_is_rounded_once():
    """A cotangent with a mean of 30 sd: adding bfloat16 parts would lose 4 %."""
    rng = np.random.default_rng(3)
    x, dy = rng.normal(size=(2, 256, 8)) + np.array([0, 30])[:, None, None]
    x, dy = (jnp.asarray(a, jnp.bfloat16) for a in (x, dy))
    _, cache = jax.jit(jaxbn.forward)(x, None, None)
    dx, _, _ = jax.jit(jaxbn.backward)(dy, cache)
    desired, _, _ = oracle.backward(np.float64(dy), np.float64(x))
    error = np.linalg.norm(np.asarray(dx, np.float64) - desired)
    assert error < 3e-3 * np.linalg.norm(desired)


def sizes_touched(fn, x, *rest):
    compiled = jax.jit(fn).lower(x, *rest).compile()
    return compiled.cost_analysis()["bytes accessed"] / x.nbytes


def test_traffic_of_inference():
    infer = functools.partial(jaxbn.batch_norm, train=False)
    x = jnp.ones((65536, 64), jnp.float32)
    assert sizes_touched(lambda *args: infer(*args)[0], x, *jaxbn.init(64)) <= 2.01


def test_traffic_of_batch_renorm_is_that_of_batch_norm():
    """The moments that r and d need are those of the kernel, computed once."""
    x, (params, state) = jnp.ones((65536, 64), jnp.float32), jaxbn.init(64)

    def step(normalize, x, params, dy):
        y, vjp = jax.vjp(lambda x, p: normalize(x, p, state, train=True)[0], x, params)
        return y, vjp(dy)

    renorm, norm = (
        sizes_touched(functools.partial(step, f), x, params, x)
        for f in (jaxbn.batch_renorm, jaxbn.batch_norm)
    )
    assert renorm <= norm + 0.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_residuals_are_x_and_vectors(dtype):
    x, (params, state) = jnp.ones((512, 16), dtype), jaxbn.init(16)

    def train(x, params):
        return jaxbn.batch_norm(x, params, state, train=True)[0]

    vjp = jax.eval_shape(lambda *args: jax.vjp(train, *args)[1], x, params)
    big = [a for a in jax.tree.leaves(vjp) if a.size >= x.size]
    assert [a.dtype for a in big] == [dtype]


def test_a_remat_policy_can_keep_the_moments():
    """The vectors by their names: the backward pass then sums nothing twice."""
    params, state = jaxbn.init(8)
    policies = jax.checkpoint_policies
    names = policies.save_only_these_names("batch_norm_mean", "batch_norm_var")

    def sums(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def block(x, params):
            y, _ = jaxbn.batch_norm(jnp.sin(x), params, state, train=True)
            return jnp.cos(y)

        def loss(x, params):
            return (block(x, params) ** 2).sum()

        gradient = jax.jit(jax.grad(loss, (0, 1)))
        text = gradient.lower(jnp.ones((64, 8)), params).as_text()
        return text.count("stablehlo.reduce(")

    # Those of the shift, the mean and the variance.
    assert sums(policies.nothing_saveable) - sums(names) == 3
