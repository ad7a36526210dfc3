"""vmap, loops and branches, donation, and Flax's lifted vmap."""

import functools
import itertools

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
    draw,
    expected,
    local_loss,
    old_state,
)
from flax import linen as nn

import jaxbn
from jaxbn.linen import BatchNorm

ALONE = [[i] for i in range(NUM)]  # each model has a batch of its own
OPTIONS = {"epsilon": EPSILON}


def stacked_state():
    return jax.tree.map(lambda a: jnp.stack([a] * NUM), old_state())


# Axes of x, of the parameters with the state, and what is summed over in gradients.
LAYOUTS = {"models": (0, 0), "models on shared data": (None, 0), "data": (0, None)}


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap(layout, where, derivative):
    """Vmap of grad, and grad of vmap: a rule may be batched before it is transposed."""
    x_axis, p_axis = LAYOUTS[layout]
    x, scale, bias, mask, dy, c = draw(
        () if x_axis is None else (NUM,), () if p_axis is None else (NUM,)
    )
    params = jaxbn.Params(jnp.array(scale), jnp.array(bias))
    state = old_state() if p_axis is None else stacked_state()
    loss = functools.partial(local_loss, derivative=derivative)
    in_axes = (x_axis, p_axis, p_axis, x_axis, 0, None)
    if where == "inside":
        f = jax.vmap(jax.grad(loss, (0, 1), has_aux=True), in_axes)
    else:

        def total(*args):
            losses, aux = jax.vmap(loss, in_axes)(*args)
            return losses.sum(), aux

        f = jax.grad(total, (0, 1), has_aux=True)
    (dx, dparams), aux = jax.jit(f)(x, params, state, mask, dy, c)

    full = [np.broadcast_to(a, (NUM, *a.shape[-2:])) for a in (x, mask)]
    scale, bias = (np.broadcast_to(a, (NUM, FEATURES)) for a in (scale, bias))
    desired = list(expected(full[0], scale, bias, full[1], dy, ALONE))
    if where == "outside":
        for i, axis in ((3, x_axis), (4, p_axis), (5, p_axis)):
            desired[i] = desired[i].sum(0) if axis is None else desired[i]
    assert_all_close((*aux, dx, *dparams), desired)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_nested_vmap(where):
    """Two models of four batches each: the inner vmap takes the outer's parameters."""
    x, scale, bias, mask, dy, c = draw((2, 4), (2,))
    dy = dy.reshape(x.shape)
    batches = (0, None, None, 0, 0, None)
    models = (0, 0, None, 0, 0, None)

    def nested(f):
        return jax.vmap(jax.vmap(f, batches), models)

    if where == "inside":
        f = nested(jax.grad(local_loss, (0, 1), has_aux=True))
    else:

        def total(*args):
            losses, aux = nested(local_loss)(*args)
            return losses.sum(), aux

        f = jax.grad(total, (0, 1), has_aux=True)
    params = jaxbn.Params(jnp.array(scale), jnp.array(bias))
    (dx, dparams), aux = jax.jit(f)(x, params, old_state(), mask, dy, c)
    per_batch = [a.reshape(NUM, *a.shape[2:]) for a in (x, mask, dy)]
    full = [np.repeat(a, 4, axis=0) for a in (scale, bias)]
    desired = expected(per_batch[0], *full, *per_batch[1:], ALONE)
    desired = [a.reshape(2, 4, *a.shape[1:]) for a in desired]
    if where == "outside":
        desired[4:] = [d.sum(1) for d in desired[4:]]
    assert_all_close((*aux, dx, *dparams), desired)


def states_after(batches):
    """Mean and variance of `old_state` after training on batches, one by one."""
    mean, var, _ = map(np.float64, old_state())
    for rows in batches:
        _, new_mean, new_var = oracle.moments(rows)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * new_mean
        var = MOMENTUM * var + (1 - MOMENTUM) * new_var
    return mean, var


def test_state_is_a_carry_of_loops():
    """scan, fori_loop and while_loop, this one with a condition on the state."""
    x, scale, bias, *_ = draw((5,), ())
    params, first = jaxbn.Params(scale, bias), old_state()

    def train(x, state):
        return batch_norm(x, params, state)

    @jax.jit
    def loops(x):
        def at(state):
            return train(x[state.num_updates - first.num_updates], state)[1]

        last, y = jax.lax.scan(lambda state, x: train(x, state)[::-1], first, x)
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
        for got, want in zip(state, states_after(x), strict=False):
            assert_close(got, want, jnp.float32, 5 * ROWS)
        assert state.num_updates == first.num_updates + 5


@pytest.mark.parametrize("training", [True, False])
def test_cond(training):
    """Training and inference as two branches of one program, and their gradient."""
    x, scale, bias, mask, dy, _ = draw((), ())

    @jax.jit
    def run(training, x):
        def y_and_state(train):
            params = jaxbn.Params(scale, bias)
            return functools.partial(
                jaxbn.batch_norm, x, params, train=train, mask=mask, **OPTIONS
            )

        return jax.lax.cond(
            training, y_and_state(True), y_and_state(False), old_state()
        )

    y, back, new = jax.vjp(functools.partial(run, training), x, has_aux=True)
    (dx,) = back(dy[0])
    options = OPTIONS | {"mask": mask}
    if training:
        assert_close(y, oracle.forward(x, scale, bias, **options), jnp.float32)
        assert_close(dx, oracle.backward(dy[0], x, scale, **options)[0], jnp.float32)
        assert new.num_updates == 5
    else:
        mean, var, _ = map(np.float64, old_state())
        want = oracle.normalize(x, mean, var, scale, bias, **options)
        assert_close(y, want, jnp.float32)
        want = np.where(mask, dy[0], 0) * scale / np.sqrt(var + EPSILON)
        assert_close(dx, want, jnp.float32)
        assert new.num_updates == 4


def test_donated_state_is_used_up():
    """Its buffers become those of the new state: a warning, hence an error, if not."""
    x, scale, bias, *_ = draw((), ())
    state = jax.tree.map(jnp.copy, old_state())
    train = jax.jit(batch_norm, donate_argnums=2)
    _, new = train(x, jaxbn.Params(scale, bias), state)
    assert all(leaf.is_deleted() for leaf in state)
    for got, want in zip(new, states_after([x]), strict=False):
        assert_close(got, want, jnp.float32)


def test_no_tracer_leaks_and_no_retracing():
    x, scale, bias, *_ = draw((NUM,), ())
    traces = itertools.count()

    @jax.jit
    def step(x, params, state):
        next(traces)

        def loss(x, params):
            y, new = jax.vmap(batch_norm, (0, None, None))(x, params, state)
            return (y**3).sum(), new

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    params = jaxbn.Params(jnp.array(scale), jnp.array(bias))
    with jax.checking_leaks():
        _, new = step(x, params, old_state())
        # The new state is as the old one: a second step compiles nothing.
        step(x, params, jax.tree.map(lambda a: a[0], new))
    assert next(traces) == 1


class Norm(nn.Module):
    """As a layer of a model, with the mask where lifted transformations take it."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, mask):
        static = {"momentum": MOMENTUM, "epsilon": EPSILON}
        norm = BatchNorm(False, axis_name=self.axis_name, name="norm", **static)
        return norm(x, mask=mask)


@pytest.mark.parametrize("sync", [False, True], ids=["models", "one batch"])
def test_linen_vmap(sync):
    """nn.vmap over models, and over shards that share variables and statistics."""
    x, scale, bias, mask, dy, _ = draw(lead_params=() if sync else (NUM,))
    shared = None if sync else 0
    lifted = nn.vmap(
        Norm,
        variable_axes={"params": shared, "batch_stats": shared},
        split_rngs={"params": not sync},
        axis_name="d",
    )
    model = lifted("d" if sync else None)
    mean, var, _ = old_state() if sync else stacked_state()

    def loss(x, scale, bias):
        variables = {
            "params": {"norm": {"scale": scale, "bias": bias}},
            "batch_stats": {"norm": {"mean": mean, "var": var}},
        }
        y, updated = model.apply(variables, x, mask, mutable=["batch_stats"])
        new = updated["batch_stats"]["norm"]
        total = (y * dy).sum() + new["mean"].sum() + new["var"].sum()
        return total, (y, new["mean"], new["var"])

    f = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    grads, aux = f(x, jnp.array(scale), jnp.array(bias))
    full = [np.broadcast_to(a, (NUM, FEATURES)) for a in (scale, bias)]
    desired = list(expected(x, *full, mask, dy, *([] if sync else [ALONE])))
    if sync:
        desired[1:3] = [d[0] for d in desired[1:3]]
        desired[4:] = [d.sum(0) for d in desired[4:]]
    assert_all_close((*aux, *grads), desired)
