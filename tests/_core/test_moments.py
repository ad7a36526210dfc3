"""batch_moments and merge_moments against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, DTYPES, assert_close, case_ids

import jaxbn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, **case_ids)
def test_equals_the_oracle(case, dtype):
    x, _, _, mask, _ = case.draw(dtype)
    got = jaxbn.batch_moments(jnp.asarray(x, dtype), axis=case.axis, mask=mask)
    n, mean, var = oracle.moments(x, axis=case.axis, mask=mask)
    np.testing.assert_array_equal(jnp.broadcast_to(got.num_elements, n.shape), n)
    assert got.num_elements.shape in {(), n.shape}
    assert {v.dtype for v in got} == {jnp.dtype(jnp.float32)}
    assert_close(got.mean, mean, jnp.float32, n.max(initial=1))
    assert_close(got.var, var, jnp.float32, n.max(initial=1))


def test_float64_and_complex():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        z = rng.normal(size=(50, 3)) + 1j * rng.normal(size=(50, 3))
        for x in (z.real, z):
            got = jaxbn.batch_moments(x)
            _, mean, var = oracle.moments(x)
            assert got.mean.dtype == x.dtype
            assert got.var.dtype == jnp.float64
            np.testing.assert_allclose(got.mean, mean, rtol=1e-14)
            np.testing.assert_allclose(got.var, var, rtol=1e-14)


def test_half_precision_squares_do_not_overflow():
    x = jnp.array([[300.0], [-300.0]], jnp.float16)
    np.testing.assert_allclose(jaxbn.batch_moments(x).var, [90000.0])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_values_under_the_mask_do_not_matter(poison):
    x = np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32)
    mask = np.arange(20)[:, None] % 3 > 0
    poisoned = np.where(mask, x, poison).astype(np.float32)
    got = jaxbn.batch_moments(poisoned, mask=mask)
    assert_close(got.mean, oracle.moments(x[mask[:, 0]])[1], jnp.float32)
    assert_close(got.var, oracle.moments(x[mask[:, 0]])[2], jnp.float32)


def test_counts_are_summed_as_integers():
    """A running float32 sum of ones stops at 2**24 (on a GPU; not on the CPU here)."""

    def moments(x, mask):
        return jaxbn.batch_moments(x, mask=mask)

    jaxpr = jax.make_jaxpr(moments)(jnp.ones((8, 3)), jnp.ones((8, 3), bool))
    sums = [
        str(e.outvars[0].aval.dtype) for e in jaxpr.eqns if "sum" in str(e.primitive)
    ]
    assert sorted(sums) == ["float32"] * 3 + ["int32"]


def test_gradient_is_that_of_mean_and_var():
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        x, ct_mean, ct_var = rng.normal(size=(40, 3)), *rng.normal(size=(2, 3))
        _, mean, _ = jaxbn.batch_moments(x)
        _, vjp = jax.vjp(lambda x: jaxbn.batch_moments(x)[1:], x)
        (dx,) = vjp((jnp.asarray(ct_mean), jnp.asarray(ct_var)))
        desired = ct_mean[None] / 40 + ct_var[None] * 2 * (x - mean[None]) / 40
        np.testing.assert_allclose(dx, desired, rtol=1e-12, atol=1e-14)


class TestMerge:
    def parts(self, *slices):
        rng = np.random.default_rng(3)
        x = (rng.normal(size=(100, 4)) + 1e4).astype(np.float32)
        return x, [jaxbn.batch_moments(x[s]) for s in slices]

    def test_equals_moments_of_the_whole(self):
        x, (a, b) = self.parts(slice(0, 13), slice(13, None))
        merged = jax.jit(jaxbn.merge_moments)(a, b)
        n, mean, var = oracle.moments(x)
        np.testing.assert_array_equal(merged.num_elements, n)
        np.testing.assert_allclose(merged.mean, mean, rtol=3e-7)
        # The parts' means are rounded to float32, whose spacing at 1e4 is 1e-3.
        np.testing.assert_allclose(merged.var, var, rtol=1e-3)

    @pytest.mark.parametrize("spoiled", [np.nan, np.inf])
    def test_a_part_with_nothing_in_it_says_nothing(self, spoiled):
        _, (part,) = self.parts(slice(None))
        nothing = jaxbn.Moments(0, jnp.full(4, spoiled), jnp.full(4, spoiled))
        for pair in ((part, nothing), (nothing, part)):
            merged = jaxbn.merge_moments(*pair)
            np.testing.assert_allclose(merged.mean, part.mean, rtol=1e-7)
            np.testing.assert_allclose(merged.var, part.var, rtol=1e-7)

    def test_is_differentiable(self):
        def loss(x, w):
            a, b = jaxbn.batch_moments(x[:5]), jaxbn.batch_moments(x[5:])
            return (jaxbn.merge_moments(a, b).var * w).sum()

        def whole(x, w):
            return (jaxbn.batch_moments(x).var * w).sum()

        with jax.enable_x64(True):
            rng = np.random.default_rng(4)
            x, w = rng.normal(size=(12, 3)), rng.normal(size=3)
            np.testing.assert_allclose(
                jax.grad(loss)(x, w), jax.grad(whole)(x, w), rtol=1e-10
            )

    @pytest.mark.parametrize("swap", [False, True])
    def test_nothing_on_one_side_returns_the_other(self, swap):
        _, (a, b) = self.parts(slice(0, 0), slice(0, None))
        merged = jaxbn.merge_moments(*((b, a) if swap else (a, b)))
        for got, desired in zip(merged, b, strict=True):
            np.testing.assert_array_equal(got, jnp.broadcast_to(desired, (4,)))

    def test_nothing_on_both_sides_is_zeros(self):
        _, (a, b) = self.parts(slice(0, 0), slice(0, 0))
        for got in jaxbn.merge_moments(a, b):
            np.testing.assert_array_equal(got, np.zeros(4))

    def test_counts_per_feature(self):
        x = np.arange(12.0, dtype=np.float32).reshape(6, 2)
        mask = np.array([[1, 0], [1, 0], [0, 0], [1, 1], [0, 1], [1, 1]], bool)
        halves = [
            jaxbn.batch_moments(x[s], mask=mask[s]) for s in (np.s_[:3], np.s_[3:])
        ]
        merged = jaxbn.merge_moments(*halves)
        n, mean, var = oracle.moments(x, mask=mask)
        np.testing.assert_array_equal(merged.num_elements, n)
        np.testing.assert_allclose(merged.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(merged.var, var, rtol=1e-6)

    def test_shapes_must_agree(self):
        a, b = (jaxbn.batch_moments(jnp.ones((2, k))) for k in (3, 1))
        with pytest.raises(ValueError, match=r"one shape.*\(3,\).*\(1,\)"):
            jaxbn.merge_moments(a, b)
