"""linen.BatchNorm: what a drop-in for Flax's keeps, and Flax's defects, gone."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, assert_close, case_ids

import jaxbn
from jaxbn.linen import BatchNorm, BatchRenorm

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (64, 3)) * 5 + 9

# The dtype of x for each case.
PARITY = {
    "matrix": jnp.bfloat16,
    "no scale": jnp.float32,
    "no parameters": jnp.float32,
    "channel first": jnp.float32,
    "two feature axes, apart": jnp.float32,
    "mask rows": jnp.bfloat16,
    "mask elements": jnp.float32,
    "mask channel first": jnp.float32,
}


def random_like(variables):
    """Variables with random values, positive where they must be."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), variables
    )


def dtypes(tree):
    return jax.tree.map(lambda a: a.dtype, tree)


@jax.jit(static_argnums=0)
def init(norm, x):
    return norm.init(KEY, x, use_running_average=False)


@jax.jit(static_argnums=0)
def train(norm, variables, x, mask=None):
    options = {"use_running_average": False, "mutable": ["batch_stats"]}
    y, updates = norm.apply(variables, x, mask=mask, **options)
    return y, updates["batch_stats"]


@jax.jit(static_argnums=0)
def train_and_infer(norm, variables, x, mask, dy):
    """All that training and inference give; dy is y's cotangent."""

    def apply(params, x):
        return train(norm, variables | {"params": params}, x, mask)

    params = variables.get("params", {})
    y, vjp, stats = jax.vjp(apply, params, x, has_aux=True)
    inferred = norm.apply(variables, x, use_running_average=True)
    return y, stats, inferred, vjp(jnp.asarray(dy, y.dtype))


def test_fields_are_flax_fields_then_ours():
    ours = [f.name for f in dataclasses.fields(BatchNorm)]
    flax_fields = [f.name for f in dataclasses.fields(nn.BatchNorm)]
    both = [f for f in flax_fields if f not in ("parent", "name")]
    assert ours[: len(both)] == both
    assert ours[len(both) :][:3] == ["running_variance", "debias", "derivative"]
    for name in both:
        assert getattr(BatchNorm, name) == getattr(nn.BatchNorm, name)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("case", [c for c in CASES if c.name in PARITY], **case_ids)
def test_parity_with_flax(case):
    """Variables, values, gradients and statistics; inference too."""
    dtype = PARITY[case.name]
    x, _, _, mask, dy = case.draw(dtype)
    x = jnp.asarray(x, dtype)
    options = {name: getattr(case, name) for name in ("axis", "use_scale", "use_bias")}
    ours, flax_norm = BatchNorm(**options), nn.BatchNorm(**options)
    mine, variables = init(ours, x), init(flax_norm, x)
    jax.tree.map(np.testing.assert_array_equal, mine, variables)
    variables = random_like(variables)
    *got, gradients = train_and_infer(ours, variables, x, mask, dy)
    if mask is not None:  # Flax lets the cotangent of masked elements in
        dy = np.where(mask, dy, 0)
    *want, flax_gradients = train_and_infer(flax_norm, variables, x, mask, dy)
    if mask is not None:
        want[0] = jnp.where(mask, want[0], 0)

    def close(a, b):
        assert a.dtype == b.dtype
        assert_close(a, np.asarray(b, np.float64), dtype, 1000)

    jax.tree.map(close, got, want)
    assert dtypes(gradients) == dtypes(flax_gradients)
    if dtype == jnp.float32:  # in bfloat16 Flax adds up rounded parts of dx
        jax.tree.map(close, gradients, flax_gradients)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32, jnp.int32, jnp.float64])
def test_dtypes_are_flax_dtypes(x_dtype):
    table = [
        {"dtype": jnp.bfloat16},
        {"dtype": jnp.float16},
        {"param_dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16, "force_float32_reductions": False},
        {"use_scale": False, "use_bias": False},
        {"dtype": jnp.float64},
        {"param_dtype": jnp.float64},
    ]

    @jax.jit(static_argnums=0)
    def run(cls, x):
        norms = [cls(momentum=0.5, **options) for options in table]
        return [(v := n.init(KEY, x, True), *train(n, v, x)) for n in norms]

    with jax.enable_x64(True):
        x = jnp.asarray(np.arange(12).reshape(4, 3) ** 2 % 7, x_dtype)
        runs = run(BatchNorm, x), run(nn.BatchNorm, x)
    for options, (mine, y, stats), (variables, flax_y, _) in zip(
        table, *runs, strict=True
    ):
        assert dtypes(mine) == dtypes(variables), options
        assert dtypes(stats) == dtypes(variables["batch_stats"]), options
        assert y.dtype == flax_y.dtype, options
        small = jnp.bfloat16 if y.dtype.itemsize == 2 else jnp.float32
        assert_close(y, np.asarray(flax_y, np.float64), small, 100)


def test_initializing_allows_a_batch_of_one_and_an_unbound_axis():
    one = X[:1]
    variables = BatchNorm(axis_name="nowhere").init(KEY, one, False)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)
    assert set(BatchNorm(True).init(KEY, one)) == {"batch_stats", "params"}
    with pytest.raises(ValueError, match="more than one element per feature"):
        BatchNorm(False).apply(variables, one, mutable=["batch_stats"])


def test_use_running_average_twice_or_never():
    with pytest.raises(ValueError, match="use_running_average"):
        BatchNorm().init(KEY, X)
    with pytest.raises(ValueError, match="use_running_average"):
        BatchNorm(True).init(KEY, X, True)


def test_inference_ignores_axis_name_and_needs_nothing_mutable():
    norm, x = BatchNorm(True, axis_name="nowhere"), jnp.ones((4, 3))
    mask = jnp.array([True, True, False, True])[:, None]
    y = norm.apply(norm.init(KEY, x), x, mask=mask)
    np.testing.assert_array_equal(y[2], 0)
    assert (y[0] != 0).all()


@pytest.mark.parametrize("mask", [[1, 0, 1], [[1], [0], [1], [1]]], ids=str)
def test_mask_broadcasts_as_in_numpy(mask):
    """A feature with nothing to count keeps its statistics."""
    x, norm = jax.random.normal(KEY, (6, 4, 3)), BatchNorm(momentum=0.0)
    y, stats = train(norm, init(norm, x), x, np.array(mask))
    whole = np.broadcast_to(mask, x.shape) > 0
    n, mean, var = oracle.moments(x, mask=whole)
    assert_close(y, oracle.forward(x, mask=whole), jnp.float32, 24)
    assert_close(stats["mean"], np.where(n > 0, mean, 0), jnp.float32, 24)
    assert_close(stats["var"], np.where(n > 0, var, 1), jnp.float32, 24)


def test_devices_with_unequal_masks_share_a_batch():
    """Of two, one counts four rows and the other one: Flax averages their means."""
    x, mask = X[:8].reshape(2, 4, 3), np.arange(8).reshape(2, 4, 1) < 5
    norm = BatchNorm(momentum=0.0, axis_name="d")
    each = functools.partial(train, norm, init(norm, x[0]))
    y, stats = jax.vmap(each, axis_name="d")(x, mask)
    _, mean, var = oracle.moments(X[:5])
    assert_close(y.reshape(8, 3)[:5], oracle.forward(X[:5]), jnp.float32, 5)
    for name, want in (("mean", mean), ("var", var)):
        assert_close(stats[name], np.stack([want, want]), jnp.float32, 5)


@pytest.mark.parametrize("options", [{"momentum": None}, {"debias": True}])
def test_update_count_only_where_a_mode_needs_it(options):
    norm = BatchNorm(**options)
    variables = norm.init(KEY, X, False)
    assert list(variables["batch_stats"]) == ["mean", "var", "num_updates"]
    _, stats = train(norm, variables, X)
    assert stats["num_updates"] == 1
    _, mean, var = oracle.moments(X)
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-5)


def test_running_variance_and_derivative_reach_the_kernel():
    norm = BatchNorm(momentum=0.0, running_variance="unbiased", derivative="jvp")
    variables = init(norm, X)
    _, stats = train(norm, variables, X)
    np.testing.assert_allclose(stats["var"], X.var(0, ddof=1), rtol=1e-5)
    y, tangent = jax.jvp(lambda x: train(norm, variables, x)[0], (X,), (X,))
    # y does not see the scale of x, nor its shift: along x it does not move.
    np.testing.assert_allclose(tangent, 0, atol=1e-4 * float(abs(y).max()))


GHOSTS = {"ghost_batch_size": 16}
LIMITS = {"r_max": lambda t: 1 + t, "d_max": lambda t: 2 * t}
RAMPS = {"r_max": jaxbn.ramp_r_max, "d_max": jaxbn.ramp_d_max}


@pytest.mark.parametrize(
    ("norm", "function", "static", "updates"),
    [
        (BatchNorm(**GHOSTS), jaxbn.ghost_batch_norm, GHOSTS, 0),
        (BatchRenorm(**LIMITS), jaxbn.batch_renorm, LIMITS, 1),
        (BatchRenorm(), jaxbn.batch_renorm, RAMPS, 15_000),
    ],
    ids=["ghosts", "limits by the count", "default limits"],
)
def test_modules_are_the_functions(norm, function, static, updates):
    variables = norm.init(KEY, X[:1], False)  # a batch of one, without ghosts
    params, state = jaxbn.init(3)
    state = state._replace(num_updates=jnp.int32(updates))
    if "num_updates" in variables["batch_stats"]:
        variables["batch_stats"]["num_updates"] = state.num_updates
    y, stats = train(norm, variables, X)
    step = functools.partial(function, train=True, momentum=0.99, **static)
    want, new = jax.jit(step)(X, params, state)
    np.testing.assert_array_equal(y, want)
    for name, value in stats.items():
        np.testing.assert_array_equal(value, getattr(new, name))
    assert norm.apply(variables, X[:5], True).shape == (5, 3)


def test_the_residual_of_a_bfloat16_x_is_x():
    norm, x = BatchNorm(False), jnp.ones((512, 16), jnp.bfloat16)
    variables = norm.init(KEY, x)

    def apply(x):
        return norm.apply(variables, x, mutable=["batch_stats"])[0]

    vjp = jax.eval_shape(lambda x: jax.vjp(apply, x)[1], x)
    big = [a.dtype for a in jax.tree.leaves(vjp) if a.size >= x.size]
    assert big == [jnp.bfloat16]


def test_another_number_of_features_is_refused():
    norm = BatchNorm(use_scale=False, use_bias=False)
    with pytest.raises(ValueError, match=r"one entry per feature.*got \(3,\)"):
        train(norm, init(norm, X), X[:, :2])


REAL = np.eye(4, 3, dtype=np.float32)
COMPLEX = REAL + np.complex64(1j) * REAL[::-1]
INTEGERS = np.arange(40).reshape(8, 5) + 2**40


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(
    ("options", "x", "dtype", "desired"),
    [
        ({"dtype": jnp.float64}, INTEGERS, "f8", INTEGERS),
        ({"param_dtype": jnp.complex64}, REAL, "c8", REAL),
        ({"dtype": jnp.float32}, REAL + np.complex64(1j), "f4", REAL),
        ({}, COMPLEX, "c8", COMPLEX),
    ],
    ids=["integers in the precision of dtype", "complex parameters", "real part", "x"],
)
def test_input_and_dtype_of_different_kinds(options, x, dtype, desired):
    with jax.enable_x64(dtype == "f8"):
        y, _ = BatchNorm(False, **options).init_with_output(KEY, x)
        assert y.dtype == dtype
        rtol = 1e-9 if dtype == "f8" else 1e-5
        np.testing.assert_allclose(y, oracle.forward(desired), rtol=rtol)


def test_intermediates_see_one_call():
    norm = BatchNorm(False)
    capture = {"capture_intermediates": True, "mutable": True}
    _, state = norm.apply(norm.init(KEY, X), X, **capture)
    assert list(state["intermediates"]) == ["__call__"]
