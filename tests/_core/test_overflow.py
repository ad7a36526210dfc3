"""Finite x whose variance float32 cannot hold: it is told, and no state keeps it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

FEATURES, BAD = 3, 1

NORMS = {
    "batch norm": jaxbn.batch_norm,
    "jvp": functools.partial(jaxbn.batch_norm, derivative="jvp"),
    "momentum None": functools.partial(jaxbn.batch_norm, momentum=None),
    "ghosts": functools.partial(jaxbn.ghost_batch_norm, ghost_batch_size=20),
    "renorm": jaxbn.batch_renorm,
    "renorm, jvp": functools.partial(jaxbn.batch_renorm, derivative="jvp"),
    "named": functools.partial(jaxbn.batch_norm, axis_name="d"),
    "named ghosts": functools.partial(
        jaxbn.ghost_batch_norm, ghost_batch_size=20, axis_name="d"
    ),
}


def draw():
    """(x, dy, mask): one feature of 1e25, in two devices of 40 rows."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 2, 40, FEATURES)).astype(np.float32)
    x[..., BAD] *= np.float32(1e25)
    return x, dy, rng.random(x.shape) < 0.8


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", NORMS)
def test_nan_in_training_and_a_state_that_is_kept(name, masked):
    x, dy, mask = draw()
    params, state = jaxbn.init(FEATURES)

    def step(x, dy, mask):
        def train(x, params):
            kept = mask if masked else None
            return NORMS[name](x, params, state, train=True, mask=kept)

        y, vjp, new = jax.vjp(train, x, params, has_aux=True)
        return y, *vjp(dy), new

    y, dx, dparams, new = jax.jit(jax.vmap(step, axis_name="d"))(x, dy, mask)
    counted = np.broadcast_to(mask if masked else True, x.shape)
    for a in (y, dx):
        bad = counted & (np.arange(FEATURES) == BAD)
        np.testing.assert_array_equal(np.isnan(a), bad)
        np.testing.assert_array_equal(np.where(counted, 0, a), 0)
    assert np.isnan(dparams.scale[..., BAD]).all()
    assert np.isfinite(np.delete(dparams.scale, BAD, -1)).all()
    # Averages over all updates have one count, so that all features wait.
    moved = (np.arange(FEATURES) != BAD) & (name != "momentum None")
    np.testing.assert_array_equal(new.mean != 0, np.tile(moved, (2, 1)))
    np.testing.assert_array_equal(new.var != 1, np.tile(moved, (2, 1)))


@pytest.mark.parametrize("shift", [0, 1e25])
def test_the_variance_is_inf(shift):
    x = draw()[0].reshape(-1, FEATURES)
    x[:, BAD] += np.float32(shift)
    _, mean, var = jax.jit(jaxbn.batch_moments)(x)
    np.testing.assert_array_equal(np.isinf(var), np.arange(FEATURES) == BAD)
    np.testing.assert_allclose(mean, np.float64(x).mean(0), rtol=1e-5)


def test_inference_is_as_its_moments_say():
    """Only a batch is called NaN: a stored variance of inf is the caller's."""
    y = jaxbn.normalize(jnp.ones((2, 1)), jnp.zeros(1), jnp.full(1, jnp.inf))
    np.testing.assert_array_equal(y, 0)
