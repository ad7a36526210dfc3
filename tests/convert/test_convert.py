"""convert: other people's weights give the same outputs, and train on alike.

tests/data/torch_convnet.npz records one training in PyTorch, so that no PyTorch is
needed here. `PYTHONPATH=tests python tests/convert/test_convert.py` writes it anew, and
a test of the peers compares it with what PyTorch does today.
"""

import os
import pathlib
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax.core import freeze

import jaxbn
from jaxbn import Params, State, convert
from jaxbn.linen import BatchNorm

RECORDING = pathlib.Path(__file__).parents[1] / "data" / "torch_convnet.npz"
FEATURES = 5
LEARNING_RATE, MOMENTUM = 0.05, 0.9
BEFORE, AFTER = 30, 50  # steps until the weights are handed over, and from there on


@pytest.fixture
def lenient():
    """Other people's code promotes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def close(actual, desired, tolerance=1e-5):
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        np.asarray(desired, np.float64),
        rtol=tolerance,
        atol=tolerance,
    )


def draw(num_features=FEATURES, seed=0):
    """A layer with a random state, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    scale, var = rng.uniform(0.5, 1.5, (2, num_features)).astype(np.float32)
    bias, mean = rng.normal(size=(2, num_features)).astype(np.float32)
    return scale, bias, mean, var


def batches(steps, axis, seed=0):
    """Batches of images with features on `axis`, far from mean 0 and variance 1."""
    rng = np.random.default_rng(seed)
    shape = [8, 3, 3]
    shape.insert(axis % 4, FEATURES)
    size = np.expand_dims(np.arange(1.0, FEATURES + 1), (0, 1, 2))
    size = np.moveaxis(size, -1, axis)
    x = rng.normal(size=(steps, *shape)) * size + 2 * size
    return x.astype(np.float32)


# ---------------------------------------------------------------- the convnet


class ConvNet(nn.Module):
    """The counterpart of `torch_convnet`: x is (batch, height, width, 3).

    SiLU and not ReLU: where the derivative jumps, one activation within a rounding of 0
    parts two trainings for good (by 3 % in 50 steps; whether depends on the machine).
    """

    @nn.compact
    def __call__(self, x, train):
        def norm(name, **kwargs):
            kwargs = {"momentum": 0.9} | kwargs
            return BatchNorm(
                not train, running_variance="unbiased", name=name, **kwargs
            )

        x = nn.Conv(8, (3, 3), padding=1, use_bias=False, name="stem")(x)
        x = nn.silu(norm("stem_norm")(x))
        x = nn.Conv(8, (3, 3), 2, padding=1, feature_group_count=4, name="grouped")(x)
        x = norm("grouped_norm", momentum=None, use_scale=False, use_bias=False)(x)
        x = nn.ConvTranspose(4, (2, 2), (2, 2), "VALID", name="up")(nn.silu(x))
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # PyTorch's order
        x = nn.silu(norm("hidden_norm", momentum=0.95)(nn.Dense(16, name="hidden")(x)))
        return nn.Dense(5, name="head")(x)


NAMES = {
    "0": "stem",
    "1": "stem_norm",
    "3": "grouped",
    "4": "grouped_norm",
    "6": "up",
    "8": "hidden",
    "9": "hidden_norm",
    "11": "head",
}


def torch_convnet():
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4),
        nn.BatchNorm2d(8, momentum=None, affine=False),
        nn.SiLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(256, 16),
        nn.BatchNorm1d(16, momentum=0.05),
        nn.SiLU(),
        nn.Linear(16, 5),
    )


def image_batches():
    """(x, label): images (channels first) and the label that a fixed filter gives."""
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(5, 3, 8, 8))
    for _ in range(BEFORE + AFTER):
        x = rng.normal(size=(16, 3, 8, 8)) * 2 + 1
        yield x.astype(np.float32), np.einsum("nchw,kchw->nk", x, pattern).argmax(1)


def train_in_torch():
    """The state dict before and after the last steps, and outputs in between."""
    import torch

    model = torch_convnet()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM)

    def arrays(prefix):
        state = model.state_dict()
        return {f"{prefix}/{k}": v.numpy().copy() for k, v in state.items()}

    recorded = {}
    for step, (x, label) in enumerate(image_batches()):
        x, label = torch.from_numpy(x), torch.from_numpy(label)
        if step == BEFORE:
            recorded = arrays("before")
            with torch.no_grad():
                recorded["inference"] = model.eval()(x).numpy()
            model.train()
            # A new optimizer, since only weights and statistics are handed over.
            optimizer = torch.optim.SGD(
                model.parameters(), LEARNING_RATE, momentum=MOMENTUM
            )
        optimizer.zero_grad()
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits, label)
        loss.backward()
        optimizer.step()
        if step == BEFORE:
            recorded["training"] = logits.detach().numpy()
    return recorded | arrays("after") | {"loss": loss.detach().numpy()}


def state_dict(recording, prefix):
    return {
        key.removeprefix(f"{prefix}/"): value
        for key, value in recording.items()
        if key.startswith(f"{prefix}/")
    }


@pytest.fixture(scope="module")
def recording():
    with np.load(RECORDING) as file:
        return dict(file)


@pytest.fixture(scope="module")
def fresh():
    """Variables of a ConvNet that nobody has trained."""
    x = jnp.zeros((2, 8, 8, 3))
    shapes = jax.eval_shape(
        lambda key: ConvNet().init(key, x, False), jax.random.key(0)
    )
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def load(state_dict, variables, names=NAMES):
    return convert.load_torch(state_dict, variables, names, conv_transpose=["6"])


def agree_with_torch(recording, variables):
    """Outputs to 1e-5; after training on, weights and statistics to 1e-3."""
    model, optimizer = ConvNet(), optax.sgd(LEARNING_RATE, MOMENTUM)

    @jax.jit
    def step(variables, momentum, x, label):
        def loss(params):
            variables_now = variables | {"params": params}
            logits, updates = model.apply(
                variables_now, x, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return losses.mean(), (logits, updates)

        gradient = jax.grad(loss, has_aux=True)
        gradients, (logits, updates) = gradient(variables["params"])
        steps, momentum = optimizer.update(gradients, momentum)
        params = optax.apply_updates(variables["params"], steps)
        return {"params": params} | updates, momentum, logits

    with jax.numpy_dtype_promotion("standard"):  # for optax
        momentum = optimizer.init(variables["params"])
        for number, (x, label) in enumerate(list(image_batches())[BEFORE:]):
            x = jnp.asarray(x.transpose(0, 2, 3, 1))
            if number == 0:
                infer = jax.jit(model.apply, static_argnames="train")
                y = infer(variables, x, train=False)
                close(y, recording["inference"])
            variables, momentum, logits = step(
                variables, momentum, x, jnp.asarray(label, jnp.int32)
            )
            if number == 0:
                close(logits, recording["training"])
    desired = load(state_dict(recording, "after"), variables)
    jax.tree.map(lambda a, b: close(a, b, 1e-3), variables, desired)
    moved = load(state_dict(recording, "before"), variables)
    kernels = (t["params"]["hidden"]["kernel"] for t in (moved, desired))
    assert np.abs(np.subtract(*kernels)).max() > 0.05  # there was something to learn


def test_convnet_trains_on_like_pytorch(recording, fresh):
    assert RECORDING.stat().st_size < 200_000
    variables = load(state_dict(recording, "before"), fresh)
    assert variables["batch_stats"]["grouped_norm"]["num_updates"] == BEFORE
    agree_with_torch(recording, variables)


@pytest.mark.peers
def test_convnet_trains_on_like_pytorch_of_today(recording, fresh):
    """The recording is what PyTorch does, too."""
    pytest.importorskip("torch")
    again = train_in_torch()
    assert set(again) == set(recording)
    for name, value in recording.items():
        close(again[name], value, 1e-3)
    agree_with_torch(again, load(state_dict(again, "before"), fresh))


# ------------------------------------------------------------------ load_torch


def test_load_keeps_what_it_is_given(recording, fresh):
    """Structure, dtypes, other collections, and the variables themselves."""
    half = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, fresh
    )
    variables = freeze(half | {"cache": {"index": jnp.arange(3)}})
    before = jax.tree.map(np.array, variables)
    weights = state_dict(recording, "before")
    loaded = load(weights, variables, {k: (path,) for k, path in NAMES.items()})
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: (a.dtype, a.shape) == (b.dtype, b.shape), loaded, before
        )
    )
    assert loaded["cache"]["index"] is variables["cache"]["index"]
    np.testing.assert_array_equal(
        loaded["params"]["head"]["kernel"], weights["11.weight"].T.astype(jnp.bfloat16)
    )
    shapes = jax.eval_shape(lambda: fresh)
    jax.tree.map(
        np.testing.assert_array_equal, load(weights, shapes), load(weights, fresh)
    )


def test_load_copies(recording, fresh):
    """PyTorch's optimizer writes into its tensors in place."""
    weights = {k: aligned(v) for k, v in state_dict(recording, "before").items()}
    loaded = load(weights, fresh)
    before = jax.tree.map(np.array, loaded)
    for array in weights.values():
        array[...] = 7
    jax.tree.map(np.testing.assert_array_equal, loaded, before)


def aligned(array):
    """A copy at an address where JAX takes NumPy's memory over, if let."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_load_names_all_that_is_wrong_at_once(recording, fresh):
    weights = state_dict(recording, "before")
    del weights["0.weight"], weights["1.running_mean"], weights["4.num_batches_tracked"]
    weights["8.bias"] = np.zeros(17, np.float32)
    weights["extra.gain"] = np.zeros(1)
    weights["extra.num_batches_tracked"] = np.zeros(())  # says nothing by itself
    names = NAMES | {"11": "top", "12": "up"}
    with pytest.raises(ValueError, match="`names` must lead from") as error:
        convert.load_torch(weights, fresh, names, conv_transpose=["6", "nowhere"])
    lines = dict(line.strip().split(": ") for line in str(error.value).split("\n")[1:])
    assert lines == {
        "named twice": "up",
        "named, but not in `variables`": "top",
        "in `conv_transpose`, but not named": "nowhere",
        "in `variables`, but not named": "params/head/bias, params/head/kernel",
        "missing in `state_dict`": "4.num_batches_tracked "
        "(for batch_stats/grouped_norm/num_updates), 0.weight (for params/stem/kernel),"
        " 12.bias (for params/up/bias), 12.weight (for params/up/kernel)",
        "missing in `state_dict` (no statistics with track_running_stats=False)": (
            "1.running_mean (for batch_stats/stem_norm/mean)"
        ),
        "extra in `state_dict`": "6.weight, 6.bias, 11.weight, 11.bias, extra.gain",
        "wrong shape": "8.bias (17,), in Flax's layout, for params/hidden/bias (16,)",
    }


def test_load_into_metadata_boxes_and_a_bare_layer():
    """Partitioned parameters keep their boxes; a single layer is called ""."""
    kernel_init = nn.with_partitioning(nn.initializers.zeros, ("in", "out"))
    dense = nn.Dense(3, kernel_init=kernel_init)
    variables = dense.init(jax.random.key(0), jnp.zeros((1, 2)))
    weight = np.arange(6, dtype=np.float32).reshape(3, 2)
    loaded = convert.load_torch(
        {"weight": weight, "bias": np.ones(3)}, variables, {"": ""}
    )
    kernel = loaded["params"]["kernel"]
    assert kernel.names == ("in", "out")
    np.testing.assert_array_equal(kernel.value, weight.T)


@pytest.mark.peers
@pytest.mark.parametrize(("rank", "groups"), [(1, 4), (2, 1), (3, 2)])
def test_convolutions_of_any_rank(rank, groups, lenient):
    """Grouped up to depthwise, dilated, strided, beside PyTorch."""
    torch = pytest.importorskip("torch")
    theirs = getattr(torch.nn, f"Conv{rank}d")(
        4, 8, 3, stride=2, padding=1, dilation=2, groups=groups
    )
    ours = nn.Conv(
        8,
        (3,) * rank,
        (2,) * rank,
        padding=1,
        kernel_dilation=(2,) * rank,
        feature_group_count=groups,
    )
    compare_layers(theirs, ours, (2, *[7, 9, 6][:rank], 4))


@pytest.mark.peers
@pytest.mark.parametrize(
    ("rank", "features", "transpose_kernel"),
    [(1, 4, False), (2, 3, False), (3, 4, True), (2, 3, True)],
)
def test_transposed_convolutions(rank, features, transpose_kernel, lenient):
    torch = pytest.importorskip("torch")
    theirs = getattr(torch.nn, f"ConvTranspose{rank}d")(4, features, 3, stride=2)
    ours = nn.ConvTranspose(
        features, (3,) * rank, (2,) * rank, "VALID", transpose_kernel=transpose_kernel
    )
    kwargs = {} if transpose_kernel else {"conv_transpose": [""]}
    compare_layers(theirs, ours, (2, *[5, 4, 3][:rank], 4), **kwargs)


@pytest.mark.peers
def test_other_layers(lenient):
    """Linear, Embedding, LayerNorm; and half tensors, which need a gradient."""
    torch = pytest.importorskip("torch")
    compare_layers(torch.nn.Linear(4, 3), nn.Dense(3), (2, 4))
    compare_layers(torch.nn.LayerNorm(4), nn.LayerNorm(epsilon=1e-5), (2, 4))
    embedding = torch.nn.Embedding(6, 3)
    variables = nn.Embed(6, 3).init(jax.random.key(0), jnp.zeros(2, jnp.int32))
    loaded = convert.load_torch(embedding.state_dict(), variables, {"": ""})
    np.testing.assert_array_equal(
        loaded["params"]["embedding"], embedding.weight.detach()
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        linear = torch.nn.Linear(2, 3).to(dtype)
        assert linear.weight.requires_grad
        weights = dict(linear.named_parameters())  # not detached as in a state dict
        variables = nn.Dense(3).init(jax.random.key(0), jnp.zeros((1, 2)))
        loaded = convert.load_torch(weights, variables, {"": ""})
        assert loaded["params"]["kernel"].dtype == jnp.float32
        np.testing.assert_array_equal(
            loaded["params"]["kernel"], linear.weight.detach().float().numpy().T
        )


def compare_layers(theirs, ours, shape, **kwargs):
    """Equal outputs of a PyTorch and a Flax layer; x has features last."""
    import torch

    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    variables = jax.eval_shape(ours.init, jax.random.key(0), x)
    loaded = convert.load_torch(theirs.state_dict(), variables, {"": ""}, **kwargs)
    with torch.no_grad():
        y = theirs(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
    close(jax.jit(ours.apply)(loaded, x), np.moveaxis(y, 1, -1))


# ------------------------------------------------------------ one layer, no peers


def test_from_torch_and_back():
    scale, bias, mean, var = draw()
    state_dict = {
        "weight": scale,
        "bias": bias,
        "running_mean": mean,
        "running_var": var,
        "num_batches_tracked": np.int64(12),
    }
    params, state = convert.from_torch(state_dict)
    for actual, desired in zip((*params, *state), state_dict.values(), strict=True):
        np.testing.assert_array_equal(actual, desired)
    back = convert.to_torch(params, state)
    assert list(back) == list(state_dict)
    assert back["num_batches_tracked"].dtype == np.int64
    for name, value in state_dict.items():
        np.testing.assert_array_equal(back[name], value)
        assert back[name].flags.writeable  # or torch.from_numpy warns

    params, state = convert.from_torch({"running_mean": mean, "running_var": var})
    assert params == Params(None, None)
    assert state.num_updates == 0
    assert len(convert.to_torch(params, state)) == 3


def test_dtypes():
    """Parameters keep theirs; statistics are float32 at least, as jaxbn.init has it."""
    scale, bias, mean, var = (jnp.asarray(a, jnp.bfloat16) for a in draw())
    arrays = {"weight": scale, "bias": bias, "running_mean": mean, "running_var": var}
    params, state = convert.from_torch(arrays)
    assert (params.scale.dtype, params.bias.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (state.mean.dtype, state.var.dtype) == (jnp.float32, jnp.float32)
    assert state.num_updates.dtype == jnp.int32
    np.testing.assert_array_equal(state.mean, mean.astype(jnp.float32))
    assert {a.dtype.name for a in convert.to_torch(params, state).values()} == {
        "float32",
        "int64",
    }
    wide = {name: np.asarray(a, np.float64) for name, a in arrays.items()}
    assert convert.from_torch(wide)[1].mean.dtype == jnp.float32
    with jax.enable_x64(True):
        params, state = convert.from_torch(wide)
        assert (params.scale.dtype, state.var.dtype) == (jnp.float64, jnp.float64)


def test_errors_name_all_that_is_wrong():
    scale, bias, mean, _ = draw()
    with pytest.raises(ValueError, match="`state_dict` must be a batch norm") as error:
        convert.from_torch({"weight": scale[:2], "running_mean": mean, "gain": bias})
    assert str(error.value).split("\n")[1:] == [
        "  missing: running_var",
        "  extra: gain",
        "  shape other than that of running_mean, (5,): weight (2,)",
    ]
    whole = {"net.bn.running_mean": mean, "net.bn.running_var": mean[:2], "bn.a": mean}
    with pytest.raises(ValueError, match=r"(?s)under 'net\.bn' .*var \(2,\)$"):
        convert.from_torch(whole, name="net.bn")
    whole["net.bn.num_batches_tracked"] = np.ones(2, int)
    with pytest.raises(ValueError, match=r"under 'net\.bn' must hold num_batches"):
        convert.from_torch(whole, name="net.bn")
    with pytest.raises(ValueError, match=r"`renorm=False`, .*jaxbn\.batch_renorm"):
        convert.from_keras(types.SimpleNamespace(renorm=True))


def test_import_brings_no_framework():
    code = (
        "import sys, jaxbn; jaxbn.convert.load_torch;"
        "names = {'flax', 'torch', 'keras', 'haiku', 'equinox', 'tensorflow'};"
        "assert not names & set(sys.modules), names & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------- one layer, beside peers


def check_outputs(params, state, infer, train, axis, **kwargs):
    """Ours beside the peer's, in inference and in training.

    `infer` and `train` take x (features on `axis`); the latter's result is y.
    """
    x = batches(1, axis, seed=1)[0]
    y, _ = jaxbn.batch_norm(x, params, state, train=False, axis=axis, **kwargs)
    close(y, infer(x))
    y, _ = jaxbn.batch_norm(x, params, state, train=True, axis=axis, **kwargs)
    close(y, train(x))
    # The peer is the same as the formula, too, and not only the same as us.
    close(y, oracle.forward(x, *params, axis=axis, **kwargs))


@pytest.mark.peers
@pytest.mark.parametrize("affine", [True, False])
def test_torch(affine):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    layer = torch.nn.BatchNorm2d(FEATURES, affine=affine)
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(draw()[0]))
            layer.bias.copy_(torch.from_numpy(draw()[1]))
    for x in batches(7, 1):
        layer(torch.from_numpy(x))
    params, state = convert.from_torch(layer.state_dict())
    assert state.num_updates == 7
    arrays = convert.to_torch(params, state)
    again = torch.nn.SyncBatchNorm(FEATURES, affine=affine)
    again.load_state_dict({k: torch.from_numpy(a) for k, a in arrays.items()})
    for name, value in layer.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    before = [np.array(a) for a in state]

    def infer(x):
        return layer.eval()(torch.from_numpy(x)).detach().numpy()

    def train(x):
        return layer.train()(torch.from_numpy(x)).detach().numpy()

    check_outputs(params, state, infer, train, 1)
    for actual, desired in zip(state, before, strict=True):
        np.testing.assert_array_equal(actual, desired)  # though the layer moved on


@pytest.mark.peers
def test_torch_without_statistics():
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="missing: running_mean, running_var"):
        convert.from_torch(layer.state_dict())
    x = jnp.zeros((2, 3))
    variables = BatchNorm(False).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"track_running_stats=False\): running_mean"):
        convert.load_torch(layer.state_dict(), variables, {"": ""})


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_torch_dtypes_there_and_back(dtype):
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm1d(FEATURES).to(getattr(torch, dtype))
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(draw()[0]))
    assert layer.weight.requires_grad
    arrays = dict(layer.named_parameters()) | dict(layer.named_buffers())
    with jax.enable_x64(True):
        params, state = convert.from_torch(arrays)
        assert params.scale.dtype == jnp.dtype(dtype)
        back = convert.to_torch(params, state)
    again = torch.nn.BatchNorm1d(FEATURES).to(getattr(torch, dtype))
    again.load_state_dict({k: torch.from_numpy(a) for k, a in back.items()})
    assert torch.equal(again.weight, layer.weight)


@pytest.mark.peers
@pytest.mark.parametrize(("axis", "affine"), [(-1, True), (1, False)])
def test_keras(axis, affine, lenient, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip(f"Keras was imported with {keras.backend.backend()}")

    def make():
        layer = keras.layers.BatchNormalization(axis, scale=affine, center=affine)
        layer.build((None, *batches(1, axis).shape[2:]))
        return layer

    layer = make()
    with pytest.raises(ValueError, match="missing: moving_mean, moving_variance"):
        convert.from_keras(keras.layers.BatchNormalization())
    if affine:
        layer.gamma.assign(draw()[0])
        layer.beta.assign(draw()[1])
    for x in batches(7, axis):
        layer(x, training=True)
    params, state = convert.from_keras(layer)
    again = make()
    again.set_weights(convert.to_keras(params, state))
    jax.tree.map(
        np.testing.assert_array_equal, convert.from_keras(again), (params, state)
    )
    check_outputs(
        params,
        state,
        lambda x: layer(x, training=False),
        lambda x: layer(x, training=True),
        axis,
        epsilon=1e-3,
    )


@pytest.mark.peers
@pytest.mark.parametrize(("axis", "affine"), [(-1, True), (1, False)])
def test_haiku(axis, affine, lenient):
    hk = pytest.importorskip("haiku")

    def net(x, is_training):
        data_format = "channels_last" if axis == -1 else "channels_first"
        norm = hk.BatchNorm(affine, affine, 0.9, data_format=data_format)
        return norm(x, is_training)

    def module(x, is_training):
        # A module around it, so that the name has more than one part.
        return hk.to_module(net)(name="net")(x, is_training)

    init, apply = hk.without_apply_rng(hk.transform_with_state(module))
    apply = jax.jit(apply, static_argnums=3)
    all_batches = batches(7, axis)
    haiku_params, haiku_state = fresh = init(None, all_batches[0], True)
    name = "net/batch_norm"
    if affine:
        shaped = haiku_params[name]["scale"].shape
        values = zip(("scale", "offset"), draw(), strict=False)
        haiku_params = {name: {word: a.reshape(shaped) for word, a in values}}
    for x in all_batches:
        _, haiku_state = apply(haiku_params, haiku_state, x, True)
    params, state = convert.from_haiku(haiku_params, haiku_state, name=name)
    assert state.num_updates == 7
    assert state.mean.shape == (FEATURES,)
    check_outputs(
        params,
        state,
        lambda x: apply(haiku_params, haiku_state, x, False)[0],
        lambda x: apply(haiku_params, haiku_state, x, True)[0],
        axis,
    )
    again = convert.to_haiku(params, state, *fresh, name=name, decay_rate=0.9)
    jax.tree.map(close, again, (haiku_params, haiku_state))  # and the same structure
    # Training goes on as if nothing had been converted.
    for x in batches(3, axis, seed=2):
        _, haiku_state = apply(haiku_params, haiku_state, x, True)
        again = again[0], apply(*again, x, True)[1]
    jax.tree.map(close, again[1], haiku_state)
    with pytest.raises(ValueError, match="shape: ") as error:
        convert.to_haiku(
            *jaxbn.init(4, use_bias=False), *fresh, name=name, decay_rate=0.9
        )
    assert "mean_ema/average (5,) for (4,)" in str(error.value)
    assert ("extra: offset" if affine else "missing: scale") in str(error.value)


@pytest.mark.peers
def test_haiku_features_on_several_axes(lenient):
    hk = pytest.importorskip("haiku")

    def net(x, is_training):
        return hk.BatchNorm(True, True, 0.9, axis=[0])(x, is_training)

    init, apply = hk.without_apply_rng(hk.transform_with_state(net))
    x = batches(1, -1)[0]
    haiku_params, haiku_state = init(None, x, True)
    want, haiku_state = apply(haiku_params, haiku_state, x, True)
    params, state = convert.from_haiku(haiku_params, haiku_state)
    assert state.mean.shape == (3, 3, FEATURES)
    y, _ = jaxbn.batch_norm(x, params, state, train=True, axis=(1, 2, 3))
    close(y, want)


@pytest.mark.peers
@pytest.mark.parametrize(("mode", "affine"), [("batch", True), ("ema", False)])
def test_equinox(mode, affine, lenient):
    eqx = pytest.importorskip("equinox")

    def make():
        return eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            FEATURES, "batch", channelwise_affine=affine, mode=mode
        )

    @eqx.filter_jit
    def call(layer, layer_state, x, inference=False):
        return jax.vmap(
            lambda x, s: layer(x, s, inference=inference),
            axis_name="batch",
            in_axes=(0, None),
            out_axes=(0, None),
        )(x, layer_state)

    layer, layer_state = fresh = make()
    params, state = convert.from_equinox(*fresh)
    np.testing.assert_array_equal(state.var, 1)
    assert state.num_updates == 0
    if affine:
        layer = eqx.tree_at(
            lambda n: (n.weight, n.bias), layer, tuple(map(jnp.asarray, draw()[:2]))
        )
    for x in batches(7, 1):
        _, layer_state = call(layer, layer_state, x)
    params, state = convert.from_equinox(layer, layer_state)
    assert state.num_updates == (7 if mode == "batch" else 1)

    def infer(x):
        return call(layer, layer_state, x, True)[0]

    if mode == "batch":
        check_outputs(params, state, infer, lambda x: call(layer, layer_state, x)[0], 1)
    else:  # there it trains by the running statistics
        x = batches(1, 1, seed=1)[0]
        y, _ = jaxbn.batch_norm(x, params, state, train=False, axis=1)
        close(y, infer(x))
    again, again_state = convert.to_equinox(params, state, *fresh)
    fresh[1].get(fresh[0].batch_state_index or fresh[0].ema_state_index)  # still valid
    arrays = eqx.filter((again, layer), eqx.is_array)
    jax.tree.map(close, *arrays)
    jax.tree.map(close, again_state, layer_state)
    # Training goes on as if nothing had been converted.
    for x in batches(3, 1, seed=2):
        y, layer_state = call(layer, layer_state, x)
        y2, again_state = call(again, again_state, x)
        close(y2, y)
    jax.tree.map(close, again_state, layer_state)
    with pytest.raises(ValueError, match=r"shape: .*running_var \(5,\) for \(4,\)"):
        convert.to_equinox(*jaxbn.init(4), layer, layer_state)


def test_keras_and_haiku_and_back():
    """With no peer there: what is written can be read."""
    scale, bias, mean, var = draw()
    params = Params(jnp.asarray(scale), jnp.asarray(bias))
    state = State(jnp.asarray(mean), jnp.asarray(var), jnp.int32(3))
    words = ("gamma", "beta", "moving_mean", "moving_variance")
    weights = dict(zip(words, convert.to_keras(params, state), strict=True))
    there = types.SimpleNamespace(**weights)
    jax.tree.map(
        np.testing.assert_array_equal,
        convert.from_keras(there),
        (params, state._replace(num_updates=jnp.int32(0))),
    )
    zero = jnp.zeros((1, 1, FEATURES))
    average = {"hidden": zero, "average": zero, "counter": jnp.int32(0)}
    there = convert.to_haiku(
        params,
        state,
        {"batch_norm": {"scale": zero, "offset": zero}, "other": {"w": zero}},
        {"batch_norm/~/mean_ema": average, "batch_norm/~/var_ema": average},
        decay_rate=0.99,
    )
    assert there[0]["other"]["w"] is zero
    jax.tree.map(
        np.testing.assert_array_equal, convert.from_haiku(*there), (params, state)
    )
    hidden = there[1]["batch_norm/~/mean_ema"]["hidden"]
    close(hidden, mean.reshape(1, 1, -1) * (1 - 0.99**3))


if __name__ == "__main__":
    os.makedirs(RECORDING.parent, exist_ok=True)
    np.savez_compressed(RECORDING, **train_in_torch())
    print(f"{RECORDING}: {RECORDING.stat().st_size} bytes")
