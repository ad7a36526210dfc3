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

pytestmark = pytest.mark.usefixtures("as_flax_wants")


class Net(nn.Module):
    """Norms with automatic names, over other axes, and in a stack (nn.scan)."""

    norm: type[nn.Module]
    options: FrozenDict  # hashable

    @nn.compact
    def __call__(self, x, train):
        def norm(**kwargs):
            options = {"momentum": 0.75, **self.options, **kwargs}
            return self.norm(use_running_average=not train, **options)

        x = nn.Conv(4, (3,))(x)
        x = nn.relu(norm()(x))
        x = x + norm(axis=(1, 2), use_scale=False)(x)
        scan = nn.scan(
            lambda layer, x, _: (jnp.tanh(layer(x)), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = scan(norm(name="stack"), x, None)
        return norm(use_bias=False, name="head")(nn.Dense(3)(x.reshape(len(x), -1)))


def ours(norm=BatchNorm, **options):
    return Net(norm, FrozenDict(options))


def theirs():
    return Net(nn.BatchNorm, FrozenDict())


# Compiled once for each net.
@functools.cache
def init(net):
    return jax.jit(lambda: net.init(jax.random.key(0), draw(0), True))()


@functools.cache
def compiled_step(net):
    @jax.jit
    def step(variables, x):
        def loss(params):
            y, updates = net.apply(
                variables | {"params": params}, x, True, mutable=["batch_stats"]
            )
            return jnp.square(y - 1 + x[:, 0]).mean(), updates

        params = variables["params"]
        gradients, updates = jax.grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients)
        return {"params": params} | updates

    return step


def train(net, variables, seeds=range(5)):
    """Variables after a training step on each batch."""
    for seed in seeds:
        variables = compiled_step(net)(variables, draw(seed))
    return variables


@functools.cache
def compiled_inference(net):
    return jax.jit(lambda variables: net.apply(variables, draw(100), False))


def infer(net, variables):
    return compiled_inference(net)(variables)


def shapes_of(tree):
    return jax.eval_shape(lambda: tree)


EXHAUSTIVE = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("net", "format_"),
    [
        pytest.param(ours(), MessagePack, id="plain"),
        pytest.param(ours(BatchRenorm), Orbax, id="renorm"),
        pytest.param(ours(debias=True), Orbax, marks=EXHAUSTIVE, id="debias"),
        pytest.param(ours(momentum=None), MessagePack, marks=EXHAUSTIVE, id="mean"),
    ],
)
def test_training_goes_on(net, format_, tmp_path):
    """What is restored, into shapes alone, trains on to the same bits."""
    variables = train(net, init(net))
    format_.save(tmp_path / "c", variables)
    restored = format_.restore(tmp_path / "c", shapes_of(init(net)))
    assert_identical(restored, variables)
    more = range(5, 8)
    assert_identical(train(net, restored, more), train(net, variables, more))


@pytest.mark.parametrize("format_", [Orbax, MessagePack])
def test_params_and_state(format_, tmp_path):
    """NamedTuples come back as such; a None, complex and bfloat16 as they were."""
    half = jaxbn.init(4, use_bias=False, param_dtype=jnp.bfloat16)
    tree = {"norm": half, "complex": jaxbn.init((2, 3), param_dtype=jnp.complex64)}
    format_.save(tmp_path / "c", tree)
    restored = format_.restore(tmp_path / "c", shapes_of(tree))
    assert_identical(restored, tree)
    assert isinstance(restored["norm"][1], jaxbn.State)


@pytest.mark.parametrize(
    ("write", "read", "format_"),
    [(theirs(), ours(), Orbax), (ours(), theirs(), MessagePack)],
    ids=["by flax", "by jaxbn"],
)
def test_between_flax_and_ours(write, read, format_, tmp_path):
    """Trained by one class, restored into the shapes of the other."""
    variables = train(write, init(write))
    format_.save(tmp_path / "c", variables)
    restored = format_.restore(tmp_path / "c", shapes_of(init(read)))
    assert_identical(restored, variables)
    desired = infer(write, variables)
    assert np.abs(desired).max() > 1
    np.testing.assert_allclose(infer(read, restored), desired, rtol=1e-6, atol=1e-6)
    assert np.abs(infer(read, init(read)) - desired).max() > 0.1  # it was the variables


def completed(net, restored):
    """What notebooks/coming-from.md tells to write."""
    return unflatten_dict(flatten_dict(init(net)) | flatten_dict(restored))


@pytest.mark.parametrize(
    ("options", "format_"),
    [({"debias": True}, Orbax), ({"momentum": None}, MessagePack)],
    ids=["debias", "mean"],
)
def test_a_count_that_the_checkpoint_lacks(options, format_, tmp_path):
    """It is completed from a fresh `init`; all that was stored counts for inference."""
    net = ours(**options)
    variables = train(theirs(), init(theirs()))
    format_.save(tmp_path / "c", variables)
    shapes = shapes_of(init(net))
    with pytest.raises(ValueError, match="num_updates"):
        format_.restore(tmp_path / "c", shapes)
    restored = format_.restore(tmp_path / "c")
    complete = completed(net, restored)
    assert jax.tree.structure(complete) == jax.tree.structure(shapes)
    assert complete["batch_stats"]["stack"]["num_updates"].tolist() == [0, 0, 0]
    assert_identical(infer(net, complete), infer(ours(), variables))
    # Without that line Linen begins the count at the first update: the same in the end.
    assert_identical(infer(net, restored), infer(ours(), variables))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, train(net, restored), train(net, complete))


def test_a_count_that_is_not_wanted():
    """Variables with counts serve modules without, Flax's too, as they are."""
    net = ours(debias=True)
    variables = train(net, init(net))
    desired = infer(net, variables)
    assert_identical(infer(ours(), variables), desired)
    np.testing.assert_allclose(
        infer(theirs(), variables), desired, rtol=1e-6, atol=1e-6
    )
