"""Programs made before there are values: eval_shape, lower and jax.export."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assert_close
from devices import EPSILON, FEATURES, batch_norm, old_state

import jaxbn


def draw(rows, dtype=jnp.float32):
    """(x, params, state, mask, dy) of a batch of any size."""
    rng = np.random.default_rng(rows)
    x, dy = rng.normal(size=(2, rows, FEATURES)).astype(np.float32)
    scale, bias = rng.uniform(0.5, 2, (2, FEATURES)).astype(np.float32)
    params = jaxbn.Params(jnp.array(scale), jnp.array(bias))
    mask = np.arange(rows)[:, None] % 4 < 3
    return jnp.array(x, dtype), params, old_state(), mask, dy


def desired(x, params, state, mask, dy, train):
    """(y, (dx, dscale, dbias))."""
    x, options = np.float64(x), {"epsilon": EPSILON, "mask": mask}
    if train:
        y = oracle.forward(x, *params, **options)
        return y, oracle.backward(dy, x, params.scale, **options)
    mean, var = map(np.float64, state[:2])
    x_hat = oracle.normalize(x, mean, var, **options)
    g = np.where(mask, dy, 0)
    dx = g * np.float64(params.scale) / np.sqrt(var + EPSILON)
    y = oracle.normalize(x, mean, var, *params, **options)
    return y, (dx, (g * x_hat).sum(0), g.sum(0))


@pytest.mark.parametrize(("dtype", "train"), [("bfloat16", True), ("float32", False)])
def test_shapes_and_compilation_ahead_of_time(dtype, train):
    """eval_shape and lower need shapes only, and the compiled program takes values."""
    args = draw(6, dtype)
    f = jax.jit(lambda x, p, s, mask: batch_norm(x, p, s, mask=mask, train=train))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args[:4])
    y, state = jax.eval_shape(f, *shapes)
    assert (y.shape, y.dtype) == (args[0].shape, dtype)
    assert state == shapes[2]
    y, state = f.lower(*shapes).compile()(*args[:4])
    assert_close(y, desired(*args, train)[0], dtype, 6)


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
