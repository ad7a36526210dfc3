"""recalibrate and inspect_statistics compile once for a model, options and shapes."""

import gc
import weakref
from typing import Any

import compilations
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn._models import measure

X = np.random.default_rng(0).normal(3, 2, (40, 4)).astype(np.float32)


class Net(nn.Module):
    """Its second batch norm is given what the first one and the options made of x."""

    field: Any = None
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, factor=1.0, shift=None, function=abs):
        x = jaxbn.linen.BatchNorm(True, epsilon=self.epsilon)(x)
        x = function(x) * factor + (0 if shift is None else shift)
        x = x if self.field is None else x * self.field[0]
        return jaxbn.linen.BatchNorm(True)(x)

    def named(self, x):
        return self(x, factor=2.0)


class NnxNet(nnx.Module):
    def __init__(self):
        self.first = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.second = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x, factor=1.0, shift=None, function=abs):
        x = function(self.first(x)) * factor + (0 if shift is None else shift)
        return self.second(x)


def linen_tool(net):
    """A function of batches and options, that gives the second layer's mean and var."""
    variables = net.init(jax.random.key(0), X)

    def recalibrate(batches=(X,), **kwargs):
        got = jaxbn.linen.recalibrate(net, variables, batches, **kwargs)
        return [got["batch_stats"]["BatchNorm_1"][name] for name in ("mean", "var")]

    return recalibrate


def nnx_tool(net):
    def recalibrate(batches=(X,), **kwargs):
        jaxbn.nnx.recalibrate(net, batches, **kwargs)
        return [net.second.mean[...], net.second.var[...]]

    return recalibrate


MAKE = {"linen": lambda: linen_tool(Net()), "nnx": lambda: nnx_tool(NnxNet())}


def expect(got, x=X, factor=1.0, shift=0.0, function=abs, epsilon=1e-5):
    x = oracle.normalize(x, *oracle.moments(x)[1:], epsilon=epsilon)
    _, *want = oracle.moments(function(x) * factor + shift)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_what_changes_compiles_and_is_right(make):
    recalibrate = make()
    cases = [
        {},
        {"factor": 2.0},
        {"factor": 3.0},
        {"shift": jnp.ones((1, 4))},
        {"batches": (X[:9],)},
        {"batches": (X[:7], X[7:]), "sequential": True},
    ]
    for kwargs in cases + cases:
        x = np.concatenate(kwargs.get("batches", (X,)))
        options = {k: v for k, v in kwargs.items() if k in ("factor", "shift")}
        expect(recalibrate(**kwargs), x, **options)
    other = jnp.full((1, 4), 5.0, jnp.float32)  # traced: no other program
    with compilations.counted() as compiled:
        for kwargs in cases:
            recalibrate(**kwargs)
        expect(recalibrate(shift=other), shift=5.0)
    assert not compiled


def test_a_function_compiles_anew():
    """It may hold what changes."""
    recalibrate, held = linen_tool(Net()), [1.0]

    def function(x):
        return abs(x) * held[0]

    for held[0] in (1.0, 2.0):
        expect(recalibrate(function=function), factor=held[0])


def test_equal_models_share():
    first, second = (linen_tool(Net(epsilon=0.5)) for _ in range(2))
    first()
    with compilations.counted() as compiled:
        expect(second(), epsilon=0.5)
    assert not compiled


def test_a_method_of_linen():
    recalibrate = linen_tool(Net())
    for method in ("named", Net.named, "named"):
        expect(recalibrate(method=method), factor=2.0)


def test_a_hyperparameter_of_nnx():
    net = NnxNet()
    recalibrate = nnx_tool(net)
    for epsilon in (1e-5, 10.0, 1e-5):
        net.first.epsilon = epsilon
        expect(recalibrate(), epsilon=epsilon)
    with compilations.counted() as compiled:
        recalibrate()
    assert not compiled


def test_a_model_that_cannot_be_hashed():
    field = [1.0]
    recalibrate = linen_tool(Net(field))
    for field[0] in (2.0, 3.0):
        expect(recalibrate(), factor=field[0])


@pytest.mark.parametrize("hold", [Net, NnxNet])
def test_a_dead_model_is_freed(hold):
    gc.collect()
    before = len(measure._PASSES)
    net = hold()
    recalibrate = (linen_tool if hold is Net else nnx_tool)(net)
    for kwargs in ({}, {"factor": 2.0}, {"sequential": True}):
        recalibrate(**kwargs)
    if hold is Net:
        recalibrate(method=net.named)
    assert len(measure._PASSES) == before + 1
    dead = weakref.ref(net)
    del net, recalibrate
    gc.collect()
    assert dead() is None
    assert len(measure._PASSES) == before


def test_options_that_compare_equal_are_told_apart():
    """For Python 1 == True == 1.0, and so for a dictionary of compiled passes."""

    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x, factor):
            x = x * (100.0 if isinstance(factor, bool) else 1.0)
            return jaxbn.linen.BatchNorm(True)(x)

    variables = Scaled().init(jax.random.key(0), X, 1)
    for factor, size in ((1, 1), (True, 100), (1.0, 1), (True, 100)):
        new = jaxbn.linen.recalibrate(Scaled(), variables, [X], factor=factor)
        mean = new["batch_stats"]["BatchNorm_0"]["mean"]
        np.testing.assert_allclose(mean, size * X.mean(0), rtol=1e-5)
