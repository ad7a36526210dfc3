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
    GROUPS,
    KINDS,
    NUM,
    assert_all_close,
    draw,
    everywhere,
    expected,
    gradients_of_all,
    local_loss,
    old_state,
    over_devices,
)

import jaxbn

EMPTY = {"counts differ": [], "one device empty": [3], "all devices empty": ALL[0]}
IN_AXES = (0, None, None, 0, 0, None)
each_kind = pytest.mark.parametrize("kind", KINDS)
grouped_or_not = pytest.mark.parametrize(
    "groups", [None, GROUPS], ids=["one batch", "two groups"]
)


def program(kind, where, in_axes=IN_AXES, **static):
    """`local_loss` over devices and its gradients, as one compiled function."""
    loss = functools.partial(local_loss, **static)
    if where == "inside":
        grad = jax.grad(loss, (0, 1), has_aux=True)
        return jax.jit(over_devices(kind, grad, in_axes))
    return jax.jit(gradients_of_all(over_devices(kind, loss, in_axes)))


def whole(gradient, kind, where):
    """A replicated parameter's gradient: JAX sums inside only if it tracks copies."""
    if where == "outside":
        return gradient
    if kind == "shard_map, check_vma":
        np.testing.assert_array_equal(gradient, np.broadcast_to(gradient[0], (8, 3)))
        return gradient[0]
    return gradient.sum(0)


@grouped_or_not
@pytest.mark.parametrize(
    ("where", "lead"),
    [("outside", ()), ("inside", ()), ("inside", (NUM,))],
    ids=["outside", "inside", "inside, varying parameters"],
)
@pytest.mark.parametrize(
    "derivative", ["vjp", pytest.param("jvp", marks=pytest.mark.exhaustive)]
)
@each_kind
def test_equals_the_whole_batch(kind, derivative, where, lead, groups):
    in_axes = (0, 0 if lead else None, *IN_AXES[2:])
    static = {"axis_name": "d", "axis_index_groups": groups}
    f = program(kind, where, in_axes, derivative=derivative, **static)
    x, scale, bias, drawn, dy, c = draw(lead_params=lead)
    params = jaxbn.Params(jnp.array(scale), jnp.array(bias))
    for name, empty in EMPTY.items():
        mask = drawn.copy()
        mask[empty] = mask[5, :, 0] = False
        desired = expected(x, *everywhere(scale, bias), mask, dy, groups or ALL)
        # Nothing under a mask may matter, in whatever way devices are combined.
        poisoned = np.where(mask, x, np.nan).astype(np.float32)
        (dx, dparams), aux = f(poisoned, params, old_state(), mask, dy, c)
        if not lead:
            dparams = [whole(g, kind, where) for g in dparams]
            desired = *desired[:4], desired[4].sum(0), desired[5].sum(0)
        assert_all_close((*aux, dx, *dparams), desired, f"({name})")


@pytest.mark.parametrize(
    ("kind", "axis_name"),
    [*((kind, "d") for kind in KINDS), *((kind, None) for kind in KINDS[:2])],
)
def test_without_a_mask_and_with_a_batch_for_each_device(kind, axis_name):
    f = program(kind, "outside", (0, 0, *IN_AXES[2:]), axis_name=axis_name)
    x, scale, bias, _, dy, c = draw()
    (dx, dparams), aux = f(x, jaxbn.Params(scale, bias), old_state(), None, dy, c)
    batches = ALL if axis_name else [[i] for i in range(NUM)]
    desired = expected(x, scale, bias, None, dy, batches)
    assert_all_close((*aux, dx, *dparams), desired)


@each_kind
def test_bad_names_are_refused_before_jax_sees_them(kind):
    def moments(name):
        f = functools.partial(jaxbn.batch_moments, axis_name=name)
        return jax.jit(over_devices(kind, f, (0,)))(jnp.ones((NUM, 2, 3)))

    for name in (("d", "d"), ["d", "e", "d"]):  # JAX 0.12 would abort the process
        with pytest.raises(ValueError, match="`axis_name` must name each axis once"):
            moments(name)
    for name in ("e", ("d", "e")):
        with pytest.raises(ValueError, match="`axis_name` 'e' is not bound here"):
            moments(name)


# Second derivatives and forward mode, in float64, against slopes of the oracle


def along_a_line(f, at, along, h=1e-5):
    """The derivative of f at `at`, along a direction; its error is of size h**2."""
    ends = [
        f(*(a + sign * h * v for a, v in zip(at, along, strict=True)))
        for sign in (1, -1)
    ]
    return [(after - before) / (2 * h) for after, before in zip(*ends, strict=True)]


@pytest.mark.parametrize(
    ("kind", "derivative", "groups"),
    [
        *((kind, "jvp", GROUPS if i % 2 else None) for i, kind in enumerate(KINDS)),
        *((kind, "vjp", None if i % 2 else GROUPS) for i, kind in enumerate(KINDS)),
    ],
)
def test_gradient_of_a_gradient_and_forward_mode(kind, derivative, groups):
    x, scale, bias, mask, dy, c = draw(lead_params=())
    mask[3] = False
    at = tuple(np.float64(a) for a in (x, scale, bias))
    along = tuple(np.random.default_rng(1).normal(size=a.shape) for a in at)
    static = {"axis_name": "d", "axis_index_groups": groups, "derivative": derivative}
    state = [np.float64(a) for a in old_state()[:2]]

    def total(x, scale, bias):
        state64 = jaxbn.State(*map(jnp.asarray, state), num_updates=0)
        f = over_devices(kind, functools.partial(local_loss, **static), IN_AXES)
        params = jaxbn.Params(scale, bias)
        losses, (y, *_) = f(x, params, state64, mask, np.float64(dy), np.float64(c))
        return losses.sum(), y

    def run(along, *at):
        def gradient_along(*at):
            gradients, _ = jax.grad(total, (0, 1, 2), has_aux=True)(*at)
            return sum(jnp.vdot(g, v) for g, v in zip(gradients, along, strict=True))

        second = jax.grad(gradient_along, (0, 1, 2))(*at)
        if derivative == "vjp":
            return second
        return *second, jax.jvp(lambda *at: total(*at)[1], at, along)[1]

    with jax.enable_x64(True):
        got = jax.jit(run)(along, *at)

    def by_oracle(x, scale, bias):
        full = everywhere(scale, bias)
        y, _, _, dx, dscale, dbias = expected(x, *full, mask, dy, groups or ALL)
        return dx, dscale.sum(0), dbias.sum(0), y

    desired = along_a_line(by_oracle, at, along)
    for a, d in zip(got, desired, strict=derivative == "jvp"):
        np.testing.assert_allclose(a, d, atol=1e-6 * max(1, np.abs(d).max()))
