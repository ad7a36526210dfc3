"""weight_decay_mask: batch norms by class, whatever they are called."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxbn.linen import BatchNorm, BatchRenorm, weight_decay_mask

ROWS, WIDTH = 8, 4
SHAPES = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
DENSE = {"kernel": True, "bias": True}
NORM = {"scale": False, "bias": False}


class Misnamed(nn.Module):
    """A Dense called "scale", one called "BatchNorm_0", and a norm called "kernel"."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(WIDTH, name="scale")(x)
        x = nn.Dense(WIDTH, name="BatchNorm_0")(x)
        x = BatchNorm(name="kernel")(x, not train)
        return nn.Dropout(0.5)(x, deterministic=not train)


MISNAMED = {"scale": DENSE, "BatchNorm_0": DENSE, "kernel": NORM}


class Setup(nn.Module):
    """Layers made in setup, one of them called twice."""

    def setup(self):
        self.shared = BatchNorm(use_running_average=False)
        self.blocks = [Misnamed(), nn.BatchNorm(use_running_average=False)]

    def __call__(self, x):
        for block in self.blocks:
            x = block(self.shared(x))
        return x


class Stacks(nn.Module):
    """Three layers by nn.scan, as many by nn.vmap as there are rows."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        split = {"params": True, "dropout": True}
        scan = nn.scan(
            lambda block, x, _: (block(x), None), axes, split_rngs=split, length=3
        )
        x, _ = scan(nn.remat(Misnamed)(name="scanned"), x, None)
        rows = jnp.broadcast_to(x, (ROWS, *x.shape))
        vmap = nn.vmap(Misnamed, variable_axes=axes, split_rngs=split)
        return vmap(name="mapped")(rows)


class Own(BatchRenorm):
    """An heir with a parameter more."""

    @nn.compact
    def __call__(self, x, use_running_average=None, **kwargs):
        kernel = self.param("kernel", nn.initializers.ones, (1, WIDTH))
        return super().__call__(x * kernel, use_running_average, **kwargs)


class InOneScope(nn.Module):
    """The norm's parameters lie beside the kernel of the module around it."""

    @nn.compact
    def __call__(self, x):
        norm = BatchNorm(use_running_average=False)
        nn.share_scope(self, norm)
        return norm(x * self.param("kernel", nn.initializers.ones, (1, WIDTH)))


BOXED = {"scale_init": nn.with_partitioning(nn.initializers.ones, ("features",))}
MODELS = {
    "misnamed": (Misnamed(), MISNAMED),
    "setup": (Setup(), {"shared": NORM, "blocks_0": MISNAMED, "blocks_1": NORM}),
    "stacks": (Stacks(), {"scanned": MISNAMED, "mapped": MISNAMED}),
    "jit": (nn.jit(Misnamed)(), MISNAMED),
    "heir": (Own(False), NORM | {"kernel": True}),
    "in one scope": (InOneScope(), NORM | {"kernel": True}),
    "boxed": (BatchNorm(False, **BOXED), NORM),
}


@pytest.mark.parametrize("name", MODELS)
def test_batch_norms_alone_are_spared(name):
    model, desired = MODELS[name]
    x = jnp.ones(SHAPES.shape)
    params = jax.eval_shape(model.init, jax.random.key(0), x).get("params", {})
    for _ in range(2):  # nn.jit remembers, and must be seen through every time
        assert weight_decay_mask(model, SHAPES) == desired
        assert weight_decay_mask(model, x) == desired
    assert jax.tree.structure(desired) == jax.tree.structure(nn.unbox(params))


def test_arguments_are_those_of_init():
    """Static ones stay static, in any position; another method; several inputs."""

    class Branches(nn.Module):
        @nn.compact
        def __call__(self, x, deep, *, train):
            x = nn.Dense(WIDTH)(x)
            return BatchNorm()(x, not train) if deep else x

        @nn.compact
        def encode(self, batch):
            x = batch["a"] + batch["b"]
            return BatchNorm(use_running_average=False, name="norm")(x)

    mask = weight_decay_mask(Branches(), SHAPES, True, train=False)
    assert mask == {"Dense_0": DENSE, "BatchNorm_0": NORM}
    mask = weight_decay_mask(Branches(), SHAPES, False, train=True)
    assert mask == {"Dense_0": DENSE}
    batch = {"a": SHAPES, "b": SHAPES}
    assert weight_decay_mask(Branches(), batch, method="encode") == {"norm": NORM}


def test_nothing_is_computed():
    """A kernel of 4 TB, of which only the shape is made."""
    wide = jax.ShapeDtypeStruct((2, 2**20), jnp.float32)
    model = nn.Sequential([nn.Dense(2**20), BatchNorm(use_running_average=False)])
    assert weight_decay_mask(model, wide) == {"layers_0": DENSE, "layers_1": NORM}
