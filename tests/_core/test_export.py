"""Programs for several platforms, and any number of rows: jax.export."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assert_close
from devices import EPSILON, FEATURES, batch_norm, old_state

import jaxbn


def draw(rows):
    """(x, params, state, mask, dy) of a batch of any size."""
    rng = np.random.default_rng(rows)
    x, dy = rng.normal(size=(2, rows, FEATURES)).astype(np.float32)
    scale, bias = rng.uniform(0.5, 2, (2, FEATURES)).astype(np.float32)
    params = jaxbn.Params(jnp.array(scale), jnp.array(bias))
    mask = np.arange(rows)[:, None] % 4 < 3
    return x, params, old_state(), mask, dy


def desired(x, params, state, mask, dy, train):
    """(y, (dx, dscale, dbias))."""
    options = {"epsilon": EPSILON, "mask": mask}
    if train:
        y = oracle.forward(x, *params, **options)
        return y, oracle.backward(dy, x, params.scale, **options)
    mean, var = map(np.float64, state[:2])
    x_hat = oracle.normalize(x, mean, var, **options)
    g = np.where(mask, dy, 0)
    dx = g * np.float64(params.scale) / np.sqrt(var + EPSILON)
    y = oracle.normalize(x, mean, var, *params, **options)
    return y, (dx, (g * x_hat).sum(0), g.sum(0))


def through_bytes(f, **options):
    """F exported for three platforms, the number of rows a symbol, and read again."""
    (n,) = jax.export.symbolic_shape("n")
    x, params, state, mask, dy = draw(2)
    batch = [jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype) for a in (x, mask, dy)]
    exported = jax.export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"))(
        batch[0], params, state, *batch[1:]
    )
    return jax.export.deserialize(exported.serialize(**options))


@pytest.mark.parametrize(
    ("train", "derivative"), [(True, "vjp"), (True, "jvp"), (False, "vjp")]
)
def test_export(train, derivative):
    """A whole step, and a forward pass whose gradient is exported along with it."""

    def forward(x, params, state, mask, dy):
        static = {"train": train, "derivative": derivative, "mask": mask}
        y, new = batch_norm(x, params, state, **static)
        return (y * dy).sum(), (y, new)

    grad = functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    step = through_bytes(grad(forward))
    again = through_bytes(forward, vjp_order=1)
    assert step.platforms == ("cpu", "cuda", "tpu")
    for rows in (5, 16):
        args = draw(rows)
        want_y, want = desired(*args, train)
        for f in (step.call, jax.jit(grad(again.call))):
            (dx, dparams), (y, new) = f(*args)
            assert_close(y, want_y, jnp.float32, rows)
            for got, one in zip((dx, *dparams), want, strict=True):
                assert_close(got, one, jnp.float32, rows)
            assert new.num_updates == args[2].num_updates + int(train)
