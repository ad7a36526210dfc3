"""Ghost batch norm: a vmap of the kernel, and updates in turn as one weighted sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import check_vma_or_not, mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from kernels import collectives

import jaxbn

PARAMS = jaxbn.Params(jnp.array([1.0, 2.0, 0.5]), jnp.array([0.0, 1.0, -1.0]))
STATE = jaxbn.init(3)[1]
MODES = [{}, {"momentum": None}, {"debias": True, "momentum": 0.6}]
MODES += [{"running_variance": "unbiased"}, {"derivative": "jvp"}]
each_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def draw(rows=24):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3)) * 2 + np.arange(rows)[:, None] / 4
    return np.float32(x)


def ghosts(x, params, mask=None, *, size, **kwargs):
    static = {"train": True, "ghost_batch_size": size, **kwargs}
    return jaxbn.ghost_batch_norm(x, params, STATE, mask=mask, **static)


def in_turn(x, params, mask=None, *, size, **kwargs):
    """One batch_norm per ghost batch, the state handed on: what it must equal."""
    cut = jax.tree.map(lambda a: a.reshape(-1, size, a.shape[-1]), (x, mask))

    def step(state, batch):
        x, mask = batch
        args = x, params, state
        return jaxbn.batch_norm(*args, train=True, mask=mask, **kwargs)[::-1]

    state, y = jax.lax.scan(step, STATE, cut)
    return y.reshape(x.shape), state


def both(*, with_gradients=True, **static):
    """(ghosts, in turn) of (x, mask), compiled; in the loss the state is a constant."""

    def step(f, x, mask):
        weight = jnp.sin(x)

        def loss(x, params):
            y, new = f(x, params, mask, **static)
            return (y * weight).sum() + (new.mean * new.var).sum(), (y, new)

        if with_gradients:
            return jax.grad(loss, (0, 1), has_aux=True)(x, PARAMS)
        return None, f(x, PARAMS, mask, **static)

    return jax.jit(lambda *args: (step(ghosts, *args), step(in_turn, *args)))


def close(got, want, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), got, want
    )


@each_mode
@pytest.mark.parametrize("size", [2, 12, 24])
def test_equals_batch_norm_in_turn(size, mode):
    got, want = both(size=size, **mode)(draw(), None)
    close(got, want)
    assert got[1][1].num_updates == 24 // size


@each_mode
def test_passed_over_groups_leave_the_state_alone(mode):
    f = both(size=4, with_gradients=False, **mode)
    mask = np.arange(24)[:, None] % 5 != 1
    without = mask.copy()
    without[8:12] = False
    close(*f(draw(), without))
    for place in (9, (9, 1)):
        x = draw()
        x[place] = np.nan
        close(*f(x, mask))
    x = draw()
    x[9], x[10] = 1e30, -1e30  # the variance is inf
    close(*f(x, mask))


@check_vma_or_not
def test_devices_keep_their_ghosts_and_merge_their_state(check_vma):
    f = functools.partial(ghosts, params=PARAMS, size=4, axis_name="d")
    sharded = jax.shard_map(
        lambda x: f(x),
        mesh=mesh(d=4),
        in_specs=P("d"),
        out_specs=(P("d"), P()),
        check_vma=check_vma,
    )
    want = jax.jit(functools.partial(in_turn, size=4))(draw(32), PARAMS)
    close(jax.jit(sharded)(draw(32)), want)


def test_collectives_under_plain_jit():
    """Nothing for y and dx, one for the state, one for the parameter gradients."""
    on = mesh(d=8)
    rows, whole = NamedSharding(on, P("d")), NamedSharding(on, P())
    train = functools.partial(ghosts, size=4)

    def gradients(x, params):
        return jax.vjp(lambda *args: train(*args)[0], x, params)[1](x)

    for f, out, number in (
        (lambda *args: train(*args)[0], rows, 0),
        (lambda *args: train(*args)[1], whole, 1),
        (lambda *args: gradients(*args)[0], rows, 0),
        (lambda *args: gradients(*args)[1], whole, 1),
    ):
        lowered = jax.jit(f, out_shardings=out).lower(
            jax.device_put(draw(64), rows), PARAMS
        )
        assert sum(collectives(lowered.compile()).values()) == number


def test_channel_first_and_inference():
    x = jax.random.normal(jax.random.key(0), (8, 3, 5))

    def run(norm, x, train, **kwargs):
        f = functools.partial(norm, train=train, axis=1, **kwargs)
        return jax.jit(f)(x, PARAMS, STATE)

    ghost = functools.partial(run, jaxbn.ghost_batch_norm, x, ghost_batch_size=2)
    close(ghost(train=True)[0][:2], run(jaxbn.batch_norm, x[:2], True)[0])
    close(ghost(train=False), run(jaxbn.batch_norm, x, False))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"size": 5}, r"divide the 24 rows of x; got 5 \(pad"),
        ({"size": 1}, "each ghost batch needs more than .*larger `ghost_batch_size`"),
        ({"size": 4, "axis": 0}, "`axis` must leave axis 0"),
    ],
)
def test_bad_sizes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ghosts(draw(), PARAMS, **kwargs)


@pytest.mark.parametrize("shape", [(0, 3), (8, 0, 3), (8, 0)], ids=str)
def test_nothing_to_count(shape):
    train = functools.partial(jaxbn.ghost_batch_norm, train=True, ghost_batch_size=2)
    y, new = jax.jit(train)(jnp.ones(shape), *jaxbn.init(shape[-1]))
    assert y.shape == shape
    assert new.num_updates == 0
