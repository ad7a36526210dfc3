"""weight_decay_mask for NNX: batch norms by class, whatever they are called."""

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


@nnx.jit
def step(model, optimizer):
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))


def test_decay_by_optax():
    """Two steps of rate 0.1 and decay 0.5: all but the norms shrink by 0.95 each."""
    model = Net()
    before, mask = nnx.state(model, nnx.Param), weight_decay_mask(model)
    nnx.update(model, jax.tree.map(jnp.ones_like, before))
    adamw = optax.adamw(0.1, weight_decay=0.5, mask=mask)
    optimizer = nnx.Optimizer(model, adamw, wrt=nnx.Param)
    with jax.numpy_dtype_promotion("standard"):  # for optax
        for _ in range(2):
            step(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for decays, param in zip(*map(jax.tree.leaves, (DESIRED, after)), strict=True):
        np.testing.assert_allclose(param, 0.95**2 if decays else 1, 4e-7 * decays)
