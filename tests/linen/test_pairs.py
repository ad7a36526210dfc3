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
from jaxbn.linen import BatchNorm, BatchRenorm, find_pairs, folded

P = functools.partial
ROWS = jax.ShapeDtypeStruct((4, 6), jnp.float32)
IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 6), jnp.float32)
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


def noisy(variables, seed=0):
    """Variables as after a training."""
    rng = np.random.default_rng(seed)
    flat = flatten_dict(variables)
    for path, leaf in flat.items():
        if path[-1] in ("var", "scale"):
            flat[path] = jnp.array(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        elif path[-1] in ("mean", "bias"):
            flat[path] = jnp.array(rng.normal(size=leaf.shape), leaf.dtype)
    return unflatten_dict(flat)


def check_folded(model, x, pairs, tolerance=1e-5):
    """The folded model gives the same y, in the same dtype."""
    x = jax.random.normal(jax.random.key(1), x.shape, x.dtype)
    variables = noisy(jax.jit(model.init)(jax.random.key(0), x))
    y = jax.jit(model.apply)(variables, x)
    with folded(pairs):
        new = jax.jit(model.apply)(jaxbn.fold_tree(variables, pairs), x)
    for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(new), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * abs(a).max())


def resnet(x):
    x = nn.relu(FlaxNorm()(Conv((3, 3))(x)))
    y = nn.relu(FlaxNorm()(Conv((1, 1))(x)))
    y = FlaxNorm()(x=nn.Conv(12, (3, 3), strides=2)(inputs=y))
    return nn.relu(y + Norm()(nn.Conv(12, (1, 1), 2, use_bias=False)(x)))


def convs(*numbers):
    return [(f"Conv_{i}", f"BatchNorm_{i}", EPSILON) for i in numbers]


DENSE = ("Dense_0", "BatchNorm_0", EPSILON)
BEFORE = ("BatchNorm_0", "Dense_0", EPSILON)
FIRST = {"BatchNorm_0": "its input is not the output of one layer"}


def reason(words):
    return {"BatchNorm_0": words}


def skip(x):
    y = Dense()(x)
    return y + Norm()(y)


def masked(x):
    return Norm()(x, mask=x > 0)


def returned_too(x):
    y = Dense()(x)
    return y, Norm()(y)


def tied(x):
    dense = Dense()
    return Norm()(dense(x)) @ dense.variables["params"]["kernel"].T


def siamese(x):
    dense, norm = Dense(), Norm()
    return norm(dense(x)) - norm(dense(x + 1))


def branches(x):
    x = Norm()(nn.relu(x))
    return Dense()(x) + nn.relu(nn.Dense(6)(x))


def branches_and_a_skip(x):
    x = Norm()(nn.relu(x))
    return Dense()(x) + x


def other_input_too(x):
    dense = Dense()
    return dense(Norm()(nn.relu(x))) + dense(x)


def casts(x):
    y = jax.ad_checkpoint.checkpoint_name(nn.Dense(6, dtype=jnp.float16)(x), "y")
    return Norm()(y.astype(jnp.float32))


BLOCK = {"params": 0, "batch_stats": 0}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(FlaxNorm()(Dense()(x)))


def scanned(x):
    stack = nn.scan(
        lambda block, x, _: (block(x), None),
        BLOCK,
        split_rngs={"params": True},
        length=3,
    )
    return stack(Block(), x, None)[0]


def branched(x):
    block = Block()
    return nn.cond(x.sum() > 0, lambda b, x: b(x), lambda b, x: b(-x), block, x)


def mapped(x):
    stack = nn.vmap(Block, variable_axes=BLOCK, split_rngs={"params": True})
    return stack()(x)


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


JITTED = [
    (f"JitBlock_{i}/Dense_0", f"JitBlock_{i}/BatchNorm_0", EPSILON) for i in (0, 1)
]
CASES = {
    "resnet": (resnet, IMAGES, convs(0, 1, 2, 3), {}),
    "skip": (skip, ROWS, [], reason("the output of Dense_0 also goes to `add`")),
    "returned": (
        returned_too,
        ROWS,
        [],
        reason("the output of Dense_0 also goes to the results"),
    ),
    "no use": (lambda x: (Norm()(x), x)[1], ROWS, [], reason("goes to nothing")),
    "named as primitives": (
        lambda x: Norm()(nn.relu(x)) + Dense(name="add")(x),
        ROWS,
        [],
        reason("its output goes to `add`"),
    ),
    "relu between": (each(Dense, nn.relu, Norm), ROWS, [], FIRST),
    "tied": (tied, ROWS, [], reason("kernel of Dense_0 also goes to `transpose`")),
    "siamese": (siamese, ROWS, [DENSE], {}),
    "two layers": (
        lambda x: (n := Norm())(Dense()(x)) + n(Dense()(-x)),
        ROWS,
        [],
        FIRST,
    ),
    "two norms": (each(Dense, Norm, Norm), ROWS, [DENSE], {"BatchNorm_1": "its input"}),
    "before": (each(nn.relu, Norm, Dense), ROWS, [BEFORE], {}),
    "before two": (
        branches,
        ROWS,
        [BEFORE, ("BatchNorm_0", "Dense_1", EPSILON)],
        {},
    ),
    "before, and a skip": (branches_and_a_skip, ROWS, [], reason("goes to `add`")),
    "other input": (other_input_too, ROWS, [], reason("Dense_0 has another input")),
    "before valid": (
        each(nn.relu, Norm, P(Conv, (3, 3), padding="VALID")),
        IMAGES,
        [("BatchNorm_0", "Conv_0", EPSILON | {"padding": "VALID"})],
        {},
    ),
    "before groups": (
        each(nn.relu, Norm, P(Conv, (1, 1), feature_group_count=3)),
        IMAGES,
        [("BatchNorm_0", "Conv_0", EPSILON | {"padding": "SAME"})],
        {},
    ),
    "before same": (
        each(nn.relu, Norm, P(Conv, (3, 3))),
        IMAGES,
        [],
        reason('`padding` must be "VALID"'),
    ),
    "before dilated": (
        each(nn.relu, Norm, P(Conv, (1, 1), input_dilation=2, padding=0)),
        IMAGES,
        [],
        reason("Conv_0 puts zeros between"),
    ),
    "before transposed": (
        each(nn.relu, Norm, P(nn.ConvTranspose, 6, (1, 1))),
        IMAGES,
        [],
        reason("ConvTranspose_0 puts zeros between"),
    ),
    "before masked kernel": (
        each(nn.relu, Norm, P(Conv, (1, 1), mask=jnp.eye(6)[None, None])),
        IMAGES,
        [],
        reason("Conv_0 has batch axes or a mask"),
    ),
    "masked kernel": (
        each(P(Conv, (1, 1), mask=jnp.eye(6)[None, None]), Norm),
        IMAGES,
        convs(0),
        {},
    ),
    "masked": (
        each(Dense, lambda x: Norm()(x, mask=x > 0)),
        ROWS,
        [],
        reason("a mask"),
    ),
    "transposed": (
        each(P(nn.ConvTranspose, 5, (2, 2), 2, transpose_kernel=True), Norm),
        IMAGES,
        [("ConvTranspose_0", "BatchNorm_0", EPSILON | {"features_axis": (-2,)})],
        {},
    ),
    "other axis": (each(Dense, P(Norm, axis=0)), ROWS, [], reason("its features are")),
    "general": (
        each(P(nn.DenseGeneral, (3, 4)), P(Norm, axis=-1)),
        ROWS,
        [("DenseGeneral_0", "BatchNorm_0", EPSILON)],
        {},
    ),
    "general, two axes": (
        each(P(nn.DenseGeneral, (3, 4), use_bias=False), P(Norm, axis=(1, 2))),
        ROWS,
        [("DenseGeneral_0", "BatchNorm_0", EPSILON | {"features_axis": (-2, -1)})],
        {},
    ),
    "before general": (
        each(nn.relu, P(Norm, axis=(2, 3)), P(nn.DenseGeneral, (3, 4), axis=(-2, -1))),
        IMAGES,
        [("BatchNorm_0", "DenseGeneral_0", EPSILON | {"features_axis": (-4, -3)})],
        {},
    ),
    "before general, one of two": (
        each(nn.relu, Norm, P(nn.DenseGeneral, (3, 4), axis=(-2, -1))),
        IMAGES,
        [],
        reason("DenseGeneral_0 sums over other axes"),
    ),
    "casts": (casts, ROWS, [DENSE], {}),
    "half": (each(P(nn.Dense, 6, dtype=jnp.float16), Norm), ROWS, [DENSE], {}),
    "renorm": (
        each(Dense, P(BatchRenorm, True)),
        ROWS,
        [("Dense_0", "BatchRenorm_0", {"epsilon": 1e-5})],
        {},
    ),
    "jit": (each(P(nn.jit(Block)), P(nn.jit(Block))), ROWS, JITTED, {}),
    "remat": (
        each(P(nn.remat(nn.Dense), 6), P(nn.remat(nn.BatchNorm), True, epsilon=1e-3)),
        ROWS,
        [("CheckpointDense_0", "CheckpointBatchNorm_0", EPSILON)],
        {},
    ),
    "branched": (branched, ROWS, [], {"Block_0/BatchNorm_0": "also goes to `cond`"}),
    "scanned": (scanned, ROWS, [], {"Block_0/BatchNorm_0": "also goes to `scan`"}),
    "mapped": (mapped, ROWS, [], {"VmapBlock_0/BatchNorm_0": "is a stack"}),
    "weight norm": (
        lambda x: Norm()(nn.WeightNorm(Dense())(x)),
        ROWS,
        [],
        reason("kernel of Dense_0 also goes to"),
    ),
    "standardized": (
        lambda x: Norm()(Standardized(6, (1, 1))(x)),
        IMAGES,
        [],
        FIRST,
    ),
    "subclass": (
        lambda x: Twice(True, epsilon=1e-3)(Dense()(x)),
        ROWS,
        [("Dense_0", "Twice_0", EPSILON)],
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_found_and_folding_them_changes_nothing(name):
    function, x, expected, reasons = CASES[name]
    pairs = find_pairs(Model(function), x)
    assert pairs == expected
    assert pairs.unfoldable.keys() == reasons.keys()
    for path, words in reasons.items():
        assert words in pairs.unfoldable[path]
    if expected:
        tolerance = 1e-3 if name in ("casts", "half") else 1e-5
        check_folded(Model(function), x, pairs, tolerance)


def test_the_arguments_of_the_call_are_handed_on():
    """Also what is no array; training is not what is folded, and is not run."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, width, train=True):
            x = nn.Dense(width)(x["x"])
            x = FlaxNorm(use_running_average=not train, axis_name="devices")(x)
            return x if width == 3 else None

    pairs = find_pairs(Net(), {"x": ROWS}, width=3, train=False)
    assert pairs == [DENSE]
    with pytest.raises(ValueError, match=r"inference; got .* `train=False`"):
        find_pairs(Net(), {"x": ROWS}, width=3)


def test_one_batch_norm_in_training_is_named():
    pairs = find_pairs(
        Model(each(Dense, Norm, P(Norm, use_running_average=False))), ROWS
    )
    assert pairs == [DENSE]
    assert "normalizes by the batch" in pairs.unfoldable["BatchNorm_1"]


def test_what_another_method_calls_is_named():
    class Net(nn.Module):
        def setup(self):
            self.dense, self.norm, self.last = Dense(), Norm(), Norm()

        def __call__(self, x):
            return (
                self.last(self.encode(x)) if self.is_initializing() else self.encode(x)
            )

        def encode(self, x):
            return self.norm(self.dense(x))

    pairs = find_pairs(Net(), ROWS)
    assert pairs == [("dense", "norm", EPSILON)]
    assert pairs.unfoldable == {"last": "it is not called, or has a call of its own"}
    assert find_pairs(Net(), ROWS, method="encode") == pairs


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

    assert find_pairs(Net(False), ROWS) == [DENSE]
    assert find_pairs(Net(True), ROWS).unfoldable == {
        "BatchNorm_0": "the output of Dense_0 also goes to the results, and "
        "its output goes to the results"
    }


@pytest.mark.parametrize("block", [Block, nn.jit(Block)])
def test_folded_holds_inside_and_not_outside(block):
    """Functions that are jitted, and models: outside, inside, outside, inside."""
    model, x = nn.Sequential([block(), nn.Dense(2)]), jnp.ones((4, 6))
    apply = jax.jit(model.apply)
    variables = noisy(model.init(jax.random.key(0), x))
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
    check_folded(model, ROWS, find_pairs(model, ROWS))
    check_folded(model, ROWS, [])


def test_interceptors_of_users_see_the_calls():
    model, seen = Model(each(Dense, Norm)), []

    def look(method, args, kwargs, context):
        seen.append(context.module.name)
        return method(*args, **kwargs)

    pairs = find_pairs(model, ROWS)
    new = jaxbn.fold_tree(model.init(jax.random.key(0), jnp.ones((4, 6))), pairs)
    with nn.intercept_methods(look), folded(pairs):
        _, sown = model.apply(new, jnp.ones((4, 6)), capture_intermediates=True)
    assert seen == [None, "Dense_0", "BatchNorm_0"]
    assert len(sown["intermediates"]["BatchNorm_0"]["__call__"]) == 1


def test_bad_input():
    model, x = Model(each(Dense, Norm)), jnp.ones((4, 6))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="must have a BatchNorm; got none"):
        find_pairs(Model(Dense()), ROWS)
    pairs = find_pairs(model, x)
    with pytest.raises(ValueError, match="that `fold_tree` returns"), folded(pairs):
        model.apply(variables, x)
    uncalled = [*pairs, ("Dense_7", "BatchNorm_7")]
    folding = folded(uncalled)
    with pytest.raises(ValueError, match=r"a layer of .*Dense_7"), folding:
        model.apply(jaxbn.fold_tree(variables, pairs), x)
