"""A quotient as two numbers: a float32, and what its rounding left out."""

import jax
import jax.numpy as jnp
from jax import lax


def quotient(
    total: jax.Array, divisor: jax.Array, rest: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(total + rest) / divisor in two, the first of 12 binary digits.

    Products of numbers of half the digits are exact, and so are differences of numbers
    that are near each other (Dekker 1971). Only in real float32, the dtype of sums that
    rounding hurts: else the second number is 0 and the first has all digits.
    """
    if total.dtype != jnp.float32:
        return total / divisor.astype(total.dtype), jnp.zeros_like(total)
    first, half = digits(total / divisor, 12), digits(divisor, 12)
    left = total - first * half - first * (divisor - half)
    return first, (left if rest is None else left + rest) / divisor


def digits(a: jax.Array, number: int) -> jax.Array:
    """A float32 rounded to so many binary digits."""
    return lax.reduce_precision(a, exponent_bits=8, mantissa_bits=number - 1)
