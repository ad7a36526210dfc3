"""recalibrate against moments that a plain model computes by hand, layer by layer."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn.linen import BatchNorm, BatchRenorm, inspect_statistics, recalibrate


class Net(nn.Module):
    """Three layers of batch norm; the later ones come after earlier ones."""

    norm: type = BatchNorm

    @nn.compact
    def __call__(self, x, train, mask=None):
        for width in (8, 6, 4):
            x = nn.Dense(width)(x)
            x = nn.tanh(self.norm(not train, momentum=0.5)(x, mask=mask))
        return x


LAYERS = [f"BatchNorm_{i}" for i in range(3)]


@pytest.fixture
def trained():
    """A net whose running statistics are far from those of the data."""
    with jax.numpy_rank_promotion("allow"):
        x = jax.random.normal(jax.random.key(0), (60, 5)) * 2 + 3
        variables = Net().init(jax.random.key(1), x, train=True)
        stats = jax.tree.map(
            lambda a: jax.random.uniform(jax.random.key(2), a.shape, minval=0.5),
            variables["batch_stats"],
        )
        yield x, variables | {"batch_stats": stats}


def by_hand(x, variables, upto, mask=None):
    """The input of layer `upto`, in float64, with the running statistics before it."""
    x = np.asarray(x, np.float64)
    for i in range(upto + 1):
        dense = variables["params"][f"Dense_{i}"]
        x = x @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"])
        if i < upto:
            stats = variables["batch_stats"][LAYERS[i]]
            params = variables["params"][LAYERS[i]]
            static = {"mask": mask}
            x = np.tanh(
                oracle.normalize(
                    x,
                    stats["mean"],
                    stats["var"],
                    *(params[k] for k in ("scale", "bias")),
                    **static,
                )
            )
    return x


def check_layer(x, variables, i, mask=None, rtol=1e-5):
    _, mean, var = oracle.moments(by_hand(x, variables, i, mask), mask=mask)
    got = variables["batch_stats"][LAYERS[i]]
    np.testing.assert_allclose(got["mean"], mean, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(got["var"], var, rtol=rtol)


def test_one_batch_gives_its_moments_at_every_layer(trained):
    x, variables = trained
    one = recalibrate(Net(), variables, [x], train=True)
    for i in range(3):
        check_layer(x, one, i)
    assert jax.tree.structure(one) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, one["params"], variables["params"])


@pytest.mark.parametrize("train", [True, False])
def test_one_pass_is_exact_before_the_first_batch_norm_for_any_split(trained, train):
    x, variables = trained
    unequal = [x[:7], x[7:10], x[10:]]
    check_layer(x, recalibrate(Net(), variables, unequal, train=train), 0)


@pytest.mark.parametrize("cuts", [[60], [7, 10, 60], [30, 60], [1, 2, 60]])
def test_sequential_is_exact_at_every_layer_for_any_split(trained, cuts):
    x, variables = trained
    split = [x[i:j] for i, j in zip([0, *cuts], cuts, strict=False)]
    got = recalibrate(Net(), variables, split, sequential=True, train=True)
    for i in range(3):
        check_layer(x, got, i)


def test_masks_and_keyword_batches(trained):
    x, variables = trained
    mask = np.arange(60)[:, None] % 4 > 0
    x = jnp.where(mask, x, jnp.nan)
    split = [{"x": x[s], "mask": mask[s]} for s in (np.s_[:9], np.s_[9:])]
    got = recalibrate(Net(), variables, split, sequential=True, train=False)
    for i in range(3):
        check_layer(jnp.where(mask, x, 0), got, i, mask)


def test_large_means(trained):
    x = trained[0] + 1e4
    got = recalibrate(
        BatchNorm(True), BatchNorm(True).init(jax.random.key(0), x), [x[:7], x[7:]]
    )
    _, mean, var = oracle.moments(x)
    np.testing.assert_allclose(got["batch_stats"]["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(got["batch_stats"]["var"], var, rtol=1e-3)


def test_sharded_batches(trained):
    x, variables = trained
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, P("d")))
    got = recalibrate(Net(), variables, [sharded], train=True)
    want = recalibrate(Net(), variables, [x], train=True)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want
    )


def test_a_stack_of_layers_in_a_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(BatchNorm(True)(nn.Dense(4)(x))) * 2 + 1, None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Block,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=3,
            )
            return scan()(x, None)[0]

    with jax.numpy_rank_promotion("allow"):
        x = jax.random.normal(jax.random.key(0), (40, 4))
        variables = Stack().init(jax.random.key(1), x)
        got = recalibrate(Stack(), variables, [x[:9], x[9:]], sequential=True)
    stats = got["batch_stats"]["ScanBlock_0"]["BatchNorm_0"]
    dense = got["params"]["ScanBlock_0"]["Dense_0"]
    h = np.asarray(x, np.float64)
    for i in range(3):
        h = h @ np.asarray(dense["kernel"][i]) + np.asarray(dense["bias"][i])
        _, mean, var = oracle.moments(h)
        np.testing.assert_allclose(stats["mean"][i], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(stats["var"][i], var, rtol=1e-5)
        h = np.tanh(oracle.normalize(h, mean, var)) * 2 + 1


def test_a_layer_called_twice_gets_both(trained):
    class Twice(nn.Module):
        def setup(self):
            self.norm = BatchNorm(True)

        def __call__(self, x):
            return self.norm(x[:, :2]) + self.norm(x[:, 2:4] + 1)

    x, _ = trained
    variables = Twice().init(jax.random.key(0), x)
    got = recalibrate(Twice(), variables, [x])["batch_stats"]["norm"]
    both = np.concatenate([x[:, :2], x[:, 2:4] + 1])
    np.testing.assert_allclose(got["mean"], both.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got["var"], both.var(0), rtol=1e-5)


def test_averaged_parameters(trained):
    x, variables = trained
    ema = optax.ema(0.5)
    state = ema.init(variables["params"])
    with jax.numpy_dtype_promotion("standard"):
        for scale in (1.0, 3.0):
            params = jax.tree.map(lambda p, scale=scale: p * scale, variables["params"])
            averaged, state = ema.update(params, state)
    variables = variables | {"params": averaged}
    check_layer(x, recalibrate(Net(), variables, [x], train=False), 0)


def test_features_with_nothing_finite_keep_their_statistics(trained):
    x, _ = trained
    norm = BatchNorm(True)
    variables = norm.init(jax.random.key(0), x)
    got = recalibrate(norm, variables, [x.at[0, 1].set(jnp.nan)])["batch_stats"]
    assert got["mean"][1] == 0
    assert got["var"][1] == 1
    np.testing.assert_allclose(got["mean"][2:], x.mean(0)[2:], rtol=1e-5)


def test_update_counts_stay():
    x = jnp.eye(6, 3)
    norm = BatchRenorm(False)
    variables = norm.init(jax.random.key(0), x)
    _, updates = norm.apply(variables, x, mutable=["batch_stats"])
    got = recalibrate(norm, variables | updates, [x])["batch_stats"]
    assert got["num_updates"] == 1
    np.testing.assert_allclose(got["mean"], x.mean(0), rtol=1e-6)


def test_progress(trained, capsys):
    x, variables = trained
    recalibrate(Net(), variables, [x, x], progress=True, train=True)
    assert "recalibrating" in capsys.readouterr().out


def test_errors(trained):
    x, variables = trained
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        recalibrate(Net(), variables, [], train=True)
    with pytest.raises(TypeError, match=r"`batches` must be re-iterable.*generator"):
        recalibrate(Net(), variables, (b for b in [x]), sequential=True, train=True)
    with pytest.raises(ValueError, match="`model` must call a BatchNorm;"):
        recalibrate(nn.Sequential([jnp.tanh]), variables, [x])


@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_in_a_jit(trained, sequential):
    """nn.jit runs a module once and keeps what came out: here it must run each time."""

    class Evaluated(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Net(name="net")(x, train=False)

    x, variables = trained
    variables = {name: {"net": tree} for name, tree in variables.items()}
    model, split = nn.jit(Evaluated)(), [x[:30], x[30:]]
    for data in (split, split, [2 * batch for batch in split]):
        got = recalibrate(model, variables, data, sequential=sequential)
        want = recalibrate(Evaluated(), variables, data, sequential=sequential)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want
        )


@pytest.mark.parametrize("measure", ["recalibrate", "inspect_statistics"])
def test_batches_of_one_are_refused(trained, measure):
    """Such a batch is normalized to nothing, and later layers would get a variance 0.

    So is every row of x, given in place of [x].
    """
    x, variables = trained
    run = {
        "recalibrate": lambda data: recalibrate(Net(), variables, data, train=True),
        "inspect_statistics": lambda data: inspect_statistics(
            variables, Net(), data, train=True
        ),
    }[measure]
    for data in (x, [x[:-1], x[-1:]]):
        with pytest.raises(ValueError, match=r"each of `batches` needs more than one"):
            run(data)


def test_batches_of_one_are_exact_in_turn(trained):
    x, variables = trained
    split = [x[:-1], x[-1:]]
    got = recalibrate(Net(), variables, split, sequential=True, train=True)
    for i in range(3):
        check_layer(x, got, i)


def test_boxed_statistics_stay_boxed(trained):
    x, variables = trained
    want = recalibrate(Net(), variables, [x], train=True)["batch_stats"]
    box = functools.partial(nn.Partitioned, names=("features",))
    boxed = variables | {"batch_stats": jax.tree.map(box, variables["batch_stats"])}
    got = recalibrate(Net(), boxed, [x], train=True)["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(box, want))


def test_a_feature_that_nothing_was_counted_for_keeps_its_statistics():
    x = jnp.arange(12.0).reshape(6, 2)
    mask = jnp.array([True, False])[None]
    norm = BatchNorm(use_running_average=True)
    variables = norm.init(jax.random.key(0), x)
    new = recalibrate(norm, variables, [{"x": x, "mask": mask}])["batch_stats"]
    np.testing.assert_allclose(new["mean"], [5, 0])
    np.testing.assert_allclose(new["var"], [x[:, 0].var(), 1], rtol=1e-6)
