"""find_pairs and folded: what is found, what is not and why, and the same outputs."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeCollectionNotFound
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxbn
from jaxbn.linen import BatchNorm, BatchRenorm, find_pairs, folded, replace_batch_norm

P = functools.partial
X = np.random.default_rng(1).normal(size=(2, 4, 4, 6)).astype(np.float32)
SHAPE = jax.ShapeDtypeStruct(X.shape, X.dtype)
Dense = P(nn.Dense, 6, use_bias=False)
Conv = P(nn.Conv, 6, use_bias=False)
Norm = P(BatchNorm, use_running_average=True, epsilon=1e-3)
FlaxNorm = P(nn.BatchNorm, use_running_average=True, epsilon=1e-3)
EPSILON = {"epsilon": 1e-3}


class Model(nn.Module):
    """Any function of x that makes its modules in it."""

    function: object

    @nn.compact
    def __call__(self, x):
        return self.function(x)


def noisy(model, x=X):
    """Variables as after a training."""
    rng = np.random.default_rng(0)
    flat = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x))
    for path, leaf in flat.items():
        if path[-1] in ("var", "scale"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            value = rng.normal(size=leaf.shape) / 2
        flat[path] = jnp.array(value, leaf.dtype)
    return unflatten_dict(flat)


def check_folded(model, pairs, tolerance=1e-5):
    """The folded model gives the same y, in the same dtype."""

    @jax.jit
    def both(variables):
        y = model.apply(variables, X)
        with folded(pairs):
            return y, model.apply(jaxbn.fold_tree(variables, pairs), X)

    y, new = both(noisy(model))
    assert y.dtype == new.dtype
    np.testing.assert_allclose(new, y, rtol=0, atol=tolerance * abs(y).max())


def resnet(x):
    x = nn.relu(FlaxNorm()(Conv((3, 3))(x)))
    y = nn.relu(FlaxNorm()(Conv((1, 1))(x)))
    y = FlaxNorm()(x=nn.Conv(12, (3, 3), strides=2)(inputs=y))
    return nn.relu(y + Norm()(nn.Conv(12, (1, 1), 2, use_bias=False)(x)))


def mobilenet(x):
    y = nn.relu6(Norm()(Conv((1, 1))(x)))
    y = nn.relu6(Norm()(Conv((3, 3), feature_group_count=6)(y)))
    return x + Norm()(Conv((1, 1))(y))


def densenet(x):
    for _ in range(2):
        y = Conv((1, 1))(nn.relu(Norm()(x)))
        y = Conv((3, 3))(nn.relu(Norm()(y)))
        x = jnp.concatenate([x, y], -1)
    return Dense()(Norm()(x).mean((1, 2)))


def skip(x):
    y = Dense()(x)
    return y + Norm()(y)


def tied(x):
    dense = Dense()
    return Norm()(dense(x)) @ dense.variables["params"]["kernel"].T


def siamese(x):
    dense, norm = Dense(), Norm()
    return norm(dense(x)) - norm(dense(x + 1))


def before(*layers, skip=lambda x: 0):
    """A batch norm before all of them; `skip` is added."""

    def run(x):
        x = Norm()(nn.relu(x))
        return sum([layer()(x) for layer in layers], skip(x))

    return run


def other_input_too(x):
    dense = Dense()
    return dense(Norm()(nn.relu(x))) + dense(x)


def casts(x):
    y = jax.ad_checkpoint.checkpoint_name(nn.Dense(6, dtype=jnp.float16)(x), "y")
    return Norm()(y.astype(jnp.float32))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(FlaxNorm()(Dense()(x)))


def scanned(x):
    axes, split = {"params": 0, "batch_stats": 0}, {"params": True}
    stack = nn.scan(lambda b, x, _: (b(x), None), axes, split_rngs=split, length=3)
    return stack(Block(), x, None)[0]


def branched(x):
    block = Block()
    return nn.cond(x.sum() > 0, lambda b, x: b(x), lambda b, x: b(-x), block, x)


def mapped(x):
    axes, split = {"params": 0, "batch_stats": 0}, {"params": True}
    return nn.vmap(Block, variable_axes=axes, split_rngs=split)()(x)


class Standardized(nn.Conv):
    """As in BiT and ViT: the kernel that is used is not the one that is kept."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value / value.std() if name == "kernel" else value


class Twice(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, use_running_average=None):
        return 2 * super().__call__(x, use_running_average)


def each(*parts):
    """Modules in a row, made in the call; functions are taken as they are."""

    def run(x):
        for part in parts:
            x = part()(x) if isinstance(part, P) else part(x)
        return x

    return run


def pair(first, second, **options):
    return first, second, EPSILON | options


DENSE = pair("Dense_0", "BatchNorm_0")
BEFORE = pair("BatchNorm_0", "Dense_0")
MASKED_CONV = P(Conv, (1, 1), mask=jnp.eye(6)[None, None])
TWO_AXES = P(nn.DenseGeneral, (3, 4), axis=(-2, -1))
FOLDED = {
    "resnet": (resnet, [pair(f"Conv_{i}", f"BatchNorm_{i}") for i in range(4)]),
    "mobilenet": (mobilenet, [pair(f"Conv_{i}", f"BatchNorm_{i}") for i in range(3)]),
    "siamese": (siamese, [DENSE]),
    "before": (before(Dense), [BEFORE]),
    "before two": (
        before(Dense, P(nn.Dense, 6)),
        [BEFORE, pair("BatchNorm_0", "Dense_1")],
    ),
    "before two, jitted": (
        before(*[P(nn.jit(nn.Dense), 6, use_bias=False, name=name) for name in "ab"]),
        [pair("BatchNorm_0", "a"), pair("BatchNorm_0", "b")],
    ),
    "before valid": (
        before(P(Conv, (3, 3), padding="VALID")),
        [pair("BatchNorm_0", "Conv_0", padding="VALID")],
    ),
    "transposed": (
        each(P(nn.ConvTranspose, 5, (2, 2), 2, transpose_kernel=True), Norm),
        [pair("ConvTranspose_0", "BatchNorm_0", features_axis=(-2,))],
    ),
    "general": (
        each(P(nn.DenseGeneral, (3, 4)), P(Norm, axis=-1)),
        [pair("DenseGeneral_0", "BatchNorm_0")],
    ),
    "general, two axes": (
        each(P(nn.DenseGeneral, (3, 4), use_bias=False), P(Norm, axis=(-2, -1))),
        [pair("DenseGeneral_0", "BatchNorm_0", features_axis=(-2, -1))],
    ),
    "before general": (
        each(nn.relu, P(Norm, axis=(2, 3)), TWO_AXES),
        [pair("BatchNorm_0", "DenseGeneral_0", features_axis=(-4, -3))],
    ),
    "casts": (casts, [DENSE]),
    "renorm": (
        each(Dense, P(BatchRenorm, True)),
        [("Dense_0", "BatchRenorm_0", {"epsilon": 1e-5})],
    ),
    "jit": (
        each(P(nn.jit(Block)), P(nn.jit(Block))),
        [pair(f"JitBlock_{i}/Dense_0", f"JitBlock_{i}/BatchNorm_0") for i in (0, 1)],
    ),
    "remat": (
        each(P(nn.remat(nn.Dense), 6), P(nn.remat(nn.BatchNorm), True, epsilon=1e-3)),
        [pair("CheckpointDense_0", "CheckpointBatchNorm_0")],
    ),
    "subclass": (
        each(Dense, P(Twice, True, epsilon=1e-3)),
        [pair("Dense_0", "Twice_0")],
    ),
}
FIRST = "its input is not the output of one layer"
# The batch norm is BatchNorm_0 but for PATHS.
REFUSED = {
    "skip": (skip, "the output of Dense_0 also goes to `add`"),
    "no use": (lambda x: (Norm()(x), x)[1], "goes to nothing"),
    "named as primitives": (
        lambda x: Norm()(nn.relu(x)) + Dense(name="add")(x),
        "its output goes to `add`",
    ),
    "tied": (tied, "kernel of Dense_0 also goes to `transpose`"),
    "two layers": (lambda x: (n := Norm())(Dense()(x)) + n(Dense()(-x)), FIRST),
    "before, and a skip": (before(Dense, skip=jnp.asarray), "output goes to `add`"),
    "other input": (other_input_too, "Dense_0 has another input"),
    "before same": (before(P(Conv, (3, 3))), '`padding` must be "VALID"'),
    "before dilated": (
        before(P(Conv, (1, 1), input_dilation=2, padding=0)),
        "Conv_0 puts zeros between",
    ),
    "before transposed": (
        before(P(nn.ConvTranspose, 6, (1, 1))),
        "ConvTranspose_0 puts zeros between",
    ),
    "before masked kernel": (before(MASKED_CONV), "Conv_0 has batch axes or a mask"),
    "before two axes": (before(TWO_AXES), "DenseGeneral_0 sums over other axes"),
    "before a batch": (
        before(P(nn.DenseGeneral, 6, batch_dims=(0,))),
        "has batch axes",
    ),
    "masked": (each(Dense, lambda x: Norm()(x, mask=x > 0)), "a mask"),
    "other axis": (each(Dense, P(Norm, axis=0)), "its features are"),
    "branched": (branched, "also goes to `cond`"),
    "scanned": (scanned, "also goes to `scan`"),
    "mapped": (mapped, "is a stack"),
    "standardized": (each(P(Standardized, 6, (1, 1)), Norm), FIRST),
}
PATHS = dict.fromkeys(("branched", "scanned"), "Block_0/BatchNorm_0")
PATHS["mapped"] = "VmapBlock_0/BatchNorm_0"


@pytest.mark.parametrize("name", FOLDED)
def test_pairs_are_found_and_folding_them_changes_nothing(name):
    function, expected = FOLDED[name]
    pairs = find_pairs(Model(function), SHAPE)
    assert pairs == expected
    assert pairs.unfoldable == {}
    check_folded(Model(function), pairs, 1e-3 if name == "casts" else 1e-5)


def test_a_densenet_is_folded_where_its_layers_come_first():
    pairs = find_pairs(Model(densenet), SHAPE)
    assert pairs == [pair("Conv_0", "BatchNorm_1"), pair("Conv_2", "BatchNorm_3")]
    assert pairs.unfoldable.keys() == {f"BatchNorm_{i}" for i in (0, 2, 4)}
    check_folded(Model(densenet), pairs)


@pytest.mark.parametrize("name", REFUSED)
def test_why_a_batch_norm_is_in_no_pair(name):
    function, words = REFUSED[name]
    pairs = find_pairs(Model(function), SHAPE)
    assert pairs == []
    [(path, reason)] = pairs.unfoldable.items()
    assert path == PATHS.get(name, "BatchNorm_0")
    assert words in reason


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (Norm, "its input is not the output of one layer"),
        (P(Norm, use_running_average=False), "normalizes by the batch"),
    ],
)
def test_a_second_batch_norm_is_named(last, words):
    pairs = find_pairs(Model(each(Dense, Norm, last)), SHAPE)
    assert pairs == [DENSE]
    assert words in pairs.unfoldable["BatchNorm_1"]


def test_the_arguments_of_the_call_are_handed_on():
    """Also what is no array; training is not what is folded, and is not run."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, width, train=True):
            x = nn.Dense(width)(x["x"])
            x = FlaxNorm(use_running_average=not train, axis_name="devices")(x)
            return x if width == 3 else None

    pairs = find_pairs(Net(), {"x": SHAPE}, width=3, train=False)
    assert pairs == [DENSE]
    with pytest.raises(ValueError, match=r"inference; got .* `train=False`"):
        find_pairs(Net(), {"x": SHAPE}, width=3)


def test_pairs_of_what_is_replaced():
    model = Model(each(Dense, FlaxNorm))
    with replace_batch_norm():
        assert find_pairs(model, SHAPE) == [DENSE]


def test_what_another_method_calls_is_named():
    class Net(nn.Module):
        def setup(self):
            self.dense, self.norm, self.last = Dense(), Norm(), Norm()

        def __call__(self, x):
            x = self.encode(x)
            return self.last(x) if self.is_initializing() else x

        def encode(self, x):
            return self.norm(self.dense(x))

    pairs = find_pairs(Net(), SHAPE)
    assert pairs == [("dense", "norm", EPSILON)]
    assert pairs.unfoldable == {"last": "it is not called, or has a call of its own"}
    assert find_pairs(Net(), SHAPE, method="encode") == pairs


def test_state_that_a_layer_writes_is_a_use_and_what_it_sows_is_not():
    class Net(nn.Module):
        writes: bool

        @nn.compact
        def __call__(self, x):
            x = Dense()(x)
            self.sow("intermediates", "x", x)
            if self.writes:
                self.variable("cache", "x", jnp.zeros_like, x).value = x
            return Norm()(x)

    assert find_pairs(Net(False), SHAPE) == [DENSE]
    assert find_pairs(Net(True), SHAPE).unfoldable == {
        "BatchNorm_0": "the output of Dense_0 also goes to the results, and "
        "its output goes to the results"
    }


@pytest.mark.parametrize("block", [Block, nn.jit(Block)])
def test_folded_holds_inside_and_not_outside(block):
    """Functions that are jitted, and models: outside, inside, outside, inside."""
    model, x = nn.Sequential([block(), nn.Dense(2)]), jnp.ones((4, 6))
    apply = jax.jit(model.apply)
    variables = noisy(model, x)
    pairs = find_pairs(model, x)
    assert len(pairs) == 1
    new = jaxbn.fold_tree(variables, pairs)
    for run in (model.apply, apply, model.apply, apply):
        y = run(variables, x)
        with folded(pairs):
            same = run(new, x)
        np.testing.assert_allclose(same, y, rtol=0, atol=1e-5 * abs(y).max())
        with pytest.raises(ScopeCollectionNotFound):
            run(new, x)


def test_folded_leaves_other_modules_alone():
    """A batch norm that is in no pair, and a bias that is there already."""
    model = Model(each(P(nn.Dense, 6), Norm, nn.relu, P(Norm, momentum=0.5), jnp.sin))
    check_folded(model, find_pairs(model, SHAPE))
    check_folded(model, [])


def test_interceptors_of_users_see_the_calls():
    model, seen = Model(each(Dense, Norm)), []

    def look(method, args, kwargs, context):
        seen.append(context.module.name)
        return method(*args, **kwargs)

    pairs = find_pairs(model, SHAPE)
    new = jaxbn.fold_tree(noisy(model), pairs)
    with nn.intercept_methods(look), folded(pairs):
        _, sown = model.apply(new, X, capture_intermediates=True)
    assert seen == [None, "Dense_0", "BatchNorm_0"]
    assert len(sown["intermediates"]["BatchNorm_0"]["__call__"]) == 1


def test_bad_input():
    model = Model(each(Dense, Norm))
    variables, pairs = noisy(model), find_pairs(model, X)
    with pytest.raises(ValueError, match="must have a BatchNorm; got none"):
        find_pairs(Model(Dense()), SHAPE)
    with pytest.raises(ValueError, match="that `fold_tree` returns"), folded(pairs):
        model.apply(variables, X)
    uncalled = [*pairs, ("Dense_7", "BatchNorm_7")]
    folding = folded(uncalled)
    with pytest.raises(ValueError, match=r"a layer of .*Dense_7"), folding:
        model.apply(jaxbn.fold_tree(variables, pairs), X)
