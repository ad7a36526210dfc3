"""nn.jit uses one trace for modules that are alike: tools still see each of them."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxbn.linen import (
    find_pairs,
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


def two(block, train=True):
    return nn.Sequential([block(train), block(train)])


def test_recalibrate_and_weight_decay():
    jitted, plain = two(nn.jit(Block)), two(Block)
    variables = jax.jit(plain.init)(jax.random.key(1), X)
    got, want = (recalibrate(model, variables, [X]) for model in (jitted, plain))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert weight_decay_mask(jitted, X) == weight_decay_mask(plain, X)
    with pytest.raises(ValueError, match=r"the order of .*layers_1"):
        recalibrate(two(nn.jit(Block)), variables, [X], sequential=True)


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
