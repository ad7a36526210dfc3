"""Programs made before there are values: eval_shape, lower and jax.export."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assert_close
from devices import (
    EPSILON,
    FEATURES,
    ROWS,
    batch_norm,
    draw,
    old_state,
)

import jaxbn

OPTIONS = {"epsilon": EPSILON}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_shapes_and_compilation_ahead_of_time(dtype, train):
    """eval_shape and lower need shapes only, and the compiled program takes values."""
    x, scale, bias, mask, *_ = draw((), ())
    args = jnp.array(x, dtype), jaxbn.Params(jnp.array(scale), jnp.array(bias))
    args = *args, old_state(), mask
    f = jax.jit(lambda x, p, s, mask: batch_norm(x, p, s, mask=mask, train=train))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    y, state = jax.eval_shape(f, *shapes)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert state == shapes[2]
    y, state = f.lower(*shapes).compile()(*args)
    wide = np.float64(args[0])
    mean, var = old_state()[:2] if not train else oracle.moments(wide, mask=mask)[1:]
    want = oracle.normalize(wide, mean, var, scale, bias, mask=mask, **OPTIONS)
    assert_close(y, want, dtype, ROWS)


def draw_rows(rows):
    """(x, params, state, mask, dy) of a batch of any size."""
    rng = np.random.default_rng(rows)
    x, dy = rng.normal(size=(2, rows, FEATURES)).astype(np.float32)
    scale, bias = rng.uniform(0.5, 2, (2, FEATURES)).astype(np.float32)
    mask = np.arange(rows)[:, None] % 4 < 3
    return x, jaxbn.Params(jnp.array(scale), jnp.array(bias)), old_state(), mask, dy


def through_bytes(f, **options):
    """F exported for three platforms, the number of rows a symbol, and read again."""
    (n,) = jax.export.symbolic_shape("n")
    x, params, state, mask, dy = draw_rows(2)
    batch = [jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype) for a in (x, mask, dy)]
    exported = jax.export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"))(
        batch[0], params, state, *batch[1:]
    )
    return jax.export.deserialize(exported.serialize(**options))


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
@pytest.mark.parametrize("train", [True, False])
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
        x, params, state, mask, dy = args = draw_rows(rows)
        options = OPTIONS | {"mask": mask}
        _, mean, var = oracle.moments(x, mask=mask)
        if train:
            want = oracle.backward(dy, x, params.scale, **options)
        else:
            mean, var = map(np.float64, state[:2])
            x_hat = oracle.normalize(x, mean, var, **options)
            g = np.where(mask, dy, 0)
            dx = g * np.float64(params.scale) / np.sqrt(var + EPSILON)
            want = dx, (g * x_hat).sum(0), g.sum(0)
        for f in (step.call, jax.jit(grad(again.call))):
            (dx, dparams), (y, new) = f(*args)
            y_want = oracle.normalize(x, mean, var, *params, **options)
            assert_close(y, y_want, jnp.float32, rows)
            for got, desired in zip((dx, *dparams), want, strict=True):
                assert_close(got, desired, jnp.float32, rows)
            assert new.num_updates == state.num_updates + int(train)
