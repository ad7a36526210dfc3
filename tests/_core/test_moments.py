"""Moments, right to float32's last digits at any mean, for any data.

What is compared with float64 there leaves ONE compiled program: XLA:CPU may otherwise
show one consumer of the shift another value than the next (`jaxbn._core.moments`).
"""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import fuses_sums
from devices import mesh
from jax.sharding import PartitionSpec as P
from steps import SLACK, assert_exact, desired, step

import jaxbn
from jaxbn._core.moments import _part


def test_half_precision_squares_do_not_overflow():
    x = jnp.array([[300.0], [-300.0]], jnp.float16)
    np.testing.assert_allclose(jax.jit(jaxbn.batch_moments)(x).var, [90000.0])


def test_counts_are_summed_as_integers():
    """A float32 sum of ones stops at 2**24 (on a GPU), an int32 one at 2**31."""

    def moments(x, mask):
        return jaxbn.batch_moments(x, mask=mask)

    jaxpr = jax.make_jaxpr(moments)(jnp.ones((8, 3)), jnp.ones((8, 3), bool))
    sums = [
        str(e.outvars[0].aval.dtype) for e in jaxpr.eqns if "sum" in str(e.primitive)
    ]
    assert sorted(sums) == ["float32"] * 3 + ["uint32"]


def test_gradient_is_that_of_mean_and_var():
    """Of one batch, and of two that are merged."""
    rng = np.random.default_rng(2)
    x, cotangents = rng.normal(size=(40, 3)), tuple(rng.normal(size=(2, 3)))

    def merged(x):
        return jaxbn.merge_moments(*map(jaxbn.batch_moments, (x[:13], x[13:])))

    with jax.enable_x64(True):
        for moments in (jaxbn.batch_moments, merged):
            _, vjp = jax.vjp(jax.jit(lambda x, f=moments: f(x)[1:]), x)
            (dx,) = jax.jit(vjp)(cotangents)
            desired = cotangents[0] / 40 + cotangents[1] * 2 * (x - x.mean(0)) / 40
            np.testing.assert_allclose(dx, desired, rtol=1e-12, atol=1e-14)


merge = jax.jit(jaxbn.merge_moments)


def test_merged_counts_per_feature_at_a_large_mean():
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(100, 4)) + 1e4).astype(np.float32)
    mask = rng.random(x.shape) < 0.7
    mask[:13, 0] = mask[13:, 1] = False
    parts = (jaxbn.batch_moments(x[s], mask=mask[s]) for s in (np.s_[:13], np.s_[13:]))
    merged, (n, mean, var) = merge(*parts), oracle.moments(x, mask=mask)
    np.testing.assert_array_equal(merged.num_elements, n)
    np.testing.assert_allclose(merged.mean, mean, rtol=3e-7)
    # The parts' means are rounded to float32, whose spacing at 1e4 is 1e-3.
    np.testing.assert_allclose(merged.var, var, rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_part_with_nothing_in_it_says_nothing(value):
    x = np.random.default_rng(4).normal(size=(20, 4)).astype(np.float32)
    part = jaxbn.batch_moments(x)
    nothing = jaxbn.Moments(0, jnp.full(4, value), jnp.full(4, value))
    for pair in ((part, nothing), (nothing, part)):
        for got, want in zip(merge(*pair), part, strict=True):
            np.testing.assert_allclose(got, jnp.broadcast_to(want, 4), rtol=1e-7)
    for got in merge(nothing, nothing):
        np.testing.assert_array_equal(got, np.zeros(4))


# About a shift: any mean, any data

FEATURES = 8  # XLA:CPU adds fewer up one after the other, where the sums err more
SHAPES = {  # a division by 1000 rounds, one by 4096 does not
    "1000 rows": ((1000, FEATURES), -1),
    "4096 rows": ((4096, FEATURES), -1),
    "images": ((10, 10, 10, FEATURES), -1),
    "channel first": ((16, FEATURES, 16, 16), 1),
    # Here XLA:CPU fuses the division of an unrounded shift: 8e-3 at mean/std 1e6.
    "odd, wide": ((154, 256), -1),
}


def draw(shape=(1000, FEATURES), axis=-1, ratio=0.0, seed=0):
    """(x, dy, scale), x with mean `ratio` and standard deviation 1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) + ratio
    dy = rng.normal(size=shape)
    scale = rng.uniform(0.5, 2, shape[axis])
    return tuple(a.astype(np.float32) for a in (x, dy, scale))


@functools.cache
def alone(axis, **kwargs):
    return jax.jit(functools.partial(step, axis=axis, **kwargs))


def over_two_devices(axis):
    one = functools.partial(step, axis=axis, axis_name="d")
    rows = P("d")
    return jax.jit(
        jax.shard_map(
            one,
            mesh=mesh(d=2),
            in_specs=(rows, rows, P()),
            out_specs=(P(), rows, rows, P(), P()),
        )
    )


WAYS = {
    "vjp": alone,
    "jvp": functools.partial(alone, derivative="jvp"),
    "devices": over_two_devices,
}


@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_any_mean(way, shape, axis):
    f = WAYS[way](axis)
    for ratio in (0, 1, 1e2, 1e4, 1e6):
        args = draw(shape, axis, ratio)
        assert_exact(f(*args), desired(*args, axis=axis), where=f"at {ratio:g}")


@pytest.mark.parametrize("rows", [4, 1000])
def test_any_mean_under_a_mask(rows):
    mask = np.arange(rows)[:, None] % 7 != 2
    for ratio in (0, 1e4, 1e6, 1e5 * (np.arange(FEATURES) == 1)):  # one far feature
        args = draw((rows, FEATURES), ratio=ratio)
        got, want = alone(-1)(*args, mask=mask), desired(*args, mask)
        assert_exact(got, want, where=f"at {ratio}")


CONSTANTS = [(3, "float32"), (4095, "float32"), (1000, "bfloat16"), (1000, "float16")]


@pytest.mark.parametrize(("rows", "dtype"), CONSTANTS)
def test_constant_features_are_nothing(rows, dtype):
    """The rounding of one float32 mean would be y = 0.3 at 1e4, and 1000 at 1e8."""
    _, dy, scale = draw((rows, 160))
    sizes = 10 ** np.random.default_rng(0).uniform(0, 8, 160)
    x = jnp.asarray(np.minimum(sizes, float(jnp.finfo(dtype).max)), dtype)
    _, y, *_, mean = alone(-1)(jnp.tile(x, (rows, 1)), dy.astype(dtype), scale)
    assert abs(y).max() <= 1e-4
    np.testing.assert_allclose(mean, x.astype(jnp.float32), rtol=1.2e-7)


# Data built against the part of the batch whose mean is the shift


def part_of(shape, axis):
    """True where an element is in the part."""
    places = jnp.arange(np.prod(shape)).reshape(shape)
    reduced = [i for i in range(len(shape)) if i != axis % len(shape)]
    part, _ = _part(places, tuple(reduced))
    return np.isin(places, part)


ADVERSARIES = {
    "apart": lambda part, noise: np.where(part, 0, 1e4) + noise,
    "all of it far": lambda part, noise: np.where(part, 1e6, 0) + noise,
    "outliers": lambda part, noise: np.where(part & (noise > 1), 1e6, 0) + noise,
}
MORE = {"odd": ((77, FEATURES), -1), "narrow": ((8, 33, FEATURES), -1)}


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize(("shape", "axis"), (SHAPES | MORE).values(), ids=SHAPES | MORE)
def test_adversaries(shape, axis, adversary):
    x, dy, scale = draw(shape, axis)
    x = ADVERSARIES[adversary](part_of(shape, axis), x).astype(np.float32)
    got, wanted = alone(axis)(x, dy, scale), desired(x, dy, scale, axis=axis)
    assert_exact(got, wanted, bounds=[2e-5 * SLACK] * 5)


def test_the_part_is_a_sixteenth_at_least():
    """What is lost is bounded by the inverse of its share; it costs as much time."""
    columns = [((rows, 1), -1) for rows in (*range(1, 70), 127, 800, 4095, 4104)]
    sequences = [((8, width, 1), -1) for width in (*range(1, 20), 31, 33)]
    for shape, axis in (*SHAPES.values(), *columns, *sequences):
        reduced = tuple(i for i in range(len(shape)) if i != axis % len(shape))
        part = jax.eval_shape(lambda x, r=reduced: _part(x, r)[0], np.zeros(shape))
        share = part.size / np.prod(shape)
        assert share >= 1 / 16, shape
        assert share <= (0.12 if np.prod(shape) // shape[axis] >= 512 else 1), shape


# Transformations, of data far from 0


def test_second_derivatives():
    """Those of the same data about 0: a batch norm does not see a shift."""
    x, dy, scale = draw((20, 2))

    def loss(x, shift):
        y = step(x + shift, dy, scale)[1]
        return (y**3 * dy).sum()

    shift = np.float32(2**12)
    near = jax.jit(jax.hessian(loss))((x + shift) - shift, 0.0)
    far = jax.jit(jax.hessian(loss))(x, shift)
    np.testing.assert_allclose(far, near, rtol=0, atol=1e-5 * abs(near).max())


def test_second_derivatives_of_the_variance_of_a_constant():
    """At its smallest value it is still the quadratic function that it is."""
    x = jnp.full((20, 1), 3.0)
    hessian = jax.jit(jax.hessian(lambda x: jaxbn.batch_moments(x).var.sum()))(x)
    wanted = 2 / 20 * (np.eye(20) - 1 / 20)
    np.testing.assert_allclose(hessian[:, 0, :, 0], wanted, rtol=0, atol=1e-6)


def test_vmap_is_a_loop():
    ratios = (0.0, 1e6, 1e2)
    drawn = [draw((100, FEATURES), ratio=ratio) for ratio in ratios]
    masks = np.arange(100)[:, None] < np.array([50, 90, 100])[:, None, None]
    stacked = [np.stack(a) for a in zip(*drawn, strict=True)]
    got = jax.jit(jax.vmap(step))(*stacked)
    of_masks = jax.jit(jax.vmap(lambda mask: step(*drawn[1], mask=mask)))(masks)
    for i, args in enumerate(drawn):
        assert_exact([a[i] for a in got], desired(*args), where=ratios[i])
        assert_exact([a[i] for a in of_masks], desired(*drawn[1], masks[i]))


def test_complex():
    x, _, scale = draw(ratio=1e4)
    x = x + 1j * draw(ratio=-1e6, seed=1)[0]

    def both(x):
        y, _ = jaxbn.forward(x, scale, jnp.zeros_like(scale))
        return y, jaxbn.batch_moments(x).var

    y, var = jax.jit(both)(x.astype(np.complex64))
    exact = np.complex128(x.astype(np.complex64))
    want = oracle.forward(exact, scale)
    assert abs(y - want).max() <= 1.5e-6 * abs(want).max()
    np.testing.assert_allclose(var, oracle.moments(exact)[2], rtol=2e-6)


def test_a_symbolic_number_of_rows():
    """There is no part then: the shift is the mean of all."""
    (n,) = jax.export.symbolic_shape("n")
    args = draw(ratio=1e6)
    rows = jax.ShapeDtypeStruct((n, FEATURES), jnp.float32)
    exported = jax.export.export(jax.jit(step))(rows, rows, args[2])
    assert_exact(exported.call(*args), desired(*args))


def test_a_mean_between_two_numbers_over_devices():
    """The mean of two neighbours is neither; each device has one of them."""
    a = np.float32(1e6)
    x = np.array([a, np.nextafter(a, np.float32(np.inf))])[:, None, None]
    x = np.repeat(x, 4, axis=1)
    params, state = jaxbn.init(1)
    named = functools.partial(jaxbn.batch_norm, train=True, axis_name="d")
    one = jax.vmap(lambda x: named(x, params, state)[0], axis_name="d")
    y = jax.jit(one)(x)
    wanted = oracle.forward(np.float64(x.reshape(-1, 1)))
    np.testing.assert_allclose(y.reshape(-1, 1), wanted, rtol=1e-6)


# What it costs


@fuses_sums
@pytest.mark.parametrize(
    ("shape", "axis", "dtype"),
    [
        ((65536, 64), -1, "float32"),
        ((32, 28, 28, 128), -1, "bfloat16"),
        ((32, 128, 28, 28), 1, "float32"),
        ((32, 128, 28, 28), 1, "bfloat16"),
    ],
    ids=str,
)
def test_traffic_on_the_cpu(shape, axis, dtype):
    """10 sizes, and the part, for which XLA counts all of x; and no branch."""
    x, scale = jnp.ones(shape, dtype), jnp.ones(shape[axis])
    compiled = alone(axis).lower(x, x, scale).compile()
    assert " conditional(" not in compiled.as_text()
    assert compiled.cost_analysis()["bytes accessed"] / x.nbytes <= 11.5
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.01 * x.nbytes
