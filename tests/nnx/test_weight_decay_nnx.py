"""weight_decay_mask for NNX: batch norms by class, whatever they are called."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxbn.nnx import BatchNorm, BatchRenorm, weight_decay_mask

WIDTH = 4
LINEAR = {"kernel": True, "bias": True}
NORM = {"scale": False, "bias": False}


class Misnamed(nnx.Module):
    """Linear layers called "scale" and "batch_norm", a norm called "kernel"."""

    def __init__(self, rngs):
        self.scale = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.batch_norm = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.kernel = BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.kernel(self.batch_norm(self.scale(x)))


MISNAMED = {"scale": LINEAR, "batch_norm": LINEAR, "kernel": NORM}


class Net(nnx.Module):
    """Flax's norm and ours, in lists, in a stack, and one under two names."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Misnamed(rngs), nnx.BatchNorm(WIDTH, rngs=rngs)])
        self.stack = nnx.vmap(Misnamed)(rngs.split(3))
        self.aside = self.blocks[0].kernel
        self.renorm = BatchRenorm(WIDTH, use_scale=False, rngs=rngs)
        self.layer_norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        for layer in self.blocks:
            x = layer(x)
        scan = nnx.scan(
            lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        x = scan(x, self.stack)
        return self.layer_norm(self.renorm(self.aside(x)))


# A module under two names is kept under the first in alphabetical order.
DESIRED = {
    "aside": NORM,
    "blocks": {0: {"scale": LINEAR, "batch_norm": LINEAR}, 1: NORM},
    "stack": MISNAMED,
    "renorm": {"bias": False},
    "layer_norm": {"scale": True, "bias": True},
}


@pytest.mark.parametrize("make", [Net, lambda: nnx.eval_shape(Net)])
def test_batch_norms_alone_are_spared(make):
    model = make()
    mask = weight_decay_mask(model)
    assert nnx.to_pure_dict(mask) == DESIRED
    params = nnx.state(model, nnx.Param)
    assert type(mask) is type(params)
    assert set(dict(nnx.to_flat_state(mask))) == set(dict(nnx.to_flat_state(params)))


def test_what_is_optimized():
    """Only kernels, say: the mask is of those."""
    kernels = nnx.All(nnx.Param, nnx.PathContains("kernel"))
    mask = weight_decay_mask(Misnamed(nnx.Rngs(0)), wrt=kernels)
    kernel = {"kernel": True}
    desired = {"scale": kernel, "batch_norm": kernel, "kernel": NORM}
    assert nnx.to_pure_dict(mask) == desired


def test_a_norm_alone_and_none():
    norm = BatchNorm(WIDTH, rngs=nnx.Rngs(0))
    assert nnx.to_pure_dict(weight_decay_mask(norm)) == NORM
    linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    assert nnx.to_pure_dict(weight_decay_mask(linear)) == LINEAR


def test_what_is_no_nnx_module():
    with pytest.raises(TypeError, match=r"a flax.nnx.Module; got State"):
        weight_decay_mask(nnx.state(Misnamed(nnx.Rngs(0))))


OPTIMIZERS = {
    "adamw": lambda decay, mask: optax.adamw(0.1, weight_decay=decay, mask=mask),
    "masked": lambda decay, mask: optax.chain(
        optax.masked(optax.add_decayed_weights(decay), mask), optax.sgd(0.1)
    ),
}


@nnx.jit
def loss_gradients(model, x):
    return nnx.grad(lambda model: jnp.square(model(x) - x).mean())(model)


@nnx.jit
def step(model, optimizer, gradients):
    optimizer.update(model, gradients)


def randomized_net():
    """No parameter is 0, so that decay would show."""
    model, rng = Net(), np.random.default_rng(0)
    params = nnx.state(model, nnx.Param)
    params = jax.tree.map(lambda p: jnp.float32(rng.uniform(0.5, 2, p.shape)), params)
    nnx.update(model, params)
    return model


def params_after(make_optimizer, decay, mask, gradients):
    model = randomized_net()
    optimizer = nnx.Optimizer(model, make_optimizer(decay, mask), wrt=nnx.Param)
    with jax.numpy_dtype_promotion("standard"):  # for optax
        for _ in range(2):
            step(model, optimizer, gradients)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_with_optax(make_optimizer):
    """Bit for bit, a spared parameter moves as without decay, the others as with it."""
    x = np.random.default_rng(1).normal(size=(8, WIDTH)).astype(np.float32)
    gradients = loss_gradients(randomized_net(), x)
    after = functools.partial(params_after, make_optimizer, gradients=gradients)
    mask = weight_decay_mask(Net())
    everything = jax.tree.map(lambda _: True, mask)
    moved, decayed, spared = after(0.5, mask), after(0.5, everything), after(0, mask)
    wanted = jax.tree.map(lambda m, a, b: a if m else b, DESIRED, decayed, spared)
    jax.tree.map(np.testing.assert_array_equal, moved, wanted)
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, decayed, spared)))
