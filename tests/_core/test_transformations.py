"""vmap, loops, remat and donation."""

import functools

import compilations
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assert_close
from devices import (
    EPSILON,
    FEATURES,
    NUM,
    ROWS,
    assert_all_close,
    batch_norm,
    draw,
    everywhere,
    expected,
    gradients_of_all,
    local_loss,
    old_state,
    states_after,
)
from jax.ad_checkpoint import checkpoint_name

import jaxbn

ALONE = [[i] for i in range(NUM)]  # each model has a batch of its own
OPTIONS = {"epsilon": EPSILON}


def stacked_state():
    return jax.tree.map(lambda a: jnp.stack([a] * NUM), old_state())


def jax_params(*arrays):
    return jaxbn.Params(*map(jnp.array, arrays))


# Axes of x, of the parameters with the state, and what is summed over in gradients.
LAYOUTS = {"models": (0, 0), "models on shared data": (None, 0), "data": (0, None)}


@pytest.mark.parametrize(
    ("where", "derivative"),
    [("outside", "vjp"), ("inside", "vjp"), ("outside", "jvp")],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap(layout, where, derivative):
    """Vmap of grad, and grad of vmap: a rule may be batched before it is transposed."""
    x_axis, p_axis = LAYOUTS[layout]
    x, scale, bias, mask, dy, c = draw(
        () if x_axis is None else (NUM,), () if p_axis is None else (NUM,)
    )
    state = old_state() if p_axis is None else stacked_state()
    loss = functools.partial(local_loss, derivative=derivative)
    in_axes = (x_axis, p_axis, p_axis, x_axis, 0, None)
    if where == "inside":
        f = jax.vmap(jax.grad(loss, (0, 1), has_aux=True), in_axes)
    else:
        f = gradients_of_all(jax.vmap(loss, in_axes))
    (dx, dparams), aux = jax.jit(f)(x, jax_params(scale, bias), state, mask, dy, c)

    full = [np.broadcast_to(a, (NUM, *a.shape[-2:])) for a in (x, mask)]
    desired = expected(full[0], *everywhere(scale, bias), full[1], dy, ALONE)
    desired = list(desired)
    if where == "outside":
        for i, axis in ((3, x_axis), (4, p_axis), (5, p_axis)):
            desired[i] = desired[i].sum(0) if axis is None else desired[i]
    assert_all_close((*aux, dx, *dparams), desired)


def test_state_is_a_carry_of_loops():
    """scan, fori_loop and while_loop, this one with a condition on the state."""
    x, scale, bias, *_ = draw((5,), ())
    params, first = jaxbn.Params(scale, bias), old_state()

    @jax.jit
    def loops(x):
        def train(state, x):
            return batch_norm(x, params, state)[::-1]

        def at(state):
            return train(state, x[state.num_updates - first.num_updates])[0]

        last, y = jax.lax.scan(train, first, x)
        until = first.num_updates + 5
        return y, [
            last,
            jax.lax.fori_loop(0, 5, lambda _, state: at(state), first),
            jax.lax.while_loop(lambda state: state.num_updates < until, at, first),
        ]

    y, states = loops(x)
    for rows, got in zip(x, y, strict=True):
        assert_close(got, oracle.forward(rows, scale, bias, **OPTIONS), jnp.float32)
    for state in states:
        for got, want in zip(state, states_after(x), strict=True):
            assert_close(got, want, jnp.float32, 5 * ROWS)


POLICIES = {
    "nothing": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("y"),
}


@pytest.mark.parametrize(
    ("policy", "derivative", "loop"),
    [
        ("nothing", "vjp", jax.lax.scan),
        ("everything", "vjp", jax.lax.scan),
        ("dots", "jvp", jax.lax.scan),
        ("names", "jvp", jax.lax.scan),
        ("nothing", "jvp", None),
        ("names", "vjp", None),
    ],
)
def test_remat_of_stacked_layers(policy, derivative, loop):
    """Three blocks tanh(batch_norm(h @ w)), as a scan or one after the other."""
    x, scale, bias, mask, dy, _ = draw((), (3,))
    w = np.random.default_rng(1).normal(size=(3, FEATURES, FEATURES))
    layers = w.astype(np.float32), scale, bias

    def formula(h, layer):
        w, scale, bias = layer
        z, n = h @ w, mask.sum(0, dtype=np.float32)
        mean = jnp.where(mask, z, 0).sum(0) / n
        var = jnp.where(mask, (z - mean[None]) ** 2, 0).sum(0) / n
        y = (z - mean[None]) * (scale / jnp.sqrt(var + EPSILON))[None] + bias[None]
        return jnp.tanh(jnp.where(mask, y, 0)), None

    @functools.partial(jax.checkpoint, policy=POLICIES[policy])
    def block(h, layer):
        w, *params = layer
        static = {"mask": mask, "derivative": derivative}
        y, _ = batch_norm(h @ w, jaxbn.Params(*params), old_state(), **static)
        return jnp.tanh(checkpoint_name(y, "y")), None

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def gradients(block, loop, x, layers):
        def loss(x, layers):
            if loop:
                y, _ = loop(block, x, layers)
            else:
                y = x
                for layer in zip(*layers, strict=True):
                    y, _ = block(y, layer)
            return (y * dy[0]).sum(), y

        return jax.grad(loss, (0, 1), has_aux=True)(x, layers)

    got, want = (gradients(f, loop, x, layers) for f in (block, formula))
    for a, d in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, d, atol=2e-5 * np.abs(d).max(), rtol=0)


def test_donated_state_is_used_up_and_the_new_one_is_as_it_was():
    """Its buffers become those of the new state: a warning, hence an error, if not."""
    x, scale, bias, *_ = draw((), ())
    params, state = jax_params(scale, bias), jax.tree.map(jnp.copy, old_state())
    train = jax.jit(batch_norm, donate_argnums=2)
    _, new = train(x, params, state)
    assert all(leaf.is_deleted() for leaf in state)
    for got, want in zip(new, states_after([x]), strict=True):
        assert_close(got, want, jnp.float32)
    with compilations.counted() as later:
        train(x, params, new)
    assert not later
