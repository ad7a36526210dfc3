"""The running statistics: one update rule, and what must never happen to it."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxbn


def batches(count=5, rows=8, features=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, rows, features)).astype(np.float32) * 2 + 3


def run(data, masks=None, state=None, **kwargs):
    state = state or jaxbn.init(data.shape[-1])[1]
    params = jaxbn.Params(None, None)
    for i, x in enumerate(data):
        mask = None if masks is None else masks[i]
        _, state = jaxbn.batch_norm(x, params, state, train=True, mask=mask, **kwargs)
    return state


def ema(data, keep, *, ddof=0):
    mean, var = np.zeros(data.shape[-1]), np.ones(data.shape[-1])
    for t, x in enumerate(data.astype(np.float64)):
        k = keep(t)
        mean = k * mean + (1 - k) * x.mean(0)
        var = k * var + (1 - k) * x.var(0, ddof=ddof)
    return mean, var


@pytest.mark.parametrize(
    ("kwargs", "keep", "ddof"),
    [
        ({}, lambda t: 0.9, 0),
        ({"momentum": 0.5}, lambda t: 0.5, 0),
        ({"momentum": 0.0}, lambda t: 0.0, 0),
        ({"momentum": 1.0}, lambda t: 1.0, 0),
        ({"running_variance": "unbiased"}, lambda t: 0.9, 1),
        ({"momentum": None}, lambda t: t / (t + 1), 0),
        ({"momentum": 0.7, "debias": True}, lambda t: min(0.7, t / (t + 1)), 0),
        ({"momentum": 0.7, "debias": True, "running_variance": "unbiased"},
         lambda t: min(0.7, t / (t + 1)), 1),
    ],
)  # fmt: skip
def test_modes(kwargs, keep, ddof):
    data = batches()
    state = run(data, **kwargs)
    mean, var = ema(data, keep, ddof=ddof)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(state.var, var, rtol=1e-5)
    assert state.num_updates == len(data)


@pytest.mark.parametrize("times", [1, 2, 10])
@pytest.mark.parametrize("kwargs", [{"momentum": None}, {"debias": True}])
def test_identical_batches_give_their_statistics_from_the_first_on(kwargs, times):
    x = batches()[0]
    state = run(np.stack([x] * times), **kwargs)
    _, mean, var = oracle.moments(x)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(state.var, var, rtol=1e-6)


def test_momentum_may_be_a_traced_schedule():
    data = batches()

    @jax.jit
    def step(x, state, momentum):
        return jaxbn.batch_norm(
            x, jaxbn.Params(None, None), state, train=True, momentum=momentum
        )[1]

    state = jaxbn.init(3)[1]
    schedule = [0.0, 0.3, 0.5, 0.7, 0.9]
    for x, momentum in zip(data, schedule, strict=True):
        state = step(x, state, momentum)
    mean, _ = ema(data, lambda t: schedule[t])
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
def test_a_feature_with_non_finite_statistics_keeps_its_old_ones(poison):
    data = batches(2)
    before = run(data[:1])
    data[1][4, 1] = poison
    after = run(data[1:], state=before)
    clean = run(batches(2)[1:], state=before)
    assert after.num_updates == 2
    for got, old, new in zip(after[:2], before[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(got[1], old[1])
        np.testing.assert_array_equal(got[jnp.array([0, 2])], new[jnp.array([0, 2])])


@pytest.mark.parametrize("kwargs", [{"momentum": None}, {"debias": True}])
def test_with_one_count_for_all_none_is_updated(kwargs):
    data = batches(2)
    before = run(data[:1], **kwargs)
    data[1][4, 1] = np.nan
    after = run(data[1:], state=before, **kwargs)
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize(
    "kwargs", [{}, {"momentum": None}, {"running_variance": "unbiased"}]
)
def test_nothing_to_count_changes_nothing(kwargs):
    before = run(batches(2), **kwargs)
    nothing = np.zeros((1, 8, 1), bool)
    after = run(batches(1), nothing, state=before, **kwargs)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    after = run(np.zeros((1, 0, 3), np.float32), state=before, **kwargs)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_unbiased_needs_two_elements():
    one = np.zeros((1, 8, 3), bool)
    one[0, 0] = True
    one[0, :2, 2] = True
    before = run(batches(1))
    after = run(batches(1), one, state=before, running_variance="unbiased")
    np.testing.assert_array_equal(after.mean[:2], before.mean[:2])
    assert after.mean[2] != before.mean[2]
    assert after.num_updates == 2


def test_all_features_poisoned_is_no_update():
    before = run(batches(1))
    after = run(np.full((1, 8, 3), np.nan, np.float32), state=before)
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize(
    "state_dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64]
)
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_dtypes_never_drift(state_dtype, x_dtype, momentum):
    """As a scan carry, which JAX refuses if a dtype or a shape changes."""
    with jax.enable_x64(True):
        state = jaxbn.State(
            jnp.zeros(3, state_dtype), jnp.ones(3, state_dtype), jnp.int32(0)
        )

        def body(state, x):
            y, state = jaxbn.batch_norm(
                x, jaxbn.Params(None, None), state, train=True, momentum=momentum
            )
            return state, y

        data = jnp.asarray(batches(), x_dtype)
        state, y = jax.lax.scan(body, state, data)
    assert y.dtype == x_dtype
    mean, _ = ema(batches(), lambda t: t / (t + 1) if momentum is None else 0.9)
    np.testing.assert_allclose(np.asarray(state.mean, np.float64), mean, rtol=0.03)


def test_overflow_of_a_small_state_dtype_is_not_finite_either():
    x = jnp.array([[1e5], [-1e5]])
    state = jaxbn.State(
        jnp.zeros(1, jnp.float16), jnp.ones(1, jnp.float16), jnp.int32(0)
    )
    _, after = jaxbn.batch_norm(
        x, jaxbn.Params(None, None), state, train=True, momentum=0.0
    )
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
def test_state_is_not_differentiated(derivative):
    x = batches(1)[0]
    params, state = jaxbn.init(3)

    def loss(x, params, state):
        _, new = jaxbn.batch_norm(x, params, state, train=True, derivative=derivative)
        return (new.mean**3).sum() + (new.var**3).sum()

    dx, dparams = jax.grad(loss, (0, 1))(x, params, state)
    np.testing.assert_array_equal(dx, 0)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), dparams)


@pytest.mark.parametrize("mode", [{"momentum": None}, {"debias": True}])
def test_one_count_means_all_features_or_none(mode):
    """Here a variance of 1e8 does not fit float16, in which the state is."""
    x = jnp.array([[1.0, 1e4], [3.0, -1e4]])
    params, state = jaxbn.init(2)
    state = state._replace(
        mean=state.mean.astype("float16"), var=jnp.ones(2, "float16")
    )
    _, new = jaxbn.batch_norm(x, params, state, train=True, **mode)
    assert new.num_updates == 0
    np.testing.assert_array_equal(new.mean, state.mean)
    np.testing.assert_array_equal(new.var, state.var)
