"""The kernel: forward, backward and normalize against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, DTYPES, assert_close, case_ids
from jax.test_util import check_grads

import jaxbn


def cast(dtype, *arrays):
    return [None if a is None else jnp.asarray(a, dtype) for a in arrays]


def steps_of(case):
    n = int(np.prod(case.shape)) // max(1, int(np.prod(case.features)))
    return max(n, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, **case_ids)
def test_forward_and_backward_equal_the_document(case, dtype):
    x, scale, bias, mask, dy = case.draw(dtype)
    static = {"axis": case.axis, "mask": mask}

    @jax.jit
    def both(x, scale, bias, dy):
        y, cache = jaxbn.forward(x, scale, bias, **static)
        return y, jaxbn.backward(dy, cache)

    y, (dx, dscale, dbias) = both(*cast(dtype, x, scale, bias, dy))
    assert y.dtype == dx.dtype == dtype
    assert y.shape == dx.shape == case.shape
    assert_close(y, oracle.forward(x, scale, bias, **static), dtype, steps_of(case))
    desired = oracle.backward(dy, x, scale, **static)
    assert_close(dx, desired[0], dtype, steps_of(case))
    for got, want, param in zip(
        (dscale, dbias), desired[1:], (scale, bias), strict=True
    ):
        if param is None:
            assert got is None
        else:
            assert got.dtype == dtype
            assert_close(got, want, dtype, steps_of(case))


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


@pytest.mark.parametrize("case", [c for c in CASES if 0 not in c.shape], **case_ids)
def test_rule_equals_finite_differences(case):
    """Central differences of the oracle in float64, along random directions."""
    x, scale, bias, mask, dy = case.draw()
    static = {"axis": case.axis, "mask": mask}
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        gradients = jax.jit(
            lambda x, scale, bias, dy: jaxbn.backward(
                dy, jaxbn.forward(x, scale, bias, **static)[1]
            )
        )(x, scale, bias, dy)
    primals = (x, scale, bias)
    for _ in range(3):
        direction = [None if p is None else rng.normal(size=p.shape) for p in primals]

        def along(t, direction=direction):
            moved = [
                None if p is None else p + t * d
                for p, d in zip(primals, direction, strict=True)
            ]
            return (oracle.forward(*moved, **static) * dy).sum()

        h = 1e-5
        numeric = (along(h) - along(-h)) / (2 * h)
        analytic = sum(
            (np.asarray(g) * d).sum()
            for g, d in zip(gradients, direction, strict=True)
            if g is not None
        )
        np.testing.assert_allclose(analytic, numeric, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("real_params", [True, False])
def test_complex(real_params):
    """Against JAX's own differentiation of the plain formula, in complex128."""
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
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

        y, cache = jaxbn.forward(x, scale, bias, mask=mask)
        desired, vjp = jax.vjp(plain, *map(jnp.asarray, (x, scale, bias)))
        np.testing.assert_allclose(y, desired, rtol=1e-12)
        np.testing.assert_allclose(y, oracle.forward(x, scale, bias, mask=mask))
        for got, want in zip(
            jaxbn.backward(dy, cache), vjp(jnp.asarray(dy)), strict=True
        ):
            assert got.dtype == want.dtype
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_pair_can_be_jitted_and_is_what_autodiff_uses():
    x, scale, bias, mask, dy = CASES[17].draw(np.float32)
    x, scale, bias, dy = cast(jnp.float32, x, scale, bias, dy)
    y, cache = jax.jit(jaxbn.forward)(x, scale, bias, mask=mask)
    gradients = jax.jit(jaxbn.backward)(dy, cache)
    params = jaxbn.Params(scale, bias)
    state = jaxbn.init(5)[1]

    @jax.jit
    def both(x, params, dy):
        def train(x, params):
            return jaxbn.batch_norm(x, params, state, train=True, mask=mask)[0]

        y, vjp = jax.vjp(train, x, params)
        return y, vjp(dy)

    y2, (dx, (dscale, dbias)) = both(x, params, dy)
    np.testing.assert_allclose(y, y2, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients, (dx, dscale, dbias), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_bfloat16_dx_is_rounded_once():
    """A cotangent with a mean of 30 sd: adding bfloat16 parts would lose 4 %."""
    rng = np.random.default_rng(3)
    x, dy = rng.normal(size=(2, 256, 8)) + np.array([0, 30])[:, None, None]
    x, dy = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, dy))
    _, cache = jaxbn.forward(jnp.asarray(x, jnp.bfloat16), None, None)
    dx, _, _ = jaxbn.backward(jnp.asarray(dy, jnp.bfloat16), cache)
    desired, _, _ = oracle.backward(dy, x)
    error = np.linalg.norm(np.asarray(dx, np.float64) - desired)
    assert error < 3e-3 * np.linalg.norm(desired)


def test_large_mean():
    """The issue's figures: mean 1e4, std 1, float32, 4096 rows."""
    rng = np.random.default_rng(4)
    x = (rng.normal(size=(4096, 16)) + 1e4).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    y, cache = jax.jit(jaxbn.forward)(x, None, None)
    dx, _, _ = jax.jit(jaxbn.backward)(dy, cache)
    _, _, var = oracle.moments(x)
    np.testing.assert_allclose(cache.moments.var, var, rtol=1e-3)
    np.testing.assert_allclose(y, oracle.forward(x), rtol=0, atol=2e-3)
    desired, _, _ = oracle.backward(dy, x)
    largest = np.abs(desired).max()
    np.testing.assert_allclose(dx, desired, rtol=0, atol=2e-3 * largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poison_under_the_mask(poison, dtype):
    """In x and in the cotangent: as if the masked rows were not there."""
    rng = np.random.default_rng(5)
    mask = np.arange(24) % 4 > 0
    x, dy = (jnp.asarray(a, dtype) for a in rng.normal(size=(2, 24, 3)))
    scale, bias = (jnp.asarray(a, dtype) for a in rng.normal(size=(2, 3)))
    hidden = ~mask[:, None]
    y, cache = jaxbn.forward(
        jnp.where(hidden, poison, x), scale, bias, mask=mask[:, None]
    )
    dx, dscale, dbias = jaxbn.backward(jnp.where(hidden, poison, dy), cache)
    y2, cache2 = jaxbn.forward(x[mask], scale, bias)
    dx2, dscale2, dbias2 = jaxbn.backward(dy[mask], cache2)
    np.testing.assert_array_equal(y[~mask], 0)
    np.testing.assert_array_equal(dx[~mask], 0)
    for got, want in [
        (y[mask], y2),
        (dx[mask], dx2),
        (dscale, dscale2),
        (dbias, dbias2),
    ]:
        assert_close(got, np.asarray(want, np.float64), dtype, 24)


class TestNormalize:
    def arguments(self):
        rng = np.random.default_rng(6)
        x = rng.normal(size=(7, 3))
        mean, scale, bias = rng.normal(size=(3, 3))
        return x, mean, rng.uniform(0.5, 2, 3), scale, bias

    def test_equals_the_oracle(self):
        x, mean, var, scale, bias = self.arguments()
        mask = np.arange(7)[:, None] % 3 > 0
        static = {"epsilon": 1e-3, "mask": mask}
        y = jaxbn.normalize(*cast(jnp.float32, x, mean, var, scale, bias), **static)
        desired = oracle.normalize(x, mean, var, scale, bias, **static)
        assert_close(y, desired, jnp.float32)

    def test_is_differentiable_in_everything_both_ways(self):
        with jax.enable_x64(True):
            check_grads(
                jaxbn.normalize, self.arguments(), order=2, modes=["fwd", "rev"]
            )

    def test_after_batch_moments_gives_the_gradient_of_batch_norm(self):
        x, _, _, scale, bias = self.arguments()
        dy = np.random.default_rng(7).normal(size=x.shape)

        def by_hand(x, scale, bias):
            _, mean, var = jaxbn.batch_moments(x)
            return jaxbn.normalize(x, mean, var, scale, bias)

        with jax.enable_x64(True):
            _, vjp = jax.vjp(by_hand, x, scale, bias)
            _, cache = jaxbn.forward(x, scale, bias)
            for got, want in zip(
                vjp(jnp.asarray(dy)), jaxbn.backward(dy, cache), strict=True
            ):
                np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)

    def test_no_nan_from_under_the_mask_in_any_gradient(self):
        x, mean, var, scale, bias = cast(jnp.float32, *self.arguments())
        mask = np.arange(7)[:, None] > 2
        weight = np.random.default_rng(8).normal(size=x.shape).astype(np.float32)

        def loss(*arguments):
            return (jaxbn.normalize(*arguments, mask=mask) * weight).sum()

        poisoned = x.at[:3].set(jnp.nan)
        every = (0, 1, 2, 3, 4)
        got = jax.grad(loss, every)(poisoned, mean, var, scale, bias)
        clean = jax.grad(loss, every)(x, mean, var, scale, bias)
        jax.tree.map(np.testing.assert_array_equal, got, clean)


def sizes_touched(fn, x, *rest):
    compiled = jax.jit(fn).lower(x, *rest).compile()
    return compiled.cost_analysis()["bytes accessed"] / x.nbytes


def test_traffic_of_inference():
    x = jnp.ones((65536, 64), jnp.float32)
    params, state = jaxbn.init(64)

    def infer(x, params, state):
        return jaxbn.batch_norm(x, params, state, train=False)[0]

    assert sizes_touched(infer, x, params, state) <= 2.01


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_residuals_are_x_and_vectors(dtype):
    x = jnp.ones((512, 16), dtype)
    params, state = jaxbn.init(16)

    def train(x, params):
        return jaxbn.batch_norm(x, params, state, train=True)[0]

    _, vjp = jax.vjp(train, x, params)
    big = [a for a in jax.tree.leaves(vjp) if getattr(a, "size", 0) >= x.size]
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
