"""A 2-D mesh, data x model: as in two vmaps, one for each of its axes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from cases import assert_close
from devices import (
    FEATURES,
    NUM,
    batch_norm,
    check_vma_or_not,
    draw,
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


def arguments(spec_x, spec_p):
    """Of `local_loss`, with the axes in front over which they are sharded."""
    lead_x, lead_p = (
        [n for s, n in zip(spec, SHAPE.values(), strict=True) if s]
        for spec in (spec_x, spec_p)
    )
    x, scale, bias, mask, dy, c = draw(lead_x, lead_p)
    params = jaxbn.Params(jnp.array(scale), jnp.array(bias))
    return x, params, old_state(), mask, dy.reshape(4, 2, *dy.shape[1:]), c


def in_two_vmaps(f, spec_x, spec_p, names=tuple(SHAPE)):
    """The model is the inner one."""
    for i in (1, 0):
        x, p = (0 if spec[i] else None for spec in (spec_x, spec_p))
        f = jax.vmap(f, (x, p, None, x, 0, None), axis_name=names[i])
    return f


def on_mesh(f, spec_x, spec_p, check_vma):
    def body(x, params, state, mask, dy, c):
        x, mask, dy = (a.reshape(a.shape[-2:]) for a in (x, mask, dy))
        params = jax.tree.map(lambda a: a.reshape(FEATURES), params)
        return jax.tree.map(lambda a: a[None, None], f(x, params, state, mask, dy, c))

    x, p = (P(*filter(None, spec)) for spec in (spec_x, spec_p))
    return jax.shard_map(
        body,
        mesh=mesh(**SHAPE),
        in_specs=(x, p, P(), x, P(*SHAPE), P()),
        out_specs=P(*SHAPE),
        check_vma=check_vma,
    )


def assert_same(f, g, *args):
    results = (jax.jit(gradients_of_all(h))(*args) for h in (f, g))
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(got.reshape(want.shape), want, jnp.float32, NUM * 6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("specs", [*itertools.product(SPECS, SPECS)], ids=str)
@pytest.mark.parametrize(
    ("sync", "check_vma", "derivative"),
    [
        (None, True, "vjp"),
        ("data", True, "vjp"),
        ("data", False, "jvp"),
        ("model", False, "vjp"),
        (("model", "data"), True, "jvp"),
        (("model", "data"), False, "vjp"),
    ],
    ids=str,
)
def test_specs_of_x_and_of_the_parameters(sync, check_vma, derivative, specs):
    f = functools.partial(local_loss, axis_name=sync, derivative=derivative)
    args = arguments(*specs)
    assert_same(on_mesh(f, *specs, check_vma), in_two_vmaps(f, *specs), *args)


def over_data(f, check_vma, **axes):
    """A shard_map of f, with one row of each argument on each device."""

    def body(x, params, state, mask, dy, c):
        loss = f(x[0], params, state, mask[0], dy[0], c)
        return jax.tree.map(lambda a: a[None], loss)

    rows = P("data")
    return jax.shard_map(
        body,
        mesh=mesh(**axes),
        in_specs=(rows, P(), P(), rows, rows, P()),
        out_specs=rows,
        check_vma=check_vma,
    )


@check_vma_or_not
def test_models_side_by_side(check_vma):
    """Two models in a vmap that `spmd_axis_name` lays over "model"; rows over data."""
    f = functools.partial(local_loss, axis_name="data")
    x, params, state, mask, dy, c = arguments(SPECS[3], SPECS[2])
    x, mask, dy = (a.swapaxes(0, 1) for a in (x, mask, dy))
    axes = (0, 0, None, 0, 0, None)
    models = jax.vmap(over_data(f, check_vma, **SHAPE), axes, spmd_axis_name="model")
    each = jax.vmap(f, (0, None, None, 0, 0, None), axis_name="data")
    assert_same(models, jax.vmap(each, axes), x, params, state, mask, dy, c)


@pytest.mark.parametrize("axis_name", [("data", "lane"), ("lane", "data")], ids=str)
def test_axes_of_shard_map_and_vmap_together(axis_name):
    """One batch over four devices and two lanes of a vmap on each of them.

    Not with check_vma, where JAX has no collective over the axis of a vmap: a plain
    lax.psum(x, "lane") in shard_map is an AssertionError with no message (0.10, 0.12).
    """
    f = functools.partial(local_loss, axis_name=axis_name)
    lanes = jax.vmap(f, (0, None, None, 0, 0, None), axis_name="lane")
    specs = SPECS[3], SPECS[0]
    vmaps = in_two_vmaps(f, *specs, names=("data", "lane"))
    assert_same(over_data(lanes, False, data=4), vmaps, *arguments(*specs))


@check_vma_or_not
def test_state_is_a_scan_carry_on_a_mesh(check_vma):
    """Its device-varying type must not drift: a state of all stays one of all."""
    x, scale, bias, *_ = draw((5, NUM), ())  # five steps
    params, over = jaxbn.Params(scale, bias), P(None, ("data", "model"))

    def steps(x, state, **kwargs):
        def step(state, x):
            return batch_norm(x, params, state, **kwargs)[::-1]

        return jax.lax.scan(step, state, x)

    named = functools.partial(steps, axis_name=("data", "model"))
    sharded = jax.shard_map(
        lambda x, state: named(x[:, 0], state),
        mesh=mesh(**SHAPE),
        in_specs=(over, P()),
        out_specs=(P(), over),
        check_vma=check_vma,
    )
    rows = x.reshape(5, -1, FEATURES)
    state, y = jax.jit(sharded)(x, old_state())
    _, want = jax.jit(steps)(rows, old_state())
    assert_close(y.reshape(rows.shape), want, jnp.float32, rows[0].size)
    for got, want in zip(state, states_after(rows), strict=True):
        assert_close(got, want, jnp.float32, rows[0].size)
