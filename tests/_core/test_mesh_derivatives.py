"""Second derivatives and forward mode over devices, in float64.

What they are held against is the slope of the oracle along a direction: of its gradient
for second derivatives, of its y for forward mode.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import (
    ALL,
    GROUPS,
    KINDS,
    NUM,
    batch_norm,
    draw,
    expected,
    local_loss,
    old_state,
    over_devices,
)

import jaxbn

IN_AXES = (0, None, None, 0, 0, None)


def wide(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)


def problem():
    """Float64 (x, scale, bias), a direction of theirs, mask, dy and c."""
    x, scale, bias, mask, dy, c = draw(lead_params=())
    mask[3] = False
    at = tuple(np.float64(a) for a in (x, scale, bias))
    rng = np.random.default_rng(1)
    along = tuple(rng.normal(size=a.shape) for a in at)
    return at, along, mask, np.float64(dy), np.float64(c)


def slope(f, at, along, h=1e-5):
    """The derivative of f at `at`, along a direction; its error is of size h**2."""
    ends = [
        f(*(a + sign * h * v for a, v in zip(at, along, strict=True)))
        for sign in (1, -1)
    ]
    return [(after - before) / (2 * h) for after, before in zip(*ends, strict=True)]


def whole_batch(x, scale, bias, mask, dy, batches):
    """(y, dx, dscale, dbias) of the oracle."""
    full = [np.broadcast_to(a, (NUM, *a.shape)) for a in (scale, bias)]
    y, _, _, dx, dscale, dbias = expected(x, *full, mask, dy, batches)
    return y, dx, dscale.sum(0), dbias.sum(0)


def assert_slopes(got, want):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-6 * max(1, np.abs(w).max()))


@pytest.mark.parametrize("grouped", [False, True], ids=["one batch", "two groups"])
@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_gradient(kind, derivative, grouped):
    at, along, mask, dy, c = problem()
    groups = GROUPS if grouped else None

    def loss(*args):
        static = {"axis_name": "d", "axis_index_groups": groups}
        return local_loss(*args, derivative=derivative, **static)[0]

    with jax.enable_x64(True):
        state = wide(old_state()._replace(num_updates=None))._replace(num_updates=0)

        def total(x, scale, bias):
            params = jaxbn.Params(scale, bias)
            losses = over_devices(kind, loss, IN_AXES)(x, params, state, mask, dy, c)
            return losses.sum()

        def along_gradient(*at):
            grads = jax.grad(total, (0, 1, 2))(*at)
            return sum(jnp.vdot(g, v) for g, v in zip(grads, along, strict=True))

        got = jax.jit(jax.grad(along_gradient, (0, 1, 2)))(*wide(at))

    def gradients(*at):
        return whole_batch(*at, mask, dy, groups or ALL)[1:]

    assert_slopes(got, slope(gradients, at, along))


@pytest.mark.parametrize("grouped", [False, True], ids=["one batch", "two groups"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind, grouped):
    at, along, mask, dy, _ = problem()
    groups = GROUPS if grouped else None

    def train(x, scale, bias, mask):
        static = {"axis_name": "d", "axis_index_groups": groups, "derivative": "jvp"}
        params = jaxbn.Params(scale, bias)
        return batch_norm(x, params, old_state(), mask=mask, **static)[0]

    with jax.enable_x64(True):
        devices = over_devices(kind, train, (0, None, None, 0))

        def tangent(*at):
            return jax.jvp(lambda *a: devices(*a, mask), at, wide(along))[1]

        got = jax.jit(tangent)(*wide(at))

    def y(*at):
        return whole_batch(*at, mask, dy, groups or ALL)[:1]

    assert_slopes([got], slope(y, at, along))
