"""Checkpoints of NNX models, Flax's class and ours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Orbax, assert_identical, draw
from flax import nnx

from jaxbn.nnx import BatchNorm, BatchRenorm

pytestmark = pytest.mark.usefixtures("lenient")


def make(cls=BatchNorm, **options):
    rngs = nnx.Rngs(0)
    norm = functools.partial(cls, momentum=0.75, rngs=rngs)
    return nnx.Sequential(
        nnx.Conv(3, 4, (3,), rngs=rngs),
        norm(4, **options),
        jnp.tanh,
        norm(5, axis=1, use_scale=False, **options),
        nnx.Linear(4, 3, rngs=rngs),
        norm(3, use_bias=False, **options),
    )


flax_s = functools.partial(make, nnx.BatchNorm)
renorm = functools.partial(make, BatchRenorm)


@nnx.jit
def step(net, x):
    gradients = nnx.grad(lambda net: jnp.square(net(x) - 1 + x).mean())(net)
    params = nnx.state(net, nnx.Param)
    nnx.update(net, jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients))


def trained(make):
    net = make()
    for seed in range(5):
        step(net, draw(seed))
    return net


@nnx.jit
def infer(net):
    return nnx.view(net, use_running_average=True)(draw(100))


def restored_into(make, path, *, lacking=()):
    """What notebooks/coming-from.md tells: only the missing keep their values."""
    net = make()
    target = nnx.filter_state(
        nnx.state(nnx.eval_shape(make)), lambda path, _: path[-1] not in lacking
    )
    nnx.update(net, Orbax.restore(path, target))
    return net


@pytest.mark.parametrize(
    ("write", "read"),
    [(flax_s, make), (make, flax_s), (renorm, renorm)],
    ids=["of flax", "for flax", "renorm"],
)
def test_what_was_trained_is_restored_into_shapes(write, read, tmp_path):
    net = trained(write)
    Orbax.save(tmp_path / "c", nnx.state(net))
    copy = restored_into(read, tmp_path / "c")
    assert_identical(nnx.state(copy), nnx.state(net))
    np.testing.assert_allclose(infer(copy), infer(net), rtol=1e-6, atol=1e-6)
    assert np.abs(infer(read()) - infer(net)).max() > 0.1  # it was the variables


@pytest.mark.parametrize("options", [{"debias": True}, {"momentum": None}], ids=str)
def test_a_count_that_the_checkpoint_lacks(options, tmp_path):
    """At 0, the first update replaces what was loaded."""
    net, counting = trained(flax_s), functools.partial(make, **options)
    Orbax.save(tmp_path / "c", nnx.state(net))
    with pytest.raises(ValueError, match="num_updates"):
        restored_into(counting, tmp_path / "c")
    copy = restored_into(counting, tmp_path / "c", lacking=["num_updates"])
    conv, norm, *_ = copy.layers
    assert norm.num_updates == 0
    np.testing.assert_allclose(infer(copy), infer(net), rtol=1e-6, atol=1e-6)
    seen = conv(draw(7))
    step(copy, draw(7))
    assert norm.num_updates == 1
    np.testing.assert_allclose(norm.mean, seen.mean((0, 1)), atol=1e-6)
