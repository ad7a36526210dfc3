"""What both modules share: limits of batch renorm are numbers or schedules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

X = jnp.array([[1.0, 10.0], [3.0, 30.0], [8.0, 20.0]])


def with_linen(cls, **limits):
    norm = cls(use_running_average=False, **limits)
    variables = norm.init(jax.random.key(0), X)
    return norm.apply(variables, X, mutable=["batch_stats"])[0]


def with_nnx(**limits):
    return jaxbn.nnx.BatchRenorm(2, rngs=nnx.Rngs(0), **limits)(X)


WAYS = {
    "linen, nn.jit": lambda **limits: with_linen(
        nn.jit(jaxbn.linen.BatchRenorm), **limits
    ),
    "nnx": with_nnx,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_schedule_may_return_an_array(way):
    limits = {"r_max": jnp.array([2.0, 1.0]), "d_max": jnp.array([0.5, 9.0])}
    y = way(**{name: lambda t, array=array: array for name, array in limits.items()})
    want, _ = jaxbn.batch_renorm(X, *jaxbn.init(2), train=True, **limits)
    np.testing.assert_allclose(y, want, rtol=1e-6)


def test_limits_are_not_in_the_state_of_nnx():
    norm = jaxbn.nnx.BatchRenorm(2, r_max=2.0, d_max=lambda t: t, rngs=nnx.Rngs(0))
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(norm))}
    assert names == {"scale", "bias", "mean", "var", "num_updates"}
