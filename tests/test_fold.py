"""fold: a layer and its batch norm in one layer give the same outputs.

The layers are Flax's own. What they return goes through the oracle's batch norm in
float64, with random statistics, and is compared with what the folded layer returns.
"""

import copy
import statistics
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax.core import freeze

import jaxbn
from jaxbn import Params, State
from jaxbn.linen import BatchNorm

EPSILON = 1e-2  # large enough that a forgotten one is seen


def draw(shape, seed=0, *, use_scale=True, use_bias=True, dtype=np.float32):
    """A trained batch norm: nothing in it is 0 or 1."""
    rng = np.random.default_rng(seed)
    scale, var = rng.uniform(0.3, 2, (2, *np.atleast_1d(shape))).astype(dtype)
    bias, mean = (rng.normal(size=(2, *np.atleast_1d(shape))) + 0.5).astype(dtype)
    params = Params(scale if use_scale else None, bias if use_bias else None)
    return params, State(mean, var, np.int32(7))


def in_float64(x, params, state, axis=-1):
    return oracle.normalize(x, *state[:2], *params, epsilon=EPSILON, axis=axis)


def trained(layer, x, seed=1):
    """Random parameters of a layer, its bias too, which Flax begins with 0."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=a.shape) / max(1, a.size) ** 0.25).astype(a.dtype)
        for name, a in shapes.items()
    }


def draw_input(shape, seed=2):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same(actual, desired, tolerance=1e-5):
    """Within 1e-5 of the largest: sums of some tens of float32 products."""
    actual, desired = np.asarray(actual), np.asarray(desired)
    assert actual.shape == desired.shape
    size = max(1, np.abs(desired).max())
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * size)


class After(NamedTuple):
    """A layer, the shape of x, and where its output and kernel have the features."""

    layer: nn.Module
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    features_axis: int | tuple[int, ...] = -1


AFTER = {
    "dense": After(nn.Dense(5), (4, 3)),
    "dense general": After(nn.DenseGeneral((4, 5)), (2, 3), (-2, -1), (-2, -1)),
    "dense general, last": After(nn.DenseGeneral((4, 5)), (2, 3)),
    "dense general, first": After(nn.DenseGeneral((4, 5)), (2, 3), -2, -2),
    "dense general, inputs": After(nn.DenseGeneral(5, axis=(-2, -1)), (2, 3, 4)),
    "conv 1": After(nn.Conv(6, (3,)), (2, 9, 4)),
    "conv 3": After(nn.Conv(6, (3, 2, 3)), (2, 5, 6, 5, 4)),
    "circular": After(nn.Conv(6, (3, 3), padding="CIRCULAR"), (2, 8, 8, 4)),
    "input dilation": After(nn.Conv(6, (3,), padding=1, input_dilation=2), (2, 8, 4)),
    "depthwise": After(nn.Conv(8, (3, 3), feature_group_count=4), (2, 8, 8, 4)),
    "all at once": After(
        nn.Conv(6, (3, 2), (2, 1), 1, kernel_dilation=2, feature_group_count=2),
        (2, 8, 8, 4),
    ),
    "local": After(nn.ConvLocal(6, (3,)), (2, 8, 4)),
    "transpose 3": After(nn.ConvTranspose(6, (2, 2, 2), (2, 1, 2)), (1, 3, 3, 3, 4)),
    "transpose valid": After(
        nn.ConvTranspose(6, (3, 3), (2, 2), "VALID", kernel_dilation=(2, 1)),
        (2, 5, 4, 4),
    ),
    "transpose_kernel": After(
        nn.ConvTranspose(6, (3, 3), (2, 2), transpose_kernel=True),
        (2, 5, 4, 4),
        features_axis=-2,
    ),
    "transpose_kernel, circular": After(
        nn.ConvTranspose(4, (3,), (2,), "CIRCULAR", transpose_kernel=True),
        (2, 6, 4),
        features_axis=-2,
    ),
}


@pytest.mark.parametrize("name", AFTER)
def test_after_a_layer(name):
    layer, shape, axis, features_axis = AFTER[name]
    x = draw_input(shape)
    weights = trained(layer, x)
    y = np.asarray(layer.apply({"params": weights}, x))
    params, state = draw(np.take(y.shape, axis))
    layer_s = weights["kernel"], weights["bias"]
    options = {"epsilon": EPSILON, "features_axis": features_axis}
    folded = jaxbn.fold(*layer_s, params, state, **options)
    check_folded(layer, weights, folded, x, in_float64(y, params, state, axis=axis))


def check_folded(layer, weights, folded, x, want):
    folded = dict(zip(("kernel", "bias"), folded, strict=True))
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, weights)
    assert_same(layer.apply({"params": folded}, x), want)


class Before(NamedTuple):
    """A layer, the shape of x, where x and the kernel have the features; `padding`."""

    layer: nn.Module
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    features_axis: int | tuple[int, ...] = -2
    padding: Any = None


def before_conv(shape, features, taps, strides=1, padding: Any = "VALID", **fields):
    """A Conv, with its own padding told to `fold_before`."""
    layer = nn.Conv(features, taps, strides, padding, **fields)
    return Before(layer, shape, padding=padding)


BEFORE = {
    "dense": Before(nn.Dense(5), (4, 3)),
    "dense general": Before(nn.DenseGeneral((4, 5)), (2, 3), features_axis=0),
    "dense general, inputs": Before(
        nn.DenseGeneral((2, 5), axis=(-2, -1)), (2, 3, 4), (-2, -1), (0, 1)
    ),
    "dense general, last input": Before(
        nn.DenseGeneral((2, 5), axis=(-2, -1)), (2, 3, 4), -1, 1, "VALID"
    ),
    "one tap, groups": Before(nn.Conv(6, (1,), feature_group_count=3), (2, 8, 9)),
    "one tap, strides": before_conv((2, 5, 6, 4), 6, (1, 1), 2, "SAME"),
    "one tap, causal": before_conv((2, 5, 4), 6, (1,), padding="CAUSAL"),
    "conv 2": before_conv((2, 9, 8, 4), 6, (3, 2), padding=0),
    "conv 3": before_conv((2, 5, 6, 5, 4), 6, (3, 2, 3), padding=[(0, 0)] * 3),
    "circular": before_conv((2, 9, 4), 6, (3,), padding="CIRCULAR"),
    "reflect": before_conv((2, 9, 4), 6, (3,), padding="REFLECT"),
    "dilation": before_conv((2, 8, 9, 4), 6, (3, 3), (2, 1), kernel_dilation=2),
    "groups": before_conv((2, 8, 4), 6, (3,), feature_group_count=2),
    "depthwise": before_conv((2, 8, 8, 4), 8, (3, 3), feature_group_count=4),
}


@pytest.mark.parametrize("name", BEFORE)
def test_before_a_layer(name):
    layer, shape, axis, features_axis, padding = BEFORE[name]
    x = draw_input(shape)
    weights = trained(layer, x)
    params, state = draw(np.take(shape, axis))
    normal = in_float64(x, params, state, axis=axis).astype(np.float32)
    layer_s = weights["kernel"], weights["bias"]
    options = {"features_axis": features_axis, "padding": padding}
    folded = jaxbn.fold_before(params, state, *layer_s, epsilon=EPSILON, **options)
    want = layer.apply({"params": weights}, normal)
    check_folded(layer, weights, folded, x, want)


def test_zero_padding_after_a_batch_norm_cannot_be_folded():
    """Why it is refused: told otherwise, the border is wrong and the rest is right."""
    layer, x = nn.Conv(6, (3, 3)), draw_input((2, 8, 8, 4))
    weights, (params, state) = trained(layer, x), draw(4)
    want = layer.apply({"params": weights}, np.float32(in_float64(x, params, state)))
    args = params, state, weights["kernel"], weights["bias"]
    for padding in ("SAME", None, 1, [(0, 0), (0, 1)], "same", "SAME_LOWER", "CAUSAL"):
        with pytest.raises(ValueError, match="`padding` must be"):
            jaxbn.fold_before(*args, epsilon=EPSILON, padding=padding)
    kernel, bias = jaxbn.fold_before(*args, epsilon=EPSILON, padding="VALID")
    got = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert_same(got[:, 1:-1, 1:-1], want[:, 1:-1, 1:-1])
    assert np.abs(got - want)[:, 0].max() > 0.1


@pytest.mark.parametrize(
    ("use_scale", "use_bias", "layer_bias"),
    [(True, True, False), (True, False, True), (False, True, True), (False,) * 3],
)
def test_what_there_is_of_scale_and_bias(use_scale, use_bias, layer_bias):
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(3, 3)).astype(np.float32), np.float32([1, -2, 3])
    b = b if layer_bias else None
    x, zeros = draw_input((5, 3)), np.zeros(3)
    params, state = draw(3, use_scale=use_scale, use_bias=use_bias)
    kernel, bias = jaxbn.fold(w, b, params, state, epsilon=EPSILON)
    y = x @ w.astype(np.float64) + (zeros if b is None else b)
    assert_same(x @ np.asarray(kernel) + np.asarray(bias), in_float64(y, params, state))
    kernel, bias = jaxbn.fold_before(params, state, w, b, epsilon=EPSILON)
    want = in_float64(x, params, state) @ w + (zeros if b is None else b)
    assert_same(x @ np.asarray(kernel) + np.asarray(bias), want)


def affine(params, state):
    """The batch norm as a x + c, in float64."""
    mean, var = map(np.float64, state[:2])
    a = params.scale / np.sqrt(var + EPSILON)
    return a, params.bias - a * mean


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_rounded_once_to_the_dtype_of_the_layer(dtype):
    """Within half a last place of `dtype`, and 8 of the arithmetic in float32."""
    with jax.enable_x64(dtype == jnp.float64):
        rng = np.random.default_rng(0)
        kernel = jnp.array(rng.normal(size=(3, 3, 4, 6)), dtype)
        w, after, before = np.float64(kernel), draw(6), draw(4)
        (a, c), (a0, c0) = affine(*after), affine(*before)
        w_c = w * c0[:, None]
        half = float(jnp.finfo(dtype).eps) / 2
        work = 8 * float(np.finfo(np.float64 if half < 1e-9 else np.float32).eps)
        keywords = {"epsilon": EPSILON}
        for got, want, size in (
            (jaxbn.fold(kernel, None, *after, **keywords), (w * a, c), 4),
            (
                jaxbn.fold_before(*before, kernel, None, padding=0, **keywords),
                (w * a0[:, None], w_c.sum((0, 1, 2))),
                np.abs(w_c).sum((0, 1, 2)).max(),
            ),
        ):
            assert [part.dtype for part in got] == [dtype, dtype]
            for part, desired, atol in zip(got, want, (0, work * size), strict=True):
                np.testing.assert_allclose(
                    np.float64(part), desired, rtol=half + work, atol=atol
                )


@pytest.mark.parametrize("complex_kernel", [True, False])
def test_complex(complex_kernel):
    """Complex data through a real or complex kernel; the new bias is complex."""
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=(2, n, 3)).astype(np.float32) for n in (5, 3))
    x, w = x[0] + 1j * x[1], w[0] + 1j * w[1] if complex_kernel else w[0]
    b = None if complex_kernel else np.float32([1, -2, 3])
    params, state = draw(3)
    params = params._replace(bias=params.bias + np.complex64(1j))
    state = state._replace(mean=state.mean - np.complex64(2j))
    shift = 0 if b is None else b
    for (kernel, bias), want in (
        (
            jaxbn.fold(w, b, params, state, epsilon=EPSILON),
            in_float64(x @ w + shift, params, state),
        ),
        (
            jaxbn.fold_before(params, state, w, b, epsilon=EPSILON),
            in_float64(x, params, state) @ w + shift,
        ),
    ):
        assert (kernel.dtype, bias.dtype) == (w.dtype, np.complex64)
        assert_same(x @ np.asarray(kernel) + np.asarray(bias), want)


def test_jit_and_stacked_layers():
    """Under jit and vmap the numbers are those of one layer after the other."""
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(4, 3, 2, 6)).astype(np.float32)
    biases = rng.normal(size=(4, 6)).astype(np.float32)
    for norms, function in (
        ([draw(6, seed) for seed in range(4)], jaxbn.fold),
        (
            [draw(4, seed) for seed in range(4)],
            lambda w, b, p, s: jaxbn.fold_before(p, s, w, b, padding="VALID"),
        ),
    ):
        params, state = jax.tree.map(lambda *leaves: np.stack(leaves), *norms)
        stacked = jax.jit(jax.vmap(function))(kernels, biases, params, state)
        for i, norm in enumerate(norms):
            one = function(kernels[i], biases[i], *norm)
            jax.tree.map(assert_same, [a[i] for a in stacked], list(one))


class Net(nn.Module):
    """Residual blocks with every kind of pair; `folded` is without batch norms."""

    norm: type = BatchNorm
    folded: bool = False

    @nn.compact
    def __call__(self, x):
        def norm(x, name):
            if self.folded:
                return x
            return self.norm(use_running_average=True, epsilon=EPSILON, name=name)(x)

        bias = self.folded
        x = norm(nn.Conv(4, (3, 3), use_bias=bias, name="stem")(x), "stem_norm")
        x = nn.relu(x) + Block(norm=self.norm, folded=self.folded)(x)
        x = nn.ConvTranspose(
            4, (2, 2), (2, 2), transpose_kernel=True, use_bias=bias, name="up"
        )(x)
        x = nn.relu(norm(x, "up_norm"))
        # One batch norm before two layers, one of which has another one after it.
        x = norm(x, "shared")
        left = nn.Conv(6, (3, 3), padding="VALID", use_bias=bias, name="left")(x)
        left = norm(left, "left_norm").mean((1, 2))
        return left + nn.Dense(6, name="right")(x.mean((1, 2)))


class Block(nn.Module):
    norm: type = BatchNorm
    folded: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), feature_group_count=2)(x)
        if not self.folded:
            x = self.norm(use_running_average=True, epsilon=EPSILON)(x)
        return nn.Dense(4)(nn.relu(x))


PAIRS = [
    ("stem", "stem_norm"),
    ("Block_0/Conv_0", "Block_0/BatchNorm_0"),
    (("up",), ("up_norm",), {"features_axis": -2}),
    ("shared", "left", {"padding": "VALID"}),
    ["left", "left_norm"],
    ("shared", "right"),
]


def train(model, x, seed=3):
    """Variables with random weights and statistics."""
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key in ("var", "scale"):
            return rng.uniform(0.3, 2, leaf.shape).astype(leaf.dtype)
        return (rng.normal(size=leaf.shape) / leaf.size**0.25).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, variables)


@pytest.mark.parametrize(("norm", "order"), [(BatchNorm, 1), (nn.BatchNorm, -1)])
def test_tree_of_a_model(norm, order):
    """The pairs in any order; what comes is what the model without them has."""
    x = draw_input((2, 8, 8, 3))
    variables = train(Net(norm), x)
    kept = copy.deepcopy(variables)
    folded = jaxbn.fold_tree(variables, PAIRS[::order], epsilon=EPSILON)
    np.testing.assert_equal(variables, kept)
    model = Net(folded=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, shapes)
    want = Net(norm).apply(variables, x)
    assert_same(model.apply(folded, x), want)
    without_epsilon = jaxbn.fold_tree(variables, PAIRS)
    assert np.abs(model.apply(without_epsilon, x) - want).max() > 1e-3
    own = [(*pair[:2], {**dict(*pair[2:]), "epsilon": EPSILON}) for pair in PAIRS]
    assert_same(model.apply(jaxbn.fold_tree(variables, own), x), want)


def test_tree_keeps_what_is_not_folded():
    """Other batch norms, other collections, and what they hold."""
    x = draw_input((2, 8, 8, 3))
    variables = {**train(Net(), x), "cache": {"stem": {"count": np.int32(3)}}}
    variables["batch_stats"]["stem_norm"]["num_updates"] = np.int32(2)
    folded = jaxbn.fold_tree(variables, PAIRS[:1], epsilon=EPSILON)
    assert folded["cache"] == variables["cache"]
    assert "stem_norm" not in folded["params"] | folded["batch_stats"]
    assert folded["batch_stats"].keys() == variables["batch_stats"].keys() - {
        "stem_norm"
    }
    assert folded["params"]["right"] == variables["params"]["right"]
    assert jaxbn.fold_tree(variables, []) == variables


class Boxed(nn.Module):
    """A layer and a batch norm with logical axes, as for a mesh."""

    folded: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
        bias = nn.with_partitioning(nn.initializers.ones, ("model",))
        x = nn.Dense(4, kernel_init=init, bias_init=bias)(x)
        if self.folded:
            return x
        return BatchNorm(True, bias_init=bias, epsilon=EPSILON)(x)


def test_tree_of_boxes_and_frozen():
    """Flax's metadata stays on kernel and bias, and a FrozenDict is read."""
    x = draw_input((2, 3))
    variables = Boxed().init(jax.random.key(0), x)
    variables["batch_stats"]["BatchNorm_0"]["mean"] = np.float32([1, 2, 3, 4])
    pairs = [("Dense_0", "BatchNorm_0")]
    folded = jaxbn.fold_tree(freeze(variables), pairs, epsilon=EPSILON)
    model = Boxed(folded=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.tree.structure(folded) == jax.tree.structure(shapes)
    assert_same(model.apply(folded, x), Boxed().apply(variables, x))


def test_tree_of_stacked_layers():
    """`vmap` folds the blocks of an `nn.scan`, jitted."""

    def stack(folded):
        return nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )

    class Stack(nn.Module):
        folded: bool = False

        @nn.compact
        def __call__(self, x):
            block = Block(folded=self.folded, name="block")
            return stack(self.folded)(block, x, None)[0]

    x = draw_input((2, 8, 8, 4))
    variables = train(Stack(), x)
    pairs = [("block/Conv_0", "block/BatchNorm_0")]
    fold = jax.jit(jax.vmap(lambda v: jaxbn.fold_tree(v, pairs, epsilon=EPSILON)))
    got = Stack(folded=True).apply(fold(variables), x)
    assert_same(got, Stack().apply(variables, x))


def test_vectors_that_do_not_fit_are_refused():
    """What is wrong with one argument alone is in test_bad_input.py."""
    kernel, (params, state) = np.ones((3, 3, 4, 4), np.float32), draw(4)
    is_complex = state._replace(var=state.var + 0j)
    for norm, message in (
        (draw(5), r"`state.mean` must .*per feature on axis {} of `kernel` .*\(5,\)"),
        (
            (params._replace(scale=np.ones(1)), state),
            r"`params.scale` .*axis {} .*\(1,",
        ),
        ((params, is_complex), "`var` must be real"),
    ):
        with pytest.raises((TypeError, ValueError), match=message.format(-1)):
            jaxbn.fold(kernel, None, *norm)
        with pytest.raises((TypeError, ValueError), match=message.format(-2)):
            jaxbn.fold_before(*norm, kernel, None, padding=0)


def test_features_that_are_none_of_the_layer_are_refused():
    kernel = np.ones((3, 3, 4, 6), np.float32)
    with pytest.raises(ValueError, match="`features_axis` must have the outputs"):
        jaxbn.fold_before(*draw(6), kernel, None, features_axis=-1)
    # 8 features are two groups of a Conv's 4, but nothing of a Dense's.
    with pytest.raises(ValueError, match=r"`state.mean` must have shape \(4,\)"):
        jaxbn.fold_before(*draw(8), kernel[0, 0], None)
    # 16 are four groups, which 6 outputs do not divide into.
    with pytest.raises(ValueError, match=r"`state.mean` must have shape \(4,\)"):
        jaxbn.fold_before(*draw(16), kernel, None, padding=0)


WRONG_PAIRS = {
    "nothing to fold": ([("stem", "Block_0")], "'Block_0', which has"),
    "two norms": (
        [("up_norm", "stem_norm")],
        "'up_norm' and 'stem_norm', both a batch",
    ),
    "layer twice": ([PAIRS[0], ("stem", "up_norm")], "got 'stem' twice"),
    "norm after two": (
        [PAIRS[0], ("up", "stem_norm")],
        "got 'stem_norm' twice, in 'stem' and 'stem_norm' and 'up'",
    ),
    "norm after and before": ([PAIRS[0], ("stem_norm", "up")], "got 'stem_norm' twice"),
    "shape": ([("stem", "left_norm")], "in the pair 'stem' and 'left_norm'"),
    "padding": ([("shared", "left")], "in the pair 'shared' and 'left'"),
    "option": ([(*PAIRS[0], {"eps": 1})], "out of epsilon, features_axis; got {'eps'"),
    "four": ([("a", "b", {}, {})], "`pairs` must hold"),
}


@pytest.mark.parametrize("name", WRONG_PAIRS)
def test_wrong_pairs_are_refused(name):
    """By name, and without any change to what came. More is in test_bad_input.py."""
    pairs, message = WRONG_PAIRS[name]
    variables = train(Net(), draw_input((2, 8, 8, 3)))
    kept = copy.deepcopy(variables)
    with pytest.raises((TypeError, ValueError), match=message):
        jaxbn.fold_tree(variables, pairs)
    np.testing.assert_equal(variables, kept)


def test_export_of_a_folded_model():
    """Through bytes, for any batch and three platforms: no batch norm is left in it."""
    x = draw_input((5, 8, 8, 3))
    variables = train(Net(), x)
    folded = jaxbn.fold_tree(variables, PAIRS, epsilon=EPSILON)
    apply = jax.jit(lambda x: Net(folded=True).apply(folded, x))
    (n,) = jax.export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
    exported = jax.export.export(apply, platforms=("cpu", "cuda", "tpu"))(shape)
    assert "rsqrt" not in exported.mlir_module()
    assert "rsqrt" in jax.jit(Net().apply).lower(variables, x).as_text()
    read = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(read.call(x), apply(x))
    assert_same(apply(x), Net().apply(variables, x))


class ConvNet(nn.Module):
    """Convolution, batch norm, relu: eight times, as inference meets them."""

    folded: bool = False

    @nn.compact
    def __call__(self, x):
        for strides in STRIDES:
            x = nn.Conv(WIDTH, (3, 3), strides, use_bias=self.folded)(x)
            x = x if self.folded else BatchNorm(True)(x)
            x = nn.relu(x)
        return nn.Dense(10)(x.mean((1, 2)))


STRIDES, WIDTH = (1, 1, 1, 2, 1, 1, 2, 1), 32


def compile_both(rows):
    """{name: (compiled, its arguments)} of the network with and without batch norms."""
    x = draw_input((rows, 32, 32, 3))
    variables = train(ConvNet(), x)
    pairs = [(f"Conv_{i}", f"BatchNorm_{i}") for i in range(len(STRIDES))]
    arguments = {
        "unfolded": (ConvNet(), variables, x),
        "folded": (ConvNet(folded=True), jaxbn.fold_tree(variables, pairs), x),
    }
    return {
        name: (jax.jit(model.apply).lower(*args).compile(), args)
        for name, (model, *args) in arguments.items()
    }


def test_folding_saves_two_operations_an_element():
    """Of x - mean, times a and plus bias an addition is left."""
    flops = {
        name: compiled.cost_analysis()["flops"]
        for name, (compiled, _) in compile_both(rows=1).items()
    }
    sides = 32 // np.cumprod(STRIDES)
    saved = flops["unfolded"] - flops["folded"]
    assert 2 * WIDTH * (sides**2).sum() <= saved < flops["folded"]


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 32])
def test_time_that_folding_saves(rows, capsys):
    """Prints what it measures: `pytest -m long -k folding_saves tests/test_fold.py`."""
    both = compile_both(rows)
    seconds = {name: [] for name in both}
    for _ in range(2000 // (8 + rows)):
        for name, (compiled, args) in both.items():  # in turn: a busy machine is fair
            start = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            seconds[name].append(time.perf_counter() - start)
    unfolded, folded = (compiled(*args) for compiled, args in both.values())
    assert_same(folded, unfolded)
    with capsys.disabled():
        print()
        for name, (compiled, _) in both.items():
            cost = compiled.cost_analysis()
            print(
                f"{name:9} {rows:3} rows {statistics.median(seconds[name]) * 1e3:7.2f} "
                f"ms, {cost['flops'] / 1e6:.1f} Mflop, "
                f"{cost['bytes accessed'] / 1e6:.2f} MB accessed, "
                f"{compiled.memory_analysis().temp_size_in_bytes / 1e6:.2f} MB of "
                f"temporaries, {len(compiled.as_text().splitlines())} lines of HLO"
            )
        ratios = [u / f for u, f in zip(*seconds.values(), strict=True)]
        print(f"unfolded / folded, median of pairs: {statistics.median(ratios):.3f}")
