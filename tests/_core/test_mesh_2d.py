"""A 2-D mesh, data x model: what is sharded over what, and under vmap and scan."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from devices import (
    FEATURES,
    NUM,
    assert_all_close,
    batch_norm,
    check_vma_or_not,
    draw,
    everywhere,
    expected,
    gradients_of_all,
    local_loss,
    mesh,
    old_state,
    states_after,
)
from jax.sharding import PartitionSpec as P

import jaxbn

SHAPE = {"data": 4, "model": 2}
SPECS = [(None, None), ("data", None), (None, "model"), ("data", "model")]
COMBINATIONS = list(itertools.product(SPECS, SPECS))
SYNC = [None, "data", "model", ("model", "data")]  # the latter in no mesh's order
BATCH = (P("data"), P(), P(), P("data"), P("data"), P())


def batches(sync):
    """The devices that share a batch, by their place in the mesh."""
    sync = (sync,) if isinstance(sync, str) else sync or ()
    grid = np.arange(NUM).reshape(*SHAPE.values())
    rest = [i for i, name in enumerate(SHAPE) if name not in sync]
    number = int(np.prod([SHAPE[name] for name in sync]))
    order = rest + [i for i in (0, 1) if i not in rest]
    return np.transpose(grid, order).reshape(-1, number)


def lead(spec):
    """An array's leading axes, one per axis of the mesh: of size 1 where replicated."""
    return tuple(n if s else 1 for s, n in zip(spec, SHAPE.values(), strict=True))


def on_mesh(array):
    """One copy for each device, in a row."""
    full = np.broadcast_to(array, (*SHAPE.values(), *array.shape[2:]))
    return full.reshape(NUM, *array.shape[2:])


def summed(array, spec):
    """The gradient of what was copied: the sum over its copies."""
    array = array.reshape(*SHAPE.values(), *array.shape[1:])
    axes = tuple(i for i, s in enumerate(spec) if s is None)
    return array.sum(axes, keepdims=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("sync", "derivative"),
    [*((sync, "vjp") for sync in SYNC), *((sync, "jvp") for sync in SYNC[1:])],
    ids=str,
)
@check_vma_or_not
def test_every_combination_of_specs(sync, check_vma, derivative):
    """All specs of x, with its mask, and of the parameters: 16 maps in one program."""

    def body(x, scale, bias, mask, dy, c):
        mask = None if mask is None else mask[0, 0]
        params = jaxbn.Params(scale[0, 0], bias[0, 0])
        static = {"axis_name": sync, "derivative": derivative}
        loss = local_loss(x[0, 0], params, old_state(), mask, dy[0, 0], c, **static)
        return jax.tree.map(lambda a: a[None, None], loss)

    def gradients(spec_x, spec_p, *args):
        of_x, of_params, whole = P(*spec_x), P(*spec_p), P(*SHAPE)
        devices = jax.shard_map(
            body,
            mesh=mesh(**SHAPE),
            in_specs=(of_x, of_params, of_params, of_x, whole, P()),
            out_specs=whole,
            check_vma=check_vma,
        )
        return gradients_of_all(devices, (0, 1, 2))(*args)

    @jax.jit
    def program(drawn):
        return [
            gradients(*specs, *args)
            for specs, args in zip(COMBINATIONS, drawn, strict=True)
        ]

    drawn = []
    for spec_x, spec_p in COMBINATIONS:
        x, scale, bias, mask, dy, c = draw(lead(spec_x), lead(spec_p))
        mask = None if sync == "model" else mask  # this one is compiled without masks
        drawn.append((x, scale, bias, mask, dy.reshape(4, 2, *dy.shape[1:]), c))
    for (spec_x, spec_p), args, (grads, aux) in zip(
        COMBINATIONS, drawn, program(drawn), strict=True
    ):
        full = [None if a is None else on_mesh(a) for a in args[:5]]
        desired = list(expected(*full, batches(sync)))
        desired[3:] = map(summed, desired[3:], (spec_x, spec_p, spec_p))
        aux = [a.reshape(d.shape) for a, d in zip(aux, desired[:3], strict=True)]
        assert_all_close((*aux, *grads), desired, f"(x {spec_x}, params {spec_p})")


def first(f, **static):
    """F of the one row that a device has, for a shard_map over `BATCH`."""

    def body(x, params, state, mask, dy, c):
        loss = f(x[0], params, state, mask[0], dy[0], c, **static)
        return jax.tree.map(lambda a: a[None], loss)

    return body


@check_vma_or_not
def test_models_side_by_side(check_vma):
    """Two models in a vmap that `spmd_axis_name` lays over "model"; rows over data."""
    x, scale, bias, mask, dy, c = draw((2, 4), (2,))
    dy = dy.reshape(x.shape)
    one_model = jax.shard_map(
        first(local_loss, axis_name="data"),
        mesh=mesh(**SHAPE),
        in_specs=BATCH,
        out_specs=P("data"),
        check_vma=check_vma,
    )
    models = jax.vmap(one_model, (0, 0, None, 0, 0, None), spmd_axis_name="model")
    args = x, jaxbn.Params(jnp.array(scale), jnp.array(bias)), old_state(), mask, dy, c
    (dx, dparams), aux = jax.jit(gradients_of_all(models))(*args)
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
    devices = jax.shard_map(
        first(lanes),
        mesh=mesh(data=4),
        in_specs=BATCH,
        out_specs=P("data"),
        check_vma=False,
    )
    args = x, jaxbn.Params(scale, bias), old_state(), mask, dy.reshape(x.shape), c
    (dx, dparams), aux = jax.jit(gradients_of_all(devices))(*args)
    rows = [a.reshape(dy.shape) for a in (x, mask)]
    desired = list(expected(rows[0], *everywhere(scale, bias), rows[1], dy))
    desired[4:] = [d.sum(0) for d in desired[4:]]
    got = [a.reshape(NUM, *a.shape[2:]) for a in (*aux, dx)]
    assert_all_close((*got, *dparams), desired)


@check_vma_or_not
def test_state_is_a_scan_carry_on_a_mesh(check_vma):
    """Its device-varying type must not drift: a state of all stays one of all."""
    x, scale, bias, *_ = draw((5, NUM), ())  # five steps
    params, over = jaxbn.Params(scale, bias), P(None, ("data", "model"))

    def body(x, state):
        def step(state, x):
            args = x, params, state
            return batch_norm(*args, axis_name=("data", "model"))[::-1]

        state, y = jax.lax.scan(step, state, x[:, 0])
        return y[:, None], state

    sharded = jax.shard_map(
        body,
        mesh=mesh(**SHAPE),
        in_specs=(over, P()),
        out_specs=(over, P()),
        check_vma=check_vma,
    )
    y, state = jax.jit(sharded)(x, old_state())
    for got, rows in zip(y, x, strict=True):
        want, *_ = expected(rows, *everywhere(scale, bias), None, 0 * rows)
        assert_close(got, want, jnp.float32, NUM * len(rows[0]))
    rows = x.reshape(5, -1, FEATURES)
    for got, want in zip(state, states_after(rows), strict=True):
        assert_close(got, want, jnp.float32, rows[0].size)
