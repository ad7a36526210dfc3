"""The running statistics: one update rule, and what must never happen to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn


def draw(steps=5, rows=8, features=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(steps, rows, features)).astype(np.float32) * 2 + 3


@functools.partial(jax.jit, static_argnames=("running_variance", "debias", "average"))
def run(data, mask=None, state=None, momentum=0.9, average=False, **kwargs):
    """Y and the state after training on each batch of `data` in a scan."""
    kwargs["momentum"] = None if average else momentum
    state = state or jaxbn.init(data.shape[-1])[1]

    def step(state, x):
        params = jaxbn.Params(None, None)
        args = x, params, state
        return jaxbn.batch_norm(*args, train=True, mask=mask, **kwargs)[::-1]

    state, y = jax.lax.scan(step, state, data)
    return y, state


@pytest.mark.parametrize(
    ("kwargs", "keep", "ddof"),
    [
        ({}, lambda t: 0.9, 0),
        ({"momentum": 0.0}, lambda t: 0.0, 0),
        ({"momentum": 1.0}, lambda t: 1.0, 0),
        ({"running_variance": "unbiased"}, lambda t: 0.9, 1),
        ({"average": True}, lambda t: t / (t + 1), 0),
        ({"momentum": 0.7, "debias": True}, lambda t: min(0.7, t / (t + 1)), 0),
        (
            {"momentum": 0.7, "debias": True, "running_variance": "unbiased"},
            lambda t: min(0.7, t / (t + 1)),
            1,
        ),
    ],
)
def test_modes(kwargs, keep, ddof):
    data, mean, var = draw(), np.zeros(3), np.ones(3)
    for t, x in enumerate(data.astype(np.float64)):
        k = keep(t)
        mean = k * mean + (1 - k) * x.mean(0)
        var = k * var + (1 - k) * x.var(0, ddof=ddof)
    _, state = run(data, **kwargs)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(state.var, var, rtol=1e-5)
    assert state.num_updates == len(data)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
def test_a_feature_with_non_finite_statistics_keeps_its_old_ones(poison):
    data = draw(2)
    _, before = run(data[:1])
    _, clean = run(data[1:], state=before)
    data[1, 4, 1] = poison
    _, after = run(data[1:], state=before)
    assert after.num_updates == 2
    for got, old, new in zip(after[:2], before[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(got, np.where([0, 1, 0], old, new))
    data[1, 4, :] = poison  # that is no update at all
    jax.tree.map(np.testing.assert_array_equal, run(data[1:], state=before)[1], before)


def test_unbiased_needs_two_elements():
    one = np.zeros((8, 3), bool)
    one[0] = one[1, 2] = True
    _, before = run(draw(1))
    _, after = run(draw(1), one, before, running_variance="unbiased")
    np.testing.assert_array_equal(after.mean[:2], before.mean[:2])
    assert after.mean[2] != before.mean[2]
    assert after.num_updates == 2


@pytest.mark.parametrize(
    ("state_dtype", "x_dtype", "average"),
    [
        ("bfloat16", "float32", False),
        ("bfloat16", "float64", True),
        ("float16", "float32", True),
        ("float16", "bfloat16", False),
        ("float32", "bfloat16", True),
        ("float32", "float64", False),
        ("float64", "bfloat16", False),
        ("float64", "float32", True),
    ],
)
def test_dtypes_never_drift(state_dtype, x_dtype, average):
    """As a scan carry, which JAX refuses if a dtype or a shape changes."""
    _, want = run(draw(), average=average)
    with jax.enable_x64(True):
        mean, var = jnp.zeros(3, state_dtype), jnp.ones(3, state_dtype)
        state = jaxbn.State(mean, var, jnp.int32(0))
        y, state = run(jnp.asarray(draw(), x_dtype), state=state, average=average)
        assert y.dtype == x_dtype
        np.testing.assert_allclose(np.float64(state.mean), want.mean, rtol=0.03)


@pytest.mark.parametrize(
    "mode", [{"momentum": 0.0}, {"average": True}, {"debias": True}], ids=str
)
def test_overflow_of_a_small_state_dtype_is_not_finite_either(mode):
    """A variance of 1e8 does not fit float16; one count means all features or none."""
    x = jnp.array([[1e4, 1.0], [-1e4, 3.0]])
    state = jaxbn.State(jnp.zeros(2, "float16"), jnp.ones(2, "float16"), jnp.int32(0))
    _, after = run(x[None], state=state, **mode)
    alone = int("momentum" in mode)
    np.testing.assert_array_equal(after.mean, [0, 2 * alone])
    np.testing.assert_array_equal(after.var, [1, 1])
    assert after.num_updates == alone
