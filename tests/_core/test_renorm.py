"""Batch renorm against the paper's algorithm in float64 NumPy."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.linen import BatchRenorm

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 3)) * [1, 5, 0.2] + [0, 3, -1]
SCALE, BIAS, WEIGHT = RNG.normal(size=3), RNG.normal(size=3), RNG.normal(size=X.shape)
MEAN, VAR = np.array([0.5, 1.0, -3.0]), np.array([1.0, 4.0, 0.5])


def paper(x, r_max, d_max, scale=SCALE, bias=BIAS):
    """Algorithm 1; r and d can be given by clipping against the batch at X."""
    std, running = np.sqrt(x.var(0) + 1e-5), np.sqrt(VAR + 1e-5)
    at, at_std = X.mean(0), np.sqrt(X.var(0) + 1e-5)
    r = np.clip(at_std / running, 1 / r_max, r_max)
    d = np.clip((at - MEAN) / running, -d_max, d_max)
    return ((x - x.mean(0)) / std * r + d) * scale + bias


def arguments(scale=SCALE, bias=BIAS, updates=0):
    params = [None if p is None else jnp.asarray(p) for p in (scale, bias)]
    state = jaxbn.State(jnp.asarray(MEAN), jnp.asarray(VAR), jnp.int32(updates))
    return jnp.asarray(X), jaxbn.Params(*params), state


def renorm(**kwargs):
    return jax.jit(functools.partial(jaxbn.batch_renorm, train=True, **kwargs))


@functools.cache
def with_traced_limits():
    def train(x, params, state, r_max, d_max):
        static = {"train": True, "r_max": r_max, "d_max": d_max}
        return jaxbn.batch_renorm(x, params, state, **static)[0]

    return jax.jit(train)


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
def test_equals_the_paper(derivative):
    """y; the gradient, with r and d constant, by finite differences."""

    @jax.jit
    def step(x, params, state, r_max, d_max):
        static = {"train": True, "derivative": derivative}
        limits = {"r_max": r_max, "d_max": d_max}

        def train(x, params):
            return jaxbn.batch_renorm(x, params, state, **static, **limits)

        y, vjp, new = jax.vjp(train, x, params, has_aux=True)
        _, plain = jaxbn.batch_norm(x, params, state, train=True)
        return y, new, plain, vjp(jnp.asarray(WEIGHT))

    primals, h = {"x": X, "scale": SCALE, "bias": BIAS}, 1e-6
    for limits in ((1.0, 0.0), (1.5, 0.3), (3.0, 5.0), (100.0, 100.0)):
        by_paper = functools.partial(paper, r_max=limits[0], d_max=limits[1])
        with jax.enable_x64(True):
            y, new, plain, (dx, dparams) = step(*arguments(), *limits)
        np.testing.assert_allclose(y, by_paper(X), rtol=1e-10)
        for got, want in zip(new, plain, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12)
        for name, gradient in zip(primals, (dx, *dparams), strict=True):
            v = np.random.default_rng(len(name)).normal(size=gradient.shape)
            ends = [
                by_paper(**primals | {name: primals[name] + t * v}) for t in (h, -h)
            ]
            slope = ((ends[0] - ends[1]) * WEIGHT).sum() / (2 * h)
            np.testing.assert_allclose((np.asarray(gradient) * v).sum(), slope, 1e-6)


@pytest.mark.parametrize(("scale", "bias"), [(SCALE, None), (None, BIAS), (None, None)])
def test_limits_1_and_0_are_batch_norm_and_wide_ones_inference(scale, bias):
    with jax.enable_x64(True):
        args = arguments(scale, bias)
        for limits, train in (((1, 0), True), ((1e9, 1e9), False)):
            got, _ = renorm(r_max=limits[0], d_max=limits[1])(*args)
            plain = jax.jit(functools.partial(jaxbn.batch_norm, train=train))
            np.testing.assert_allclose(got, plain(*args)[0], rtol=1e-9)


STEP = jaxbn.step_limits(4, 1.5, 0.5)
SCHEDULES = {  # and r_max and d_max after some updates
    "by hand": (
        {"r_max": lambda t: 1 + t.astype(jnp.float32) / 7, "d_max": lambda t: t / 14},
        {7: (2.0, 0.5)},
    ),
    "the ramp": ({}, {0: (1, 0), 5000: (1, 0), 22500: (2, 4.375), 10**6: (3, 5)}),
    "a step": ({"r_max": STEP[0], "d_max": STEP[1]}, {3: (1, 0), 4: (1.5, 0.5)}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_take_the_update_count(name):
    kwargs, limits = SCHEDULES[name]
    f = renorm(**kwargs)
    for updates, at in limits.items():
        args = arguments(updates=updates)
        want = with_traced_limits()(*args, *map(jnp.float32, at))
        np.testing.assert_allclose(f(*args)[0], want, rtol=1e-5)


def test_equal_step_limits_compile_once():
    assert jaxbn.step_limits(7) != jaxbn.step_limits(8)
    assert pickle.loads(pickle.dumps(jaxbn.step_limits(7))) == jaxbn.step_limits(7)
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(norm, x):
        traces.append(norm)
        return norm.init(jax.random.key(0), x)

    for _ in range(2):
        r_max, d_max = jaxbn.step_limits(7)
        step(BatchRenorm(False, r_max=r_max, d_max=d_max), jnp.ones((4, 3)))
    assert len(traces) == 1


def test_constant_feature_has_no_nan():
    x = jnp.ones((6, 3)).at[:, 0].set(jnp.arange(6.0))
    params, state = jaxbn.init(3)

    def loss(x, params, *limits):
        y = with_traced_limits()(x, params, state, *limits)
        return (y**2 * WEIGHT[:6].astype(np.float32)).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1)))
    with jax.debug_nans(True):
        for limits in ((1.0, 0.0), (3.0, 5.0)):
            got = gradients(x, params, *limits)
            assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(got))


def test_over_devices_and_masks():
    x, params, state = arguments()
    mask = jnp.arange(12)[:, None] % 4 > 0

    def train(x, mask, **kwargs):
        static = {"train": True, "r_max": 1.5, "d_max": 0.5}
        return jaxbn.batch_renorm(x, params, state, mask=mask, **static, **kwargs)

    named = functools.partial(train, axis_name="d")
    named = jax.jit(jax.vmap(named, axis_name="d", out_axes=(0, None)))
    y, new = named(x.reshape(3, 4, 3), mask.reshape(3, 4, 1))
    got, want = (y.reshape(12, 3), new), jax.jit(train)(x, mask)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, got, want)


def test_complex_d_is_clipped_by_its_length():
    params, state = jaxbn.init(1, param_dtype=jnp.complex64)
    x = jnp.array([[3 + 4j], [3 + 4j]], jnp.complex64)
    y, _ = renorm(r_max=1, d_max=1)(x, params, state)
    np.testing.assert_allclose(y, [[0.6 + 0.8j]] * 2, rtol=1e-4)
