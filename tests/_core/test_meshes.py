"""Devices that share a batch, on one axis: shard_map, vmap and pmap against the oracle.

The loss is random in y and uses the new state, whose contribution to every gradient
must be zero. Gradients are taken outside of the map (of the sum of all losses) and
inside of it (of one's own), with replicated parameters and with each device's own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import (
    ALL,
    FEATURES,
    GROUPS,
    KINDS,
    NUM,
    assert_all_close,
    draw,
    expected,
    local_loss,
    mesh,
    old_state,
    over_devices,
)
from jax.sharding import PartitionSpec as P

import jaxbn

EMPTY = {"counts differ": [], "one device empty": [3], "all devices empty": ALL[0]}


def program(kind, where, derivative, grouped, params_axis):
    """`local_loss` over devices and its gradients, as one compiled function."""
    loss = functools.partial(
        local_loss,
        axis_name="d",
        axis_index_groups=GROUPS if grouped else None,
        derivative=derivative,
    )
    in_axes = (0, params_axis, None, 0, 0, None)
    if where == "inside":
        grad = jax.grad(loss, (0, 1), has_aux=True)
        return jax.jit(over_devices(kind, grad, in_axes))

    def total(*args):
        losses, aux = over_devices(kind, loss, in_axes)(*args)
        return losses.sum(), aux

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))


def whole(gradient, kind, where):
    """A replicated parameter's gradient: JAX sums inside only if it tracks copies."""
    if where == "outside":
        return gradient
    if kind == "shard_map, check_vma":
        np.testing.assert_array_equal(gradient, np.broadcast_to(gradient[0], (8, 3)))
        return gradient[0]
    return gradient.sum(0)


@pytest.mark.parametrize("grouped", [False, True], ids=["one batch", "two groups"])
@pytest.mark.parametrize("params_axis", [None, 0], ids=["replicated", "varying"])
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize(
    "derivative", ["vjp", pytest.param("jvp", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_whole_batch(kind, derivative, where, params_axis, grouped):
    f = program(kind, where, derivative, grouped, params_axis)
    x, scale, bias, drawn, dy, c = draw(lead_params=() if params_axis is None else (8,))
    params = jaxbn.Params(jnp.array(scale), jnp.array(bias))
    full = [np.broadcast_to(a, (NUM, FEATURES)) for a in (scale, bias)]
    for name, empty in EMPTY.items():
        mask = drawn.copy()
        mask[empty] = mask[5, :, 0] = False
        desired = expected(x, *full, mask, dy, GROUPS if grouped else ALL)
        # Nothing under a mask may matter, in whatever way devices are combined.
        poisoned = np.where(mask, x, np.nan).astype(np.float32)
        (dx, dparams), aux = f(poisoned, params, old_state(), mask, dy, c)
        if params_axis is None:
            dparams = [whole(g, kind, where) for g in dparams]
            desired = *desired[:4], desired[4].sum(0), desired[5].sum(0)
        assert_all_close((*aux, dx, *dparams), desired, f"({name})")


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_mask(kind):
    f = program(kind, "outside", "vjp", grouped=False, params_axis=0)
    x, scale, bias, _, dy, c = draw()
    (dx, dparams), aux = f(x, jaxbn.Params(scale, bias), old_state(), None, dy, c)
    assert_all_close((*aux, dx, *dparams), expected(x, scale, bias, None, dy))


def test_vmap_with_spmd_axis_name():
    """The lanes of the vmap lie on devices, and share one batch."""
    x, scale, bias, mask, dy, c = draw(lead_params=())

    def loss(x, *args):
        # It is such a constraint that `spmd_axis_name` changes: lanes stay on "d".
        x = jax.lax.with_sharding_constraint(x, P(None, None))
        return local_loss(x, *args, axis_name="lane")

    lanes = jax.vmap(
        jax.grad(loss, (0, 1), has_aux=True),
        (0, None, None, 0, 0, None),
        axis_name="lane",
        spmd_axis_name="d",
    )
    with jax.set_mesh(mesh(d=NUM)):
        x = jax.device_put(x, P("d"))
        params = jaxbn.Params(scale, bias)
        (dx, dparams), aux = jax.jit(lanes)(x, params, old_state(), mask, dy, c)
    assert dx.sharding.shard_shape(dx.shape)[0] == 1
    full = [np.broadcast_to(a, (NUM, FEATURES)) for a in (scale, bias)]
    desired = expected(x, *full, mask, dy)
    assert_all_close((*aux, dx, *dparams), desired)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_statistics_per_shard_on_purpose(kind):
    """The recipe: shard_map without `axis_name`, and a state for every shard."""
    f = jax.grad(local_loss, (0, 1), has_aux=True)
    f = jax.jit(over_devices(kind, f, (0, 0, None, 0, 0, None)))
    x, scale, bias, mask, dy, c = draw()
    mask[3] = False
    (dx, dparams), aux = f(x, jaxbn.Params(scale, bias), old_state(), mask, dy, c)
    desired = expected(x, scale, bias, mask, dy, [[i] for i in range(NUM)])
    assert_all_close((*aux, dx, *dparams), desired)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_names_are_refused_before_jax_sees_them(kind):
    x = jnp.ones((NUM, 2, 3))

    def moments(name):
        f = functools.partial(jaxbn.batch_moments, axis_name=name)
        return jax.jit(over_devices(kind, f, (0,)))(x)

    for name in (("d", "d"), ["d", "e", "d"]):  # JAX 0.12 would abort the process
        with pytest.raises(ValueError, match="`axis_name` must name each axis once"):
            moments(name)
    for name in ("e", ("d", "e")):
        with pytest.raises(ValueError, match="`axis_name` 'e' is not bound here"):
            moments(name)
