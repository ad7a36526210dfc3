"""Finite x whose variance float32 cannot hold: it is told, and no state keeps it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

FEATURES, BAD = 3, 1
AT_BAD = np.arange(FEATURES) == BAD

partial = functools.partial
NORMS = {  # and whether with a mask
    "batch norm": (jaxbn.batch_norm, True),
    "no mask": (jaxbn.batch_norm, False),
    "jvp": (partial(jaxbn.batch_norm, derivative="jvp"), False),
    "momentum None": (partial(jaxbn.batch_norm, momentum=None), True),
    "ghosts": (partial(jaxbn.ghost_batch_norm, ghost_batch_size=20), True),
    "renorm": (jaxbn.batch_renorm, False),
    "renorm, jvp": (partial(jaxbn.batch_renorm, derivative="jvp"), True),
    "named": (partial(jaxbn.batch_norm, axis_name="d"), False),
    "named, mask": (partial(jaxbn.batch_norm, axis_name="d"), True),
    "named ghosts": (
        partial(jaxbn.ghost_batch_norm, ghost_batch_size=20, axis_name="d"),
        False,
    ),
}


def draw():
    """(x, dy, mask): one feature of 1e25, in two devices of 40 rows."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 2, 40, FEATURES)).astype(np.float32)
    x[..., BAD] *= np.float32(1e25)
    return x, dy, rng.random(x.shape) < 0.8


@pytest.mark.parametrize("name", NORMS)
def test_nan_in_training_and_a_state_that_is_kept(name):
    x, dy, mask = draw()
    params, state = jaxbn.init(FEATURES)
    norm, masked = NORMS[name]

    def step(x, dy, mask):
        def train(x, params):
            return norm(x, params, state, train=True, mask=mask if masked else None)

        y, vjp, new = jax.vjp(train, x, params, has_aux=True)
        return y, *vjp(dy), new

    y, dx, dparams, new = jax.jit(jax.vmap(step, axis_name="d"))(x, dy, mask)
    counted = mask | (not masked)
    for a in (y, dx):
        np.testing.assert_array_equal(np.isnan(a), counted & AT_BAD)
        np.testing.assert_array_equal(np.where(counted, 0, a), 0)
    assert np.isnan(dparams.scale[..., BAD]).all()
    assert np.isfinite(np.delete(dparams.scale, BAD, -1)).all()
    # Averages over all updates have one count, so that all features wait.
    moved = np.tile(~AT_BAD & (name != "momentum None"), (2, 1))
    np.testing.assert_array_equal(new.mean != 0, moved)
    np.testing.assert_array_equal(new.var != 1, moved)


def test_the_variance_is_inf():
    moments = jax.jit(jaxbn.batch_moments)
    for shift in (0, 1e25):
        x = draw()[0].reshape(-1, FEATURES)
        x[:, BAD] += np.float32(shift)
        _, mean, var = moments(x)
        np.testing.assert_array_equal(np.isinf(var), AT_BAD)
        np.testing.assert_allclose(mean, np.float64(x).mean(0), rtol=1e-5)


def test_inference_is_as_its_moments_say():
    """Only a batch is called NaN: a stored variance of inf is the caller's."""
    y = jaxbn.normalize(jnp.ones((2, 1)), jnp.zeros(1), jnp.full(1, jnp.inf))
    np.testing.assert_array_equal(y, 0)
