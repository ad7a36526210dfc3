"""Ghost batch norm: a vmap of the kernel, and updates in turn as one weighted sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn

PARAMS = jaxbn.Params(jnp.array([1.0, 2.0, 0.5]), jnp.array([0.0, 1.0, -1.0]))
MODES = [{}, {"momentum": None}, {"debias": True, "momentum": 0.6}]
MODES += [{"running_variance": "unbiased"}, {"derivative": "jvp"}]


def data(rows=24, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)) * 2 + np.arange(rows)[:, None] / 4
    return jnp.asarray(x, jnp.float32)


def in_turn(x, size, mask=None, **kwargs):
    """One batch_norm per ghost batch, the state handed on: what it must equal."""
    state, ys = jaxbn.init(3)[1], []
    for i in range(0, len(x), size):
        part = None if mask is None else mask[i : i + size]
        y, state = jaxbn.batch_norm(
            x[i : i + size], PARAMS, state, train=True, mask=part, **kwargs
        )
        ys.append(y)
    return jnp.concatenate(ys), state


def close(got, want, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), got, want
    )


@pytest.mark.parametrize("kwargs", MODES, ids=str)
@pytest.mark.parametrize("size", [2, 4, 12])
def test_equals_batch_norm_in_turn(size, kwargs):
    got = jax.jit(
        functools.partial(
            jaxbn.ghost_batch_norm, train=True, ghost_batch_size=size, **kwargs
        )
    )(data(), PARAMS, jaxbn.init(3)[1])
    close(got, in_turn(data(), size, **kwargs))
    assert got[1].num_updates == 24 // size


@pytest.mark.parametrize("kwargs", MODES, ids=str)
def test_one_group_is_batch_norm(kwargs):
    state = jaxbn.init(3)[1]
    step = {"train": True} | kwargs
    got = jax.jit(
        functools.partial(jaxbn.ghost_batch_norm, ghost_batch_size=24, **step)
    )(data(), PARAMS, state)
    want = jax.jit(functools.partial(jaxbn.batch_norm, **step))(data(), PARAMS, state)
    close(got, want, rtol=1e-6)


@pytest.mark.parametrize("kwargs", MODES, ids=str)
@pytest.mark.parametrize("poison", ["empty group", "nan", "one feature nan", "var inf"])
def test_passed_over_groups_leave_the_state_alone(poison, kwargs):
    x, mask = data(), np.ones((24, 1), bool)
    mask[1::5] = False
    if poison == "empty group":
        mask[8:12] = False
    elif poison == "var inf":
        x = x.at[9:11].set(jnp.array([[1e30], [-1e30]]))
    else:
        x = x.at[9, slice(None) if poison == "nan" else 1].set(jnp.nan)
    got = jaxbn.ghost_batch_norm(
        x, PARAMS, jaxbn.init(3)[1], train=True, ghost_batch_size=4, mask=mask, **kwargs
    )
    close(got, in_turn(x, 4, mask, **kwargs))


def test_gradients_are_those_in_turn():
    weight = jax.random.normal(jax.random.key(1), (24, 3))

    def loss(normalize, x, params):
        y, new = normalize(x, params)
        return (y * weight).sum() + (new.mean * new.var).sum()

    def ghost(x, params):
        return jaxbn.ghost_batch_norm(
            x, params, jaxbn.init(3)[1], train=True, ghost_batch_size=4
        )

    def slow(x, params):
        parts = [
            jaxbn.batch_norm(x[i : i + 4], params, jaxbn.init(3)[1], train=True)
            for i in range(0, 24, 4)
        ]
        return jnp.concatenate([y for y, _ in parts]), parts[0][1]

    grad = jax.grad(loss, (1, 2))
    close(grad(ghost, data(), PARAMS), grad(slow, data(), PARAMS))


def test_devices_keep_their_ghosts_and_merge_their_state():
    x, state = data(32), jaxbn.init(3)[1]
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    for check_vma in (True, False):
        y, new = jax.jit(
            jax.shard_map(
                lambda x: jaxbn.ghost_batch_norm(
                    x, PARAMS, state, train=True, ghost_batch_size=4, axis_name="d"
                ),
                mesh=mesh,
                in_specs=P("d"),
                out_specs=(P("d"), P()),
                check_vma=check_vma,
            )
        )(x)
        close((y, new), in_turn(x, 4))


def test_collectives_under_plain_jit():
    """Nothing for y and dx, one for the state, one for the parameter gradients."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("d"))
    x = jax.device_put(data(64), rows)
    state = jaxbn.init(3)[1]

    def train(x, params):
        return jaxbn.ghost_batch_norm(x, params, state, train=True, ghost_batch_size=4)

    def gradients(x, params, dy):
        _, vjp = jax.vjp(lambda x, params: train(x, params)[0], x, params)
        return vjp(dy)

    whole = NamedSharding(mesh, P())
    layouts = {
        "y": (lambda x, p: train(x, p)[0], rows, 0),
        "state": (lambda x, p: train(x, p)[1], whole, 1),
        "dx": (lambda x, p: gradients(x, p, x)[0], rows, 0),
        "dparams": (lambda x, p: gradients(x, p, x)[1], whole, 1),
    }
    counts = {}
    for name, (fn, out, _) in layouts.items():
        text = jax.jit(fn, out_shardings=out).lower(x, PARAMS).compile().as_text()
        kinds = ("all-reduce(", "all-gather(", "collective-permute(", "all-to-all(")
        counts[name] = sum(text.count(f" {kind}") for kind in kinds)
    assert counts == {name: count for name, (_, _, count) in layouts.items()}


def test_channel_first_and_inference():
    x = jax.random.normal(jax.random.key(0), (8, 3, 5))
    state = jaxbn.init(3)[1]
    static = {"ghost_batch_size": 2, "axis": 1}
    y, _ = jaxbn.ghost_batch_norm(x, PARAMS, state, train=True, **static)
    want, _ = jaxbn.batch_norm(x[:2], PARAMS, state, train=True, axis=1)
    close(y[:2], want)
    y, after = jaxbn.ghost_batch_norm(x, PARAMS, state, train=False, **static)
    close(y, jaxbn.batch_norm(x, PARAMS, state, train=False, axis=1)[0])
    assert after.num_updates == 0


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"ghost_batch_size": 5}, ValueError, r"divide the 24 rows of x; got 5 \(pad"),
        ({"ghost_batch_size": 0}, ValueError, "must divide the 24 rows of x; got 0"),
        ({"ghost_batch_size": 2.0}, TypeError, "`ghost_batch_size` must be an int"),
        (
            {"ghost_batch_size": 1},
            ValueError,
            "each ghost batch needs more than one .*larger `ghost_batch_size`",
        ),
        ({"ghost_batch_size": 4, "axis": 0}, ValueError, "`axis` must leave axis 0"),
    ],
)  # fmt: skip
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        jaxbn.ghost_batch_norm(data(), PARAMS, jaxbn.init(3)[1], train=True, **kwargs)


@pytest.mark.parametrize("shape", [(0, 3), (8, 0, 3), (8, 0)], ids=str)
def test_nothing_to_count(shape):
    params, state = jaxbn.init(shape[-1])
    y, new = jaxbn.ghost_batch_norm(
        jnp.ones(shape), params, state, train=True, ghost_batch_size=2
    )
    assert y.shape == shape
    assert new.num_updates == 0
