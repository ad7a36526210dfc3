"""Plain jit over sharded arrays: nothing is named, and the batch is still the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assert_close
from devices import EPSILON, MOMENTUM, batch_norm, mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn

ROWS, FEATURES = 32, 4
LAYOUTS = {  # of x, and of what has one entry per feature
    "batch": (P("data", None), P()),
    "batch over both": (P(("data", "model"), None), P()),
    "features": (P(None, "model"), P("model")),
    "batch and features": (P("data", "model"), P("model")),
    "batch and features, replicated params": (P("data", "model"), P()),
}


def gradients(x, params, state, mask, dy, c, *, derivative):
    def loss(x, params):
        y, new = batch_norm(x, params, state, mask=mask, derivative=derivative)
        total = (y * dy).sum() + (c[0] * new.mean).sum() + (c[1] * new.var).sum()
        return total, (y, new)

    return jax.grad(loss, (0, 1), has_aux=True)(x, params)


def draw():
    """x, params, mask, dy and c; the first shard of rows has nothing that counts."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, ROWS, FEATURES)).astype(np.float32)
    x += np.linspace(-5, 5, ROWS, dtype=np.float32)[:, None]
    scale, bias, *c = rng.uniform(0.5, 2, (4, FEATURES)).astype(np.float32)
    mask = rng.random(x.shape) < np.linspace(0.2, 1, ROWS)[:, None]
    mask[: ROWS // 8] = False
    return x, jaxbn.Params(scale, bias), mask, dy, c


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_equals_the_whole_batch(kind, layout, derivative):
    devices = mesh(data=4, model=2, kind=kind)
    of_x, of_params = (NamedSharding(devices, spec) for spec in LAYOUTS[layout])
    x, params, mask, dy, c = draw()
    _, state = jaxbn.init(FEATURES)
    f = jax.jit(functools.partial(gradients, derivative=derivative))
    with jax.set_mesh(devices):
        (dx, dparams), (y, new) = f(
            jax.device_put(x, of_x),
            jax.device_put(params, of_params),
            state._replace(
                mean=jax.device_put(state.mean, of_params),
                var=jax.device_put(state.var, of_params),
            ),
            jax.device_put(mask, of_x),
            jax.device_put(dy, of_x),
            [jax.device_put(a, of_params) for a in c],
        )
    options = {"epsilon": EPSILON, "mask": mask}
    assert_close(y, oracle.forward(x, *params, **options), jnp.float32, ROWS)
    want = oracle.backward(dy, x, params.scale, **options)
    for got, desired in zip((dx, *dparams), want, strict=True):
        assert_close(got, desired, jnp.float32, ROWS)
    _, mean, var = oracle.moments(x, mask=mask)
    assert_close(new.mean, (1 - MOMENTUM) * mean, jnp.float32, ROWS)
    assert_close(new.var, MOMENTUM + (1 - MOMENTUM) * var, jnp.float32, ROWS)
    for big in (y, dx):  # neither was gathered
        assert big.sharding.shard_shape(x.shape) == of_x.shard_shape(x.shape)
    if kind == AxisType.Explicit:  # part of the type, which an update keeps
        assert new.mean.sharding.is_equivalent_to(of_params, 1)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("rows", [32, 104, 256, 4096])
@pytest.mark.parametrize("spec", [P("data"), P(("data", "model")), P("data", "model")])
def test_every_number_of_rows(kind, rows, spec):
    """The part of the batch is made of blocks that each lie on one device."""
    devices = mesh(data=4, model=2, kind=kind)
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, rows, FEATURES)).astype(np.float32)
    x += 1000
    params, state = jaxbn.init(FEATURES)

    @jax.jit
    def step(x, dy):
        y, vjp, new = jax.vjp(lambda x: batch_norm(x, params, state), x, has_aux=True)
        return y, *vjp(dy), new.var

    with jax.set_mesh(devices):
        y, dx, var = step(*jax.device_put((x, dy), NamedSharding(devices, spec)))
    assert_close(y, oracle.forward(x, epsilon=EPSILON), jnp.float32, rows)
    want, *_ = oracle.backward(dy, np.float64(x), epsilon=EPSILON)
    assert_close(dx, want, jnp.float32, rows)
    want = MOMENTUM + (1 - MOMENTUM) * np.float64(x).var(0)
    assert_close(var, want, jnp.float32, rows)
