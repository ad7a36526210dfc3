"""fold: a layer and its batch norm in one layer give the same outputs.

Flax's own layers and the oracle's batch norm in float64, with random statistics.
"""

import copy
import functools
import statistics
import time
from typing import Any

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
fold = functools.partial(jaxbn.fold, epsilon=EPSILON)
fold_before = functools.partial(jaxbn.fold_before, epsilon=EPSILON)
fold_tree = functools.partial(jaxbn.fold_tree, epsilon=EPSILON)


def draw(shape, seed=0, *, use_scale=True, use_bias=True):
    """A trained batch norm: nothing in it is 0 or 1."""
    rng = np.random.default_rng(seed)
    shape = np.atleast_1d(shape)
    scale, var = rng.uniform(0.3, 2, (2, *shape)).astype(np.float32)
    bias, mean = (rng.normal(size=(2, *shape)) + 0.5).astype(np.float32)
    params = Params(scale if use_scale else None, bias if use_bias else None)
    return params, State(mean, var, np.int32(7))


def draw_input(*shape, seed=2):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def in_float64(x, params, state, axis=-1):
    return oracle.normalize(x, *state[:2], *params, epsilon=EPSILON, axis=axis)


def trained(model, x):
    """Variables with random weights and statistics, a bias too."""
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(3)

    def fill(path, leaf):
        if path[-1].key in ("var", "scale"):
            return rng.uniform(0.3, 2, leaf.shape).astype(leaf.dtype)
        return (rng.normal(size=leaf.shape) / leaf.size**0.25).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, variables)


def assert_same(actual, desired):
    """Within 1e-5 of the largest: sums of some tens of float32 products."""
    actual, desired = np.asarray(actual), np.asarray(desired)
    assert actual.shape == desired.shape
    size = max(1, np.abs(desired).max())
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-5 * size)


def check_folded(layer, weights, folded, x, want):
    folded = {"kernel": folded[0], "bias": folded[1]}
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, weights)
    assert_same(layer.apply({"params": folded}, x), want)


def axis(*axes):
    return {"features_axis": axes if len(axes) > 1 else axes[0]}


# The layer, the shape of x, the axes that the batch norm has features on, options.
STRIDED = nn.Conv(6, (3, 2), (2, 1), 1, kernel_dilation=2, feature_group_count=2)
TRANSPOSE = functools.partial(nn.ConvTranspose, 6, (3, 3), (2, 2))
TRANSPOSED = TRANSPOSE(transpose_kernel=True)
AFTER = {
    "dense": (nn.Dense(5), (4, 3), -1, {}),
    "general": (nn.DenseGeneral((4, 5)), (2, 3), (-2, -1), axis(-2, -1)),
    "general, last": (nn.DenseGeneral((4, 5)), (2, 3), -1, {}),
    "general, first": (nn.DenseGeneral((4, 5)), (2, 3), -2, axis(-2)),
    "general, inputs": (nn.DenseGeneral(5, axis=(-2, -1)), (2, 3, 4), -1, {}),
    "conv": (STRIDED, (2, 8, 8, 4), -1, {}),
    "local": (nn.ConvLocal(6, (3,)), (2, 8, 4), -1, {}),
    "transpose": (TRANSPOSE("VALID"), (2, 5, 4, 4), -1, {}),
    "transpose_kernel": (TRANSPOSED, (2, 5, 4, 4), -1, axis(-2)),
}


@pytest.mark.parametrize("name", AFTER)
def test_after_a_layer(name):
    layer, shape, features, options = AFTER[name]
    x = draw_input(*shape)
    weights = trained(layer, x)["params"]
    y = np.asarray(layer.apply({"params": weights}, x))
    norm = draw(np.take(y.shape, features))
    step = jax.jit(functools.partial(fold, **options))
    folded = step(weights["kernel"], weights["bias"], *norm)
    check_folded(layer, weights, folded, x, in_float64(y, *norm, features))


def before_conv(shape, *conv, padding: Any = "VALID", **fields):
    """A Conv, with its own padding told to `fold_before`."""
    return nn.Conv(*conv, padding=padding, **fields), shape, -1, {"padding": padding}


GENERAL = nn.DenseGeneral((2, 5), axis=(-2, -1))
BEFORE = {
    "dense": (nn.Dense(5), (4, 3), -1, {}),
    "general": (nn.DenseGeneral((4, 5)), (2, 3), -1, axis(0)),
    "general, inputs": (GENERAL, (2, 3, 4), (-2, -1), axis(0, 1)),
    "general, last": (GENERAL, (2, 3, 4), -1, axis(1) | {"padding": "VALID"}),
    "one tap, groups": (nn.Conv(6, (1,), feature_group_count=3), (2, 8, 9), -1, {}),
    "one tap": before_conv((2, 5, 6, 4), 6, (1, 1), 2, padding="SAME"),
    "one tap, causal": before_conv((2, 5, 4), 6, (1,), padding="CAUSAL"),
    "strides": before_conv((2, 8, 9, 4), 6, (3, 2), (2, 1), padding=0),
    "conv 3": before_conv((2, 5, 6, 5, 4), 6, (3, 2, 3), padding=[(0, 0)] * 3),
    "circular": before_conv((2, 9, 4), 6, (3,), padding="CIRCULAR"),
    "reflect": before_conv((2, 9, 4), 6, (3,), padding="REFLECT"),
    "groups": before_conv((2, 8, 4), 6, (3,), feature_group_count=2),
    "depthwise": before_conv((1, 5, 5, 4), 8, (3, 3), feature_group_count=4),
}


@pytest.mark.parametrize("name", BEFORE)
def test_before_a_layer(name):
    layer, shape, features, options = BEFORE[name]
    x = draw_input(*shape)
    weights = trained(layer, x)["params"]
    norm = draw(np.take(shape, features))
    step = jax.jit(functools.partial(fold_before, **options))
    folded = step(*norm, weights["kernel"], weights["bias"])
    normal = in_float64(x, *norm, features).astype(np.float32)
    want = layer.apply({"params": weights}, normal)
    check_folded(layer, weights, folded, x, want)


PADDINGS = ["SAME", None, 1, [(0, 0), (0, 1)], "same", "SAME_LOWER", "CAUSAL"]


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_zero_padding_after_a_batch_norm_cannot_be_folded(padding):
    with pytest.raises(ValueError, match="`padding` must be"):
        jaxbn.fold_before(*draw(4), draw_input(3, 3, 4, 6), None, padding=padding)


def both_ways(x, w, b, norm):
    """What `fold` and `fold_before` give for `x @ w + b`, and the outputs to come."""
    shift = 0 if b is None else b
    return (
        (fold(w, b, *norm), in_float64(x @ np.asarray(w) + shift, *norm)),
        (fold_before(*norm, w, b), in_float64(x, *norm) @ w + shift),
    )


@pytest.mark.parametrize(
    ("use_scale", "use_bias", "layer_bias"),
    [(True, True, False), (True, False, True), (False, True, True), (False,) * 3],
)
def test_what_there_is_of_scale_and_bias(use_scale, use_bias, layer_bias):
    b = np.float32([1, -2, 3]) if layer_bias else None
    norm, x = draw(3, use_scale=use_scale, use_bias=use_bias), draw_input(5, 3)
    for (kernel, bias), want in both_ways(x, draw_input(3, 3, seed=0), b, norm):
        assert_same(x @ np.asarray(kernel) + np.asarray(bias), want)


@pytest.mark.parametrize("what", ["all", "mean", "bias"])
def test_complex(what):
    """Complex data through a real or complex kernel; the new bias is complex."""
    x = draw_input(5, 3) + 1j * draw_input(5, 3, seed=1)
    w, b = draw_input(3, 3, seed=0), np.float32([1, -2, 3])
    (scale, bias), state = draw(3)
    if what == "all":
        w, b = w + 1j * draw_input(3, 3, seed=4), None
    if what != "mean":
        bias = bias + np.complex64(1j)
    if what != "bias":
        state = state._replace(mean=state.mean - np.complex64(2j))
    for (kernel, new), want in both_ways(x, w, b, (Params(scale, bias), state)):
        assert (kernel.dtype, new.dtype) == (w.dtype, np.complex64)
        assert_same(x @ np.asarray(kernel) + np.asarray(new), want)


def affine(params, state):
    """The batch norm as a x + c, in float64."""
    a = params.scale / np.sqrt(np.float64(state.var) + EPSILON)
    return a, params.bias - a * state.mean


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_rounded_once_to_the_dtype_of_the_layer(dtype):
    """Within half a last place of `dtype`, and 8 of the arithmetic in float32."""
    with jax.enable_x64(dtype == jnp.float64):
        kernel = jnp.array(draw_input(3, 3, 4, 6), dtype)
        w, after, before = np.float64(kernel), draw(6), draw(4)
        (a, c), (a0, c0) = affine(*after), affine(*before)
        w_c = w * c0[:, None]
        half = float(jnp.finfo(dtype).eps) / 2
        work = 8 * float(np.finfo(np.float64 if half < 1e-9 else np.float32).eps)
        folded_before = jax.jit(functools.partial(fold_before, padding=0))
        want_before = w * a0[:, None], w_c.sum((0, 1, 2))
        largest = np.abs(w_c).sum((0, 1, 2)).max()
        for got, want, size in (
            (jax.jit(fold)(kernel, None, *after), (w * a, c), 4),
            (folded_before(*before, kernel, None), want_before, largest),
        ):
            assert [part.dtype for part in got] == [dtype, dtype]
            for part, desired, atol in zip(got, want, (0, work * size), strict=True):
                np.testing.assert_allclose(
                    np.float64(part), desired, rtol=half + work, atol=atol
                )


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
        up = nn.ConvTranspose(4, (2, 2), (2, 2), transpose_kernel=True, name="up")
        x = nn.relu(norm(up(x), "up_norm"))
        # One batch norm before two layers, one of which has another one after it.
        x = norm(x, "shared")
        left = nn.Conv(6, (3, 3), padding="VALID", use_bias=bias, name="left")(x)
        right = nn.Dense(6, name="right")(x.mean((1, 2)))
        return norm(left, "left_norm").mean((1, 2)) + right


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
IMAGES = draw_input(2, 6, 6, 3)


@functools.cache
def variables_of_net(norm=BatchNorm):
    return trained(Net(norm), IMAGES)


@pytest.mark.parametrize(("norm", "order"), [(BatchNorm, 1), (nn.BatchNorm, -1)])
def test_tree_of_a_model(norm, order):
    """The pairs in any order; what comes is what the model without them has."""
    variables, model = variables_of_net(norm), Net(folded=True)
    apply = jax.jit(model.apply)
    kept = copy.deepcopy(variables)
    folded = fold_tree(variables, PAIRS[::order])
    np.testing.assert_equal(variables, kept)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, shapes)
    want = jax.jit(Net(norm).apply)(variables, IMAGES)
    assert_same(apply(folded, IMAGES), want)
    without_epsilon = jaxbn.fold_tree(variables, PAIRS)
    assert np.abs(apply(without_epsilon, IMAGES) - want).max() > 1e-3
    own = [(*pair[:2], {**dict(*pair[2:]), "epsilon": EPSILON}) for pair in PAIRS]
    assert_same(apply(jaxbn.fold_tree(variables, own), IMAGES), want)


def test_tree_keeps_what_is_not_folded():
    """Other batch norms, other collections, and what they hold."""
    variables = copy.deepcopy(variables_of_net())
    variables["cache"] = {"stem": {"count": np.int32(3)}}
    variables["batch_stats"]["stem_norm"]["num_updates"] = np.int32(2)
    folded = fold_tree(variables, PAIRS[:1])
    assert folded["cache"] == variables["cache"]
    assert "stem_norm" not in folded["params"]
    others = variables["batch_stats"].keys() - {"stem_norm"}
    assert folded["batch_stats"].keys() == others
    assert folded["params"]["right"] == variables["params"]["right"]
    assert jaxbn.fold_tree(variables, []) == variables


def test_tree_of_boxes_and_frozen():
    """Flax's metadata stays on kernel and bias, and a FrozenDict is read."""
    variables = variables_of_net()
    boxed = jax.tree.map(lambda a: nn.Partitioned(a, ("model",) * a.ndim), variables)
    folded = fold_tree(freeze(boxed), PAIRS)
    want = fold_tree(variables, PAIRS)
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(folded), want)
    assert folded["params"]["left"]["kernel"].names == ("model",) * 4
    assert folded["params"]["up"]["bias"].names == ("model",)
    assert isinstance(folded["params"]["left"]["bias"], jax.Array)  # it is new


def test_tree_of_stacked_layers():
    """Under jit and vmap the numbers are those of one layer after the other."""
    trees = [jax.tree.map(lambda a, i=i: a + i, variables_of_net()) for i in range(2)]
    step = functools.partial(fold_tree, pairs=PAIRS)
    stacked = jax.jit(jax.vmap(step))(jax.tree.map(lambda *a: np.stack(a), *trees))
    for i, tree in enumerate(trees):
        jax.tree.map(lambda a, b, i=i: assert_same(a[i], b), stacked, step(tree))


def test_vectors_that_do_not_fit_are_refused():
    """What is wrong with one argument alone is in test_bad_input.py."""
    kernel, (params, state) = np.ones((3, 3, 4, 4), np.float32), draw(4)
    small = params._replace(scale=np.ones(1))
    is_complex = state._replace(var=state.var + 0j)
    for norm, message in (
        (draw(5), r"`state.mean` must .*per feature on axis {} of `kernel` .*\(5,\)"),
        ((small, state), r"`params.scale` .*axis {} .*\(1,"),
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


WRONG_PAIRS = [
    ([("stem", "Block_0")], "'Block_0', which has"),
    ([("up_norm", "stem_norm")], "'up_norm' and 'stem_norm', both a batch"),
    ([PAIRS[0], ("stem", "up_norm")], "got 'stem' twice"),
    (
        [PAIRS[0], ("up", "stem_norm")],
        "got 'stem_norm' twice, in 'stem' and 'stem_norm' and 'up'",
    ),
    ([PAIRS[0], ("stem_norm", "up")], "got 'stem_norm' twice"),
    ([("stem", "left_norm")], "in the pair 'stem' and 'left_norm'"),
    ([("shared", "left")], "in the pair 'shared' and 'left'"),
    ([(*PAIRS[0], {"eps": 1})], "out of epsilon, features_axis; got {'eps'"),
    ([("a", "b", {}, {})], "`pairs` must hold"),
]


@pytest.mark.parametrize(("pairs", "message"), WRONG_PAIRS)
def test_wrong_pairs_are_refused(pairs, message):
    """By name, and without any change to what came. More is in test_bad_input.py."""
    kept = copy.deepcopy(variables_of_net())
    with pytest.raises((TypeError, ValueError), match=message):
        jaxbn.fold_tree(variables_of_net(), pairs)
    np.testing.assert_equal(variables_of_net(), kept)


class ConvNet(nn.Module):
    """Convolution, batch norm, relu: eight times, as inference meets them."""

    folded: bool = False

    @nn.compact
    def __call__(self, x):
        for strides in STRIDES:
            x = nn.Conv(WIDTH, (3, 3), strides, use_bias=self.folded)(x)
            x = nn.relu(x if self.folded else BatchNorm(True)(x))
        return nn.Dense(10)(x.mean((1, 2)))


STRIDES, WIDTH = (1, 1, 1, 2, 1, 1, 2, 1), 32


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 32])
def test_time_that_folding_saves(rows, capsys):
    """Two operations an element: of x - mean, times a, plus bias an addition is left.

    Prints what it measures: `pytest -m long -k folding_saves tests/test_fold.py`.
    """
    x = draw_input(rows, 32, 32, 3)
    variables = trained(ConvNet(), x)
    pairs = [(f"Conv_{i}", f"BatchNorm_{i}") for i in range(len(STRIDES))]
    trees = {False: variables, True: jaxbn.fold_tree(variables, pairs)}
    programs = {
        folded: jax.jit(ConvNet(folded).apply).lower(tree, x).compile()
        for folded, tree in trees.items()
    }
    seconds = {folded: [] for folded in trees}
    for _ in range(2000 // (8 + rows)):
        for folded, tree in trees.items():  # in turn: a busy machine is fair
            start = time.perf_counter()
            jax.block_until_ready(programs[folded](tree, x))
            seconds[folded].append(time.perf_counter() - start)
    assert_same(*(programs[folded](tree, x) for folded, tree in trees.items()))
    flops = {folded: p.cost_analysis()["flops"] for folded, p in programs.items()}
    elements = WIDTH * rows * ((32 // np.cumprod(STRIDES)) ** 2).sum()
    assert 2 * elements <= flops[False] - flops[True] < flops[True]
    ratios = [u / f for u, f in zip(*seconds.values(), strict=True)]
    with capsys.disabled():
        for folded, times in seconds.items():
            print(f"\n{rows} rows, {folded=}: {statistics.median(times) * 1e3:.2f} ms")
        print(f"unfolded / folded, median of pairs: {statistics.median(ratios):.3f}")
