"""recalibrate against moments that a plain model computes by hand, layer by layer."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn.linen import BatchNorm, BatchRenorm, recalibrate, weight_decay_mask

pytestmark = pytest.mark.usefixtures("lenient")
KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(3, 2, (60, 5)).astype(np.float32)
LAYERS = [f"BatchNorm_{i}" for i in range(3)]


class Net(nn.Module):
    """Three layers of batch norm; the later ones come after earlier ones."""

    @nn.compact
    def __call__(self, x, train=True, mask=None):
        for width in (8, 6, 4):
            x = nn.Dense(width)(x)
            x = nn.tanh(BatchNorm(not train, momentum=0.5)(x, mask=mask))
        return x


class JittedNet(nn.Module):
    """nn.jit runs a module once and keeps what came out: tools must run it anew."""

    @nn.compact
    def __call__(self, x):
        return nn.jit(Net)(name="net")(x)


@functools.cache
def trained():
    """Variables whose running statistics are far from those of the data."""
    variables = jax.jit(Net().init)(KEY, X)
    rng = np.random.default_rng(1)
    stats = jax.tree.map(
        lambda a: rng.uniform(0.5, 1, a.shape).astype(a.dtype), variables["batch_stats"]
    )
    return variables | {"batch_stats": stats}


def split(*cuts):
    return [X[i:j] for i, j in zip((0, *cuts), (*cuts, len(X)), strict=True)]


def check_layers(variables, numbers=(0, 1, 2), x=X, mask=None):
    """Of `Net`; in float64, with the new running statistics of the layers before."""
    h = np.asarray(x, np.float64)
    for i, name in enumerate(LAYERS):
        dense, norm = (variables["params"][key] for key in (f"Dense_{i}", name))
        h = h @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"])
        stats = variables["batch_stats"][name]
        if i in numbers:
            _, mean, var = oracle.moments(h, mask=mask)
            np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(stats["var"], var, rtol=1e-5)
        vectors = stats["mean"], stats["var"], norm["scale"], norm["bias"]
        h = np.tanh(oracle.normalize(h, *vectors, mask=mask))


def assert_same(actual, desired, **tolerance):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **tolerance), actual, desired
    )


def test_one_batch_gives_its_moments_at_every_layer():
    new = recalibrate(Net(), trained(), [X])
    check_layers(new)
    assert jax.tree.structure(new) == jax.tree.structure(trained())
    assert_same(new["params"], trained()["params"], rtol=0)


def test_one_pass_is_exact_before_the_first_batch_norm_for_any_split():
    check_layers(recalibrate(Net(), trained(), split(7, 10), train=False), [0])


def test_sequential_is_exact_at_every_layer_for_any_split():
    check_layers(recalibrate(Net(), trained(), split(1, 10), sequential=True))


def test_masks_and_keyword_batches():
    mask = np.arange(60)[:, None] % 4 > 0
    x = jnp.where(mask, X, jnp.nan)
    batches = [{"x": x[s], "mask": mask[s]} for s in (np.s_[:9], np.s_[9:])]
    new = recalibrate(Net(), trained(), batches, sequential=True, train=False)
    check_layers(new, x=jnp.where(mask, X, 0), mask=mask)


def test_large_means_and_features_with_nothing_to_count():
    """Features that are masked, or not finite, keep their statistics."""
    x, mask = X + 1e4, np.arange(5) != 0
    x[0, 1] = np.nan
    norm = BatchNorm(True)
    batches = [{"x": x[s], "mask": mask} for s in (np.s_[:9], np.s_[9:])]
    new = recalibrate(norm, norm.init(KEY, x), batches)["batch_stats"]
    _, mean, var = oracle.moments(x)
    np.testing.assert_array_equal(new["mean"][:2], 0)
    np.testing.assert_array_equal(new["var"][:2], 1)
    np.testing.assert_allclose(new["mean"][2:], mean[2:], rtol=1e-6)
    np.testing.assert_allclose(new["var"][2:], var[2:], rtol=1e-3)


def test_sharded_batches():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(X, NamedSharding(mesh, P("d")))
    check_layers(recalibrate(Net(), trained(), [sharded]))


def test_a_stack_of_layers_in_a_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(BatchNorm(True)(nn.Dense(5)(x))) * 2 + 1, None

    axes = {"params": 0, "batch_stats": 0}
    model = nn.scan(Block, axes, split_rngs={"params": True}, length=3)()
    batches = [(x, None) for x in split(9)]
    variables = jax.jit(model.init)(KEY, X, None)
    new = recalibrate(model, variables, batches, sequential=True)
    stats, dense = new["batch_stats"]["BatchNorm_0"], new["params"]["Dense_0"]
    h = np.asarray(X, np.float64)
    for i in range(3):
        h = h @ np.asarray(dense["kernel"][i]) + np.asarray(dense["bias"][i])
        _, mean, var = oracle.moments(h)
        np.testing.assert_allclose(stats["mean"][i], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(stats["var"][i], var, rtol=1e-5)
        h = np.tanh(oracle.normalize(h, mean, var)) * 2 + 1


def test_a_layer_called_twice_gets_both():
    class Twice(nn.Module):
        def setup(self):
            self.norm = BatchNorm(True)

        def __call__(self, x):
            return self.norm(x[:, :2]) + self.norm(x[:, 2:4] + 1)

    new = recalibrate(Twice(), Twice().init(KEY, X), [X])["batch_stats"]["norm"]
    both = np.concatenate([X[:, :2], X[:, 2:4] + 1])
    np.testing.assert_allclose(new["mean"], both.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["var"], both.var(0), rtol=1e-5)


def test_update_counts_stay():
    norm = BatchRenorm(False)
    variables = norm.init(KEY, X)
    _, updates = norm.apply(variables, X, mutable=["batch_stats"])
    new = recalibrate(norm, variables | updates, [X])["batch_stats"]
    assert new["num_updates"] == 1
    np.testing.assert_allclose(new["mean"], X.mean(0), rtol=1e-6)


def test_progress(capsys):
    recalibrate(Net(), trained(), [X, X], progress=True)
    assert "recalibrating" in capsys.readouterr().out


def test_errors():
    with pytest.raises(TypeError, match=r"`batches` must be re-iterable.*generator"):
        recalibrate(Net(), trained(), (b for b in [X]), sequential=True)
    with pytest.raises(ValueError, match="`model` must call a BatchNorm;"):
        recalibrate(nn.Sequential([jnp.tanh]), trained(), [X])
    for one_row in (X, [X[:-1], X[-1:]]):  # each row of x, in place of [x]
        with pytest.raises(ValueError, match=r"each of `batches` needs more than one"):
            recalibrate(Net(), trained(), one_row)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_in_a_jit(sequential):
    variables = {name: {"net": tree} for name, tree in trained().items()}
    for batches in (split(30), split(30), [2 * batch for batch in split(30)]):
        new = recalibrate(JittedNet(), variables, batches, sequential=sequential)
        want = recalibrate(Net(), trained(), batches, sequential=sequential)
        for name, tree in want.items():
            assert_same(new[name]["net"], tree, rtol=1e-5)


def test_boxed_statistics_stay_boxed():
    want = recalibrate(Net(), trained(), [X])["batch_stats"]
    box = functools.partial(nn.Partitioned, names=("features",))
    boxed = trained() | {"batch_stats": jax.tree.map(box, trained()["batch_stats"])}
    new = recalibrate(Net(), boxed, [X])["batch_stats"]
    assert_same(new, jax.tree.map(box, want), rtol=0)


def test_blocks_with_one_trace_of_nn_jit():
    """They are alike, and tools still see each of them."""

    def model(block):
        return nn.Sequential([nn.Dense(4), block(False), block(False)])

    jitted, plain = model(nn.jit(BatchNorm)), model(BatchNorm)
    variables = jax.jit(plain.init)(KEY, X)
    new, want = (recalibrate(each, variables, [X]) for each in (jitted, plain))
    assert_same(new, want, rtol=0)
    assert weight_decay_mask(jitted, X) == weight_decay_mask(plain, X)
    with pytest.raises(ValueError, match=r"the order of .*layers_2"):
        recalibrate(jitted, variables, [X], sequential=True)
