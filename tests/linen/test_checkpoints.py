"""Checkpoints: Orbax and flax.serialization, from Flax's classes and to them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import MessagePack, Orbax, assert_identical, draw
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxbn
from jaxbn.linen import BatchNorm, BatchRenorm

pytestmark = pytest.mark.usefixtures("lenient")


class Net(nn.Module):
    """Norms with automatic names, over other axes, and in a stack (nn.scan)."""

    norm: type[nn.Module] = BatchNorm
    options: FrozenDict = FrozenDict()  # hashable

    @nn.compact
    def __call__(self, x, train):
        def norm(**kwargs):
            options = {"momentum": 0.75, **self.options, **kwargs}
            return self.norm(use_running_average=not train, **options)

        x = nn.Conv(4, (3,))(x)
        x = nn.relu(norm()(x))
        x = x + norm(axis=(1, 2), use_scale=False)(x)
        axes, split = {"params": 0, "batch_stats": 0}, {"params": True}
        scan = nn.scan(
            lambda layer, x, _: (jnp.tanh(layer(x)), None),
            variable_axes=axes,
            split_rngs=split,
            length=3,
        )
        x, _ = scan(norm(name="stack"), x, None)
        return norm(use_bias=False, name="head")(nn.Dense(3)(x.reshape(len(x), -1)))


FLAX_S, OURS, RENORM = Net(nn.BatchNorm), Net(), Net(BatchRenorm)
DEBIAS, AVERAGE = (
    Net(options=FrozenDict(o)) for o in ({"debias": True}, {"momentum": None})
)


@functools.cache
def init(net):
    return jax.jit(lambda: net.init(jax.random.key(0), draw(0), True))()


@jax.jit(static_argnums=0)
def step(net, variables, x):
    def loss(params):
        now = variables | {"params": params}
        y, updates = net.apply(now, x, True, mutable=["batch_stats"])
        return jnp.square(y - 1 + x[:, 0]).mean(), updates

    params = variables["params"]
    gradients, updates = jax.grad(loss, has_aux=True)(params)
    return {
        "params": jax.tree.map(lambda p, g: p - g / 20, params, gradients)
    } | updates


def train(net, variables):
    for seed in range(5):
        variables = step(net, variables, draw(seed))
    return variables


@jax.jit(static_argnums=0)
def infer(net, variables):
    return net.apply(variables, draw(100), False)


def shapes_of(tree):
    return jax.eval_shape(lambda: tree)


@pytest.mark.parametrize(
    ("write", "read", "format_"),
    [
        (FLAX_S, OURS, Orbax),
        (OURS, FLAX_S, MessagePack),
        (RENORM, RENORM, Orbax),
        (DEBIAS, DEBIAS, MessagePack),
    ],
    ids=["of flax", "for flax", "renorm", "debias"],
)
def test_what_was_trained_is_restored_into_shapes(write, read, format_, tmp_path):
    variables = train(write, init(write))
    format_.save(tmp_path / "c", variables)
    restored = format_.restore(tmp_path / "c", shapes_of(init(read)))
    assert_identical(restored, variables)
    desired = infer(write, variables)
    assert np.abs(desired).max() > 1
    np.testing.assert_allclose(infer(read, restored), desired, rtol=1e-6, atol=1e-6)
    assert np.abs(infer(read, init(read)) - desired).max() > 0.1  # it was the variables


@pytest.mark.parametrize("format_", [Orbax, MessagePack])
def test_params_and_state(format_, tmp_path):
    """NamedTuples come back as such; a None, complex and bfloat16 as they were."""
    params, state = jaxbn.init(4, use_bias=False, param_dtype=jnp.bfloat16)
    _, state = jaxbn.batch_norm(
        jnp.arange(8.0).reshape(2, 4), params, state, train=True
    )
    tree = {
        "norm": (params, state),
        "complex": jaxbn.init((2, 3), param_dtype=jnp.complex64),
    }
    format_.save(tmp_path / "c", tree)
    restored = format_.restore(tmp_path / "c", shapes_of(tree))
    assert_identical(restored, tree)
    assert isinstance(restored["norm"][1], jaxbn.State)


@pytest.mark.parametrize(
    ("net", "format_"),
    [(DEBIAS, Orbax), (AVERAGE, MessagePack)],
    ids=["debias", "mean"],
)
def test_a_count_that_the_checkpoint_lacks(net, format_, tmp_path):
    """It is completed from a fresh `init`; all that was stored counts for inference."""
    variables = train(FLAX_S, init(FLAX_S))
    format_.save(tmp_path / "c", variables)
    shapes = shapes_of(init(net))
    with pytest.raises(ValueError, match="num_updates"):
        format_.restore(tmp_path / "c", shapes)
    restored = format_.restore(tmp_path / "c")
    # As notebooks/coming-from.md tells to write:
    complete = unflatten_dict(flatten_dict(init(net)) | flatten_dict(restored))
    assert jax.tree.structure(complete) == jax.tree.structure(shapes)
    assert complete["batch_stats"]["stack"]["num_updates"].tolist() == [0, 0, 0]
    assert_identical(infer(net, complete), infer(OURS, variables))
    # A count that is not wanted is left alone, by Flax's class too.
    assert_identical(infer(OURS, complete), infer(OURS, variables))
    assert_identical(infer(FLAX_S, complete), infer(FLAX_S, variables))
    # Without that line Linen begins the count at the first update: the same in the end.
    assert_identical(infer(net, restored), infer(OURS, variables))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, train(net, restored), train(net, complete))
