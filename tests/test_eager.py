"""Outside of jit nothing compiles in the second call."""

import functools

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


def training(norm, **kwargs):
    return functools.partial(norm, train=True, **kwargs), (X, *jaxbn.init(4))


def gradient():
    call, (x, params, state) = training(jaxbn.batch_norm, mask=MASK)
    loss = jax.grad(lambda *args: (call(*args)[0] ** 2).sum(), (0, 1))
    return loss, (jnp.asarray(x), params, state)


def forward_and_backward():
    def call(x, scale, bias):
        y, cache = jaxbn.forward(x, scale, bias)
        return jaxbn.backward(y, cache)

    return call, (X, *jaxbn.init(4)[0])


def linen(norm):
    variables = norm.init(jax.random.key(0), X)
    return functools.partial(norm.apply, mutable=["batch_stats"]), (variables, X)


def of_linen(tool, *, variables_first=False, **kwargs):
    net = Net()
    args = net, net.init(jax.random.key(0), X, True)
    args = args[::-1] if variables_first else args
    return lambda *args: tool(*args, BATCHES, train=True, **kwargs), args


def of_nnx(tool, **kwargs):
    rngs = nnx.Rngs(0)
    linear = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
    net = nnx.Sequential(linear, jaxbn.nnx.BatchNorm(4, rngs=rngs))
    return lambda net: tool(net, BATCHES, **kwargs), (net,)


CALLS = {
    "batch_norm": lambda: training(jaxbn.batch_norm),
    "gradient": gradient,
    "batch_moments": lambda: (jaxbn.batch_moments, (X,)),
    "forward, backward": forward_and_backward,
    "ghost": lambda: training(jaxbn.ghost_batch_norm, ghost_batch_size=4),
    "renorm": lambda: training(jaxbn.batch_renorm, r_max=3.0, d_max=5.0),
    "linen": lambda: linen(jaxbn.linen.BatchNorm(False)),
    "nnx": lambda: (jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0)), (X,)),
    "nnx renorm": lambda: (jaxbn.nnx.BatchRenorm(4, rngs=nnx.Rngs(0)), (X,)),
    "recalibrate": lambda: of_linen(jaxbn.linen.recalibrate),
    "recalibrate in turn": lambda: of_linen(jaxbn.linen.recalibrate, sequential=True),
    "inspect": lambda: of_linen(jaxbn.linen.inspect_statistics, variables_first=True),
    "nnx recalibrate": lambda: of_nnx(jaxbn.nnx.recalibrate),
    "nnx recalibrate in turn": lambda: of_nnx(jaxbn.nnx.recalibrate, sequential=True),
    "nnx inspect": lambda: of_nnx(jaxbn.nnx.inspect_statistics),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_compiles_nothing(name):
    call, args = CALLS[name]()
    call(*args)
    with compilations.counted() as later:
        call(*args)
        call(*args)
    assert not later
