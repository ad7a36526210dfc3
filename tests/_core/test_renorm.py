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


def arguments(scale=SCALE, bias=BIAS):
    params = [None if p is None else jnp.asarray(p) for p in (scale, bias)]
    state = jaxbn.State(jnp.asarray(MEAN), jnp.asarray(VAR), jnp.int32(0))
    return jnp.asarray(X), jaxbn.Params(*params), state


def renorm(**kwargs):
    return jax.jit(functools.partial(jaxbn.batch_renorm, train=True, **kwargs))


@pytest.mark.parametrize("limits", [(1, 0), (1.5, 0.3), (3, 5), (100, 100)])
@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
def test_equals_the_paper(limits, derivative):
    """y; the gradient, with r and d constant, by finite differences."""
    r_max, d_max = limits
    static = {"r_max": r_max, "d_max": d_max, "derivative": derivative}
    with jax.enable_x64(True):
        x, params, state = arguments()
        y, new = renorm(**static)(x, params, state)
        np.testing.assert_allclose(y, paper(X, r_max, d_max), rtol=1e-10)
        _, plain = jaxbn.batch_norm(x, params, state, train=True)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-12), new, plain
        )

        def loss(x, params):
            return (renorm(**static)(x, params, state)[0] * WEIGHT).sum()

        dx, dparams = jax.grad(loss, (0, 1))(x, params)
    h = 1e-6
    for i, gradient, moved in [
        (0, dx, lambda t, v: paper(X + t * v, r_max, d_max)),
        (1, dparams.scale, lambda t, v: paper(X, r_max, d_max, scale=SCALE + t * v)),
        (2, dparams.bias, lambda t, v: paper(X, r_max, d_max, bias=BIAS + t * v)),
    ]:
        v = np.random.default_rng(i).normal(size=gradient.shape)
        numeric = ((moved(h, v) - moved(-h, v)) * WEIGHT).sum() / (2 * h)
        np.testing.assert_allclose((np.asarray(gradient) * v).sum(), numeric, rtol=1e-6)


@pytest.mark.parametrize("scale", [SCALE, None])
@pytest.mark.parametrize("bias", [BIAS, None])
def test_limits_1_and_0_are_batch_norm(scale, bias):
    x, params, state = jax.tree.map(
        lambda a: a.astype(jnp.float32) if a.ndim else a, arguments(scale, bias)
    )
    got = renorm(r_max=1, d_max=0)(x, params, state)
    want = jax.jit(functools.partial(jaxbn.batch_norm, train=True))(x, params, state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want)


def test_unclipped_training_is_inference():
    with jax.enable_x64(True):
        x, params, state = arguments()
        y, _ = renorm(r_max=1e9, d_max=1e9)(x, params, state)
        want, _ = jaxbn.batch_norm(x, params, state, train=False)
        np.testing.assert_allclose(y, want, rtol=1e-9)


def test_schedules_take_the_update_count():
    x, params, state = arguments()
    state = state._replace(num_updates=jnp.int32(7))
    static = {
        "r_max": lambda t: 1 + t.astype(jnp.float32) / 7,
        "d_max": lambda t: t / 14,
    }
    got, _ = renorm(**static)(x, params, state)
    want, _ = renorm(r_max=2.0, d_max=jnp.array([0.5]))(x, params, state)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_ramp_begins_as_batch_norm_and_ends_at_3_and_5():
    x, params, state = arguments()
    for updates, r_max, d_max in [
        (0, 1, 0),
        (5000, 1, 0),
        (22500, 2, 4.375),
        (10**6, 3, 5),
    ]:
        state = state._replace(num_updates=jnp.int32(updates))
        got, _ = renorm()(x, params, state)
        want, _ = renorm(r_max=r_max, d_max=d_max)(x, params, state)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_step_limits_open_at_once_after_the_warmup():
    x, params, state = arguments()
    r_max, d_max = jaxbn.step_limits(4, 1.5, 0.5)
    for updates, limits in [(3, (1, 0)), (4, (1.5, 0.5))]:
        state = state._replace(num_updates=jnp.int32(updates))
        got, _ = renorm(r_max=r_max, d_max=d_max)(x, params, state)
        want, _ = renorm(r_max=limits[0], d_max=limits[1])(x, params, state)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_equal_step_limits_compile_once():
    assert jaxbn.step_limits(7) != jaxbn.step_limits(8)
    assert pickle.loads(pickle.dumps(jaxbn.step_limits(7))) == jaxbn.step_limits(7)
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(norm, variables, x):
        traces.append(norm)
        return norm.apply(variables, x, mutable=["batch_stats"])

    for _ in range(2):
        r_max, d_max = jaxbn.step_limits(7)
        norm = BatchRenorm(False, r_max=r_max, d_max=d_max)
        step(norm, norm.init(jax.random.key(0), jnp.ones((4, 3))), jnp.ones((4, 3)))
    assert len(traces) == 1


@pytest.mark.parametrize("limits", [(1, 0), (3, 5)])
def test_constant_feature_has_no_nan(limits):
    x = jnp.ones((6, 3)).at[:, 0].set(jnp.arange(6.0))
    _, params, state = jaxbn.init(3)[0], *jaxbn.init(3)
    static = {"r_max": limits[0], "d_max": limits[1]}

    def loss(x, params):
        return (renorm(**static)(x, params, state)[0] ** 2 * WEIGHT[:6]).sum()

    with jax.debug_nans(True):
        gradients = jax.grad(loss, (0, 1))(x, params)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_over_devices_and_masks():
    x, params, state = jax.tree.map(
        lambda a: a.astype(jnp.float32) if a.ndim else a, arguments()
    )
    mask = jnp.arange(12)[:, None] % 4 > 0
    whole = renorm(r_max=1.5, d_max=0.5)(x, params, state, mask=mask)
    y, new = jax.vmap(
        lambda x, mask: jaxbn.batch_renorm(
            x, params, state, train=True, r_max=1.5, d_max=0.5, mask=mask, axis_name="d"
        ),
        axis_name="d",
        out_axes=(0, None),
    )(x.reshape(3, 4, 3), mask.reshape(3, 4, 1))
    np.testing.assert_allclose(y.reshape(12, 3), whole[0], rtol=1e-5, atol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), new, whole[1]
    )


def test_complex_d_is_clipped_by_its_length():
    params, state = jaxbn.init(1, param_dtype=jnp.complex64)
    x = jnp.array([[3 + 4j], [3 + 4j]], jnp.complex64)
    y, _ = renorm(r_max=1, d_max=1)(x, params, state)
    np.testing.assert_allclose(y, [[0.6 + 0.8j]] * 2, rtol=1e-4)


def test_traffic_is_that_of_batch_norm():
    """The moments that r and d need are those of the kernel, computed once."""
    x = jnp.ones((65536, 64), jnp.float32)
    params, state = jaxbn.init(64)

    def step(normalize, x, params, dy):
        y, vjp = jax.vjp(lambda x, p: normalize(x, p, state, train=True)[0], x, params)
        return y, vjp(dy)

    sizes = []
    for normalize in (jaxbn.batch_renorm, jaxbn.batch_norm):
        lowered = jax.jit(functools.partial(step, normalize)).lower(x, params, x)
        sizes.append(lowered.compile().cost_analysis()["bytes accessed"] / x.nbytes)
    assert sizes[0] <= sizes[1] + 0.1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r_max": 0.5}, "`r_max` must be at least 1; got 0.5"),
        ({"d_max": -1}, "`d_max` must be at least 0; got -1"),
    ],
)
def test_bad_limits(kwargs, message):
    x, params, state = arguments()
    with pytest.raises(ValueError, match=message):
        jaxbn.batch_renorm(x, params, state, train=True, **kwargs)
    with pytest.raises(ValueError, match=message.partition(";")[0]):
        jaxbn.step_limits(9, **kwargs)


def test_a_negative_warmup():
    with pytest.raises(ValueError, match="`warmup` must not be negative; got -1"):
        jaxbn.step_limits(-1)
