"""Whole networks of other libraries, trained there, go on here where they stopped.

Those of PyTorch in float64, so that nothing but an error makes a difference.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn import convert

pytestmark = pytest.mark.peers

LIKE_TORCH = {"momentum": 0.9, "epsilon": 1e-5, "running_variance": "unbiased"}
# Features, number and first stride of the blocks of a ResNet-18.
STAGES = [(64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)]
# Expansion, features, number and first stride of the blocks of a MobileNetV2 (Sandler
# et al. 2018, table 2), without the last stages.
INVERTED = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 2, 2)]


def blocks():
    """Input features, expansion, features and stride of each inverted block."""
    last = 32
    for expansion, features, number, stride in INVERTED:
        for i in range(number):
            yield last, expansion, features, stride if i == 0 else 1
            last = features


# The networks in PyTorch


def torch_networks(torch):
    def conv_norm(last, features, size=3, stride=1, groups=1):
        kwargs = {"padding": size // 2, "groups": groups, "bias": False}
        conv = torch.nn.Conv2d(last, features, size, stride, **kwargs)
        return torch.nn.Sequential(conv, torch.nn.BatchNorm2d(features))

    class Block(torch.nn.Module):
        def __init__(self, last, features, stride):
            super().__init__()
            self.first = conv_norm(last, features, 3, stride)
            self.second = conv_norm(features, features)
            if last != features or stride != 1:
                self.skip = conv_norm(last, features, 1, stride)

        def forward(self, x):
            y = self.second(self.first(x).relu())
            return (y + (self.skip(x) if hasattr(self, "skip") else x)).relu()

    class Inverted(torch.nn.Module):
        def __init__(self, last, expansion, features, stride):
            super().__init__()
            wide = last * expansion
            if expansion > 1:
                self.widen = conv_norm(last, wide, 1)
            self.depthwise = conv_norm(wide, wide, 3, stride, wide)
            self.narrow = conv_norm(wide, features, 1)
            self.adds = last == features and stride == 1

        def forward(self, x):
            relu6 = torch.nn.functional.relu6
            y = relu6(self.widen(x)) if hasattr(self, "widen") else x
            y = self.narrow(relu6(self.depthwise(y)))
            return x + y if self.adds else y

    def head(features):
        pool = torch.nn.AdaptiveAvgPool2d(1)
        return pool, torch.nn.Flatten(), torch.nn.Linear(features, 10)

    def resnet():
        last, layers = 64, [conv_norm(3, 64, 7, 2), torch.nn.ReLU()]
        layers.append(torch.nn.MaxPool2d(3, 2, 1))
        for features, number, stride in STAGES:
            for i in range(number):
                layers.append(Block(last, features, stride if i == 0 else 1))
                last = features
        return torch.nn.Sequential(*layers, *head(512))

    def mobilenet():
        stem = conv_norm(3, 32, 3, 2), torch.nn.ReLU6()
        return torch.nn.Sequential(*stem, *(Inverted(*b) for b in blocks()), *head(64))

    return {"resnet": resnet, "mobilenet": mobilenet}


# In Flax


class ConvNorm(nn.Module):
    features: int
    size: int = 3
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x, train):
        kwargs = {"padding": self.size // 2, "feature_group_count": self.groups}
        sizes = (self.size,) * 2, (self.stride,) * 2
        x = nn.Conv(self.features, *sizes, use_bias=False, **kwargs)(x)
        return jaxbn.linen.BatchNorm(not train, **LIKE_TORCH)(x)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(ConvNorm(64, 7, 2)(x, train))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for features, number, first in STAGES:
            for stride in (first,) + (1,) * (number - 1):
                y = nn.relu(ConvNorm(features, 3, stride)(x, train))
                y = ConvNorm(features)(y, train)
                if y.shape != x.shape:
                    x = ConvNorm(features, 1, stride)(x, train)
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu6(ConvNorm(32, 3, 2)(x, train))
        for last, expansion, features, stride in blocks():
            y, wide = x, last * expansion
            if expansion > 1:
                y = nn.relu6(ConvNorm(wide, 1)(y, train))
            y = nn.relu6(ConvNorm(wide, 3, stride, wide)(y, train))
            y = ConvNorm(features, 1)(y, train)
            x = x + y if x.shape == y.shape else y
        return nn.Dense(10)(x.mean((1, 2)))


class NnxConvNorm(nnx.Module):
    def __init__(self, last, features, size=3, stride=1, groups=1):
        rngs, kwargs = nnx.Rngs(0), {"padding": size // 2, "use_bias": False}
        kwargs |= {"strides": stride, "feature_group_count": groups}
        self.conv = nnx.Conv(last, features, (size,) * 2, rngs=rngs, **kwargs)
        self.norm = jaxbn.nnx.BatchNorm(features, rngs=rngs, **LIKE_TORCH)

    def __call__(self, x):
        return self.norm(self.conv(x))


class NnxMobileNet(nnx.Module):
    def __init__(self):
        layers = [NnxConvNorm(3, 32, 3, 2)]
        for last, expansion, features, stride in blocks():
            wide = last * expansion
            if expansion > 1:
                layers.append(NnxConvNorm(last, wide, 1))
            layers.append(NnxConvNorm(wide, wide, 3, stride, wide))
            layers.append(NnxConvNorm(wide, features, 1))
        self.layers = nnx.List(layers)
        self.head = nnx.Linear(64, 10, rngs=nnx.Rngs(0))

    def __call__(self, x):
        stem, *layers = self.layers
        x, layers = nnx.relu6(stem(x)), iter(layers)
        for _, expansion, _, _ in blocks():
            y = nnx.relu6(next(layers)(x)) if expansion > 1 else x
            depthwise, narrow = next(layers), next(layers)
            y = narrow(nnx.relu6(depthwise(y)))
            x = x + y if x.shape == y.shape else y
        return self.head(x.mean((1, 2)))


# From PyTorch


@functools.cache
def trained(name):
    """A network after three steps: arrays, logits, and arrays of the next gradients.

    The last are the gradients of the weights, and the statistics after that step.
    """
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch_networks(torch)[name]().double()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)

    def backward(step):
        x, labels = map(torch.from_numpy, batch(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net.train()(x), labels).backward()

    for step in range(3):
        backward(step)
        optimizer.step()
    before = {k: v.numpy().copy() for k, v in net.state_dict().items()}
    logits = net.eval()(torch.from_numpy(batch(9)[0])).detach().numpy()
    backward(3)
    after = {k: v.numpy() for k, v in net.named_buffers()}
    after |= {k: v.grad.numpy() for k, v in net.named_parameters()}
    names = dict.fromkeys(k.rpartition(".")[0] for k in before)
    return before, logits, after, list(names)


def batch(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(1, 2, (8, 3, 32, 32)), rng.integers(10, size=8)


def channels_last(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def loss(logits, labels):
    return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()


def as_float64(tree):
    def wide(a):
        is_float = jnp.issubdtype(a.dtype, jnp.floating)
        return jnp.zeros(a.shape, jnp.float64 if is_float else a.dtype)

    return jax.tree.map(wide, tree)


def assert_close(actual, desired):
    def close(path, a, b):
        error = 1e-13 + 1e-11 * np.abs(b).max()  # some are 0 but for rounding
        np.testing.assert_allclose(a, b, rtol=0, atol=error, err_msg=str(path))

    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree_util.tree_map_with_path(close, actual, desired)


@pytest.fixture
def float64():
    promotion = jax.numpy_dtype_promotion("standard")
    with jax.enable_x64(True), promotion, jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_from_torch_to_linen(name, float64):
    before, logits, after, modules = trained(name)
    model = {"resnet": ResNet, "mobilenet": MobileNet}[name]()
    x, labels = batch(3)
    paths = []

    def note(method, args, kwargs, context):
        if isinstance(context.module, nn.Conv | jaxbn.linen.BatchNorm | nn.Dense):
            paths.append(context.module.path)
        return method(*args, **kwargs)

    with nn.intercept_methods(note):
        init = functools.partial(model.init, train=True)
        shapes = jax.eval_shape(init, jax.random.key(0), channels_last(x))
    fresh = as_float64(shapes)
    names = dict(zip(modules, paths, strict=True))
    variables = convert.load_torch(before, fresh, names)
    apply = jax.jit(model.apply, static_argnames=("train", "mutable"))
    actual = apply(variables, channels_last(batch(9)[0]), train=False)
    assert_close(actual, logits)

    def step(params):
        rest = variables | {"params": params}
        args = rest, channels_last(x), True
        logits, updates = model.apply(*args, mutable=["batch_stats"])
        return loss(logits, labels), updates

    grads, updates = jax.jit(jax.grad(step, has_aux=True))(variables["params"])
    assert_close({"params": grads, **updates}, convert.load_torch(after, fresh, names))


def test_from_torch_to_nnx(float64):
    before, logits, after, modules = trained("mobilenet")
    x, labels = batch(3)
    model = NnxMobileNet()
    pairs = itertools.product(range(len(model.layers)), ("conv", "norm"))
    paths = [f"layers/{i}/{name}" for i, name in pairs] + ["head"]
    names = dict(zip(modules, paths, strict=True))
    nnx.update(model, as_float64(nnx.state(model)))
    desired = nnx.clone(model)
    jaxbn.nnx.load_torch(model, before, names)
    jaxbn.nnx.load_torch(desired, after, names)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params):
        model = nnx.merge(graph, params, rest, copy=True)
        return loss(model(channels_last(x)), labels), nnx.state(model, nnx.BatchStat)

    grads, stats = jax.jit(jax.grad(step, has_aux=True))(params)
    assert_close((grads, stats), tuple(nnx.state(desired, nnx.Param, nnx.BatchStat)))
    model.eval()
    assert_close(nnx.jit(lambda m, x: m(x))(model, channels_last(batch(9)[0])), logits)


# From Keras and Haiku


def assert_norms_agree(norms, epsilon):
    """Each norm of a network: its input, its output in inference, Params and State."""
    for x, y, params, state in norms:
        got, _ = jaxbn.batch_norm(x, params, state, train=False, epsilon=epsilon)
        np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


def test_keras_mobilenet(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    x, labels = batch(0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        x = channels_last(x).astype(jnp.float32)
        shape = x.shape[1:]
        net = keras.applications.MobileNetV2(shape, 0.35, weights=None, classes=10)
        net.compile("sgd", "sparse_categorical_crossentropy")
        net.fit(x, labels, epochs=2, verbose=0)
        norms = [n for n in net.layers if "BatchNormalization" in type(n).__name__]
        ends = [end for n in norms for end in (n.input, n.output)]
        seen = keras.Model(net.inputs, ends)(x, training=False)
    read = [convert.from_keras(n) for n in norms]
    assert len(read) == 52
    both = zip(seen[::2], seen[1::2], read, strict=True)
    assert_norms_agree([(x, y, *ours) for x, y, ours in both], epsilon=1e-3)
    for norm, ours in zip(norms, read, strict=True):
        arrays = convert.to_keras(*ours)
        norm.set_weights([np.zeros_like(a) for a in arrays])
        norm.set_weights(arrays)
        jax.tree.map(np.testing.assert_array_equal, convert.from_keras(norm), ours)


def test_haiku_resnet():
    hk = pytest.importorskip("haiku")
    x = channels_last(batch(0)[0]).astype(jnp.float32)
    seen = {}

    def note(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if (
            isinstance(context.module, hk.BatchNorm)
            and context.method_name == "__call__"
        ):
            seen[context.module.module_name] = args[0], y
        return y

    def run(x, train):
        with hk.intercept_methods(note):
            return hk.nets.ResNet18(10)(x, train)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        net = hk.without_apply_rng(hk.transform_with_state(run))
        params, state = jax.jit(net.init, static_argnums=2)(jax.random.key(0), x, True)
        for _ in range(3):
            train = jax.jit(net.apply, static_argnums=3)
            state = train(params, state, x, True)[1]
        net.apply(params, state, x, False)
    assert len(seen) == 20
    norms = []
    for name, xy in seen.items():
        ours = convert.from_haiku(params, state, name=name)
        norms.append((*xy, *ours))
        back = convert.to_haiku(*ours, params, state, name=name, decay_rate=0.9)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, back, (params, state))
    assert_norms_agree(norms, epsilon=1e-5)
