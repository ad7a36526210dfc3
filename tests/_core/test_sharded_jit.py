"""Plain jit over sharded arrays: nothing is named, and the batch is still the whole.

Where JAX makes shardings part of a type, on explicit meshes and under shard_map's
check_vma, each test failed once where `flax.linen.BatchNorm` passed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assert_close
from devices import EPSILON, batch_norm, mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn.linen import BatchNorm

ROWS, FEATURES = 64, 4
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
STATE = jaxbn.init(FEATURES)[1]
NORM = functools.partial(jaxbn.batch_norm, train=True)
BOTH = P("data", "model")
MASK = np.arange(ROWS)[:, None] % 7 > 0
LAYOUTS = {  # of x, and of what has one entry per feature
    "batch": (P("data", None), P()),
    "batch over both": (P(("data", "model"), None), P()),
    "features": (P(None, "model"), P("model")),
    "batch and features": (BOTH, P("model")),
    "batch and features, replicated params": (BOTH, P()),
}


def draw(rows=ROWS, mean=None):
    """(x, params, dy)."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, rows, FEATURES)).astype(np.float32)
    x += np.linspace(-5, 5, rows, dtype=np.float32)[:, None] if mean is None else mean
    scale, bias = rng.uniform(0.5, 2, (2, FEATURES)).astype(np.float32)
    return x, jaxbn.Params(scale, bias), dy


def put(devices, tree, spec):
    """`tree` on the mesh, its scalars on every device."""
    return jax.tree.map(
        lambda a: jax.device_put(
            a, NamedSharding(devices, spec if np.ndim(a) else P())
        ),
        tree,
    )


def with_gradients(norm, x, params, dy, *rest):
    """y, the state, and the gradients of a loss of both for x and the parameters."""

    def loss(x, params):
        y, new = norm(x, params, *rest)
        return (y * dy).sum() + (new.mean * new.var).sum(), (y, new)

    gradients, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
    return y, new, gradients


def assert_same(got, want):
    jax.tree.map(lambda a, b: assert_close(a, b, jnp.float32, ROWS), got, want)


def sharded_as_whole(kind, specs, norm, *args, like=None):
    """The results on the mesh of `with_gradients`, which are those on one device."""
    want = jax.jit(functools.partial(with_gradients, like or norm))(*args)
    devices = mesh(data=4, model=2, kind=kind)
    with jax.set_mesh(devices):
        on_mesh = [put(devices, *each) for each in zip(args, specs, strict=True)]
        got = jax.jit(functools.partial(with_gradients, norm))(*on_mesh)
    assert_same(got, want)
    return got


@pytest.mark.parametrize(
    ("kind", "derivative"),
    [
        (AUTO, "vjp"),
        (EXPLICIT, "vjp"),
        (EXPLICIT, "jvp"),
        pytest.param(AUTO, "jvp", marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_whole_batch(kind, layout, derivative):
    of_x, of_params = LAYOUTS[layout]
    x, params, dy = draw()
    mask = np.random.default_rng(1).random(x.shape) < np.linspace(0.2, 1, ROWS)[:, None]
    mask[: ROWS // 8] = False  # the first shard of rows has nothing that counts

    def norm(x, params, state, mask):
        return batch_norm(x, params, state, mask=mask, derivative=derivative)

    specs = of_x, of_params, of_x, of_params, of_x
    args = x, params, dy, STATE, mask
    y, new, (dx, _) = sharded_as_whole(kind, specs, norm, *args)
    want = oracle.forward(x, *params, epsilon=EPSILON, mask=mask)
    assert_close(y, want, jnp.float32, ROWS)
    whole = NamedSharding(mesh(data=4, model=2), of_x).shard_shape(x.shape)
    for big in (y, dx):  # neither was gathered
        assert big.sharding.shard_shape(x.shape) == whole
    if kind == EXPLICIT:  # part of the type, which an update keeps
        of_state = NamedSharding(new.mean.sharding.mesh, of_params)
        assert new.mean.sharding.is_equivalent_to(of_state, 1)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
@pytest.mark.parametrize(
    ("rows", "spec"),
    [
        (32, P(("data", "model"))),
        (104, P("data")),
        (104, P(("data", "model"))),
        (256, BOTH),
        (4096, P(("data", "model"))),
    ],
)
def test_every_number_of_rows(kind, rows, spec):
    """The part of the batch is made of blocks that each lie on one device."""
    norm = functools.partial(batch_norm, state=STATE)
    x, params, dy = draw(rows, mean=1000)
    y, *_ = sharded_as_whole(kind, (spec, P(), spec), norm, x, params, dy)
    want = oracle.forward(x, *params, epsilon=EPSILON)
    assert_close(y, want, jnp.float32, rows)


# 32 rows are two shards: JAX cuts no ghost batch, so that the rows are gathered.
@pytest.mark.parametrize(
    ("size", "spec"), [(4, P("data")), (8, BOTH), (32, BOTH)], ids=str
)
def test_ghosts_of_rows_on_an_explicit_mesh(size, spec):
    static = {"train": True, "ghost_batch_size": size}

    def norm(x, params, state, mask):
        return jaxbn.ghost_batch_norm(x, params, state, mask=mask, **static)

    features = P(*spec[1:])
    specs = spec, features, spec, features, P("data")
    y, *_ = sharded_as_whole(EXPLICIT, specs, norm, *draw(), STATE, MASK)
    assert jax.typeof(y).sharding.spec == P(*spec, *[None] * (2 - len(spec)))


def test_ghosts_of_a_linen_module_on_an_explicit_mesh():
    x, *_ = draw()
    norm = BatchNorm(use_running_average=False, ghost_batch_size=4)
    variables = jax.jit(norm.init)(jax.random.key(0), x)
    apply = jax.jit(functools.partial(norm.apply, mutable=["batch_stats"]))
    got = apply(variables, put(mesh(d=8, kind=EXPLICIT), x, P("d")))
    assert_same(got, apply(variables, x))


def test_merged_moments_of_sharded_features():
    x, *_ = draw()
    parts = put(mesh(data=4, model=2, kind=EXPLICIT), [x, x[:8] + 3], BOTH)

    @jax.jit
    def merged(a, b):
        return jaxbn.merge_moments(jaxbn.batch_moments(a), jaxbn.batch_moments(b))

    whole = oracle.moments(np.concatenate(parts))
    for value, desired in zip(merged(*parts), whole, strict=True):
        assert_close(value, np.broadcast_to(desired, (FEATURES,)), jnp.float32, ROWS)


def test_a_named_axis_beside_an_explicit_one():
    norm, rows = functools.partial(NORM, state=STATE), (P("data"), P())
    named = jax.shard_map(
        lambda x, params: norm(x, params, axis_name="data"),
        in_specs=rows,
        out_specs=rows,
        axis_names={"data"},
        mesh=mesh(data=4, model=2, kind=EXPLICIT),
    )
    sharded_as_whole(EXPLICIT, (BOTH, P("model"), BOTH), named, *draw(), like=norm)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_vmap_of_a_shard_map_over_another_axis(masked):
    x, params, _ = draw()
    x, mask = np.stack([x, x[::-1] ** 2]), MASK | (not masked)
    devices = mesh(data=4, model=2)

    @jax.shard_map(
        mesh=devices,
        in_specs=(P("data"), P("data"), P(), P()),
        out_specs=(P("data"), P()),
        check_vma=True,
    )
    def named(x, mask, params, state):
        mask = mask if masked else None
        return NORM(x, params, state, mask=mask, axis_name="data")

    f = jax.vmap(named, in_axes=(0, None, None, None), spmd_axis_name="model")
    of_x = put(devices, x, P("model", "data"))
    y, new = jax.jit(f)(of_x, mask, params, STATE)
    for got, rows in zip(y, x, strict=True):
        assert_close(got, oracle.forward(rows, *params, mask=mask), jnp.float32, ROWS)
    assert new.num_updates.tolist() == [1, 1]


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"debias": True}], ids=str)
def test_one_count_for_shards_of_features(options):
    """As under plain jit, where any feature counts, or all features have to.

    The usual layout: rows over data, features over model, moments over data only.
    """
    norm = functools.partial(NORM, **options)
    of_state = jaxbn.State(P("model"), P("model"), P())
    sharded = jax.shard_map(
        functools.partial(norm, axis_name="data"),
        mesh=mesh(data=4, model=2),
        in_specs=(BOTH, P("model"), of_state),
        out_specs=(BOTH, of_state),
    )
    got, want = (jax.jit(functools.partial(with_gradients, f)) for f in (sharded, norm))
    for spoiled in (0, 1, FEATURES):
        x, params, dy = draw()
        x[0, :spoiled] = np.nan
        assert_same(got(x, params, dy, STATE), want(x, params, dy, STATE))


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="JAX mixes up the meshes by itself"
)
def test_vmap_over_an_explicit_axis_of_an_unmapped_cotangent():
    """The cotangent was made outside the mesh, and nobody tells it of the mesh."""
    x, params, dy = draw()
    x, dy = np.stack([x, x[::-1] ** 2]), jnp.asarray(dy)

    def dx(x):
        return jax.vjp(lambda x: NORM(x, params, STATE)[0], x)[1](dy)[0]

    want = jax.jit(lambda x: jnp.stack([dx(x[0]), dx(x[1])]))(x)
    devices = mesh(model=2, kind=EXPLICIT)
    with jax.set_mesh(devices):
        got = jax.jit(jax.vmap(dx))(put(devices, x, P("model")))
    assert_same(got, want)
