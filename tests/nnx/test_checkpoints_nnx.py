"""Checkpoints of NNX models: Orbax and flax.serialization, Flax's class and ours."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import MessagePack, Orbax, assert_identical, draw
from flax import nnx

from jaxbn.nnx import BatchNorm, BatchRenorm

pytestmark = pytest.mark.usefixtures("as_flax_wants")


class PureMessagePack(MessagePack):
    """flax.serialization knows dicts, not nnx.State."""

    @staticmethod
    def save(path, state):
        MessagePack.save(path, nnx.to_pure_dict(state))

    @staticmethod
    def restore(path, target):
        pure = flax.serialization.from_bytes(
            nnx.to_pure_dict(target), path.read_bytes()
        )
        nnx.replace_by_pure_dict(target, pure)
        return target


class Net(nnx.Module):
    def __init__(self, norm, options):
        rngs = nnx.Rngs(0)
        norm = functools.partial(norm, momentum=0.75, rngs=rngs)
        self.conv = nnx.Conv(3, 4, (3,), rngs=rngs)
        self.norm = norm(4, **options)
        self.plane = norm(5, axis=1, use_scale=False, **options)
        self.dense = nnx.Linear(20, 3, rngs=rngs)
        self.head = norm(3, use_bias=False, **options)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = jnp.tanh(x + self.plane(x))
        return self.head(self.dense(x.reshape(len(x), -1)))


def ours(norm=BatchNorm, **options):
    return Net(norm, options)


def theirs():
    return Net(nnx.BatchNorm, {})


@nnx.jit
def step(net, x):
    def loss(net):
        return jnp.square(net(x) - 1 + x[:, 0]).mean()

    gradients = nnx.grad(loss)(net)
    params = nnx.state(net, nnx.Param)
    nnx.update(net, jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients))


def train(net, seeds=range(5)):
    for seed in seeds:
        step(net, draw(seed))
    return net


@nnx.jit
def infer(net):
    return nnx.view(net, use_running_average=True)(draw(100))


def restored_into(make, format_, path, *, lacking=()):
    """What notebooks/coming-from.md tells: only the missing keep their values."""
    net = make()
    target = nnx.filter_state(
        nnx.state(nnx.eval_shape(make)), lambda path, _: path[-1] not in lacking
    )
    nnx.update(net, format_.restore(path, target))
    return net


renorm = functools.partial(ours, BatchRenorm)


@pytest.mark.parametrize(
    ("make", "format_"),
    [(ours, PureMessagePack), (renorm, Orbax)],
    ids=["plain", "renorm"],
)
def test_training_goes_on(make, format_, tmp_path):
    net = train(make())
    format_.save(tmp_path / "c", nnx.state(net))
    copy = restored_into(make, format_, tmp_path / "c")
    assert_identical(nnx.state(copy), nnx.state(net))
    more = range(5, 8)
    assert_identical(nnx.state(train(copy, more)), nnx.state(train(net, more)))


@pytest.mark.parametrize(
    ("write", "read", "format_"),
    [(theirs, ours, Orbax), (ours, theirs, PureMessagePack)],
)
def test_between_flax_and_ours(write, read, format_, tmp_path):
    net = train(write())
    format_.save(tmp_path / "c", nnx.state(net))
    copy = restored_into(read, format_, tmp_path / "c")
    assert_identical(nnx.state(copy), nnx.state(net))
    desired = infer(net)
    np.testing.assert_allclose(infer(copy), desired, rtol=1e-6, atol=1e-6)
    assert np.abs(infer(read()) - desired).max() > 0.1  # it was the variables


@pytest.mark.parametrize(
    ("make", "format_"),
    [
        (functools.partial(ours, debias=True), Orbax),
        (functools.partial(ours, momentum=None), PureMessagePack),
    ],
    ids=["debias", "mean"],
)
def test_a_count_that_the_checkpoint_lacks(make, format_, tmp_path):
    """At 0, the first update replaces what was loaded."""
    net = train(theirs())
    format_.save(tmp_path / "c", nnx.state(net))
    with pytest.raises(ValueError, match="num_updates"):
        restored_into(make, format_, tmp_path / "c")
    copy = restored_into(make, format_, tmp_path / "c", lacking=["num_updates"])
    assert copy.norm.num_updates == 0
    np.testing.assert_allclose(infer(copy), infer(net), rtol=1e-6, atol=1e-6)
    x = draw(7)
    seen = copy.conv(x)
    step(copy, x)
    assert copy.norm.num_updates == 1
    np.testing.assert_allclose(copy.norm.mean, seen.mean((0, 1)), atol=1e-6)
