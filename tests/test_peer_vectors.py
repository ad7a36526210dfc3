"""ONNX's and PyTorch's own test vectors for batch norm, held against ours.

They come in their packages: ONNX's with numbers, PyTorch's to be computed by it.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

import jaxbn
from jaxbn import Params, State

pytestmark = pytest.mark.peers


def state_of(mean, var):
    return State(jnp.asarray(mean), jnp.asarray(var), jnp.zeros((), jnp.int32))


# ONNX: features on axis 1; `momentum` is ours, and the running variance biased.

ONNX = ["example", "epsilon", "example_training_mode", "epsilon_training_mode"]


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


OPS = ["nn.functional.batch_norm", "native_batch_norm", "_native_batch_norm_legit"]


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


@pytest.mark.parametrize("name", OPS)
def test_torch_op_samples(torch, name):
    home = importlib.import_module("torch.testing._internal.common_methods_invocations")
    (op, *_) = [op for op in home.op_db if op.name == name]
    told = {"all": 0, "no axis 1": 0, "momentum": 0}
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        told["all"] += 1
        x, a = sample.input, bound_arguments(name, sample)
        if x.ndim < 2:  # a batch of scalars, without features
            told["no axis 1"] += 1
            continue
        leaves = [t for t in (x, a.get("weight"), a.get("bias")) if t is not None]
        given = [numpy(a.get(k)) for k in ("running_mean", "running_var")]
        y, saved = op(x, *sample.args, **sample.kwargs), ()
        if isinstance(y, tuple):
            y, *saved = y
        dy = torch.randn_like(y)
        gradients = [numpy(g) for g in torch.autograd.grad(y, leaves, dy)]
        check_op(numpy(x), a, given, y, saved, numpy(dy), gradients, told)
    assert told["all"] - told["no axis 1"] >= 9
    assert told["momentum"] > 0
    assert (told["no axis 1"] > 0) == (name == OPS[0])


def check_op(x, a, given, y, saved, dy, gradients, told):
    scale, bias = numpy(a.get("weight")), numpy(a.get("bias"))
    kernel = {"axis": 1, "epsilon": a["eps"]}
    primals = [v for v in (x, scale, bias) if v is not None]

    def parts(primals):
        rest = iter(primals)
        return [None if v is None else next(rest) for v in (x, scale, bias)]

    def f(*primals):
        x, scale, bias = parts(primals)
        if not a["training"]:
            return jaxbn.normalize(x, *given, scale, bias, **kernel)
        state = jaxbn.init(x.shape[1], param_dtype=jnp.float64)[1]
        return jaxbn.batch_norm(x, Params(scale, bias), state, train=True, **kernel)[0]

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
