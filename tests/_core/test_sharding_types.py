"""Shardings that JAX makes part of a type: explicit meshes, and shard_map's check_vma.

Each test here failed once, where `flax.linen.BatchNorm` passed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assert_close
from devices import mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn.linen import BatchNorm

ROWS, FEATURES = 64, 4
EXPLICIT = AxisType.Explicit


def draw(*lead):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, *lead, ROWS, FEATURES)).astype(np.float32)
    x += np.linspace(-5, 5, ROWS, dtype=np.float32)[:, None]
    scale, bias = rng.uniform(0.5, 2, (2, FEATURES)).astype(np.float32)
    return x, dy, jaxbn.Params(scale, bias), jaxbn.init(FEATURES)[1]


def put(devices, tree, spec):
    """`tree` on the mesh, its scalars on every device."""
    return jax.tree.map(
        lambda a: jax.device_put(
            a, NamedSharding(devices, spec if np.ndim(a) else P())
        ),
        tree,
    )


def with_gradients(norm, x, params, dy):
    """y, the state, and the gradients of sum(y dy) for x and the parameters."""

    def loss(x, params):
        y, state = norm(x, params)
        return (y * dy).sum(), (y, state)

    gradients, (y, state) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
    return y, state, gradients


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


# 32 rows are two shards: JAX cuts no ghost batch, so that the rows are gathered.
@pytest.mark.parametrize("size", [4, 8, 32])
@pytest.mark.parametrize("spec", [P("d"), P("d", "m")], ids=str)
def test_ghosts_of_rows_on_an_explicit_mesh(size, spec):
    x, dy, params, state = draw()
    mask = np.arange(ROWS)[:, None] % 7 > 0

    def f(x, params, state, mask, dy):
        norm = functools.partial(
            jaxbn.ghost_batch_norm, state=state, train=True, ghost_batch_size=size
        )
        return with_gradients(functools.partial(norm, mask=mask), x, params, dy)

    want = jax.jit(f)(x, params, state, mask, dy)
    devices = mesh(d=4, m=2, kind=EXPLICIT)
    of_features = P(*spec[1:])
    with jax.set_mesh(devices):
        got = jax.jit(f)(
            put(devices, x, spec),
            put(devices, params, of_features),
            put(devices, state, of_features),
            put(devices, mask, P("d")),
            put(devices, dy, spec),
        )
    assert_same(got, want)
    assert jax.typeof(got[0]).sharding.spec == P(*spec, *[None] * (2 - len(spec)))


def test_ghosts_of_a_linen_module_on_an_explicit_mesh():
    x, *_ = draw()
    norm = BatchNorm(use_running_average=False, ghost_batch_size=4)
    variables = norm.init(jax.random.key(0), x)
    apply = jax.jit(functools.partial(norm.apply, mutable=["batch_stats"]))
    devices = mesh(d=8, kind=EXPLICIT)
    got = apply(variables, put(devices, x, P("d")))
    assert_same(got, apply(variables, x))


def test_merged_moments_of_sharded_features():
    x, *_ = draw()
    devices = mesh(d=4, m=2, kind=EXPLICIT)

    @jax.jit
    def merged(a, b):
        return jaxbn.merge_moments(jaxbn.batch_moments(a), jaxbn.batch_moments(b))

    got = merged(put(devices, x[:48], P("d", "m")), put(devices, x[48:], P("d", "m")))
    for value, desired in zip(got, oracle.moments(x), strict=True):
        assert_close(value, np.broadcast_to(desired, (FEATURES,)), jnp.float32, ROWS)


def test_a_named_axis_beside_an_explicit_one():
    x, dy, params, state = draw()
    devices = mesh(d=4, m=2, kind=EXPLICIT)

    @jax.shard_map(
        in_specs=(P("d"), P()), out_specs=(P("d"), P()), axis_names={"d"}, mesh=devices
    )
    def named(x, params):
        return jaxbn.batch_norm(x, params, state, train=True, axis_name="d")

    def whole(x, params):
        return jaxbn.batch_norm(x, params, state, train=True)

    want = jax.jit(functools.partial(with_gradients, whole))(x, params, dy)
    with jax.set_mesh(devices):
        got = jax.jit(functools.partial(with_gradients, named))(
            put(devices, x, P("d", "m")),
            put(devices, params, P("m")),
            put(devices, dy, P("d", "m")),
        )
    assert_same(got, want)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_vmap_of_a_shard_map_over_another_axis(masked):
    x, _, params, state = draw(2)
    mask = np.arange(ROWS)[:, None] % 7 > 0 if masked else np.ones((ROWS, 1), bool)
    devices = mesh(d=4, m=2)

    @jax.shard_map(
        mesh=devices,
        in_specs=(P("d"), P("d"), P(), P()),
        out_specs=(P("d"), P()),
        check_vma=True,
    )
    def named(x, mask, params, state):
        mask = mask if masked else None
        return jaxbn.batch_norm(x, params, state, train=True, axis_name="d", mask=mask)

    f = jax.vmap(named, in_axes=(0, None, None, None), spmd_axis_name="m")
    y, new = jax.jit(f)(put(devices, x, P("m", "d")), mask, params, state)
    for i in range(2):
        assert_close(y[i], oracle.forward(x[i], *params, mask=mask), jnp.float32, ROWS)
    assert new.num_updates.tolist() == [1, 1]


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"debias": True}], ids=str)
@pytest.mark.parametrize("spoiled", [0, 1, FEATURES], ids="{} spoiled".format)
def test_one_count_for_shards_of_features(options, spoiled):
    """As under plain jit, where any feature counts, or all features have to."""
    x, _, params, state = draw()
    x[0, :spoiled] = np.nan
    devices = mesh(d=4, m=2)
    of_state = jaxbn.State(P("m"), P("m"), P())

    def whole(x, params, state, axis_name=None):
        return jaxbn.batch_norm(
            x, params, state, train=True, axis_name=axis_name, **options
        )

    sharded = jax.shard_map(
        functools.partial(whole, axis_name="d"),
        mesh=devices,
        in_specs=(P("d", "m"), P("m"), of_state),
        out_specs=(P("d", "m"), of_state),
    )
    args = x, params, state
    assert_same(jax.jit(sharded)(*args), jax.jit(whole)(*args))


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="JAX mixes up the meshes by itself"
)
def test_vmap_over_an_explicit_axis_of_an_unmapped_cotangent():
    """The cotangent was made outside the mesh, and nobody tells it of the mesh."""
    x, dy, params, state = draw(2)
    dy = jnp.asarray(dy[0])
    devices = mesh(m=2, kind=EXPLICIT)

    def dx(x):
        f = functools.partial(jaxbn.batch_norm, params=params, state=state, train=True)
        return jax.vjp(lambda x: f(x)[0], x)[1](dy)[0]

    want = [jax.jit(dx)(row) for row in x]
    with jax.set_mesh(devices):
        got = jax.jit(jax.vmap(dx))(put(devices, x, P("m")))
    assert_same(got, jnp.stack(want))
