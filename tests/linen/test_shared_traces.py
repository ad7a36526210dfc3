"""nn.jit uses one trace for modules that are alike: tools still see each of them."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import jaxbn
from jaxbn.linen import (
    find_pairs,
    folded,
    recalibrate,
    replace_batch_norm,
    weight_decay_mask,
)

X = jax.random.normal(jax.random.key(0), (8, 4))


class Block(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=False)(x)
        return nn.relu(nn.BatchNorm(not self.train)(x))


class NormBeforeTwo(nn.Module):
    dense: type = nn.Dense

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(True)(nn.relu(x))
        return self.dense(4, name="a")(x) + self.dense(4, name="b")(x)


def two(block, train=True):
    return nn.Sequential([block(train), block(train)])


def variables_of(model):
    variables = model.init(jax.random.key(1), X)
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [
        jax.random.uniform(k, a.shape, minval=0.5, maxval=1.5)
        for k, a in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(drawn)


def test_recalibrate_and_weight_decay():
    jitted, plain = two(nn.jit(Block)), two(Block)
    variables = variables_of(plain)
    got, want = (recalibrate(model, variables, [X]) for model in (jitted, plain))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert weight_decay_mask(jitted, X) == weight_decay_mask(plain, X)
    with pytest.raises(ValueError, match=r"the order of .*layers_1"):
        recalibrate(two(nn.jit(Block)), variables, [X], sequential=True)


@pytest.mark.parametrize(
    ("jitted", "plain"),
    [
        (two(nn.jit(Block), train=False), two(Block, train=False)),
        (NormBeforeTwo(nn.jit(nn.Dense)), NormBeforeTwo()),
    ],
)
def test_pairs(jitted, plain):
    variables, pairs = variables_of(plain), find_pairs(jitted, X)
    assert pairs == find_pairs(plain, X)
    assert len(pairs) == 2
    assert pairs.unfoldable == {}
    with folded(pairs):
        y = jitted.apply(jaxbn.fold_tree(variables, pairs), X)
    np.testing.assert_allclose(y, plain.apply(variables, X), rtol=1e-5, atol=1e-5)


def test_pairs_of_what_is_replaced():
    model = two(Block, train=False)
    pairs = find_pairs(model, X)
    with replace_batch_norm():
        assert find_pairs(model, X) == pairs


def test_replace_finds_what_was_traced_before():
    model = nn.jit(Block)()
    variables = model.init(jax.random.key(1), X)
    for _ in range(2):
        with replace_batch_norm(momentum=0.25):
            model.apply(variables, X, mutable=["batch_stats"])
