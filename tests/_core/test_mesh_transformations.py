"""shard_map under other transformations: vmap over it, vmap in it, scan in it."""

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
    MOMENTUM,
    NUM,
    ROWS,
    assert_all_close,
    batch_norm,
    check_vma_or_not,
    draw,
    expected,
    local_loss,
    mesh,
    old_state,
)
from jax.sharding import PartitionSpec as P

import jaxbn

SHAPE = {"data": 4, "model": 2}


@check_vma_or_not
def test_models_side_by_side(check_vma):
    """Two models in a vmap that `spmd_axis_name` lays over "model"; rows over data."""
    x, scale, bias, mask, dy, c = draw((2, 4), (2,))
    dy = dy.reshape(x.shape)

    def body(x, params, state, mask, dy, c):
        static = {"axis_name": "data"}
        loss = local_loss(x[0], params, state, mask[0], dy[0], c, **static)
        return jax.tree.map(lambda a: a[None], loss)

    one_model = jax.shard_map(
        body,
        mesh=mesh(**SHAPE),
        in_specs=(P("data"), P(), P(), P("data"), P("data"), P()),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    models = jax.vmap(one_model, (0, 0, None, 0, 0, None), spmd_axis_name="model")

    @jax.jit
    def gradients(x, params):
        def total(x, params):
            losses, aux = models(x, params, old_state(), mask, dy, c)
            return losses.sum(), aux

        return jax.grad(total, (0, 1), has_aux=True)(x, params)

    (dx, dparams), aux = gradients(x, jaxbn.Params(scale, bias))
    for i in range(2):
        full = [np.broadcast_to(a[i], (4, FEATURES)) for a in (scale, bias)]
        desired = list(expected(x[i], *full, mask[i], dy[i], [list(range(4))]))
        desired[4:] = [d.sum(0) for d in desired[4:]]
        got = (*aux, dx, *dparams)
        assert_all_close([a[i] for a in got], desired, f"(model {i})")


@pytest.mark.parametrize("axis_name", [("data", "lane"), ("lane", "data")], ids=str)
def test_axes_of_shard_map_and_vmap_together(axis_name):
    """One batch over four devices and two lanes of a vmap on each of them.

    Not with check_vma, where JAX has no collective over the axis of a vmap: a plain
    lax.psum(x, "lane") in shard_map is an AssertionError with no message (0.10, 0.12).
    """
    x, scale, bias, mask, dy, c = draw((4, 2), ())
    lanes = jax.vmap(
        functools.partial(local_loss, axis_name=axis_name),
        (0, None, None, 0, 0, None),
        axis_name="lane",
    )

    def body(x, params, state, mask, dy, c):
        loss = lanes(x[0], params, state, mask[0], dy[0], c)
        return jax.tree.map(lambda a: a[None], loss)

    devices = jax.shard_map(
        body,
        mesh=mesh(data=4),
        in_specs=(P("data"), P(), P(), P("data"), P("data"), P()),
        out_specs=P("data"),
        check_vma=False,
    )

    @jax.jit
    def gradients(x, params):
        def total(x, params):
            args = mask, dy.reshape(x.shape), c
            losses, aux = devices(x, params, old_state(), *args)
            return losses.sum(), aux

        return jax.grad(total, (0, 1), has_aux=True)(x, params)

    (dx, dparams), aux = gradients(x, jaxbn.Params(scale, bias))
    full = [np.broadcast_to(a, (NUM, FEATURES)) for a in (scale, bias)]
    masks = mask.reshape(dy.shape)
    desired = list(expected(x.reshape(dy.shape), *full, masks, dy))
    desired[4:] = [d.sum(0) for d in desired[4:]]
    got = [a.reshape(NUM, *a.shape[2:]) for a in (*aux, dx)]
    assert_all_close((*got, *dparams), desired)


@check_vma_or_not
def test_state_is_a_scan_carry_on_a_mesh(check_vma):
    """Its device-varying type must not drift: a state of all stays one of all."""
    x, scale, bias, *_ = draw((5, NUM), ())  # five steps
    params = jaxbn.Params(scale, bias)

    def body(x, state):
        def step(state, x):
            y, state = batch_norm(x, params, state, axis_name=("data", "model"))
            return state, y

        state, y = jax.lax.scan(step, state, x[:, 0])
        return y[:, None], state

    y, state = jax.jit(
        jax.shard_map(
            body,
            mesh=mesh(**SHAPE),
            in_specs=(P(None, ("data", "model")), P()),
            out_specs=(P(None, ("data", "model")), P()),
            check_vma=check_vma,
        )
    )(x, old_state())
    mean, var, num_updates = old_state()
    for step in range(5):
        rows = x[step].reshape(-1, FEATURES)
        want = oracle.forward(rows, scale, bias, epsilon=EPSILON).reshape(x[step].shape)
        assert_close(y[step], want, jnp.float32, NUM * ROWS)
        _, new_mean, new_var = oracle.moments(rows)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * new_mean
        var = MOMENTUM * var + (1 - MOMENTUM) * new_var
    assert_close(state.mean, mean, jnp.float32, NUM * ROWS)
    assert_close(state.var, var, jnp.float32, NUM * ROWS)
    assert state.num_updates == num_updates + 5
