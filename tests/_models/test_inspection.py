"""inspect: the layer that was spoiled is named first, and nothing else is blamed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn._core.moments import Moments
from jaxbn._models import inspection
from jaxbn.linen import BatchNorm, LayerStatistics, inspect_statistics, recalibrate

LAYERS = [f"BatchNorm_{i}" for i in range(3)]

# Ways to spoil running statistics, from gross to what training itself may do.
SPOILED = {
    "mean off": lambda mean, var: (mean + 2 * np.sqrt(var), var),
    "var too small": lambda mean, var: (mean, var / 20),
    "var too large": lambda mean, var: (mean, var * 20),
    "never updated": lambda mean, var: (mean * 0, var * 0 + 1),
    "not a number": lambda mean, var: (mean * np.nan, var),
    "infinite": lambda mean, var: (mean, var * np.inf),
    "negative": lambda mean, var: (mean, -var),
}


class Net(nn.Module):
    """Three batch norms, each after the one before it."""

    @nn.compact
    def __call__(self, x, train):
        for width in (8, 6, 4):
            x = nn.Dense(width)(x)
            x = nn.tanh(BatchNorm(use_running_average=not train)(x))
        return x


@pytest.fixture(scope="module")
def sound():
    """Data, and variables with their very statistics."""
    x = np.random.default_rng(0).normal(3, 2, (200, 5)).astype(np.float32)
    with jax.numpy_rank_promotion("allow"):
        variables = jax.jit(lambda x: Net().init(jax.random.key(1), x, False))(x)
        return x, recalibrate(Net(), variables, [x], train=False)


def layer(mean, var, scale=None, data=None, epsilon=1e-5):
    """A record, from lists."""
    arrays = [np.asarray(a, np.float64) for a in (mean, var)]
    if data is not None:
        data = Moments(*(np.asarray(a, np.float64) for a in data))
    scale = None if scale is None else np.asarray(scale, np.float64)
    return LayerStatistics(("layer",), *arrays, scale, data, epsilon)


def test_sound_statistics_diverge_nowhere(sound):
    x, variables = sound
    layers = inspect_statistics(variables, Net(), [x], train=False)
    assert {each.name for each in layers} == set(LAYERS)
    for each in layers:
        assert each.kl.shape == each.mean.shape == (each.num_features,)
        assert each.kl.max() < 1e-9
        assert each.dead == each.scale_near_zero == each.not_finite == []


def test_batches_are_pooled(sound):
    x, variables = sound
    layers = inspect_statistics(variables, Net(), [x[:50], (x[50:],)], train=True)
    by_name = {each.name: each for each in layers}
    # Only what the first layer is given is the same for any split.
    assert by_name[LAYERS[0]].kl.max() < 1e-9
    assert 1e-9 < by_name[LAYERS[2]].kl.max() < 0.1


@pytest.mark.parametrize("how", SPOILED.values(), ids=SPOILED)
def test_spoiled_layer_is_named_first_and_alone(sound, how):
    x, variables = sound
    stats, name = variables["batch_stats"], LAYERS[1]
    mean, var = how(*(np.array(stats[name][key]) for key in ("mean", "var")))
    variables = variables | {"batch_stats": stats | {name: {"mean": mean, "var": var}}}
    layers = inspect_statistics(variables, Net(), [x], train=False)
    assert layers[0].name == name
    assert layers[0].mean_kl > 0.05
    assert all(np.isfinite(each.kl).all() for each in layers)
    for other in layers[1:]:  # those after it, too
        assert other.mean_kl < 1e-9


def test_kl_is_the_integral():
    """Over a fine grid, with epsilon in both variances."""
    mean, var, epsilon = [0.3, -2.0], [0.5, 4.0], 1e-3
    data = ([9, 9], [0.0, 1.0], [1.0, 0.1])
    kl = layer(mean, var, data=data, epsilon=epsilon).kl
    t, step = np.linspace(-40, 40, 400_001, retstep=True)

    def log_normal(m, v):
        v = v + epsilon
        return -0.5 * ((t - m) ** 2 / v + np.log(2 * np.pi * v))

    for i in range(2):
        p, q = log_normal(data[1][i], data[2][i]), log_normal(mean[i], var[i])
        np.testing.assert_allclose(kl[i], step * np.sum(np.exp(p) * (p - q)), rtol=1e-6)


def test_kl_is_finite_whatever_the_statistics():
    values = [0.0, 1e-38, 1.0, 3e38, -1.0, np.nan, np.inf, -np.inf]
    mean, var, true = (each.ravel() for each in np.meshgrid(values, values, values))
    with np.errstate(all="ignore"):
        odd = layer(mean, var, data=(np.ones_like(true), true, abs(true)))
    assert np.isfinite(odd.kl).all()
    assert (odd.kl >= 0).all()
    assert np.isfinite(odd.mean_kl)
    # What is not finite in the data is not held against the running statistics.
    assert (odd.kl[~np.isfinite(true)] == 0).all()
    broken = np.isfinite(true) & ~np.isfinite(mean)
    assert (odd.kl[broken] == inspection.LARGEST_KL).all()


def test_channels_are_found():
    found = layer(
        mean=[0.0, 300.0, 3000.0, 0.0],
        var=[1.0, 1.0, 1.0, 1e-8],
        scale=[0.0, 1.0, -1e-4, 0.5],
    )
    assert found.dead == [(3,)]
    assert found.scale_near_zero == [(0,), (2,)]
    np.testing.assert_allclose(found.mean_over_std, [0, 300, 3000, 0], rtol=1e-4)
    assert found.kl is found.mean_kl is found.worst_channel is None
    # The data have the last word on what the layer is given.
    data = ([4, 4, 4, 0], [5.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0])
    found = layer(found.mean, found.var, data=data)
    assert found.dead == [(0,), (3,)]
    np.testing.assert_allclose(found.mean_over_std, [5 / 1e-5**0.5, 0, 0, 0])
    assert found.kl[3] == 0  # for which nothing was counted


@pytest.mark.parametrize("dtype", inspection.STD_IS_LOST)
def test_std_is_lost_where_the_threshold_says(dtype):
    """A unit of spread around a mean above the threshold: rounding moves all of it."""
    limit = inspection.STD_IS_LOST[dtype]
    for mean, lost in ((limit * 1.01, True), (limit / 4, False)):
        around = jnp.asarray([mean - 0.5, mean + 0.5], dtype)
        spread = float(around[1]) - float(around[0])
        assert (abs(spread - 1) >= 1 or float(around.mean()) != mean) == lost


def test_without_data_layers_are_in_order(sound):
    layers = inspect_statistics(sound[1], epsilon=0.5)
    assert {each.epsilon for each in layers} == {0.5}
    assert [each.path for each in layers] == [(name,) for name in LAYERS]
    assert [each.num_features for each in layers] == [8, 6, 4]


def test_stack_names_layer_and_channel():
    size, zeros, ones = np.full((3, 2), 9), np.zeros((3, 2)), np.ones((3, 2))
    found = layer(np.eye(3, 2, -1), ones, data=(size, zeros, ones))
    assert found.worst_channel == (1, 0)
    assert found.num_features == 6


def test_model_that_is_a_batch_norm(sound):
    x, _ = sound
    norm = BatchNorm(use_running_average=True)
    [found] = inspect_statistics(norm.init(jax.random.key(0), x), norm, [x])
    assert found.path == ()
    assert found.name == "(the model itself)"
    assert found.kl.min() > 1
    [found] = inspect_statistics(norm.init(jax.random.key(0), x), norm, [x * np.nan])
    assert found.data is found.kl is found.worst_channel is None


def test_refusals(sound):
    _, variables = sound
    with pytest.raises(ValueError, match="`batch_stats` with a mean and a var"):
        inspect_statistics({"params": variables["params"]})
    with pytest.raises(TypeError, match=r"variables\['batch_stats'\]` must be a dict"):
        inspect_statistics({"batch_stats": None})
    abstract = jax.eval_shape(lambda: variables)
    with pytest.raises(TypeError, match="BatchNorm_0/mean as an array of numbers"):
        inspect_statistics(abstract)
