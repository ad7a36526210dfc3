"""linen.BatchNorm: what a drop-in for Flax's keeps, and Flax's defects, gone."""

import dataclasses

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, assert_close, case_ids

from jaxbn.linen import BatchNorm

PARITY = [c for c in CASES if 0 not in c.shape and "everything" not in c.mask]
PARITY = [c for c in PARITY if c.mask not in ("nothing", "empty feature")]


def random_like(variables, seed=0):
    """Variables with random values, positive where they must be."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), variables
    )


def dtypes(tree):
    return jax.tree.map(lambda a: a.dtype, tree)


def train(norm, variables, x, mask=None, dy=None):
    """(y, batch_stats, gradients) of one training call; dy is y's cotangent."""

    @jax.jit
    def step(variables, x):
        def apply(params, x):
            y, updates = norm.apply(
                variables | {"params": params},
                x,
                use_running_average=False,
                mask=mask,
                mutable=["batch_stats"],
            )
            return y, updates["batch_stats"]

        params = variables.get("params", {})
        y, vjp, stats = jax.vjp(apply, params, x, has_aux=True)
        return y, stats, vjp(jnp.asarray(dy, y.dtype))

    return step(variables, x)


def test_fields_are_flax_fields_then_ours():
    ours = [f.name for f in dataclasses.fields(BatchNorm)]
    flax_fields = [f.name for f in dataclasses.fields(nn.BatchNorm)]
    both = [f for f in flax_fields if f not in ("parent", "name")]
    assert ours[: len(both)] == both
    assert ours[len(both) :][:3] == ["running_variance", "debias", "derivative"]
    for name in both:
        assert getattr(BatchNorm, name) == getattr(nn.BatchNorm, name)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("case", PARITY, **case_ids)
def test_parity_with_flax(case, dtype):
    """Variables, values, gradients and statistics; inference too."""
    x, _, _, mask, dy = case.draw(dtype)
    x = jnp.asarray(x, dtype)
    kwargs = {
        "axis": case.axis,
        "use_scale": case.use_scale,
        "use_bias": case.use_bias,
    }
    ours, flax_norm = BatchNorm(**kwargs), nn.BatchNorm(**kwargs)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = flax_norm.init(jax.random.key(0), x, False)
        mine = ours.init(jax.random.key(0), x, use_running_average=False)
        jax.tree.map(np.testing.assert_array_equal, mine, variables)
        assert list(mine["batch_stats"]) == list(variables["batch_stats"])
        variables = random_like(variables)
        y, stats, gradients = train(ours, variables, x, mask, dy)
        y2, stats2, gradients2 = train(flax_norm, variables, x, mask, dy)
        if mask is not None:
            y2 = jnp.where(mask, y2, 0)
            # Flax lets the cotangent of masked elements in: compare without it.
            dy = np.where(mask, dy, 0)
            _, _, gradients2 = train(flax_norm, variables, x, mask, dy)
        infer = [n.apply(variables, x, True) for n in (ours, flax_norm)]
    assert y.dtype == y2.dtype
    assert infer[0].dtype == infer[1].dtype

    def close(a, b):
        assert a.dtype == b.dtype
        assert_close(a, np.asarray(b, np.float64), dtype, 1000)

    jax.tree.map(close, (y, stats, infer[0]), (y2, stats2, infer[1]))
    assert dtypes(gradients) == dtypes(gradients2)
    if dtype == jnp.float32:  # in bfloat16 Flax adds up rounded parts of dx
        jax.tree.map(close, gradients, gradients2)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"dtype": jnp.bfloat16},
        {"dtype": jnp.float16},
        {"param_dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16, "force_float32_reductions": False},
        {"use_scale": False, "use_bias": False},
        {"dtype": jnp.float64},
        {"param_dtype": jnp.float64},
        {"dtype": jnp.complex64},
    ],
    ids=str,
)
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32, jnp.int32, jnp.float64])
def test_dtypes_are_flax_dtypes(kwargs, x_dtype):
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        x = jnp.asarray(np.arange(12).reshape(4, 3) ** 2 % 7, x_dtype)
        ours, flax_norm = (
            cls(momentum=0.5, **kwargs) for cls in (BatchNorm, nn.BatchNorm)
        )
        variables = flax_norm.init(jax.random.key(0), x, True)
        if kwargs.get("dtype") != jnp.complex64:  # there the running mean is complex
            mine = ours.init(jax.random.key(0), x, True)
            assert dtypes(mine) == dtypes(variables)
            y, updates = ours.apply(variables, x, False, mutable=["batch_stats"])
            y2, _ = flax_norm.apply(variables, x, False, mutable=["batch_stats"])
            assert y.dtype == y2.dtype
            small = jnp.bfloat16 if y.dtype.itemsize == 2 else jnp.float32
            assert_close(y, np.asarray(y2, np.float64), small, 100)
            assert dtypes(updates["batch_stats"]) == dtypes(variables["batch_stats"])


def test_complex_statistics():
    rng = np.random.default_rng(0)
    x = jnp.asarray(
        rng.normal(size=(9, 3)) + 1j * rng.normal(size=(9, 3)), jnp.complex64
    )
    norm = BatchNorm(momentum=0.0, param_dtype=jnp.complex64)
    variables = norm.init(jax.random.key(0), x, False)
    assert variables["batch_stats"]["mean"].dtype == jnp.complex64
    assert variables["batch_stats"]["var"].dtype == jnp.float32
    y, updates = norm.apply(variables, x, False, mutable=["batch_stats"])
    _, mean, var = oracle.moments(x)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], var, rtol=1e-5)
    np.testing.assert_allclose(y, oracle.forward(x), rtol=1e-4)


class Net(nn.Module):
    norm: type = BatchNorm

    @nn.compact
    def __call__(self, x, train):
        for width in (8, 4):
            x = nn.Dense(width)(x)
            x = nn.relu(self.norm(not train)(x))
        return x


def test_checkpoints_both_ways():
    x = jax.random.normal(jax.random.key(1), (16, 5))
    flax_net, our_net = Net(nn.BatchNorm), Net(BatchNorm)
    with jax.numpy_rank_promotion("allow"):
        theirs = flax_net.init(jax.random.key(0), x, True)
        ours = our_net.init(jax.random.key(0), x, True)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        trained = random_like(theirs)
        for source, target, template in [
            (flax_net, our_net, ours),
            (our_net, flax_net, theirs),
        ]:
            saved = flax.serialization.to_bytes(trained)
            loaded = flax.serialization.from_bytes(template, saved)
            np.testing.assert_allclose(
                target.apply(loaded, x, False),
                source.apply(trained, x, False),
                rtol=1e-6,
                atol=1e-6,
            )


class TestInitializing:
    def test_batch_of_one_and_unbound_axis(self):
        norm = BatchNorm(axis_name="nowhere")
        variables = norm.init(jax.random.key(0), jnp.ones((1, 3)), False)
        np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
        np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)

    def test_output_uses_the_batch(self):
        x = jax.random.normal(jax.random.key(0), (64, 3)) * 5 + 9
        y, _ = BatchNorm().init_with_output(jax.random.key(0), x, False)
        assert_close(y, oracle.forward(x), jnp.float32, 64)

    def test_inference_creates_everything_too(self):
        variables = BatchNorm().init(jax.random.key(0), jnp.ones((1, 3)), True)
        assert set(variables) == {"batch_stats", "params"}

    def test_after_it_one_element_is_an_error(self):
        norm = BatchNorm()
        variables = norm.init(jax.random.key(0), jnp.ones((1, 3)), False)
        with pytest.raises(ValueError, match="more than one element per feature"):
            norm.apply(variables, jnp.ones((1, 3)), False, mutable=["batch_stats"])


class TestUseRunningAverage:
    x = jnp.ones((4, 3))

    def test_twice_or_never(self):
        with pytest.raises(ValueError, match="use_running_average"):
            BatchNorm().init(jax.random.key(0), self.x)
        with pytest.raises(ValueError, match="use_running_average"):
            BatchNorm(True).init(jax.random.key(0), self.x, True)

    def test_traced(self):
        with pytest.raises(TypeError, match="`use_running_average` must be a Python"):
            jax.jit(BatchNorm().init)(jax.random.key(0), self.x, True)

    def test_inference_ignores_axis_name_and_needs_nothing_mutable(self):
        norm = BatchNorm(True, axis_name="nowhere")
        variables = norm.init(jax.random.key(0), self.x)
        mask = jnp.array([True, True, False, True])[:, None]
        y = norm.apply(variables, self.x, mask=mask)
        np.testing.assert_array_equal(y[2], 0)
        assert (y[0] != 0).all()


def test_mask_broadcasts_as_in_numpy():
    x = jax.random.normal(jax.random.key(0), (6, 4, 3))
    norm = BatchNorm(momentum=0.0)
    variables = norm.init(jax.random.key(0), x, False)
    for mask in (np.array([1, 0, 1]), np.array([[1], [0], [1], [1]])):
        y, updates = norm.apply(variables, x, False, mask=mask, mutable=["batch_stats"])
        whole = np.broadcast_to(mask, x.shape) > 0
        _, mean, var = oracle.moments(x, mask=whole)
        assert_close(y, oracle.forward(x, mask=whole), jnp.float32, 24)
        n = whole.sum((0, 1))
        kept = np.where(n > 0, mean, 0), np.where(n > 0, var, 1)
        assert_close(updates["batch_stats"]["mean"], kept[0], jnp.float32, 24)
        assert_close(updates["batch_stats"]["var"], kept[1], jnp.float32, 24)


@pytest.mark.parametrize("kwargs", [{"momentum": None}, {"debias": True}])
def test_update_count_only_where_a_mode_needs_it(kwargs):
    x = jax.random.normal(jax.random.key(0), (64, 3)) * 5 + 9
    norm = BatchNorm(**kwargs)
    variables = norm.init(jax.random.key(0), x, False)
    assert list(variables["batch_stats"]) == ["mean", "var", "num_updates"]
    _, updates = norm.apply(variables, x, False, mutable=["batch_stats"])
    assert updates["batch_stats"]["num_updates"] == 1
    _, mean, var = oracle.moments(x)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], var, rtol=1e-5)


def test_running_variance_and_derivative_reach_the_kernel():
    x = jax.random.normal(jax.random.key(0), (8, 3))
    norm = BatchNorm(momentum=0.0, running_variance="unbiased", derivative="jvp")
    variables = norm.init(jax.random.key(0), x, False)

    def apply(x):
        return norm.apply(variables, x, False, mutable=["batch_stats"])

    _, updates = apply(x)
    np.testing.assert_allclose(
        updates["batch_stats"]["var"], x.var(0, ddof=1), rtol=1e-5
    )
    y, tangent = jax.jvp(lambda x: apply(x)[0], (x,), (x,))
    # y does not see the scale of x, nor its shift: along x it does not move.
    np.testing.assert_allclose(tangent, 0, atol=1e-4 * float(abs(y).max()))


class TestFlaxDefects:
    """Each of these goes wrong with flax.linen.BatchNorm (FLAX.md, by number)."""

    def apply(self, x, mask=None, **kwargs):
        norm = BatchNorm(momentum=0.0, **kwargs)
        variables = norm.init(jax.random.key(0), x, False)
        return norm.apply(variables, x, False, mask=mask, mutable=["batch_stats"])

    def test_1_unequal_masks_over_devices(self):
        x = jnp.array([[[1.0], [2.0], [3.0], [4.0]], [[0.0], [9.0], [9.0], [9.0]]])
        mask = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0]])[..., None]
        norm = BatchNorm(momentum=0.0, axis_name="d")
        variables = norm.init(jax.random.key(0), x[0], False)
        _, updates = jax.vmap(
            lambda x, mask: norm.apply(
                variables, x, False, mask=mask, mutable=["batch_stats"]
            ),
            axis_name="d",
        )(x, mask)
        np.testing.assert_allclose(updates["batch_stats"]["mean"], [[2.0], [2.0]])

    def test_2_nan_padding(self):
        x = jnp.array([[1.0, 2.0], [3.0, 5.0], [jnp.nan, jnp.nan]])
        mask = jnp.array([[True], [True], [False]])
        norm = BatchNorm()
        variables = norm.init(jax.random.key(0), x, False)
        _, stats, gradients = train(norm, variables, x, mask, np.ones((3, 2)))
        assert all(jnp.isfinite(a).all() for a in jax.tree.leaves((stats, gradients)))

    def test_3_large_mean(self):
        x = jax.random.normal(jax.random.key(0), (4096, 3)) + 1e4
        y, updates = self.apply(x)
        _, _, var = oracle.moments(x)
        np.testing.assert_allclose(updates["batch_stats"]["var"], var, rtol=1e-3)
        np.testing.assert_allclose(y.std(0), 1, rtol=1e-3)

    def test_4_nothing_to_count(self):
        for x, mask in [
            (jnp.ones((4, 3)), jnp.zeros((4, 1))),
            (jnp.ones((0, 3)), None),
        ]:
            _, updates = self.apply(x, mask)
            np.testing.assert_array_equal(updates["batch_stats"]["mean"], 0)
            np.testing.assert_array_equal(updates["batch_stats"]["var"], 1)

    def test_8_axes(self):
        for axis, message in [((1, -1), "once"), (5, "must lie in")]:
            with pytest.raises(ValueError, match=f"`axis`.*{message}"):
                self.apply(jnp.ones((4, 3)), axis=axis)
        norm = BatchNorm(use_scale=False, use_bias=False)
        variables = norm.init(jax.random.key(0), jnp.ones((4, 3)), False)
        with pytest.raises(ValueError, match=r"one entry per feature.*got \(3,\)"):
            norm.apply(variables, jnp.ones((4, 2)), False, mutable=["batch_stats"])


class TestAsFlaxHasIt:
    """Small usages that a helper with fresh eyes found to differ."""

    def test_integers_keep_the_precision_of_dtype(self):
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            x = jnp.arange(40).reshape(8, 5) + 2**40
            y, _ = BatchNorm(False, dtype=jnp.float64).init_with_output(
                jax.random.key(0), x
            )
            np.testing.assert_allclose(y, oracle.forward(x), rtol=1e-9)

    def test_dtype_must_be_inexact(self):
        with pytest.raises(TypeError, match="`dtype` must be floating point"):
            BatchNorm(False, dtype=jnp.int32).init(jax.random.key(0), jnp.ones((4, 3)))

    def test_complex_parameters_for_a_real_input(self):
        norm = BatchNorm(False, param_dtype=jnp.complex64)
        y, _ = norm.init_with_output(jax.random.key(0), jnp.eye(4, 3))
        assert y.dtype == jnp.complex64
        np.testing.assert_allclose(y.real, oracle.forward(np.eye(4, 3)), rtol=1e-5)

    def test_real_dtype_for_a_complex_input_takes_the_real_part(self):
        x = jax.lax.complex(jnp.eye(4, 3), jnp.ones((4, 3)))
        norm = BatchNorm(False, dtype=jnp.float32)
        y, _ = norm.init_with_output(jax.random.key(0), x)
        np.testing.assert_allclose(y, oracle.forward(np.eye(4, 3)), rtol=1e-5)

    def test_mask_message_shows_the_mask_that_came(self):
        norm = BatchNorm(False)
        with pytest.raises(ValueError, match=r"as in NumPy; got \(8,\).*\[:, None\]"):
            norm.init(jax.random.key(0), jnp.ones((8, 5)), mask=jnp.ones(8, bool))

    @pytest.mark.parametrize("kwargs", [{"momentum": None}, {"debias": True}])
    def test_inference_on_a_flax_checkpoint_needs_no_count(self, kwargs):
        x = jnp.eye(4, 3)
        variables = nn.BatchNorm().init(jax.random.key(0), x, True)
        norm = BatchNorm(True, **kwargs)
        np.testing.assert_allclose(norm.apply(variables, x), x, rtol=1e-4)

    def test_tabulate_and_intermediates_see_one_call(self):
        x = jnp.eye(4, 3)
        norm = BatchNorm(False)
        variables = norm.init(jax.random.key(0), x)
        _, state = jax.jit(
            lambda v: norm.apply(v, x, capture_intermediates=True, mutable=True)
        )(variables)
        assert list(state["intermediates"]) == ["__call__"]
        assert "BatchNorm" in nn.tabulate(norm, jax.random.key(0))(x)
