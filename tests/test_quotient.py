"""Quotients in two float32 numbers, which have the digits of three halves of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn._quotient import digits, quotient

RNG = np.random.default_rng(0)
TOTALS = (RNG.normal(size=1000) * 10.0 ** RNG.integers(-20, 20, 1000)).astype("float32")
DIVISORS = RNG.integers(1, 2**24, 1000).astype("float32")


@pytest.mark.parametrize("size", [0, 1e-6, 0.1])
def test_in_two(size):
    """Also of a total in two, the second of which is smaller, by `size`."""
    rest = TOTALS * np.float32(size)
    first, second = jax.jit(quotient)(TOTALS, DIVISORS, rest if size else None)
    exact = (np.float64(TOTALS) + rest) / DIVISORS
    bound = 2.0**-34 * abs(TOTALS / DIVISORS) + 2.0**-23 * abs(rest / DIVISORS)
    off = np.float64(first) + np.float64(second) - exact
    np.testing.assert_array_less(abs(off), bound)
    np.testing.assert_array_equal(digits(first, 12), first)


def test_so_many_digits():
    a = np.linspace(1, 2, 77, dtype=np.float32)
    np.testing.assert_array_equal(digits(jnp.asarray(a), 4), np.round(a * 8) / 8)
    np.testing.assert_array_equal(digits(jnp.asarray(-a), 24), -a)


def test_complex_numbers_are_divided_once():
    total = TOTALS + 1j * TOTALS[::-1]
    first, second = quotient(jnp.asarray(total), jnp.asarray(DIVISORS))
    np.testing.assert_allclose(first, total / DIVISORS, rtol=1e-6)
    np.testing.assert_array_equal(second, 0)


def test_float64_is_divided_once():
    with jax.enable_x64(True):
        total = jnp.asarray(TOTALS, "float64") * 1e100
        first, second = quotient(total, jnp.asarray(DIVISORS, "float64"))
        np.testing.assert_allclose(first, np.float64(total) / DIVISORS, rtol=1e-15)
        np.testing.assert_array_equal(second, 0)
