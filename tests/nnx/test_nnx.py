"""nnx.BatchNorm: the bits of linen.BatchNorm, and all that NNX does to modules."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, assert_close, case_ids
from checkpoints import assert_identical
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn.linen
import jaxbn.nnx
from jaxbn.nnx import BatchNorm, BatchRenorm

OURS = ["running_variance", "debias", "derivative", "ghost_batch_size"]
# Flax's own layers broadcast across ranks.
lax_ranks = pytest.mark.usefixtures("lenient")


def draw(*shape, mean=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * 2 + mean, jnp.float32)


def make(num_features, cls=BatchNorm, **kwargs):
    return cls(num_features, rngs=nnx.Rngs(0), **kwargs)


call = nnx.jit(lambda model, x: model(x))


def pure(model):
    """Copies of its arrays, in dictionaries."""
    return jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(model)))


def assert_statistics(norm, x, mask=None):
    """They are those of x."""
    _, mean, var = oracle.moments(x, mask=mask)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-5)


def arguments_of(cls):
    return dict(inspect.signature(cls.__init__).parameters)


def test_arguments_are_flax_arguments_then_ours():
    ours, flax_s = (arguments_of(cls) for cls in (BatchNorm, nnx.BatchNorm))
    assert list(ours) == [*flax_s, *OURS]
    for name, parameter in flax_s.items():
        if name != "promote_dtype":  # here nothing need be promoted
            assert ours[name].default == parameter.default
            assert ours[name].kind == parameter.kind


def test_arguments_of_renorm_are_those_of_batch_norm_and_its_limits(monkeypatch):
    plain, renorm = arguments_of(BatchNorm), arguments_of(BatchRenorm)
    del plain["ghost_batch_size"]  # its statistics are those of the whole batch
    assert list(renorm) == [*list(plain)[:2], "r_max", "d_max", *list(plain)[2:]]
    assert plain.items() <= renorm.items()
    limits = jaxbn.linen.BatchRenorm.r_max, jaxbn.linen.BatchRenorm.d_max
    assert (renorm["r_max"].default, renorm["d_max"].default) == limits

    given, got = {name: object() for name in plain if name != "self"}, {}

    def init(self, num_features, **kwargs):
        got.update(kwargs, num_features=num_features)

    monkeypatch.setattr(BatchNorm, "__init__", init)
    BatchRenorm(**given)
    assert got == given


@pytest.mark.parametrize(
    ("use_scale", "use_bias", "param_dtype"),
    [(True, True, jnp.bfloat16), (False, True, "f4"), (True, False, "f4")],
)
def test_variables_and_draws_are_flax_variables_and_draws(
    use_scale, use_bias, param_dtype
):
    options = {"use_scale": use_scale, "use_bias": use_bias, "param_dtype": param_dtype}
    options |= dict.fromkeys(("scale_init", "bias_init"), nnx.initializers.normal())
    rngs = [nnx.Rngs(params=3) for _ in range(2)]
    ours = BatchNorm(5, rngs=rngs[0], **options)
    flax_s = nnx.BatchNorm(5, rngs=rngs[1], **options)
    mine, theirs = (dict(nnx.to_flat_state(nnx.state(n))) for n in (ours, flax_s))
    assert mine.keys() == theirs.keys()
    for path, variable in theirs.items():
        assert type(mine[path]) is type(variable)
        assert mine[path].dtype == variable.dtype
        np.testing.assert_array_equal(mine[path][...], variable[...])
    assert (ours.scale is None, ours.bias is None) == (not use_scale, not use_bias)
    after = [jax.random.key_data(rng.params()) for rng in rngs]
    np.testing.assert_array_equal(after[0], after[1])


@pytest.mark.parametrize("kwargs", [{"momentum": None}, {"debias": True}])
def test_update_count_only_where_a_mode_needs_it(kwargs):
    assert not hasattr(make(4), "num_updates")
    norm, x = make(4, **kwargs), draw(8, 4, mean=9)
    assert isinstance(norm.num_updates, nnx.BatchStat)
    for _ in range(2):  # without a start at 0
        call(norm, x)
        assert_statistics(norm, x)
    norm(x, use_running_average=True)
    assert norm.num_updates[...] == 2


def test_use_running_average_in_the_call_wins_or_is_needed():
    norm, x = make(4, use_running_average=True, axis_name="nowhere"), draw(8, 4)
    np.testing.assert_allclose(norm(x), x, rtol=1e-4)
    norm = make(4, use_running_average=True)
    assert_close(norm(x, use_running_average=False), oracle.forward(x), x.dtype, 8)
    with pytest.raises(ValueError, match=r"constructor.*call.*nnx\.view"):
        make(4, use_running_average=None)(x)


def test_train_eval_view():
    norm, x = make(4), draw(8, 4, mean=5)
    norm.eval()
    before = norm.mean[...]
    np.testing.assert_allclose(norm(x), x, rtol=1e-4)
    view = nnx.view(norm, use_running_average=False)
    view(x)  # shares its variables
    assert norm.use_running_average
    assert (norm.mean[...] != before).all()
    norm.train()
    assert norm.use_running_average is False
    norm.set_view(use_running_average=True)
    norm.set_view()
    assert norm.use_running_average is True
    info = nnx.view_info(norm)
    assert "BatchNorm:\n  use_running_average" in info
    assert "inference" in info


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [(BatchNorm, {}), (BatchRenorm, {}), (BatchNorm, {"ghost_batch_size": 4})],
)
def test_one_element_warns_once_and_returns_the_bias(cls, kwargs):
    norm = make(4, cls, bias_init=nnx.initializers.ones, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            y = norm(draw(1, 4, mean=7))
    (warning,) = caught
    assert "needs more than one element per feature" in str(warning.message)
    assert "axis_name" in str(warning.message)
    assert warning.filename == __file__
    np.testing.assert_array_equal(y, 1)
    np.testing.assert_array_equal(norm.mean[...], 0)
    np.testing.assert_array_equal(norm.var[...], 1)


def test_one_element_in_each_ghost_batch_or_device():
    with pytest.raises(ValueError, match="`axis_name` 'd' is not bound"):
        make(4, axis_name="d")(draw(1, 4))
    with pytest.raises(ValueError, match="more than one element"):
        make(4, ghost_batch_size=1)(draw(8, 4))
    norm = make(4, axis_name="d", momentum=0.0)
    x = draw(4, 1, 4)
    f = nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), axis_name="d"))
    assert_close(f(norm, x)[:, 0], oracle.forward(x[:, 0]), x.dtype, 4)
    np.testing.assert_allclose(norm.mean[...], x.mean((0, 1)), rtol=1e-5)


def random_like(variables):
    """Variables with random values, positive where they must be; no updates yet."""
    rng = np.random.default_rng(0)

    def value(a):
        if jnp.issubdtype(a.dtype, jnp.integer):
            return jnp.zeros(a.shape, a.dtype)
        return jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype)

    return jax.tree.map(value, variables)


def check_bits(kwargs, num_features, x, mask, dy, cls="BatchNorm"):
    """Of y, the statistics and the gradients, in training and in inference."""
    linen_norm = getattr(jaxbn.linen, cls)(**kwargs)
    shapes = jax.eval_shape(lambda: linen_norm.init(jax.random.key(0), x, False))
    variables = random_like(shapes)

    def of_linen(use_running_average, params, x):
        now = variables | {"params": params}
        args = (x, use_running_average)
        y, updates = linen_norm.apply(now, *args, mask=mask, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    def of_nnx(use_running_average, params, x):
        norm = make(num_features, getattr(jaxbn.nnx, cls), **kwargs)
        for name, value in (variables["batch_stats"] | params).items():
            assert getattr(norm, name).dtype == value.dtype
            getattr(norm, name).set_value(value)
        y = norm(x, use_running_average, mask=mask)
        return y, nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat))

    @jax.jit(static_argnums=0)
    def both_modes(apply, params, x):
        results = []
        for use_running_average in (False, True):
            in_mode = functools.partial(apply, use_running_average)
            y, vjp, stats = jax.vjp(in_mode, params, x, has_aux=True)
            results.append((y, stats, vjp(jnp.asarray(dy, y.dtype))))
        return results

    params = variables.get("params", {})
    assert_identical(both_modes(of_nnx, params, x), both_modes(of_linen, params, x))


BITS = {
    "no scale": jnp.bfloat16,
    "no parameters": jnp.float32,
    "channel first": jnp.float32,
    "two feature axes, apart": jnp.bfloat16,
    "mask elements": jnp.bfloat16,
    "mask everything": jnp.float32,
}


@pytest.mark.parametrize("case", [c for c in CASES if c.name in BITS], **case_ids)
def test_the_bits_of_linen(case):
    dtype = BITS[case.name]
    x, _, _, mask, dy = case.draw(dtype)
    kwargs = {name: getattr(case, name) for name in ("axis", "use_scale", "use_bias")}
    check_bits(kwargs, case.features, jnp.asarray(x, dtype), mask, dy)


@pytest.mark.parametrize(
    ("kwargs", "x_dtype"),
    [
        ({"dtype": "bfloat16", "debias": True, "running_variance": "unbiased"}, "f4"),
        ({"dtype": "float32", "momentum": None, "epsilon": 1e-3}, "bfloat16"),
        ({"param_dtype": "bfloat16"}, "bfloat16"),
        ({"param_dtype": "complex64"}, "complex64"),
        ({"dtype": "complex64", "derivative": "jvp"}, "f4"),
        ({"ghost_batch_size": 4}, "f4"),
        ({"r_max": 3.0, "d_max": 5.0}, "f4"),
        ({"r_max": lambda t: 1 + jnp.arange(5.0), "d_max": lambda t: t}, "f4"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else value,
)
def test_the_bits_of_linen_with(kwargs, x_dtype):
    x, dy = draw(8, 5, mean=100).astype(x_dtype), draw(8, 5, seed=1)
    check_bits(
        kwargs, 5, x, None, dy, "BatchRenorm" if "r_max" in kwargs else "BatchNorm"
    )


def test_masks_as_in_numpy_and_integers():
    x, mask = np.arange(32).reshape(8, 4) ** 2 % 7, np.array([1, 0, 1, 1])
    whole = np.broadcast_to(mask, x.shape) > 0
    y = make(4)(x, mask=mask)
    assert_close(y, oracle.forward(x, mask=whole), jnp.float32, 8)


def test_complex_x_needs_complex_statistics():
    with pytest.raises(TypeError, match=r"`state\.mean` .*param_dtype=jnp.complex64"):
        make(4)(draw(8, 4).astype(complex))


def test_limits_of_renorm_are_not_in_the_state():
    names = pure(make(2, BatchRenorm, r_max=2.0, d_max=lambda t: t)).keys()
    assert names == {"scale", "bias", "mean", "var", "num_updates"}


class Block(nnx.Module):
    """A layer and a batch norm."""

    def __init__(self, rngs, **kwargs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = BatchNorm(4, rngs=rngs, **{"momentum": 0.5} | kwargs)

    def __call__(self, x):
        return nnx.tanh(self.norm(self.linear(x)))


def test_forward_mode():
    x = draw(8, 4)
    graphdef, state = nnx.split(make(4, derivative="jvp"))
    f = jax.jit(lambda x: nnx.merge(graphdef, state, copy=True)(x))
    y, tangent = jax.jvp(f, (x,), (x,))
    # y does not see the scale of x: along x it does not move.
    np.testing.assert_allclose(tangent, 0, atol=1e-4 * float(abs(y).max()))


@lax_ranks
def test_training_under_remat():
    def gradients(call):
        block = Block(nnx.Rngs(0))
        loss = nnx.grad(lambda block, x: (call(block, x) * jnp.sin(x)).sum())
        return nnx.to_pure_dict(nnx.jit(loss)(block, DATA)), pure(block)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    remat, plain = map(gradients, (nnx.remat(Block.__call__), Block.__call__))
    jax.tree.map(close, remat, plain)
    assert (remat[1]["norm"]["mean"] != 0).all()


@lax_ranks
def test_eval_shape():
    x = draw(8, 4)
    abstract = nnx.eval_shape(lambda: Block(nnx.Rngs(0), debias=True))
    y = nnx.eval_shape(lambda m, x: m(x), abstract, x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert abstract.norm.num_updates.dtype == jnp.int32
    model = Block(nnx.Rngs(0))
    for closed_over in (model, jax.grad(lambda x: model(x).sum()), jax.vmap(model)):
        like = x[None] if closed_over is not model else x
        assert nnx.eval_shape(closed_over, like).shape == like.shape
    np.testing.assert_array_equal(model.norm.mean[...], 0)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, x: jax.jit(model)(x),
        lambda model, x: jax.jit(jax.vmap(model))(x[None]),
        lambda model, x: jax.grad(lambda x: (model(x) ** 2).sum())(x),
        lambda model, x: jax.jit(jax.grad(lambda x: model(x).sum()))(x),
        lambda model, x: jax.jit(jax.checkpoint(model))(x),
    ],
    ids=["jit", "vmap", "grad", "only a gradient", "checkpoint"],
)
def test_training_what_is_closed_over_is_an_error_as_in_flax(use):
    model = make(4)
    with pytest.raises(TraceContextError, match="pass the model to it"):
        use(model, draw(8, 4))
    np.testing.assert_array_equal(model.mean[...], 0)
    np.testing.assert_array_equal(model.var[...], 1)
    model = make(4, use_running_average=True)  # nothing is to be updated
    assert jnp.isfinite(use(model, draw(8, 4))).all()


def test_mutable_references_and_arrays_of_numpy():
    """The latter as checkpoints give them."""
    x = draw(8, 4, mean=3)
    with nnx.var_defaults(ref=True):
        norm = make(4, momentum=0.0, debias=True)
    jax.jit(lambda x: norm(x))(x)
    np.testing.assert_allclose(norm.mean[...], x.mean(0), rtol=1e-5)
    assert norm.num_updates[...] == 1
    norm = make(4, momentum=0.0)
    nnx.update(norm, jax.tree.map(np.asarray, nnx.state(norm)))
    norm(x)
    np.testing.assert_allclose(norm.mean[...], x.mean(0), rtol=1e-5)


def mesh_of(kind, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (kind,) * len(axes))


@pytest.mark.parametrize("spec", [P(None, None), P("d", "e")], ids=str)
def test_gradients_on_an_explicit_mesh(spec):
    """With sharded features, where Flax's module fails."""
    x, dy = draw(8, 4, mean=3), draw(8, 4, seed=1)
    norm = make(4, momentum=0.0, scale_init=nnx.initializers.normal(1.0))

    def loss(norm, x, dy):
        y = norm(x)
        # The state is a constant to it, however large.
        return (y * dy).sum() + 1e3 * (norm.mean[...] + norm.var[...]).sum(), y

    argnums = (nnx.DiffState(0, nnx.Param), 1)
    step = nnx.jit(nnx.grad(loss, argnums=argnums, has_aux=True))
    with jax.set_mesh(mesh_of(AxisType.Explicit, d=4, e=2)):
        (gradients, dx), y = step(norm, *(jax.device_put(a, spec) for a in (x, dy)))
    assert jax.typeof(y).sharding.spec == spec
    got = y, dx, gradients["scale"][...], gradients["bias"][...]
    parts = norm.scale[...], norm.bias[...]
    want = oracle.forward(x, *parts), *oracle.backward(dy, x, parts[0])
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, x.dtype, 8)
    assert_statistics(norm, x)


def test_metadata_shards_parameters():
    sharded = {"out_sharding": ("d",)}
    x = draw(8, 4, mean=3)
    with jax.set_mesh(mesh_of(AxisType.Auto, d=4)):
        norm = make(4, scale_metadata=sharded, bias_metadata=sharded, momentum=0.0)
        for param in (norm.scale, norm.bias):
            assert param.out_sharding == ("d",)
            assert param[...].sharding.spec == P("d")
        assert_close(call(norm, x), oracle.forward(x), x.dtype, 8)
        assert_statistics(norm, x)


def test_shard_map():
    """Devices with unequal masks are one batch."""
    x, mask = draw(8, 4, mean=3), np.arange(8)[:, None] % 3 > 0
    mask[:2] = False  # one device has nothing to count
    norm = make(4, axis_name="d", momentum=0.0)
    f = nnx.shard_map(
        lambda m, x, mask: m(x, mask=mask),
        mesh=mesh_of(AxisType.Auto, d=4),
        in_specs=(P(), P("d"), P("d")),
        out_specs=P("d"),
    )
    y = nnx.jit(f)(norm, x, mask)
    assert_close(y, oracle.forward(x, mask=mask), x.dtype, 8)
    assert_statistics(norm, x, mask)


def test_dtype_rounds_no_statistics():
    """Nor x, which at mean 100 has but a bit or two behind the point."""
    x = draw(256, 4, mean=100)
    norm = make(4, momentum=0.0, dtype=jnp.bfloat16)
    y = norm(x)
    norm.eval()
    want = oracle.forward(x)
    for got in (y, norm(x)):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype("f4"), want, rtol=2**-8, atol=1e-4)
    norm.promote_dtype = promote_dtype  # Flax's: x in bfloat16
    error = abs(norm(x).astype(jnp.float32) - want).max()
    assert 0.02 < error < 0.3


DATA = draw(60, 4, mean=3)


def test_recalibrate_normalizes_plainly_on_one_device():
    first = make(4, BatchRenorm, axis_name="d", r_max=3.0, d_max=5.0)
    net = nnx.Sequential(first, jnp.exp, make(4))
    jaxbn.nnx.recalibrate(net, [DATA])
    assert_statistics(net.layers[2], np.exp(oracle.forward(DATA)))
    with pytest.raises(ValueError, match="each of `batches` needs more than one"):
        jaxbn.nnx.recalibrate(net, [DATA[:1]])


def test_recalibrate_leaves_modes_and_counts_and_random_streams():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.norm = BatchRenorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(x))

    net = Noisy(nnx.Rngs(0))
    net(DATA)
    count = net.dropout.rngs.count[...]
    jaxbn.nnx.recalibrate(net, [DATA])
    assert net.norm.num_updates[...] == 1
    assert net.norm.use_running_average is False
    assert net.dropout.rngs.count[...] == count
    assert_statistics(net.norm, DATA)


@pytest.mark.parametrize("sequential", [False, True])
def test_recalibrate_with_masks_and_keyword_batches(sequential):
    norm, mask = make(4, use_running_average=True), np.arange(60)[:, None] % 4 > 0
    x = jnp.where(mask, DATA, jnp.nan)
    batches = [{"x": x[s], "mask": mask[s]} for s in (np.s_[:9], np.s_[9:])]
    options = {"sequential": sequential, "use_running_average": True}
    jaxbn.nnx.recalibrate(norm, batches, **options)
    assert_statistics(norm, DATA, mask)


def test_recalibrate_gives_a_shared_layer_both_calls():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.a = BatchNorm(2, rngs=rngs)
            self.b = self.a

        def __call__(self, x):
            return self.a(x[:, :2]) + self.b(x[:, 2:] + 1)

    net = Twice(nnx.Rngs(0))
    jaxbn.nnx.recalibrate(net, [DATA[:30], DATA[30:]])
    assert_statistics(net.a, np.concatenate([DATA[:, :2], DATA[:, 2:] + 1]))


class Stack(nnx.Module):
    def __init__(self):
        create = nnx.vmap(lambda rngs: Block(rngs, momentum=None))
        self.blocks = nnx.split_rngs(splits=3)(create)(nnx.Rngs(0))

    @nnx.jit
    def __call__(self, x):
        axes = {"in_axes": (0, nnx.Carry), "out_axes": nnx.Carry}
        return nnx.scan(lambda block, x: block(x), **axes)(self.blocks, x)

    def check(self, x):
        """The statistics by the oracle, of what comes out of the layers before."""
        norm, h = self.blocks.norm, np.float64(x)
        for i, kernel in enumerate(np.float64(self.blocks.linear.kernel[...])):
            _, mean, var = oracle.moments(h @ kernel)
            np.testing.assert_allclose(norm.mean[i], mean, 1e-4, 1e-5)
            np.testing.assert_allclose(norm.var[i], var, 1e-4)
            h = np.tanh(oracle.normalize(h @ kernel, mean, var))
        return h


@lax_ranks
def test_layers_in_a_jitted_scan():
    stack = Stack()
    assert stack.blocks.norm.num_updates.shape == (3,)
    params = nnx.to_pure_dict(nnx.state(stack, nnx.Param))
    np.testing.assert_allclose(stack(DATA), stack.check(DATA), rtol=1e-3, atol=1e-4)
    jaxbn.nnx.recalibrate(stack, [DATA[:30] + 1, DATA[30:]], sequential=True)
    stack.check(np.concatenate([DATA[:30] + 1, DATA[30:]]))
    assert_identical(nnx.to_pure_dict(nnx.state(stack, nnx.Param)), params)


@lax_ranks
def test_an_error_of_recalibrate_changes_nothing():
    passes = iter([DATA, DATA[:, :3]])  # one batch in each

    class Batches:
        def __iter__(self):
            yield next(passes)

    net = nnx.Sequential(Block(nnx.Rngs(0)), Block(nnx.Rngs(1)))
    before = pure(net)
    with pytest.raises(TypeError, match="dot_general"):
        jaxbn.nnx.recalibrate(net, Batches(), sequential=True)
    assert_identical(pure(net), before)
    assert net.layers[0].norm.recorded is None


@lax_ranks
def test_inspection_finds_the_spoiled_layer_and_changes_nothing():
    net = nnx.Sequential(Block(nnx.Rngs(0)), Block(nnx.Rngs(1)))
    jaxbn.nnx.recalibrate(net, [DATA])
    spoiled = net.layers[1].norm
    spoiled.mean.set_value(spoiled.mean[...].at[2].add(9.0))
    before = pure(net)
    worst, *others = jaxbn.nnx.inspect_statistics(net, [DATA])
    assert worst.name == "layers/1/norm"
    assert worst.worst_channel == (2,)
    assert len(others) == 1
    assert all(layer.kl.max() < 1e-6 for layer in others)
    assert_identical(pure(net), before)


def test_inspection_without_data_and_with_the_epsilon_of_the_layer():
    norm = make(4, epsilon=1.0, use_scale=False)
    norm.var.set_value(jnp.array([1.0, 1e-3, 1.0, 1e-3]))
    [layer] = jaxbn.nnx.inspect_statistics(norm)
    assert layer.dead == [(1,), (3,)]
    assert layer.kl is None
    assert layer.scale is None
    linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`model` must have a BatchNorm;"):
        jaxbn.nnx.inspect_statistics(linear)
