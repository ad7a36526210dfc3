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
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn.linen
import jaxbn.nnx
from jaxbn.nnx import BatchNorm, BatchRenorm

OURS = ["running_variance", "debias", "derivative", "ghost_batch_size"]


def draw(*shape, mean=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * 2 + mean, jnp.float32)


def make(num_features, cls=BatchNorm, **kwargs):
    return cls(num_features, rngs=nnx.Rngs(0), **kwargs)


def statistics(norm):
    return norm.mean[...], norm.var[...]


def pure(model, *filters):
    """Copies of its arrays, in dictionaries."""
    return jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(model, *filters)))


def assert_statistics(norm, x, mask=None):
    """They are those of x."""
    _, mean, var = oracle.moments(x, mask=mask)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-5)


# --- As in flax.nnx -----------------------------------------------------------------


def test_arguments_are_flax_arguments_then_ours():
    ours, flax_s = (
        inspect.signature(cls.__init__).parameters for cls in (BatchNorm, nnx.BatchNorm)
    )
    assert list(ours) == [*flax_s, *OURS]
    for name, parameter in flax_s.items():
        if name != "promote_dtype":  # here nothing need be promoted
            assert ours[name].default == parameter.default
            assert ours[name].kind == parameter.kind


def test_arguments_of_renorm_are_those_of_batch_norm_and_its_limits(monkeypatch):
    plain = dict(inspect.signature(BatchNorm.__init__).parameters)
    renorm = dict(inspect.signature(BatchRenorm.__init__).parameters)
    del plain["ghost_batch_size"]  # its statistics are those of the whole batch
    assert list(renorm) == [*list(plain)[:2], "r_max", "d_max", *list(plain)[2:]]
    assert plain.items() <= renorm.items()
    limits = jaxbn.linen.BatchRenorm.r_max, jaxbn.linen.BatchRenorm.d_max
    assert (renorm["r_max"].default, renorm["d_max"].default) == limits

    given, got = {name: object() for name in plain if name != "self"}, {}
    monkeypatch.setattr(
        BatchNorm,
        "__init__",
        lambda self, num_features, **kwargs: got.update(
            kwargs, num_features=num_features
        ),
    )
    BatchRenorm(**given)
    assert got == given


@pytest.mark.parametrize(
    ("use_scale", "use_bias", "param_dtype"),
    [
        (True, True, jnp.bfloat16),
        (False, True, jnp.float32),
        (True, False, jnp.float32),
    ],
)
def test_variables_and_draws_are_flax_variables_and_draws(
    use_scale, use_bias, param_dtype
):
    rngs = [nnx.Rngs(params=3) for _ in range(2)]
    ours, flax_norm = (
        cls(
            5,
            use_scale=use_scale,
            use_bias=use_bias,
            param_dtype=param_dtype,
            scale_init=nnx.initializers.normal(),
            bias_init=nnx.initializers.normal(),
            rngs=rng,
        )
        for cls, rng in zip((BatchNorm, nnx.BatchNorm), rngs, strict=True)
    )
    mine, theirs = (dict(nnx.to_flat_state(nnx.state(n))) for n in (ours, flax_norm))
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
        norm(x)
        assert_statistics(norm, x)
    norm(x, use_running_average=True)
    assert norm.num_updates[...] == 2


def test_state_of_flax_module_loads_and_the_reverse():
    x = draw(8, 4, mean=2)
    theirs = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with jax.numpy_rank_promotion("allow"):
        theirs(x)
        for source, target in [
            (theirs, make(4, debias=True)),
            (make(4), nnx.BatchNorm(4, rngs=nnx.Rngs(1))),
        ]:
            source.train()
            source(x)
            nnx.update(target, nnx.state(source))
            for model in (source, target):
                model.eval()
            np.testing.assert_allclose(target(x), source(x), rtol=1e-6, atol=1e-6)


class TestUseRunningAverage:
    def test_call_wins_over_constructor(self):
        norm, x = make(4, use_running_average=True), draw(8, 4)
        np.testing.assert_allclose(norm(x), x, rtol=1e-4)
        assert_close(norm(x, use_running_average=False), oracle.forward(x), x.dtype, 8)

    def test_nowhere(self):
        norm = make(4, use_running_average=None)
        with pytest.raises(ValueError, match=r"constructor.*call.*nnx\.view"):
            norm(draw(8, 4))

    def test_train_eval_view(self):
        norm, x = make(4), draw(8, 4, mean=5)
        norm.eval()
        before = statistics(norm)
        np.testing.assert_allclose(norm(x), x, rtol=1e-4)
        view = nnx.view(norm, use_running_average=False)
        view(x)  # shares its variables
        assert norm.use_running_average
        assert (norm.mean[...] != before[0]).all()
        norm.train()
        assert norm.use_running_average is False
        norm.set_view(use_running_average=True)
        assert norm.use_running_average is True
        norm.set_view()
        assert norm.use_running_average is True

    def test_view_info_shows_the_argument(self):
        info = nnx.view_info(make(4))
        assert "BatchNorm:\n  use_running_average" in info
        assert "inference" in info

    def test_inference_ignores_axis_name(self):
        y = make(4, use_running_average=True, axis_name="nowhere")(draw(8, 4))
        assert jnp.isfinite(y).all()


class TestOneElementPerFeature:
    """NNX cannot tell initializing, where it is fine, from training."""

    @pytest.mark.parametrize("cls", [BatchNorm, BatchRenorm])
    def test_warns_once_and_returns_the_bias(self, cls):
        norm = make(4, cls, bias_init=nnx.initializers.ones)
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

    def test_with_ghost_batches(self):
        norm = make(4, ghost_batch_size=4)
        with pytest.warns(UserWarning, match="more than one element"):
            np.testing.assert_array_equal(norm(draw(1, 4)), 0)
        with pytest.raises(ValueError, match="more than one element"):
            make(4, ghost_batch_size=1)(draw(8, 4))

    def test_devices_count_together(self):
        norm = make(4, axis_name="d", momentum=0.0)
        x = draw(4, 1, 4)
        f = nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), axis_name="d"))
        assert_close(f(norm, x)[:, 0], oracle.forward(x[:, 0]), x.dtype, 4)
        np.testing.assert_allclose(norm.mean[...], x.mean((0, 1)), rtol=1e-5)

    def test_unbound_axis_is_an_error(self):
        with pytest.raises(ValueError, match="`axis_name` 'd' is not bound"):
            make(4, axis_name="d")(draw(1, 4))


# --- The bits of Linen ----------------------------------------------------------------


def random_like(variables, seed=0):
    """Variables with random values, positive where they must be; no updates yet."""
    rng = np.random.default_rng(seed)

    def value(a):
        if jnp.issubdtype(a.dtype, jnp.integer):
            return jnp.zeros(a.shape, a.dtype)
        return jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype)

    return jax.tree.map(value, variables)


def steps(apply, params, x, dy):
    """(y, batch_stats, (params' gradients, dx)), in training and in inference."""

    def step(params, x, dy, use_running_average):
        in_mode = functools.partial(apply, use_running_average)
        y, vjp, stats = jax.vjp(in_mode, params, x, has_aux=True)
        return y, stats, vjp(dy.astype(y.dtype))

    both = jax.jit(lambda *args: (step(*args, False), step(*args, True)))
    return both(params, x, dy)


def check_bits(kwargs, num_features, x, mask, dy, cls="BatchNorm"):
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
            getattr(norm, name).set_value(value)
        y = norm(x, use_running_average, mask=mask)
        return y, nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat))

    params = variables.get("params", {})
    want, got = (steps(apply, params, x, dy) for apply in (of_linen, of_nnx))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


BITS = {
    "zero rows": jnp.float32,
    "no scale": jnp.bfloat16,
    "no parameters": jnp.float32,
    "channel first": jnp.float32,
    "two feature axes, apart": jnp.bfloat16,
    "mask elements": jnp.bfloat16,
    "mask images": jnp.float32,
    "mask everything": jnp.float32,
}


@pytest.mark.parametrize("case", [c for c in CASES if c.name in BITS], **case_ids)
def test_the_bits_of_linen(case):
    """y, statistics and gradients, in training and inference, at default arguments."""
    dtype = BITS[case.name]
    x, _, _, mask, dy = case.draw(dtype)
    kwargs = {
        "axis": case.axis,
        "use_scale": case.use_scale,
        "use_bias": case.use_bias,
    }
    check_bits(kwargs, case.features, jnp.asarray(x, dtype), mask, jnp.asarray(dy))


@pytest.mark.parametrize(
    ("kwargs", "x_dtype"),
    [
        ({"dtype": jnp.bfloat16}, jnp.float32),
        ({"dtype": jnp.float32}, jnp.bfloat16),
        ({"param_dtype": jnp.bfloat16}, jnp.bfloat16),
        ({"param_dtype": jnp.bfloat16}, jnp.float32),
        ({"dtype": jnp.complex64}, jnp.float32),
        ({"debias": True, "running_variance": "unbiased"}, jnp.float32),
        ({"momentum": None, "derivative": "jvp", "epsilon": 1e-3}, jnp.float32),
        ({"ghost_batch_size": 4}, jnp.float32),
    ],
    ids=str,
)
def test_the_bits_of_linen_with(kwargs, x_dtype):
    x, dy = draw(8, 5, mean=100).astype(x_dtype), draw(8, 5, seed=1)
    check_bits(kwargs, 5, x, None, dy)


def test_the_bits_of_linen_in_renorm():
    x, dy = draw(8, 5, mean=100), draw(8, 5, seed=1)
    check_bits({"r_max": 3.0, "d_max": 5.0}, 5, x, None, dy, "BatchRenorm")


def test_integers_give_the_bits_of_linen():
    x = jnp.arange(32).reshape(8, 4) ** 2 % 7
    linen_norm = jaxbn.linen.BatchNorm(False)
    y, _ = linen_norm.init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(jax.jit(lambda x: make(4)(x))(x), y)


# --- Transformations of NNX -----------------------------------------------------------


class Block(nnx.Module):
    """A layer and a batch norm."""

    def __init__(self, rngs, **kwargs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = BatchNorm(4, rngs=rngs, **{"momentum": 0.5} | kwargs)

    def __call__(self, x):
        return nnx.tanh(self.norm(self.linear(x)))


@pytest.fixture
def lax_ranks():
    """Flax's own layers broadcast across ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def assert_same_state(a, b, rtol=1e-5):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6),
        pure(a),
        pure(b),
    )


def make_stack(**kwargs):
    """Three blocks, whose arrays have one more axis, the first."""
    create = nnx.vmap(lambda rngs: Block(rngs, **kwargs), in_axes=0, out_axes=0)
    return nnx.split_rngs(splits=3)(create)(nnx.Rngs(0))


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def in_turn(block, x):
    return block(x)


def check_layers(layers, batches, sequential=False):
    """All outputs of (kernel, mean, variance) in turn; the two by the oracle.

    They are those of all batches; `sequential` normalizes by them, not by each one.
    """
    for kernel, mean, var in layers:
        batches = [h @ np.asarray(kernel, np.float64) for h in np.float64(batches)]
        _, want_mean, want_var = oracle.moments(np.concatenate(batches))
        np.testing.assert_allclose(mean, want_mean, 1e-4, 1e-5)
        np.testing.assert_allclose(var, want_var, 1e-4)
        batches = [
            oracle.normalize(h, want_mean, want_var)
            if sequential
            else oracle.forward(h)
            for h in batches
        ]
        batches = np.tanh(batches)
    return np.concatenate(batches)


def layers_of(stack):
    norm = stack.norm
    arrays = stack.linear.kernel[...], norm.mean[...], norm.var[...]
    return zip(*arrays, strict=True)


@pytest.mark.usefixtures("lax_ranks")
class TestTransformations:
    def test_jit(self):
        x = draw(8, 4, mean=3)
        eager, jitted = (Block(nnx.Rngs(0), debias=True) for _ in range(2))
        y = nnx.jit(lambda m, x: m(x))(jitted, x)
        np.testing.assert_allclose(y, eager(x), rtol=1e-5, atol=1e-5)
        assert_same_state(eager, jitted)

    def test_a_scan_over_steps_with_donated_state(self):
        graphdef, state = nnx.split(make(4, momentum=0.5, debias=True))
        xs = draw(5, 8, 4, mean=3)

        def step(state, x):
            model = nnx.merge(graphdef, state)
            y = model(x)
            return nnx.state(model), y

        scan = jax.jit(lambda s, xs: jax.lax.scan(step, s, xs), donate_argnums=0)
        state, ys = scan(state, xs)
        one_by_one = make(4, momentum=0.5, debias=True)
        for x, y in zip(xs, ys, strict=True):
            np.testing.assert_allclose(y, one_by_one(x), rtol=1e-5, atol=1e-5)
        assert_same_state(nnx.merge(graphdef, state), one_by_one)
        assert one_by_one.num_updates[...] == 5

    def test_grad(self):
        """Of a loss that is random in y, against the oracle; statistics come along."""
        x, dy = draw(8, 4, mean=3), draw(8, 4, seed=1)
        norm = make(4, momentum=0.0, scale_init=nnx.initializers.normal(1.0))

        def loss(norm, x):
            # The state is a constant to it, however large.
            return (norm(x) * dy).sum() + 1e3 * (norm.mean[...] + norm.var[...]).sum()

        argnums = (nnx.DiffState(0, nnx.Param), 1)
        gradients, dx = nnx.jit(nnx.grad(loss, argnums=argnums))(norm, x)
        desired = oracle.backward(dy, x, norm.scale[...])
        for got, want in zip(
            (dx, gradients["scale"][...], gradients["bias"][...]), desired, strict=True
        ):
            assert_close(got, want, x.dtype, 8)
        assert_statistics(norm, x)

    def test_forward_mode(self):
        x = draw(8, 4)
        norm = make(4, derivative="jvp")
        graphdef, state = nnx.split(norm)
        y, tangent = jax.jvp(
            lambda x: nnx.merge(graphdef, state, copy=True)(x), (x,), (x,)
        )
        # y does not see the scale of x: along x it does not move.
        np.testing.assert_allclose(tangent, 0, atol=1e-4 * float(abs(y).max()))

    def test_remat(self):
        x, dy = draw(8, 4, mean=3), draw(8, 4, seed=1)

        class Remat(Block):
            @nnx.remat
            def __call__(self, x):
                return super(Remat, self).__call__(x)

        def step(model):
            def loss(model):
                return (model(x) * dy).sum()

            return nnx.jit(nnx.grad(loss))(model)

        plain, remat = Block(nnx.Rngs(0)), Remat(nnx.Rngs(0))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
            pure(step(remat)),
            pure(step(plain)),
        )
        assert_same_state(plain, remat)
        assert (plain.norm.mean[...] != 0).all()

    def test_scan_over_layers(self):
        stack, x = make_stack(momentum=None), draw(8, 4, mean=3)
        assert stack.norm.mean.shape == (3, 4)
        assert stack.norm.num_updates.shape == (3,)
        y = nnx.jit(in_turn)(stack, x)
        want = check_layers(layers_of(stack), [x])
        np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-4)

    def test_vmap_over_models_and_over_a_shared_one(self):
        models, xs = make_stack(), draw(3, 8, 4, mean=3)
        y = nnx.jit(nnx.vmap(lambda m, x: m(x)))(models, xs)
        for i in range(3):
            h = np.asarray(xs[i], np.float64) @ models.linear.kernel[i]
            assert_close(y[i], np.tanh(oracle.forward(h)), jnp.float32, 800)
            assert_close(models.norm.mean[i], 0.5 * h.mean(0), jnp.float32, 800)

        # One model, whose statistics are each lane's own.
        axes = nnx.StateAxes({nnx.BatchStat: 0, ...: None})
        norm = make(4, momentum=0.0)
        for name in ("mean", "var"):
            variable = getattr(norm, name)
            variable.set_value(jnp.broadcast_to(variable[...], (3, 4)))
        nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(axes, 0)))(norm, xs)
        np.testing.assert_allclose(norm.mean[...], xs.mean(1), rtol=1e-5)

    def test_eval_shape(self):
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
            lambda model, x: jax.vmap(model)(x[None]),
            lambda model, x: jax.grad(lambda x: (model(x) ** 2).sum())(x),
            lambda model, x: jax.jit(jax.grad(lambda x: model(x).sum()))(x),
            lambda model, x: jax.jit(jax.checkpoint(model))(x),
        ],
        ids=["jit", "vmap", "grad", "only a gradient", "checkpoint"],
    )
    def test_training_what_is_closed_over_is_an_error_as_in_flax(self, use):
        model = make(4)
        with pytest.raises(TraceContextError, match="pass the model to it"):
            use(model, draw(8, 4))
        np.testing.assert_array_equal(model.mean[...], 0)
        np.testing.assert_array_equal(model.var[...], 1)
        model = make(4, use_running_average=True)  # nothing is to be updated
        assert jnp.isfinite(use(model, draw(8, 4))).all()

    def test_mutable_references(self):
        x = draw(8, 4, mean=3)
        with nnx.var_defaults(ref=True):
            norm = make(4, momentum=0.0, debias=True)
        jax.jit(lambda x: norm(x))(x)
        np.testing.assert_allclose(norm.mean[...], x.mean(0), rtol=1e-5)
        assert norm.num_updates[...] == 1

    def test_arrays_of_numpy(self):
        """As checkpoints give them."""
        norm = make(4, momentum=0.0)
        nnx.update(norm, jax.tree.map(np.asarray, nnx.state(norm)))
        norm(draw(8, 4, mean=3))
        np.testing.assert_allclose(norm.mean[...], draw(8, 4, mean=3).mean(0), 1e-5)


# --- Devices --------------------------------------------------------------------------


def explicit_mesh(**axes):
    kinds = (AxisType.Explicit,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), kinds)


class TestDevices:
    @pytest.mark.parametrize(
        ("spec", "use_running_average"),
        [(P("d"), False), (P(None, "d"), True), (P("d", "e"), False)],
        ids=str,
    )
    def test_explicit_mesh(self, spec, use_running_average):
        """With sharded features, where Flax's module fails."""
        x, dy = draw(8, 4, mean=3), draw(8, 4, seed=1)

        def step(norm, x, dy):
            argnums = (nnx.DiffState(0, nnx.Param), 1)

            def loss(norm, x):
                y = norm(x, use_running_average)
                return (y * dy).sum(), y

            return nnx.grad(loss, argnums=argnums, has_aux=True)(norm, x)

        want_norm, norm = make(4), make(4)
        (want_params, want_dx), want_y = nnx.jit(step)(want_norm, x, dy)
        mesh = explicit_mesh(d=4, e=2) if "e" in str(spec) else explicit_mesh(d=4)
        with jax.set_mesh(mesh):
            x, dy = (jax.device_put(a, spec) for a in (x, dy))
            (params, dx), y = nnx.jit(step)(norm, x, dy)
        assert jax.typeof(y).sharding.spec == jax.typeof(x).sharding.spec
        for a, b in zip((y, dx), (want_y, want_dx), strict=True):
            assert_close(a, b, jnp.float32, 8)
        for name in ("scale", "bias"):
            assert_close(params[name][...], want_params[name][...], jnp.float32, 8)
        assert_same_state(norm, want_norm)

    def test_metadata_shards_parameters(self):
        metadata = {"out_sharding": ("d",)}
        with jax.set_mesh(jax.make_mesh((4,), ("d",), (AxisType.Auto,))):
            norm, plain = (
                make(4, scale_metadata=meta, bias_metadata=meta)
                for meta in (metadata, {})
            )
            for param in (norm.scale, norm.bias):
                assert param.out_sharding == ("d",)
                assert param[...].sharding.spec == P("d")
            x = draw(8, 4, mean=3)
            y = nnx.jit(lambda m, x: m(x))(norm, x)
            assert_close(y, oracle.forward(x), x.dtype, 8)
            plain(x)
            assert_same_state(norm, plain)

    def test_shard_map(self):
        """Devices with unequal masks are one batch; gradients included."""
        x, dy = draw(8, 4, mean=3), draw(8, 4, seed=1)
        mask = np.arange(8)[:, None] % 3 > 0
        mask[:2] = False  # one device has nothing to count
        norm = make(4, axis_name="d", momentum=0.0)
        graphdef, params, rest = nnx.split(norm, nnx.Param, ...)

        def local(params, rest, x, mask):
            model = nnx.merge(graphdef, params, rest)
            y = model(x, mask=mask)
            return y, nnx.state(model, nnx.BatchStat)

        sharded = jax.shard_map(
            local,
            mesh=jax.make_mesh((4,), ("d",), (AxisType.Auto,)),
            in_specs=(P(), P(), P("d"), P("d")),
            out_specs=(P("d"), P()),
        )

        @jax.jit
        def step(params, x):
            y, vjp, stats = jax.vjp(
                lambda p, x: sharded(p, rest, x, mask), params, x, has_aux=True
            )
            return y, stats, vjp(dy)

        y, stats, (dparams, dx) = step(params, x)
        _, mean, var = oracle.moments(x, mask=mask)
        np.testing.assert_allclose(stats["mean"][...], mean, rtol=1e-5)
        np.testing.assert_allclose(stats["var"][...], var, rtol=1e-5)
        desired = oracle.backward(np.where(mask, dy, 0), x, mask=mask)
        got = dx, dparams["scale"][...], dparams["bias"][...]
        for a, b in zip(
            (y, *got), (oracle.forward(x, mask=mask), *desired), strict=True
        ):
            assert_close(a, b, jnp.float32, 8)

    def test_nnx_shard_map(self):
        x = draw(8, 4, mean=3)
        norm = make(4, axis_name="d", momentum=0.0)
        mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,))
        f = nnx.shard_map(
            lambda m, x: m(x), mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d")
        )
        y = nnx.jit(f)(norm, x)
        assert_close(y, oracle.forward(x), x.dtype, 8)
        np.testing.assert_allclose(norm.mean[...], x.mean(0), rtol=1e-5)


# --- Defects --------------------------------------------------------------------------


class TestFlaxDefects:
    """Each of these goes wrong with flax.nnx.BatchNorm (FLAX.md, by number)."""

    def test_2_nan_padding(self):
        x = jnp.array([[1.0, 2.0], [3.0, 5.0], [jnp.nan, jnp.nan]])
        mask = jnp.array([[True], [True], [False]])
        norm = make(2)
        argnums = (nnx.DiffState(0, nnx.Param), 1)
        gradients = nnx.jit(
            nnx.grad(lambda m, x: m(x, mask=mask)[0, 0], argnums=argnums)
        )(norm, x)
        leaves = jax.tree.leaves((gradients, nnx.state(norm)))
        assert all(jnp.isfinite(a).all() for a in leaves)

    def test_5_state_keeps_its_dtype(self):
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            for dtype in (jnp.float64, jnp.bfloat16):
                norm = make(4, param_dtype=dtype)
                nnx.jit(lambda m, x: m(x))(norm, draw(8, 4).astype(dtype))
                assert [a.dtype for a in statistics(norm)] == [jnp.float32] * 2

    def test_7_dtype_rounds_no_statistics(self):
        """Nor x, which at mean 100 has but a bit or two behind the point."""
        x = draw(256, 4, mean=100)
        norm = make(4, momentum=0.0, dtype=jnp.bfloat16)
        y = norm(x)
        norm.eval()
        want = oracle.forward(x)
        for got in (y, norm(x)):
            assert got.dtype == jnp.bfloat16
            np.testing.assert_allclose(
                got.astype(jnp.float32), want, rtol=2**-8, atol=1e-4
            )
        norm.promote_dtype = promote_dtype  # Flax's: x in bfloat16
        error = abs(norm(x).astype(jnp.float32) - want).max()
        assert 0.02 < error < 0.3

    def test_7_complex(self):
        x = jax.lax.complex(draw(8, 4, mean=1), draw(8, 4, seed=1))
        for kwargs in ({"param_dtype": jnp.complex64}, {"dtype": jnp.complex64}):
            norm = make(4, momentum=0.0, **kwargs)
            np.testing.assert_allclose(norm(x), oracle.forward(x), rtol=1e-4)
            assert_statistics(norm, x)
        with pytest.raises(TypeError, match=r"`state\.mean` must be complex"):
            make(4)(x)

    def test_8_features(self):
        norm = make(4, use_scale=False, use_bias=False)
        with pytest.raises(ValueError, match=r"one entry per feature.*got \(4,\)"):
            norm(jnp.ones((8, 2)))

    def test_11_masks_as_in_numpy(self):
        """Flax's own such test compares NaN with NaN."""
        x, mask = draw(8, 4), np.array([1, 0, 1, 1])
        whole = np.broadcast_to(mask, x.shape) > 0
        y = make(4)(x, mask=mask)
        assert_close(y, oracle.forward(x, mask=whole), x.dtype, 4)


# --- recalibrate ----------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Interrupted:
    """One batch, in the first pass over it."""

    def __init__(self, x):
        self.x, self.passes = x, 0

    def __iter__(self):
        if self.passes == 1:
            raise OSError("second pass")
        yield self.x
        self.passes += 1


@pytest.mark.usefixtures("lax_ranks")
class TestRecalibrate:
    x = draw(60, 4, mean=3)

    @pytest.mark.parametrize("sequential", [False, True])
    def test_one_layer_after_the_other(self, sequential):
        net = Net(nnx.Rngs(0))
        params, structure = pure(net, nnx.Param), jax.tree.structure(pure(net))
        batches = [self.x[:30], self.x[30:]]
        jaxbn.nnx.recalibrate(net, batches, sequential=sequential)
        layers = [
            (block.linear.kernel[...], *statistics(block.norm)) for block in net.blocks
        ]
        check_layers(layers, batches, sequential)
        assert jax.tree.structure(pure(net)) == structure
        jax.tree.map(np.testing.assert_array_equal, pure(net, nnx.Param), params)

    def test_modes_and_counts_and_random_streams_stay(self):
        class Noisy(nnx.Module):
            def __init__(self, rngs):
                self.norm = BatchNorm(4, debias=True, rngs=rngs)
                self.dropout = nnx.Dropout(0.5, rngs=rngs)

            def __call__(self, x):
                return self.dropout(self.norm(x))

        net = Noisy(nnx.Rngs(0))
        net(self.x)
        count = net.dropout.rngs.count[...]
        jaxbn.nnx.recalibrate(net, [self.x])
        assert net.norm.num_updates[...] == 1
        assert net.norm.use_running_average is False
        assert net.dropout.rngs.count[...] == count
        np.testing.assert_allclose(net.norm.mean[...], self.x.mean(0), rtol=1e-5)

    def test_keyword_batches_and_masks(self):
        norm = make(4, use_running_average=True)
        mask = np.arange(60)[:, None] % 4 > 0
        x = jnp.where(mask, self.x, jnp.nan)
        batches = [{"x": x[s], "mask": mask[s]} for s in (np.s_[:9], np.s_[9:])]
        jaxbn.nnx.recalibrate(norm, batches, use_running_average=True)
        assert_statistics(norm, self.x, mask)

    def test_a_shared_layer_gets_both_calls(self):
        class Twice(nnx.Module):
            def __init__(self, rngs):
                self.a = BatchNorm(2, rngs=rngs)
                self.b = self.a

            def __call__(self, x):
                return self.a(x[:, :2]) + self.b(x[:, 2:] + 1)

        net = Twice(nnx.Rngs(0))
        jaxbn.nnx.recalibrate(net, [self.x[:7], self.x[7:]])
        assert_statistics(net.a, np.concatenate([self.x[:, :2], self.x[:, 2:] + 1]))

    def test_a_stack_of_layers_in_a_scan(self):
        class Stack(nnx.Module):
            def __init__(self):
                self.blocks = make_stack()

            def __call__(self, x):
                return in_turn(self.blocks, x)

        net = Stack()
        jaxbn.nnx.recalibrate(net, [self.x[:9], self.x[9:]], sequential=True)
        check_layers(layers_of(net.blocks), [self.x], sequential=True)

    def test_under_nnx_jit_each_pass_is_traced(self):
        class Jitted(Net):
            @nnx.jit
            def __call__(self, x):
                return super(Jitted, self).__call__(x)

        nets = Net(nnx.Rngs(0)), Jitted(nnx.Rngs(0))
        for net in nets:
            jaxbn.nnx.recalibrate(net, [self.x[:7], self.x[7:]], sequential=True)
        assert_same_state(*nets)

    def test_renorm_normalizes_plainly(self):
        norm = make(4, BatchRenorm)
        jaxbn.nnx.recalibrate(norm, [self.x])
        np.testing.assert_allclose(norm.var[...], self.x.var(0), rtol=1e-5)
        assert norm.num_updates[...] == 0

    def test_an_error_changes_nothing(self):
        net = Net(nnx.Rngs(0))
        before = pure(net)
        wrong = [self.x, self.x[:, :3]]
        for batches, kwargs, error, message in [
            ([self.x[1:], self.x[:1]], {}, ValueError, "each of `batches` needs more"),
            ((b for b in [self.x]), {"sequential": True}, TypeError, "re-iterable"),
            (wrong, {"sequential": True}, TypeError, "dot_general"),
            (Interrupted(self.x), {"sequential": True}, OSError, "second pass"),
            ([self.x], {"unknown": 1}, TypeError, "unknown"),
        ]:
            with pytest.raises(error, match=message):
                jaxbn.nnx.recalibrate(net, batches, **kwargs)
        after = pure(net)
        assert jax.tree.structure(after) == jax.tree.structure(before)
        jax.tree.map(np.testing.assert_array_equal, after, before)
        assert net.blocks[0].norm.recorded is None


# --- inspect_statistics ---------------------------------------------------------------


@pytest.mark.usefixtures("lax_ranks")
class TestInspect:
    x = draw(60, 4, mean=3)

    def test_finds_the_spoiled_layer_and_changes_nothing(self):
        net = Net(nnx.Rngs(0))
        jaxbn.nnx.recalibrate(net, [self.x])
        spoiled = net.blocks[1].norm
        spoiled.mean.set_value(spoiled.mean[...].at[2].add(9.0))
        before = pure(net)
        worst, *others = jaxbn.nnx.inspect_statistics(net, [self.x])
        assert worst.name == "blocks/1/norm"
        assert worst.worst_channel == (2,)
        assert len(others) == 1
        assert all(layer.kl.max() < 1e-6 for layer in others)
        jax.tree.map(np.testing.assert_array_equal, pure(net), before)

    def test_without_data_and_with_the_epsilon_of_the_layer(self):
        norm = make(4, epsilon=1.0, use_scale=False)
        norm.var.set_value(jnp.array([1.0, 1e-3, 1.0, 1e-3]))
        [layer] = jaxbn.nnx.inspect_statistics(norm)
        assert layer.dead == [(1,), (3,)]
        assert layer.kl is None
        assert layer.scale is None

    def test_a_model_without_batch_norm(self):
        linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="`model` must have a BatchNorm;"):
            jaxbn.nnx.inspect_statistics(linear)
        with pytest.raises(ValueError, match="`model` must call a BatchNorm;"):
            jaxbn.nnx.recalibrate(linear, [self.x])
