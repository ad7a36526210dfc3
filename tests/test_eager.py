"""Outside of jit nothing compiles in the second call."""

import compilations
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
MASK = np.arange(16)[:, None] % 4 > 0
BATCHES = [X[:8], X[8:]]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return jaxbn.linen.BatchNorm(not train)(nn.Dense(4, use_bias=False)(x))


def functional(mask=None):
    def call(x, params, state):
        return jaxbn.batch_norm(x, params, state, train=True, mask=mask)

    return call, (jnp.asarray(X), *jaxbn.init(4))


def gradient(mask=None):
    call, args = functional(mask)
    return jax.grad(lambda *args: (call(*args)[0] ** 2).sum(), (0, 1)), args


def moments(**kwargs):
    return lambda x: jaxbn.batch_moments(x, **kwargs), (X,)


def forward_and_backward():
    def call(x, scale, bias):
        y, cache = jaxbn.forward(x, scale, bias)
        return jaxbn.backward(y, cache)

    return call, (X, *jaxbn.init(4)[0])


def variant(function, **kwargs):
    return lambda *args: function(*args, train=True, **kwargs), (X, *jaxbn.init(4))


def linen(norm):
    variables = norm.init(jax.random.key(0), X)
    return lambda v, x: norm.apply(v, x, mutable=["batch_stats"]), (variables, X)


def of_linen(tool, *, variables_first=False, **kwargs):
    net = Net()
    variables = net.init(jax.random.key(0), X, True)
    args = (variables, net) if variables_first else (net, variables)
    return lambda *args: tool(*args, BATCHES, train=True, **kwargs), args


def of_nnx(tool, **kwargs):
    rngs = nnx.Rngs(0)
    linear = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
    net = nnx.Sequential(linear, jaxbn.nnx.BatchNorm(4, rngs=rngs))
    return lambda net: tool(net, BATCHES, **kwargs), (net,)


CALLS = {
    "batch_norm": functional,
    "batch_norm, mask": lambda: functional(MASK),
    "gradient": gradient,
    "gradient, mask": lambda: gradient(MASK),
    "batch_moments": moments,
    "batch_moments, mask": lambda: moments(mask=MASK),
    "forward, backward": forward_and_backward,
    "ghost": lambda: variant(jaxbn.ghost_batch_norm, ghost_batch_size=4),
    "renorm": lambda: variant(jaxbn.batch_renorm, r_max=3.0, d_max=5.0),
    "linen": lambda: linen(jaxbn.linen.BatchNorm(False)),
    "linen renorm": lambda: linen(jaxbn.linen.BatchRenorm(False)),
    "nnx": lambda: (jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0)), (X,)),
    "nnx renorm": lambda: (jaxbn.nnx.BatchRenorm(4, rngs=nnx.Rngs(0)), (X,)),
    "linen recalibrate": lambda: of_linen(jaxbn.linen.recalibrate),
    "linen recalibrate in turn": lambda: of_linen(
        jaxbn.linen.recalibrate, sequential=True
    ),
    "linen inspect": lambda: of_linen(
        jaxbn.linen.inspect_statistics, variables_first=True
    ),
    "nnx recalibrate": lambda: of_nnx(jaxbn.nnx.recalibrate),
    "nnx recalibrate in turn": lambda: of_nnx(jaxbn.nnx.recalibrate, sequential=True),
    "nnx inspect": lambda: of_nnx(jaxbn.nnx.inspect_statistics),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_compiles_nothing(name):
    call, args = CALLS[name]()
    with compilations.counted() as first:
        call(*args)
    with compilations.counted() as later:
        call(*args)
        call(*args)
    assert not later, f"{len(later)}, after {len(first)} in the first call"
