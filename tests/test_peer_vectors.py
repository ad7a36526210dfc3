"""Other libraries' own test vectors for batch norm, held against ours.

ONNX and PyTorch bring theirs in their packages: cases with numbers, cases without that
PyTorch computes. Haiku's and Keras's tests are retold here as behaviour.
"""

import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

import jaxbn
from jaxbn import Params, State

peers = pytest.mark.peers


def state_of(mean, var):
    return State(jnp.asarray(mean), jnp.asarray(var), jnp.zeros((), jnp.int32))


# ONNX: features on axis 1; `momentum` is ours, and the running variance biased.

ONNX = ["example", "epsilon", "example_training_mode", "epsilon_training_mode"]


@peers
@pytest.mark.parametrize("name", ONNX)
def test_onnx(name):
    pytest.importorskip("onnx")
    home = "onnx.backend.test.case.node"
    importlib.import_module(f"{home}.batch_normalization")  # which registers its cases
    cases = {
        case.name: case
        for case in importlib.import_module(home)._NodeTestCases
        if case.model.graph.node[0].op_type == "BatchNormalization"
    }
    assert set(cases) == {f"test_batchnorm_{name}" for name in ONNX}
    case = cases[f"test_batchnorm_{name}"]
    (node,) = case.model.graph.node
    given = {attribute.name: attribute for attribute in node.attribute}
    train = "training_mode" in given and given["training_mode"].i == 1
    epsilon = given["epsilon"].f if "epsilon" in given else 1e-5
    assert "momentum" not in given  # the default is 0.9, as ours
    for inputs, outputs in case.data_sets:
        x, scale, bias, mean, var = map(jnp.asarray, inputs)
        static = {"axis": 1, "epsilon": epsilon, "train": train}
        params, state = Params(scale, bias), state_of(mean, var)
        y, new = jaxbn.batch_norm(x, params, state, **static)
        got = [y, new.mean, new.var] if train else [y]
        for actual, desired in zip(got, outputs, strict=True):
            assert actual.shape == desired.shape
            assert_close(actual, desired, jnp.float32, x.size // x.shape[1])


# PyTorch: features on axis 1; `momentum` is one minus ours, None the average of all
# updates; the running variance is unbiased. Both in float64, to the last bits.


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    # PyTorch's own tables of cases import it.
    pytest.importorskip("expecttest")
    module.set_num_threads(1)
    module.manual_seed(0)
    with jax.enable_x64(True):
        yield module


def numpy(tensor):
    return None if tensor is None else tensor.detach().numpy().copy()


def check(actual, desired):
    """Within some hundred roundings of float64: sums of 144 numbers of size 10."""
    np.testing.assert_allclose(actual, numpy(desired), rtol=1e-12, atol=1e-12)


OPS = [
    "nn.functional.batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
]


def bound_arguments(name, sample):
    """A sample's arguments by the names of `torch.nn.functional.batch_norm`."""
    words = ["running_mean", "running_var", "weight", "bias"]
    words += ["training", "momentum", "eps"]
    if name != OPS[0]:
        words = [*words[2:4], *words[:2], *words[4:]]
    if name == OPS[2] and len(sample.args) == 5:
        words = [word for word in words if not word.startswith("running")]
    defaults = dict.fromkeys(words[:4]) | {"training": False, "momentum": 0.1}
    pairs = zip(words, sample.args, strict=False)
    return defaults | {"eps": 1e-5} | dict(pairs) | sample.kwargs


@peers
@pytest.mark.parametrize("name", OPS)
def test_torch_op_samples(torch, name):
    home = importlib.import_module("torch.testing._internal.common_methods_invocations")
    (op, *_) = [op for op in home.op_db if op.name == name]
    told = {"all": 0, "no axis 1": 0, "momentum": 0}
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        told["all"] += 1
        x, a = sample.input, bound_arguments(name, sample)
        if (
            x.ndim < 2
        ):  # a batch of scalars without features, which ours has no word for
            told["no axis 1"] += 1
            continue
        leaves = [t for t in (x, a.get("weight"), a.get("bias")) if t is not None]
        given = [numpy(a.get(k)) for k in ("running_mean", "running_var")]
        y, saved = op(x, *sample.args, **sample.kwargs), ()
        if isinstance(y, tuple):
            y, *saved = y
        dy = torch.randn_like(y)
        gradients = [numpy(g) for g in torch.autograd.grad(y, leaves, dy)]
        check_op(torch, numpy(x), a, given, y, saved, numpy(dy), gradients, told)
    assert told["all"] - told["no axis 1"] >= 9
    assert told["momentum"] > 0
    assert (told["no axis 1"] > 0) == (name == OPS[0])


def check_op(torch, x, a, given, y, saved, dy, gradients, told):
    del torch
    scale, bias = numpy(a.get("weight")), numpy(a.get("bias"))
    kernel = {"axis": 1, "epsilon": a["eps"]}
    primals = [v for v in (x, scale, bias) if v is not None]

    def parts(primals):
        rest = iter(primals)
        return [None if v is None else next(rest) for v in (x, scale, bias)]

    if not a["training"]:

        def f(*primals):
            x, scale, bias = parts(primals)
            return jaxbn.normalize(x, *given, scale, bias, **kernel)

    else:

        def f(*primals):
            x, scale, bias = parts(primals)
            state = state_of(np.zeros(x.shape[1]), np.ones(x.shape[1]))
            params = Params(scale, bias)
            return jaxbn.batch_norm(x, params, state, train=True, **kernel)[0]

    got, vjp = jax.vjp(f, *primals)
    check(got, y)
    for actual, desired in zip(vjp(dy), gradients, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-11, atol=1e-11)
    if not a["training"]:
        return
    moments = jaxbn.batch_moments(x, axis=1)
    if len(saved) == 2 and saved[0].numel():
        check(moments.mean, saved[0])
        check((moments.var + a["eps"]) ** -0.5, saved[1])
    if given[0] is None:
        return
    momentum = 1 - a["momentum"]
    kwargs = {"momentum": momentum, "running_variance": "unbiased"}
    if not 0 <= momentum <= 1:  # extrapolation, which PyTorch lets pass
        told["momentum"] += 1
        with pytest.raises(ValueError, match="`momentum`"):
            jaxbn.update_state(state_of(*given), moments, **kwargs)
        return
    new = jaxbn.update_state(state_of(*given), moments, **kwargs)
    check(new.mean, a["running_mean"])  # which PyTorch has changed in place
    check(new.var, a["running_var"])


MODULES = ["nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d"]


def module_inputs(torch, name):
    home = importlib.import_module("torch.testing._internal.common_modules")
    (info,) = [info for info in home.module_db if info.name == name]
    where = {"device": "cpu", "dtype": torch.float64, "requires_grad": False}
    inputs = info.module_inputs_func(info, training=True, **where)
    return info, inputs, info.module_error_inputs_func(info, training=True, **where)


def constructed(info, given):
    layer = info.module_cls(*given.args, **given.kwargs).double()
    signature = inspect.signature(info.module_cls).bind(*given.args, **given.kwargs)
    signature.apply_defaults()
    return layer, signature.arguments


@peers
@pytest.mark.parametrize("name", MODULES)
def test_torch_modules(torch, name):
    """Two steps of training, then inference."""
    info, inputs, _ = module_inputs(torch, name)
    for case in inputs:
        layer, arguments = constructed(info, case.constructor_input)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        (x,) = case.forward_input.args
        momentum, epsilon = arguments["momentum"], arguments["eps"]
        kwargs = {
            "axis": 1,
            "epsilon": epsilon,
            "momentum": None if momentum is None else 1 - momentum,
            "running_variance": "unbiased",
        }
        params = Params(numpy(layer.weight), numpy(layer.bias))
        state = jaxbn.init(x.shape[1], param_dtype=jnp.float64)[1]
        for batch in (x, 2 * x + 1):
            y, state = jaxbn.batch_norm(
                numpy(batch), params, state, train=True, **kwargs
            )
            check(y, layer(batch))
        if layer.running_mean is None:  # PyTorch then trains for ever
            continue
        if x.numel():
            check(state.mean, layer.running_mean)
            check(state.var, layer.running_var)
            assert int(state.num_updates) == int(layer.num_batches_tracked) == 2
        else:
            assert state.num_updates == 0
            np.testing.assert_array_equal(state.var, 1)
        y, _ = jaxbn.batch_norm(numpy(x), params, state, train=False, **kwargs)
        check(y, layer.eval()(x))


@peers
@pytest.mark.parametrize("name", MODULES)
def test_torch_module_errors(torch, name):
    info, _, errors = module_inputs(torch, name)
    assert errors
    for case in errors:
        given = case.module_error_input.constructor_input
        (x,) = case.module_error_input.forward_input.args
        layer, arguments = constructed(info, given)
        with pytest.raises(case.error_type, match=case.error_regex):
            layer(x)
        params, state = jaxbn.init(x.shape[1])
        with pytest.raises(ValueError, match="`epsilon` must be positive"):
            jaxbn.batch_norm(
                numpy(x), params, state, train=True, axis=1, epsilon=arguments["eps"]
            )


# What Haiku's tests of its BatchNorm say, without Haiku.


def both_modes(x, **kwargs):
    """Training by one batch, and inference by what that leaves behind."""
    params, state = jaxbn.init(x.shape[kwargs.get("axis", -1)])
    kwargs |= {"momentum": None}
    y, state = jaxbn.batch_norm(x, params, state, train=True, **kwargs)
    return y, jaxbn.batch_norm(x, params, state, train=False, **kwargs)[0]


class TestHaiku:
    def test_channels_alike_but_for_a_shift_come_out_alike(self):
        x = jnp.arange(24.0).reshape(2, 3, 4)
        y, inference = both_modes(x)
        np.testing.assert_array_equal(y, jnp.broadcast_to(y[..., :1], y.shape))
        np.testing.assert_allclose(inference, y, rtol=1e-6)

    @pytest.mark.parametrize("axis", [-1, 1])
    @pytest.mark.parametrize("value", [1.0, 10000.1])
    def test_a_constant_comes_out_as_the_bias(self, axis, value):
        x = jnp.full((2, 5, 3, 5), value)
        params = Params(jnp.full(5, 0.5), jnp.full(5, 2.0))
        state = jaxbn.init(5)[1]
        y, _ = jaxbn.batch_norm(x, params, state, train=True, axis=axis)
        # 10000.1 is not among the float32 numbers whose sums are exact.
        close = {"rtol": 0, "atol": 0 if value == 1 else 0.5 * 2**-10 * 1e-5**-0.5}
        np.testing.assert_allclose(y, jnp.full(x.shape, 2.0), **close)

    def test_channels_of_constants_come_out_as_0(self):
        x = jnp.stack([jnp.full((5, 3, 3), 2.0), jnp.ones((5, 3, 3))], 1)
        y, _ = both_modes(x, axis=1)
        np.testing.assert_array_equal(y, 0)

    @pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3], [4, 5], [6, 7]]])
    def test_one_row_on_each_device(self, groups):
        x = jnp.arange(32.0).reshape(8, 1, 4)
        params, state = jaxbn.init(4)

        def step(x):
            kwargs = {"axis_name": "i", "axis_index_groups": groups, "epsilon": 1e-10}
            return jaxbn.batch_norm(x, params, state, train=True, **kwargs)[0]

        y = jax.jit(jax.vmap(step, axis_name="i"))(x)
        for batch in groups or [range(8)]:
            rows = np.asarray(x[jnp.array(batch)])
            want = (rows - rows.mean(0)) / rows.std(0)
            np.testing.assert_allclose(y[jnp.array(batch)], want, rtol=1e-5, atol=1e-6)

    def test_examples_of_a_vmap_share_a_batch_where_its_axis_is_named(self):
        x = jax.random.normal(jax.random.key(42), (4, 8, 8, 3))
        params, state = jaxbn.init(3)
        y, new = jax.vmap(
            lambda x: jaxbn.batch_norm(x, params, state, train=True, axis_name="i"),
            axis_name="i",
        )(x)
        want, state = jaxbn.batch_norm(x, params, state, train=True)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(new.var[0], state.var, rtol=1e-6)

    def test_dtypes_are_those_of_x(self):
        x = jax.random.normal(jax.random.key(0), (100, 5))
        params, state = jaxbn.init(5)
        y, state = jaxbn.batch_norm(x, params, state, train=True)
        assert y.dtype == state.mean.dtype == jnp.float32
        half, _ = jaxbn.batch_norm(x.astype(jnp.bfloat16), params, state, train=False)
        assert half.dtype == jnp.bfloat16


# What Keras's tests of its BatchNormalization say, without Keras.


class TestKeras:
    @pytest.mark.parametrize("axis", [-1, 1])
    @pytest.mark.parametrize("shape", [(5, 2, 3), (5, 3, 3, 2)])
    @pytest.mark.parametrize("first", [(0, 0), (1, 1)])
    def test_momentum_0(self, axis, shape, first):
        """The statistics are those of the last batch, whatever they were."""
        x = 5 + 10 * np.random.default_rng(0).normal(size=shape).astype(np.float32)
        params, state = jaxbn.init(shape[axis])
        state = state._replace(
            mean=jnp.full_like(state.mean, first[0]),
            var=jnp.full_like(state.var, first[1]),
        )
        kwargs = {"axis": axis, "momentum": 0, "epsilon": 1e-3}
        untrained, _ = jaxbn.batch_norm(x, params, state, train=False, **kwargs)
        y = x
        for _ in range(3):
            y, state = jaxbn.batch_norm(y, params, state, train=True, **kwargs)
        np.testing.assert_allclose(state.mean, 0, atol=1e-6)
        np.testing.assert_allclose(state.var, 1, atol=3e-3)  # epsilon, twice
        y, state = jaxbn.batch_norm(x, params, state, train=True, **kwargs)
        assert np.abs(untrained - y).max() > 1
        inference, _ = jaxbn.batch_norm(x, params, state, train=False, **kwargs)
        np.testing.assert_allclose(inference, y, rtol=1e-5, atol=1e-6)

    def test_everything_masked(self):
        x, mask = jnp.zeros((4, 5)), jnp.zeros((4, 1), bool)
        params, state = jaxbn.init(5, use_scale=False, use_bias=False)
        y, new = jaxbn.batch_norm(x, params, state, train=True, mask=mask)
        np.testing.assert_array_equal(y, 0)
        jax.tree.map(np.testing.assert_array_equal, new, state)

    @pytest.mark.parametrize("padding", [0.0, 0.1, 1.0, np.nan])
    def test_padding_is_not_seen(self, padding):
        x = np.array([[1, 5], [2, 5], [padding, padding], [padding, padding]] * 10)
        x = jnp.asarray(x, jnp.float32).reshape(10, 4, 2)
        mask = jnp.array([True, True, False, False]).reshape(1, 4, 1)
        params, state = jaxbn.init(2)
        kwargs = {"train": True, "momentum": 0, "mask": mask}
        _, state = jaxbn.batch_norm(x, params, state, **kwargs)
        np.testing.assert_array_equal(state.mean, [1.5, 5])
        np.testing.assert_array_equal(state.var, [0.25, 0])

    def test_a_mask_of_ones_along_two_axes(self):
        x, mask = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 1, 1), bool)
        params, state = jaxbn.init(4)
        kwargs = {"train": True, "momentum": 0, "mask": mask, "epsilon": 1e-3}
        y, state = jaxbn.batch_norm(x, params, state, **kwargs)
        np.testing.assert_array_equal(y, 0)
        np.testing.assert_array_equal(state.mean, 1)
        np.testing.assert_array_equal(state.var, 0)

    def test_frozen_is_inference(self):
        """An untrained layer that is frozen hands x on."""
        x = 5 + 10 * jax.random.normal(jax.random.key(0), (20, 4, 4, 3))
        params, state = jaxbn.init(3)
        y, new = jaxbn.batch_norm(x, params, state, train=False, epsilon=1e-7)
        np.testing.assert_allclose(y, x, rtol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, new, state)

    def test_a_variance_beyond_float16_is_kept(self):
        x = jnp.full((4, 3), 2.0, jnp.float16)
        params, state = jaxbn.init(3, param_dtype=jnp.float16)
        state = state._replace(var=jnp.full(3, 7e4))
        y, state = jaxbn.batch_norm(x, params, state, train=True, momentum=1.0)
        assert y.dtype == jnp.float16
        np.testing.assert_array_equal(state.var, np.float32(7e4))

    @pytest.mark.parametrize("momentum", [0.0, 1.0])
    def test_the_ends_of_momentum_are_allowed(self, momentum):
        x = jnp.array([[1.0], [3.0]])
        params, state = jaxbn.init(1)
        _, new = jaxbn.batch_norm(x, params, state, train=True, momentum=momentum)
        np.testing.assert_array_equal(new.mean, 2 * (1 - momentum))

    def test_renorm_is_batch_norm_in_inference(self):
        x = jax.random.normal(jax.random.key(0), (4, 10))
        scale, bias, mean, std = jax.random.normal(jax.random.key(1), (4, 10))
        args = (x, Params(scale, bias), state_of(mean, std**2))
        y, _ = jaxbn.batch_renorm(*args, train=False)
        np.testing.assert_array_equal(y, jaxbn.batch_norm(*args, train=False)[0])

    def test_renorm_without_limits(self):
        """Keras keeps an average of std for r and d; ours is that of the variance."""
        x = np.array([[4, 6, 2], [8, -2, 5], [6, 4, 3]], np.float32)
        rng = np.random.default_rng(1337)
        scale, bias, mean = rng.normal(size=(3, 3)).astype(np.float32)
        var = rng.uniform(0.5, 2, 3).astype(np.float32)
        y, new = jaxbn.batch_renorm(
            x,
            Params(scale, bias),
            state_of(mean, var),
            train=True,
            r_max=np.inf,
            d_max=np.inf,
            epsilon=1e-3,
            momentum=0.9,
        )
        std, stored = np.sqrt(x.var(0) + 1e-3), np.sqrt(var + 1e-3)
        r, d = std / stored, (x.mean(0) - mean) / stored
        want = ((x - x.mean(0)) / std * r + d) * scale + bias
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(new.mean, 0.9 * mean + 0.1 * x.mean(0), rtol=1e-5)
