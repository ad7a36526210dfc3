"""Float16 with Flax's dynamic loss scale: what overflows leaves no trace."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax.training.dynamic_scale import DynamicScale

from jaxbn.linen import BatchNorm, BatchRenorm

pytestmark = pytest.mark.exhaustive

ROWS, WIDTH, MOMENTUM = 32, 4, 0.75
# In float16 the loss of `step` has gradients that overflow above about 2^16.
HUGE_SCALE = 2.0**24


class Net(nn.Module):
    norm: nn.Module

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, dtype=jnp.float16)(x)
        self.sow("intermediates", "x", x)
        x = self.norm(x)
        return nn.Dense(1, dtype=jnp.float16)(nn.relu(x))


def options():
    return {"momentum": MOMENTUM, "dtype": jnp.float16, "use_running_average": False}


NORMS = {
    "plain": lambda: BatchNorm(**options()),
    "debiased": lambda: BatchNorm(**options(), debias=True),
    "ghost": lambda: BatchNorm(**options(), ghost_batch_size=8),
    "renorm": lambda: BatchRenorm(**options()),
    "jvp": lambda: BatchNorm(**options(), derivative="jvp"),
}


def batch(seed, size=1.0):
    x = np.random.default_rng(seed).normal(size=(ROWS, 3)) * size
    return jnp.asarray(x, jnp.float32)


def step(net):
    """As in Flax's ImageNet example: only the parameters wait for a finite step."""

    @jax.jit
    def run(scale, params, stats, x):
        def loss(params):
            y, updates = net.apply(
                {"params": params, "batch_stats": stats},
                x,
                mutable=["batch_stats", "intermediates"],
            )
            return jnp.square(y.astype(jnp.float32) - 1).mean(), updates

        scale, finite, (_, updates), gradients = scale.value_and_grad(
            loss, has_aux=True
        )(params)
        moved = jax.tree.map(
            lambda p, g: jnp.where(finite, p - 0.1 * g, p), params, gradients
        )
        (seen,) = updates["intermediates"]["x"]
        return scale, moved, updates["batch_stats"]["norm"], finite, seen

    return lambda scale, params, stats, x: run(scale, params, {"norm": stats}, x)


def start(norm):
    net = Net(norm)
    variables = net.init(jax.random.key(0), batch(0))
    return step(net), variables["params"], variables["batch_stats"]["norm"]


def assert_same(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


def all_moved(before, after):
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return all(np.all(a != b) for a, b in pairs)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_activations_that_overflow(norm):
    """Finite, overflowing, finite: the statistics pass over the second batch."""
    run, params, stats = start(norm())
    scale = DynamicScale(scale=1.0)
    scale, params, stats, finite, _ = run(scale, params, stats, batch(1))
    assert finite
    halved, *same, finite, seen = run(scale, params, stats, batch(2, size=1e6))
    assert not finite
    assert not np.isfinite(seen).all()
    assert_same(same, [params, stats])
    assert halved.scale == 0.5
    _, _, after, finite, _ = run(halved, *same, batch(3))
    assert finite
    assert all_moved(stats, after)
    assert_same(after, run(scale, params, stats, batch(3))[2])  # no second batch


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
def test_gradients_that_overflow(derivative):
    """The forward pass is sound, and so is what it adds to the statistics."""
    run, params, stats = start(BatchNorm(**options(), derivative=derivative))
    scale, mean, var = DynamicScale(scale=HUGE_SCALE), np.zeros(WIDTH), np.ones(WIDTH)
    for overflows in range(30):
        scale, after, stats, finite, seen = run(scale, params, stats, batch(overflows))
        _, batch_mean, batch_var = oracle.moments(np.float64(seen))
        mean = MOMENTUM * mean + (1 - MOMENTUM) * batch_mean
        var = MOMENTUM * var + (1 - MOMENTUM) * batch_var
        np.testing.assert_allclose(stats["mean"], mean, atol=1e-5)
        np.testing.assert_allclose(stats["var"], var, rtol=1e-5)
        if finite:
            break
        assert_same(after, params)
    assert finite
    assert overflows >= 3
    assert scale.scale == HUGE_SCALE / 2**overflows
    assert all_moved(params["norm"], after["norm"])
