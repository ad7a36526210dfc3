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
    ALL,
    EPSILON,
    MOMENTUM,
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
from flax import linen as nn

import jaxbn
from jaxbn.linen import BatchNorm

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


def test_nested_vmap():
    """Two models of four batches each: the inner vmap takes the outer's parameters."""
    x, scale, bias, mask, dy, c = draw((2, 4), (2,))
    models = jax.vmap(local_loss, (0, None, None, 0, 0, None))
    models = jax.vmap(models, (0, 0, None, 0, 0, None))
    args = x, jax_params(scale, bias), old_state(), mask, dy.reshape(x.shape), c
    (dx, dparams), aux = jax.jit(gradients_of_all(models))(*args)
    rows = [a.reshape(dy.shape) for a in (x, mask)]
    full = [np.repeat(a, 4, axis=0) for a in (scale, bias)]
    desired = expected(rows[0], *full, rows[1], dy, ALONE)
    desired = [a.reshape(2, 4, *a.shape[1:]) for a in desired]
    desired[4:] = [d.sum(1) for d in desired[4:]]
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


def test_cond():
    """Training and inference as two branches of one program, and their gradient."""
    x, scale, bias, mask, dy, _ = draw((), ())
    options = OPTIONS | {"mask": mask}

    @jax.jit
    def run(training, x):
        def branch(train):
            params = jaxbn.Params(scale, bias)
            return functools.partial(
                jaxbn.batch_norm, x, params, train=train, **options
            )

        return jax.lax.cond(training, branch(True), branch(False), old_state())

    mean, var, _ = map(np.float64, old_state())
    trained = oracle.forward(x, scale, bias, **options)
    inferred = oracle.normalize(x, mean, var, scale, bias, **options)
    slope = np.where(mask, dy[0], 0) * scale / np.sqrt(var + EPSILON)
    for training, want_y, want_dx, updates in (
        (True, trained, oracle.backward(dy[0], x, scale, **options)[0], 5),
        (False, inferred, slope, 4),
    ):
        y, back, new = jax.vjp(functools.partial(run, training), x, has_aux=True)
        assert_close(y, want_y, jnp.float32)
        assert_close(back(dy[0])[0], want_dx, jnp.float32)
        assert new.num_updates == updates


def test_donated_state_is_used_up():
    """Its buffers become those of the new state: a warning, hence an error, if not."""
    x, scale, bias, *_ = draw((), ())
    state = jax.tree.map(jnp.copy, old_state())
    train = jax.jit(batch_norm, donate_argnums=2)
    _, new = train(x, jaxbn.Params(scale, bias), state)
    assert all(leaf.is_deleted() for leaf in state)
    for got, want in zip(new, states_after([x]), strict=True):
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

    params = jax_params(scale, bias)
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
    grads, aux = f(x, *jax_params(scale, bias))
    full = everywhere(scale, bias)
    desired = list(expected(x, *full, mask, dy, ALL if sync else ALONE))
    if sync:
        desired[1:3] = [d[0] for d in desired[1:3]]
        desired[4:] = [d.sum(0) for d in desired[4:]]
    assert_all_close((*aux, *grads), desired)
