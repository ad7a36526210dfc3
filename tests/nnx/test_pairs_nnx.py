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


class Block(nnx.Module):
    def __init__(self, norm, inputs, outputs, rngs):
        size = (3, 3)
        self.conv = nnx.Conv(inputs, outputs, size, use_bias=False, rngs=rngs)
        self.norm = norm(outputs, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(x=self.conv(inputs=x)))


@nnx.jit
def call(module, x):
    return module(x)


class ConvNet(nnx.Module):
    """Modules in lists, dicts and tuples; one block is jitted, one rematerialized."""

    def __init__(self, rngs):
        self.pixels = nnx.data(jnp.full((1, 1, 1, 3), 0.1))  # an array as it is
        self.stem = nnx.Dict(block=Block(nnx.BatchNorm, 3, 4, rngs))
        self.blocks = nnx.List([Block(n, 4, 4, rngs) for n in (BatchNorm, BatchRenorm)])
        self.head = nnx.data((nnx.Linear(4, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.stem["block"](x - self.pixels)
        y = call(self.blocks[0], x)
        x += nnx.remat(lambda block, x: block(x))(self.blocks[1], y)
        return self.head[1](self.head[0](self.dropout(x.mean((1, 2)))))


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


def test_a_network_is_folded_whole():
    model = noisy(ConvNet(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 3))
    pairs = find_pairs(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    blocks = ("stem/block", "blocks/0", "blocks/1")
    assert pairs == [
        *[(f"{block}/conv", f"{block}/norm", EPSILON) for block in blocks],
        ("head/0", "head/1", EPSILON),
    ]
    assert pairs.unfoldable == {}
    smaller = check_folded(model, x, pairs)
    norms = nnx.BatchNorm | BatchNorm
    assert not [m for _, m in nnx.iter_modules(smaller) if isinstance(m, norms)]
    assert jax.tree.leaves(nnx.state(smaller, nnx.BatchStat)) == []
    assert len(inspect_statistics(model)) == 4
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
    "skip": (lambda m, x: (y := m.a(x)) + m.norm(y), "of a also goes to `add`"),
    "mask": (lambda m, x: m.norm(m.a(x), mask=x > 0), "a mask"),
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
    def reasons(function, **parts):
        model = Net(function, **parts)
        model.eval()
        return find_pairs(model, jnp.ones((3, 2, 4))).unfoldable

    rngs = nnx.Rngs(0)
    a, b = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
    norm, twice = BatchNorm(4, rngs=rngs), Twice(4, rngs=rngs)
    after_a = reasons(lambda m, x: m.norm(m.a(x)), a=a, norm=twice)
    assert "has a call of its own" in after_a["norm"]
    b.kernel, parts = a.kernel, {"a": a, "b": b, "norm": norm}
    after_a = reasons(lambda m, x: m.norm(m.a(x)) + m.b(x), **parts)
    assert "kernel of a also goes to b" in after_a["norm"]
    after_b = reasons(lambda m, x: m.norm(m.b(x)) + m.a(x), **parts)
    assert "shares its kernel" in after_b["norm"]

    @nnx.vmap
    def stack(rngs):
        return nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), BatchNorm(4, rngs=rngs))

    apply = nnx.vmap(lambda block, x: block(x))
    stacked = reasons(lambda m, x: apply(m.a, x), a=stack(nnx.Rngs(0).split(3)))
    assert "is a stack" in stacked["a/layers/1"]


def test_dtypes_stay_as_they_are():
    """The batch norm of a half-precision layer returns float32; so does its place."""
    rngs, x = nnx.Rngs(0), jnp.ones((3, 4))
    half = nnx.Linear(4, 4, dtype=jnp.bfloat16, rngs=rngs)
    for dtype in (None, jnp.float16):
        norm = BatchNorm(4, dtype=dtype, rngs=rngs)
        model = nnx.Sequential(half, norm)
        model.eval()
        assert fold(model, find_pairs(model, x))(x).dtype == model(x).dtype


def test_bad_input():
    rngs, x = nnx.Rngs(0), jnp.ones((3, 4))
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs))
    with pytest.raises(ValueError, match="must have a BatchNorm; got none"):
        find_pairs(model, x)
    with pytest.raises(ValueError, match="arguments must be those of inference"):
        find_pairs(nnx.Sequential(*model.layers, BatchNorm(4, rngs=rngs)), x)


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
