"""NNX: find_pairs, fold and load_torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbn.nnx import (
    BatchNorm,
    BatchRenorm,
    find_pairs,
    fold,
    inspect_statistics,
    load_torch,
)

EPSILON = {"epsilon": 1e-5}


def conv(inputs, outputs, size, rngs, **options):
    return nnx.Conv(inputs, outputs, (size, size), use_bias=False, rngs=rngs, **options)


class Block(nnx.Module):
    """A residual block, as in any NNX ResNet."""

    def __init__(self, inputs, features, strides, rngs):
        self.conv1 = conv(inputs, features, 3, rngs, strides=strides)
        self.norm1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = conv(features, features, 3, rngs)
        self.norm2 = BatchNorm(features, rngs=rngs)
        self.project = nnx.data(None)
        if strides > 1:
            parts = conv(inputs, features, 1, rngs, strides=strides)
            norm = BatchRenorm(features, rngs=rngs)
            self.project = nnx.Sequential(parts, norm)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(x=self.conv2(inputs=y))
        return nnx.relu(y + (x if self.project is None else self.project(x)))


@nnx.jit
def call(module, x):
    return module(x)


class ResNet(nnx.Module):
    """Modules in lists, dicts and tuples; one block is jitted, one rematerialized."""

    def __init__(self, rngs):
        self.pixels = nnx.data(jnp.full((1, 1, 1, 3), 0.1))  # an array as it is
        self.stem = nnx.Dict(conv=conv(3, 8, 3, rngs), norm=BatchNorm(8, rngs=rngs))
        self.blocks = nnx.List([Block(8, 8, 1, rngs), Block(8, 12, 2, rngs)])
        self.head = nnx.data(
            (nnx.Linear(12, 12, rngs=rngs), nnx.BatchNorm(12, rngs=rngs))
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem["norm"](self.stem["conv"](x - self.pixels)))
        x = call(self.blocks[0], x)
        x = nnx.remat(lambda block, x: block(x))(self.blocks[1], x)
        x = self.dropout(x.mean((1, 2)))
        return self.head[1](self.head[0](x))


def noisy(model, seed=0):
    """The model as after a training, in inference."""
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("var", "scale"):
            variable.set_value(jnp.array(rng.uniform(0.5, 1.5, variable.shape), "f4"))
        elif path[-1] in ("mean", "bias"):
            variable.set_value(jnp.array(rng.normal(size=variable.shape), "f4"))
    model.eval()
    return model


def check_folded(model, x, pairs):
    y, smaller = call(model, x), fold(model, pairs)
    assert abs(call(smaller, x) - y).max() <= 1e-5 * abs(y).max()
    np.testing.assert_array_equal(call(model, x), y)
    return smaller


def test_a_resnet_is_folded_whole():
    model = noisy(ResNet(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 9, 9, 3))
    pairs = find_pairs(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert pairs == [
        ("stem/conv", "stem/norm", EPSILON),
        ("blocks/0/conv1", "blocks/0/norm1", EPSILON),
        ("blocks/0/conv2", "blocks/0/norm2", EPSILON),
        ("blocks/1/conv1", "blocks/1/norm1", EPSILON),
        ("blocks/1/conv2", "blocks/1/norm2", EPSILON),
        ("blocks/1/project/layers/0", "blocks/1/project/layers/1", EPSILON),
        ("head/0", "head/1", EPSILON),
    ]
    assert pairs.unfoldable == {}
    smaller = check_folded(model, x, pairs)
    norms = nnx.BatchNorm | BatchNorm
    assert not [m for _, m in nnx.iter_modules(smaller) if isinstance(m, norms)]
    assert jax.tree.leaves(nnx.state(smaller, nnx.BatchStat)) == []
    assert len(inspect_statistics(model)) == 7
    view = nnx.view(smaller, use_running_average=True, deterministic=True)
    np.testing.assert_array_equal(call(view, x), call(smaller, x))
    assert find_pairs(model, x=x) == pairs  # nothing is left in the model


class Net(nnx.Module):
    """Any function of x and the modules `parts`."""

    def __init__(self, function, **parts):
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, x):
        return self.function(self, x)


class Twice(nnx.BatchNorm):
    def __call__(self, x):
        return 2 * super().__call__(x)


def sow(m, x):
    x = m.a(x)
    m.sow(nnx.Intermediate, "x", x)
    return m.norm(x)


def write(m, x):
    m.kept.set_value(m.a(x))
    return m.norm(m.kept[...])


BEFORE = [("norm", "a", EPSILON), ("norm", "b", EPSILON)]
CASES = {
    "before": (lambda m, x: m.a(y := m.norm(nnx.relu(x))) + m.b(y), BEFORE),
    "sow": (sow, [("a", "norm", EPSILON)]),
    "written": (write, "output of a also goes to the results"),
    "tied": (lambda m, x: m.norm(m.a(x)) @ m.a.kernel.T, "kernel of a also goes to"),
}


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_pairs_are_those_whose_outputs_go_nowhere_else(name):
    function, expected = CASES[name]
    rngs = nnx.Rngs(0)
    a, b = (nnx.Linear(4, 4, use_bias=False, rngs=rngs) for _ in range(2))
    x = jax.random.normal(jax.random.key(1), (5, 4))
    kept = nnx.Cache(jnp.zeros_like(x))
    model = noisy(Net(function, a=a, b=b, norm=BatchNorm(4, rngs=rngs), kept=kept))
    pairs = find_pairs(model, x)
    if isinstance(expected, str):
        assert expected in pairs.unfoldable["norm"]
    else:
        assert pairs == expected
        assert pairs.unfoldable == {}
        check_folded(model, x, pairs)


def test_shared_arrays_stacks_and_other_classes_are_named():
    rngs, x = nnx.Rngs(0), jnp.ones((3, 2, 4))
    linear, norm = nnx.Linear(4, 4, rngs=rngs), BatchNorm(4, rngs=rngs)
    other = nnx.Linear(4, 4, rngs=rngs)
    other.kernel = linear.kernel
    model = Net(lambda m, x: m.norm(m.a(x)) + m.b(x), a=linear, b=other, norm=norm)
    model.eval()
    assert "kernel of a also goes to b" in find_pairs(model, x).unfoldable["norm"]
    model = Net(lambda m, x: m.norm(m.b(x)) + m.a(x), a=linear, b=other, norm=norm)
    model.eval()
    assert "shares its kernel" in find_pairs(model, x).unfoldable["norm"]

    @nnx.vmap
    def stack(rngs):
        parts = nnx.Linear(4, 4, rngs=rngs), BatchNorm(4, rngs=rngs)
        return nnx.Sequential(*parts)

    apply = nnx.vmap(lambda block, x: block(x))
    model = Net(lambda m, x: apply(m.a, x), a=stack(nnx.Rngs(0).split(3)))
    model.eval()
    assert "is a stack" in find_pairs(model, x).unfoldable["a/layers/1"]

    twice = Twice(4, rngs=rngs)
    model = Net(lambda m, x: m.norm(m.a(x)), a=nnx.Linear(4, 4, rngs=rngs), norm=twice)
    model.eval()
    assert "has a call of its own" in find_pairs(model, x).unfoldable["norm"]


def test_dtypes_stay_as_they_are():
    """The batch norm of a half-precision layer returns float32; so does its place."""
    rngs, x = nnx.Rngs(0), jnp.ones((3, 4))
    half = nnx.Linear(4, 4, dtype=jnp.bfloat16, rngs=rngs)
    for dtype in (None, jnp.float16):
        norm = BatchNorm(4, dtype=dtype, rngs=rngs)
        model = nnx.Sequential(half, norm)
        model.eval()
        assert fold(model, find_pairs(model, x))(x).dtype == model(x).dtype


def test_load_torch_fills_a_model():
    """All arrays at their places, in Flax's layout; nothing if there is an error."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 4, 2, 2)).astype(np.float32)
    scale, bias, mean, var = rng.uniform(0.5, 1, (4, 4)).astype(np.float32)
    names = {"0": "layers/0", "1": ("layers", "1")}
    theirs = {"0.weight": weight, "1.weight": scale, "1.bias": bias}
    theirs |= {"1.running_mean": mean, "1.running_var": var}
    rngs = nnx.Rngs(0)
    conv = nnx.ConvTranspose(3, 4, (2, 2), use_bias=False, rngs=rngs)
    norm = BatchNorm(4, momentum=None, rngs=rngs)
    model = nnx.Sequential(conv, norm, nnx.relu, nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    before = jax.tree.leaves(nnx.state(model))
    with pytest.raises(ValueError, match=r"missing in `state_dict`: .*num_batches"):
        load_torch(model, theirs, names, conv_transpose=["0"])
    for old, new in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        assert old is new
    theirs["1.num_batches_tracked"] = np.int64(7)
    load_torch(model, theirs, names, conv_transpose=["0"])
    flipped = weight[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
    np.testing.assert_array_equal(conv.kernel[...], flipped)
    for name, value in [("scale", scale), ("bias", bias), ("mean", mean), ("var", var)]:
        np.testing.assert_array_equal(getattr(norm, name)[...], value)
    assert norm.num_updates[...] == 7
