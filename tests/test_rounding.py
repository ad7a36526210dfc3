"""Means far from 0 for their standard deviation: nothing is lost to their rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assert_close, fuses_sums

import jaxbn
from jaxbn import _rounding

FEATURES = 4


def draw(ratio, rows=100, dtype=np.float32, seed=0):
    """(x, dy, scale), x with mean `ratio` and standard deviation 1."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(rows, FEATURES)) + ratio).astype(dtype)
    dy = rng.normal(size=x.shape).astype(np.float32)
    return x, dy, rng.uniform(0.5, 2, FEATURES).astype(np.float32)


def both(x, scale, dy, **kwargs):
    y, cache = jaxbn.forward(x, scale, jnp.zeros_like(scale), **kwargs)
    return y, *jaxbn.backward(dy, cache)


def desired(x, scale, dy, mask=None):
    x, scale, dy = (np.float64(a) for a in (x, scale, dy))
    y = oracle.forward(x, scale, np.zeros(FEATURES), mask=mask)
    return y, *oracle.backward(dy, x, scale, mask=mask)


def assert_all_close(got, wanted, rows):
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, jnp.float32, rows)


@pytest.mark.parametrize("rows", [4, 100, 1000])
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("masked", [False, True])
def test_as_exact_as_near_zero(rows, ratio, masked):
    x, dy, scale = draw(ratio, rows)
    mask = np.arange(rows)[:, None] != 2 if masked else None
    got = jax.jit(both)(x, scale, dy, mask=mask)
    assert_all_close(got, desired(x, scale, dy, mask), rows)


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_moments(ratio):
    x, *_ = draw(ratio)
    _, mean, var = jax.jit(jaxbn.batch_moments)(x)
    _, exact_mean, exact_var = oracle.moments(np.float64(x))
    np.testing.assert_allclose(mean, exact_mean, rtol=6e-8)  # rounded once
    assert_close(var, exact_var, jnp.float32, len(x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [3, 10, 1000, 4095])
def test_constant_features_are_nothing(dtype, rows):
    """Where the mean's rounding alone would be y = 0.3 at 1e4, and 30 at 1e6."""
    sizes = np.minimum([1.1, 10000.1, 1e6, 1.9e6], float(jnp.finfo(dtype).max))
    x = jnp.asarray(sizes, dtype)
    x = jnp.broadcast_to(x, (rows, FEATURES))
    dy = jax.random.normal(jax.random.key(0), x.shape, dtype)
    y, _, dscale, _ = jax.jit(both)(x, jnp.ones(FEATURES), dy)
    np.testing.assert_array_equal(y, jnp.zeros_like(y))
    np.testing.assert_array_equal(dscale, 0)
    _, mean, var = jaxbn.batch_moments(x)
    np.testing.assert_array_equal(mean, x[0].astype(jnp.float32))
    np.testing.assert_array_equal(var, 0)


@pytest.mark.parametrize("in_one_pass", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_correction_in_one_pass_and_in_two(in_one_pass, masked):
    """In one, it is that of a GPU or TPU. Of any mean: here, of one far off."""
    x, *_ = draw(1e5)
    mask = np.arange(len(x))[:, None] % 3 != 1 if masked else None
    num_elements, exact_mean, exact_var = oracle.moments(np.float64(x), mask=mask)
    mean = (exact_mean + np.linspace(-1, 1, FEATURES)).astype(np.float32)
    operands = (x, mean, mean, np.float32(num_elements)) + (mask,) * masked
    correct = functools.partial(_rounding._correct, features=(1,))
    mean, var, low = jax.jit(correct, static_argnames="in_one_pass")(
        *operands, in_one_pass=in_one_pass
    )
    np.testing.assert_allclose(
        np.float64(mean) + np.float64(low), exact_mean, atol=1e-6
    )
    assert_close(var, exact_var, jnp.float32, len(x))


def test_one_far_feature_of_many():
    x, dy, scale = draw(0)
    x[:, 1] += 1e5
    got = jax.jit(both)(x, scale, dy)
    assert_all_close(got, desired(x, scale, dy), len(x))


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
def test_gradients_of_batch_norm(derivative):
    x, dy, scale = draw(1e5)
    state = jaxbn.init(FEATURES)[1]

    def loss(x, scale):
        params = jaxbn.Params(scale, jnp.zeros_like(scale))
        y, _ = jaxbn.batch_norm(x, params, state, train=True, derivative=derivative)
        return (y * dy).sum()

    got = jax.jit(jax.grad(loss, (0, 1)))(x, scale)
    assert_all_close(got, desired(x, scale, dy)[1:3], len(x))


def test_second_derivatives():
    """Those of the same data about 0: a batch norm does not see a shift."""
    x, dy, scale = draw(0, rows=6)

    def loss(x, shift):
        y = both(x + shift, scale, dy)[0]
        return (y**3 * dy).sum()

    shift = np.float32(2**12)
    near = jax.jit(jax.hessian(loss))((x + shift) - shift, 0.0)
    far = jax.jit(jax.hessian(loss))(x, shift)
    # The rounding of the mean is no part of the rule's own derivative.
    size, rounding = abs(near).max(), shift * jnp.finfo(jnp.float32).eps
    np.testing.assert_allclose(far, near, rtol=0, atol=rounding * size)


def test_vmap_is_a_loop():
    stacked = [np.stack(a) for a in zip(*map(draw, (0.0, 1e5, 1e2)), strict=True)]
    got = jax.jit(jax.vmap(both))(stacked[0], stacked[2], stacked[1])
    for i, ratio in enumerate((0.0, 1e5, 1e2)):
        x, dy, scale = draw(ratio)
        assert_all_close([a[i] for a in got], desired(x, scale, dy), len(x))


def test_vmap_over_masks_alone():
    x, dy, scale = draw(1e5)
    masks = np.arange(100)[:, None] < np.array([50, 90])[:, None, None]
    got = jax.jit(jax.vmap(lambda mask: both(x, scale, dy, mask=mask)))(masks)
    for i, mask in enumerate(masks):
        assert_all_close([a[i] for a in got], desired(x, scale, dy, mask), len(x))


def test_complex():
    x, dy, scale = draw(1e4)
    x = x + 1j * draw(-1e4, seed=1)[0]
    exact = np.complex128(x)
    y, *_ = jax.jit(both)(x.astype(np.complex64), scale, dy.astype(np.complex64))
    assert_close(y, oracle.forward(exact, scale, np.zeros(FEATURES)), jnp.float32, 100)


def test_overflow_stays_overflow():
    x, *_ = draw(1e6)
    _, _, var = jax.jit(jaxbn.batch_moments)(x * np.float32(1e20))
    assert np.isinf(var).all()


@fuses_sums
def test_two_reads_in_a_branch():
    x = jnp.ones((65536, 64))
    compiled = jax.jit(both).lower(x, jnp.ones(64), x).compile()
    assert " conditional(" in compiled.as_text()
    assert compiled.cost_analysis()["bytes accessed"] / x.nbytes <= 12.1


@pytest.mark.parametrize("unit", [2.0**-8, 2.0**12])
def test_far_is_told_by_the_standard_deviation_alone(unit):
    """In another unit of x all is the same, epsilon too."""
    x, dy, scale = draw(1000)
    got = jax.jit(functools.partial(both, epsilon=1e-5 * unit**2))(x * unit, scale, dy)
    y, dx, *rest = desired(x, scale, dy)
    assert_all_close((got[0], got[1] * unit, *got[2:]), (y, dx, *rest), len(x))


def test_a_mean_between_two_numbers_over_devices():
    """The mean of two neighbours is neither; each device has one of them."""
    a = np.float32(1e6)
    x = np.array([a, np.nextafter(a, np.float32(np.inf))])[:, None, None]
    x = np.repeat(x, 4, axis=1)
    y = jax.vmap(
        lambda x: jaxbn.batch_norm(x, *jaxbn.init(1), train=True, axis_name="d")[0],
        axis_name="d",
    )(x)
    wanted = oracle.forward(np.float64(x.reshape(-1, 1)), np.ones(1), np.zeros(1))
    np.testing.assert_allclose(y.reshape(-1, 1), wanted, rtol=1e-6)


def test_a_variance_that_overflows_is_inf():
    """Also beside features that are far, where the square of the mean's error is."""
    x, *_ = draw(100)
    unit = np.array([1e30, 1, 1, 1e30], np.float32)
    _, mean, var = jax.jit(jaxbn.batch_moments)(x * unit)
    np.testing.assert_array_equal(np.isinf(var), unit > 1)
    np.testing.assert_allclose(mean, unit * oracle.moments(np.float64(x))[1], rtol=1e-6)
