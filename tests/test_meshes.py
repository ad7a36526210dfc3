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
    KINDS,
    NUM,
    assert_all_close,
    draw,
    expected,
    jit,
    local_loss,
    old_state,
    over_devices,
)

import jaxbn

GROUPS = [[0, 3, 5, 6], [1, 2, 4, 7]]
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
        return jit(kind, over_devices(kind, grad, in_axes))

    def total(*args):
        losses, aux = over_devices(kind, loss, in_axes)(*args)
        return losses.sum(), aux

    return jit(kind, jax.grad(total, (0, 1), has_aux=True))


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
@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
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
