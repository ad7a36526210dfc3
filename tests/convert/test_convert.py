"""convert: other people's weights give the same outputs, and train on alike.

tests/data/torch_convnet.npz records one training in PyTorch, so that no PyTorch is
needed here. `PYTHONPATH=tests python tests/convert/test_convert.py` writes it anew, and
a test of the peers compares it with what PyTorch does today.
"""

import functools
import pathlib
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
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


def close(actual, desired, tolerance=1e-5):
    both = (np.asarray(each, np.float64) for each in (actual, desired))
    np.testing.assert_allclose(*both, rtol=tolerance, atol=tolerance)


def draw():
    """A layer with a random state, as NumPy arrays."""
    rng = np.random.default_rng(0)
    scale, var = rng.uniform(0.5, 1.5, (2, FEATURES)).astype(np.float32)
    bias, mean = rng.normal(size=(2, FEATURES)).astype(np.float32)
    return scale, bias, mean, var


def batches(steps, axis, seed=0):
    """Batches of images with features on `axis`, far from mean 0 and variance 1."""
    size = np.arange(1.0, FEATURES + 1)
    x = np.random.default_rng(seed).normal(2, size=(steps, 8, 3, 3, FEATURES)) * size
    return np.moveaxis(x, -1, axis % 4 + 1).astype(np.float32)


# A network of PyTorch, trained there, goes on here


class ConvNet(nn.Module):
    """The counterpart of `torch_convnet`: x is (batch, height, width, 3).

    SiLU and not ReLU: where the derivative jumps, one activation within a rounding of 0
    parts two trainings for good (by 3 % in 50 steps; whether depends on the machine).
    """

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(BatchNorm, not train, running_variance="unbiased")
        x = nn.Conv(8, (3, 3), padding=1, use_bias=False, name="stem")(x)
        x = nn.silu(norm(momentum=0.9, name="stem_norm")(x))
        x = nn.Conv(8, (3, 3), 2, padding=1, feature_group_count=4, name="grouped")(x)
        bare = {"momentum": None, "use_scale": False, "use_bias": False}
        x = nn.silu(norm(**bare, name="grouped_norm")(x))
        x = nn.ConvTranspose(4, (2, 2), (2, 2), "VALID", name="up")(x)
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # PyTorch's order
        x = norm(momentum=0.95, name="hidden_norm")(nn.Dense(16, name="hidden")(x))
        return nn.Dense(5, name="head")(nn.silu(x))


NAMES = {"0": "stem", "1": "stem_norm", "3": "grouped", "4": "grouped_norm", "6": "up"}
NAMES |= {"8": "hidden", "9": "hidden_norm", "11": "head"}


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


def train_in_torch(dtype="float32"):
    """The state dict before and after the last steps, and outputs in between."""
    import torch

    model = torch_convnet().to(getattr(torch, dtype))
    weights = [*model.parameters()]
    begin = functools.partial(torch.optim.SGD, weights, LEARNING_RATE, MOMENTUM)
    optimizer, recorded = begin(), {}

    def arrays(prefix):
        state = model.state_dict()
        return {f"{prefix}/{k}": v.numpy().copy() for k, v in state.items()}

    for step, (x, label) in enumerate(image_batches()):
        x, label = torch.from_numpy(x.astype(dtype)), torch.from_numpy(label)
        if step == BEFORE:
            recorded = arrays("before")
            with torch.no_grad():
                recorded["inference"] = model.eval()(x).numpy()
            model.train()
            optimizer = begin()  # only weights and statistics are handed over
        optimizer.zero_grad()
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits, label)
        loss.backward()
        optimizer.step()
        if step == BEFORE:
            recorded["training"] = logits.detach().numpy()
    return recorded | arrays("after") | {"loss": loss.detach().numpy()}


def state_dict(recording, prefix):
    found = {key: value for key, value in recording.items() if key.startswith(prefix)}
    return {key.removeprefix(f"{prefix}/"): value for key, value in found.items()}


@pytest.fixture(scope="module")
def recording():
    with np.load(RECORDING) as file:
        return dict(file)


def fresh(dtype="float32"):
    """Variables of a ConvNet that nobody has trained."""
    init = functools.partial(ConvNet().init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((2, 8, 8, 3)))

    def zeros(a):
        return jnp.zeros(a.shape, dtype if a.dtype == jnp.float32 else a.dtype)

    return jax.tree.map(zeros, shapes)


def load(state_dict, variables, names=NAMES):
    return convert.load_torch(state_dict, variables, names, conv_transpose=["6"])


def agree_with_torch(recording, dtype, outputs, trained):
    """Outputs, and after training on, weights and statistics; to these tolerances."""
    model, variables = ConvNet(), load(state_dict(recording, "before"), fresh(dtype))
    assert variables["batch_stats"]["grouped_norm"]["num_updates"] == BEFORE
    before, velocity = variables, jax.tree.map(jnp.zeros_like, variables["params"])

    @jax.jit
    def step(variables, velocity, x, label):
        def loss(params):
            now = variables | {"params": params}
            logits, new = model.apply(now, x, train=True, mutable=["batch_stats"])
            right = jax.nn.log_softmax(logits)[jnp.arange(len(x)), label]
            return -right.mean(), (logits, new)

        grads, (logits, new) = jax.grad(loss, has_aux=True)(variables["params"])
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, grads)
        steps = jax.tree.map(lambda v: LEARNING_RATE * v, velocity)
        params = jax.tree.map(jnp.subtract, variables["params"], steps)
        return {"params": params} | new, velocity, logits

    for number, (x, label) in enumerate([*image_batches()][BEFORE:]):
        x = x.transpose(0, 2, 3, 1).astype(dtype)
        if number == 0:
            infer = jax.jit(functools.partial(model.apply, train=False))
            close(infer(variables, x), recording["inference"], outputs)
        variables, velocity, logits = step(variables, velocity, x, label)
        if number == 0:
            close(logits, recording["training"], outputs)
    desired = load(state_dict(recording, "after"), before)
    jax.tree.map(functools.partial(close, tolerance=trained), variables, desired)
    kernels = (each["params"]["hidden"]["kernel"] for each in (before, desired))
    assert np.abs(np.subtract(*kernels)).max() > 0.05  # there was something to learn


def test_convnet_trains_on_like_pytorch(recording):
    assert RECORDING.stat().st_size < 200_000
    agree_with_torch(recording, "float32", 1e-5, 1e-3)


@pytest.mark.peers
def test_convnet_trains_on_like_pytorch_of_today(recording, lenient):
    pytest.importorskip("torch")
    again = train_in_torch()
    assert set(again) == set(recording)
    for name, value in recording.items():
        close(again[name], value, 1e-3)
    with jax.enable_x64(True):  # nothing but an error makes a difference
        agree_with_torch(train_in_torch("float64"), "float64", 1e-11, 1e-9)


# load_torch


def test_load_keeps_what_it_is_given(recording):
    """Structure, dtypes, other collections, and the variables themselves."""
    weights = state_dict(recording, "before")
    variables = freeze(fresh("bfloat16") | {"cache": {"index": jnp.arange(3)}})
    before = jax.tree.map(np.array, variables)
    loaded = load(weights, variables, {k: (path,) for k, path in NAMES.items()})
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    shapes = jax.eval_shape(lambda: variables)
    assert jax.eval_shape(lambda: loaded) == shapes
    assert loaded["cache"]["index"] is variables["cache"]["index"]
    kernel = weights["11.weight"].T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(loaded["params"]["head"]["kernel"], kernel)
    from_shapes = load(weights, shapes)
    for name in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, from_shapes[name], loaded[name])


def test_load_copies(recording):
    """PyTorch's optimizer writes into its tensors in place."""
    weights = {k: aligned(v) for k, v in state_dict(recording, "before").items()}
    loaded = load(weights, fresh())
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


def test_load_names_all_that_is_wrong_at_once(recording):
    weights = state_dict(recording, "before")
    del weights["0.weight"], weights["1.running_mean"], weights["4.num_batches_tracked"]
    weights["8.bias"] = np.zeros(17, np.float32)
    weights["extra.gain"] = np.zeros(1)
    weights["extra.num_batches_tracked"] = np.zeros(())  # says nothing by itself
    names = NAMES | {"11": "top", "12": "up"}
    with pytest.raises(ValueError, match="`names` must lead from") as error:
        convert.load_torch(weights, fresh(), names, conv_transpose=["6", "nowhere"])
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
    weights = {"weight": np.arange(6.0).reshape(3, 2), "bias": np.ones(3)}
    kernel = convert.load_torch(weights, variables, {"": ""})["params"]["kernel"]
    assert kernel.names == ("in", "out")
    np.testing.assert_array_equal(kernel.value, weights["weight"].T)


def conv(rank, groups):
    sizes = {"kernel_size": (3,), "strides": (2,), "kernel_dilation": (2,)}
    sizes = {name: size * rank for name, size in sizes.items()}
    return nn.Conv(8, **sizes, padding=1, feature_group_count=groups)


def up(rank, features, flipped):
    sizes = (3,) * rank, (2,) * rank
    return nn.ConvTranspose(features, *sizes, "VALID", transpose_kernel=flipped)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "args", "ours"),  # kernel, stride, padding, dilation, groups
    [
        ("Conv1d", (4, 8, 3, 2, 1, 2, 4), conv(1, 4)),  # dilated and depthwise
        ("Conv2d", (4, 8, 3, 2, 1, 2, 1), conv(2, 1)),
        ("Conv3d", (4, 8, 3, 2, 1, 2, 2), conv(3, 2)),
        ("ConvTranspose1d", (4, 4, 3, 2), up(1, 4, False)),
        ("ConvTranspose2d", (4, 3, 3, 2), up(2, 3, False)),
        ("ConvTranspose2d", (4, 3, 3, 2), up(2, 3, True)),
        ("ConvTranspose3d", (4, 4, 3, 2), up(3, 4, True)),
        ("Linear", (4, 3), nn.Dense(3)),
        ("LayerNorm", (4,), nn.LayerNorm(epsilon=1e-5)),
        ("Embedding", (6, 3), nn.Embed(6, 3)),
    ],
)
def test_layers_compute_as_in_torch(name, args, ours, lenient):
    torch = pytest.importorskip("torch")
    theirs = getattr(torch.nn, name)(*args)
    rank = len(getattr(ours, "kernel_size", ()))
    x = np.random.default_rng(0).normal(size=(2, *(7, 9, 6)[:rank], 4))
    x = np.arange(6).reshape(2, 3) if name == "Embedding" else x.astype(np.float32)
    variables = jax.eval_shape(ours.init, jax.random.key(0), x)
    unlike = [""] if getattr(ours, "transpose_kernel", True) is False else []
    weights = theirs.state_dict()
    loaded = convert.load_torch(weights, variables, {"": ""}, conv_transpose=unlike)
    with torch.no_grad():
        y = theirs(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
    close(jax.jit(ours.apply)(loaded, x), np.moveaxis(y, 1, -1) if rank else y)


# One layer


def test_from_torch_and_back():
    scale, bias, mean, var = draw()
    arrays = {"weight": scale, "bias": bias, "running_mean": mean, "running_var": var}
    arrays["num_batches_tracked"] = np.int64(12)
    params, state = convert.from_torch(arrays)
    for actual, desired in zip((*params, *state), arrays.values(), strict=True):
        np.testing.assert_array_equal(actual, desired)
    back = convert.to_torch(params, state)
    assert list(back) == list(arrays)
    assert back["num_batches_tracked"].dtype == np.int64
    for name, value in arrays.items():
        np.testing.assert_array_equal(back[name], value)
        assert back[name].flags.writeable  # or torch.from_numpy warns

    params, state = convert.from_torch({"running_mean": mean, "running_var": var})
    assert params == Params(None, None)
    assert state.num_updates == 0
    assert len(convert.to_torch(params, state)) == 3


def test_keras_and_haiku_and_back():
    """With no peer there: what is written can be read."""
    # Features on two axes.
    scale, bias, mean, var = (jnp.stack([a, 2 * a]) for a in draw())
    params, state = Params(scale, bias), State(mean, var, jnp.int32(3))
    words = ("gamma", "beta", "moving_mean", "moving_variance")
    weights = dict(zip(words, convert.to_keras(params, state), strict=True))
    back = convert.from_keras(types.SimpleNamespace(**weights))
    uncounted = params, state._replace(num_updates=jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, back, uncounted)

    zero = jnp.zeros((1, *mean.shape))
    average = {"hidden": zero, "average": zero, "counter": jnp.int32(0)}
    there = convert.to_haiku(
        params,
        state,
        {"batch_norm": {"scale": zero, "offset": zero}, "other": {"w": zero}},
        {"batch_norm/~/mean_ema": average, "batch_norm/~/var_ema": average},
        decay_rate=0.99,
    )
    assert there[0]["other"]["w"] is zero
    back = convert.from_haiku(*there)
    jax.tree.map(np.testing.assert_array_equal, back, (params, state))
    hidden = there[1]["batch_norm/~/mean_ema"]["hidden"]
    close(hidden, mean[None] * (1 - 0.99**3))


def test_dtypes():
    """Parameters keep theirs; statistics are float32 at least, as jaxbn.init has it."""
    scale, bias, mean, var = (jnp.asarray(a, jnp.bfloat16) for a in draw())
    arrays = {"weight": scale, "bias": bias, "running_mean": mean, "running_var": var}
    params, state = convert.from_torch(arrays)
    assert (params.scale.dtype, params.bias.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (state.mean.dtype, state.var.dtype) == (jnp.float32, jnp.float32)
    assert state.num_updates.dtype == jnp.int32
    np.testing.assert_array_equal(state.mean, mean.astype(jnp.float32))
    back = convert.to_torch(params, state)
    assert {a.dtype.name for a in back.values()} == {"float32", "int64"}
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


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_torch_dtypes_there_and_back(dtype):
    torch = pytest.importorskip("torch")

    def make():
        return torch.nn.BatchNorm1d(FEATURES).to(getattr(torch, dtype))

    layer, again = make(), make()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(draw()[0]))
    # Not detached as in a state dict: they need a gradient.
    arrays = dict(layer.named_parameters()) | dict(layer.named_buffers())
    with jax.enable_x64(True):
        params, state = convert.from_torch(arrays)
        assert params.scale.dtype == jnp.dtype(dtype)
        back = convert.to_torch(params, state)
    again.load_state_dict({k: torch.from_numpy(a) for k, a in back.items()})
    assert torch.equal(again.weight, layer.weight)


# One layer, beside peers: `call` returns y, and trains in place


class Torch:
    counts, epsilon = 7, 1e-5

    def __init__(self, axis, affine):
        self.torch = pytest.importorskip("torch")
        self.torch.set_num_threads(1)
        self.layer = self.torch.nn.BatchNorm2d(FEATURES, affine=affine)

    def put(self, params, state):
        arrays = convert.to_torch(params, state).items()
        self.layer.load_state_dict({k: self.torch.from_numpy(a) for k, a in arrays})

    def read(self):
        return convert.from_torch(self.layer.state_dict())

    def call(self, x, train):
        return self.layer.train(train)(self.torch.from_numpy(x)).detach().numpy()


class Keras:
    counts, epsilon = 0, 1e-3  # it does not count

    def __init__(self, axis, affine):
        keras = pytest.importorskip("keras")
        if keras.backend.backend() != "jax":
            pytest.skip(f"Keras was imported with {keras.backend.backend()}")
        norm = keras.layers.BatchNormalization
        self.layer = norm(axis, scale=affine, center=affine)
        self.layer.build((None, *batches(1, axis).shape[2:]))

    def put(self, params, state):
        self.layer.set_weights(convert.to_keras(params, state))

    def read(self):
        return convert.from_keras(self.layer)

    def call(self, x, train):
        return self.layer(x, training=train)


class Haiku:
    counts, epsilon = 7, 1e-5
    name = "net/batch_norm"

    def __init__(self, axis, affine):
        hk = pytest.importorskip("haiku")

        def net(x, train):
            data_format = "channels_last" if axis == -1 else "channels_first"
            return hk.BatchNorm(affine, affine, 0.9, data_format=data_format)(x, train)

        def module(x, train):  # around it, so that the name has more than one part
            return hk.to_module(net)(name="net")(x, train)

        init, apply = hk.without_apply_rng(hk.transform_with_state(module))
        self.apply = jax.jit(apply, static_argnums=3)
        self.fresh = init(None, batches(1, axis)[0], True)

    def put(self, params, state):
        self.now = convert.to_haiku(
            params, state, *self.fresh, name=self.name, decay_rate=0.9
        )

    def read(self):
        return convert.from_haiku(*self.now, name=self.name)

    def call(self, x, train):
        y, state = self.apply(*self.now, x, train)
        self.now = self.now[0], state
        return y


class Equinox:
    counts, epsilon, mode = 7, 1e-5, "batch"

    def __init__(self, axis, affine):
        self.eqx = pytest.importorskip("equinox")
        make = self.eqx.nn.make_with_state(self.eqx.nn.BatchNorm)
        options = {"channelwise_affine": affine, "mode": self.mode}
        self.now = self.fresh = make(FEATURES, "batch", **options)
        both = self.read()[1], jaxbn.init(FEATURES)[1]
        jax.tree.map(np.testing.assert_array_equal, *both)

    def put(self, params, state):
        self.now = convert.to_equinox(params, state, *self.fresh)

    def read(self):
        return convert.from_equinox(*self.now)

    def call(self, x, train):
        layer, state = self.now
        norm = functools.partial(layer, inference=not train)
        norm = jax.vmap(norm, (0, None), (0, None), axis_name="batch")
        y, state = self.eqx.filter_jit(norm)(x, state)
        self.now = layer, state
        return y


class EquinoxByAverages(Equinox):
    counts, mode = 1, "ema"  # whether there was an update


@pytest.mark.peers
@pytest.mark.parametrize(
    ("peer", "axis", "affine"),
    [
        *((Torch, 1, affine) for affine in (True, False)),
        *(
            (peer, *each)
            for peer in (Keras, Haiku)
            for each in ((-1, True), (1, False))
        ),
        (Equinox, 1, True),
        (EquinoxByAverages, 1, False),
    ],
)
def test_layer_goes_on_training_there_and_here(
    peer, axis, affine, lenient, monkeypatch
):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    theirs, again = peer(axis, affine), peer(axis, affine)
    params = Params(*map(jnp.asarray, draw()[:2])) if affine else Params(None, None)
    for each in (theirs, again):
        each.put(params, jaxbn.init(FEATURES)[1])
    for x in batches(7, axis):
        theirs.call(x, True)
    read, state = theirs.read()
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert state.num_updates == peer.counts
    before = jax.tree.map(np.array, state)
    again.put(read, state)

    x, *others = batches(3, axis, seed=1)
    options = {"axis": axis, "epsilon": peer.epsilon}
    norm = functools.partial(jaxbn.batch_norm, x, params, state, **options)
    close(norm(train=False)[0], theirs.call(x, False))
    close(again.call(x, False), theirs.call(x, False))
    y = theirs.call(x, True)
    close(again.call(x, True), y)
    if peer is not EquinoxByAverages:  # which trains by the running statistics
        close(norm(train=True)[0], y)
        # The peer is the same as the formula, too, and not only the same as us.
        close(y, oracle.forward(x, *params, **options))
    for x in others:
        close(again.call(x, True), theirs.call(x, True))
    jax.tree.map(close, again.read(), theirs.read())
    jax.tree.map(np.testing.assert_array_equal, state, before)  # it was a copy


@pytest.mark.peers
def test_equinox_debiases_in_float64(lenient):
    x = np.float64(batches(1, 1)[0])
    with jax.enable_x64(True):
        mean, var = jnp.arange(FEATURES) / 3, 1 + jnp.arange(FEATURES) / 7
        there = Equinox(1, False)
        there.put(Params(None, None), jaxbn.State(mean, var, jnp.int32(7)))
        got = there.call(x, False)
        state = there.read()[1]
    want = oracle.normalize(x, mean, var, axis=1, epsilon=there.epsilon)
    np.testing.assert_allclose(got, want, rtol=1e-13)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-15)


@pytest.mark.peers
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("peer", [Haiku, Equinox])
def test_layer_of_another_shape_is_refused(peer, affine, lenient):
    there, other = peer(-1, affine), jaxbn.init(4, use_bias=False)
    with pytest.raises(ValueError, match=r"shape: .*\(5,\) for \(4,\)") as error:
        there.put(*other)
    words = "extra: (offset|bias)" if affine else "missing: (scale|weight)"
    assert re.search(words, str(error.value))


if __name__ == "__main__":
    RECORDING.parent.mkdir(exist_ok=True)
    np.savez_compressed(RECORDING, **train_in_torch())
    print(f"{RECORDING}: {RECORDING.stat().st_size} bytes")
