"""One table of cases, crossed with everything, and one table of tolerances."""

import dataclasses

import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

# XLA:CPU of jaxlib 0.10.0 and 0.10.1 makes a tree of a big sum, and writes out what
# stands before it, ours and everybody's: 20 sizes are moved where later ones move 10.
FUSES_SUMS = tuple(map(int, jaxlib.__version__.split(".")[:3])) >= (0, 10, 2)
fuses_sums = pytest.mark.skipif(
    not FUSES_SUMS, reason="XLA:CPU takes nothing into a big sum before jaxlib 0.10.2"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """An input: its shape, feature axes, mask, and which parameters there are."""

    name: str
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    mask: str = "none"
    use_scale: bool = True
    use_bias: bool = True

    @property
    def features(self):
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return tuple(self.shape[i] for i in sorted(a % len(self.shape) for a in axes))

    def draw(self, dtype=np.float64, seed=0):
        """(x, scale, bias, mask, dy) in float64 NumPy, exact in `dtype`."""
        rng = np.random.default_rng(seed)

        def exact(a):
            return np.asarray(a).astype(dtype).astype(np.float64)

        x = exact(rng.normal(size=self.shape) * 2 + 1)
        dy = exact(rng.normal(size=self.shape) + 0.5)
        scale = exact(rng.uniform(0.5, 2, self.features)) if self.use_scale else None
        bias = exact(rng.normal(size=self.features)) if self.use_bias else None
        return x, scale, bias, self._mask(rng), dy

    def _mask(self, rng):
        if self.mask == "none":
            return None
        if self.mask == "rows":
            shape = (self.shape[0],) + (1,) * (len(self.shape) - 1)
            mask = rng.random(shape) < 0.6
            mask[:2] = True  # at least two rows count
            return mask
        mask = rng.random(self.shape) < 0.6
        if self.mask == "nothing":
            mask[...] = False
        if self.mask == "empty feature":
            mask[..., 0] = False
        return mask


CASES = [
    Case("matrix", (6, 5)),
    Case("one feature", (7, 1)),
    Case("two rows", (2, 4)),
    Case("zero rows", (0, 3)),
    Case("no features", (4, 0)),
    Case("no scale", (6, 5), use_scale=False),
    Case("no bias", (6, 5), use_bias=False),
    Case("no parameters", (6, 5), use_scale=False, use_bias=False),
    Case("features first", (5, 9), axis=0),
    Case("sequence", (3, 4, 5)),
    Case("channel first", (2, 3, 4, 5), axis=1),
    Case("channel last", (2, 4, 5, 3)),
    Case("one image", (1, 4, 5, 3)),
    Case("volume", (2, 3, 2, 3, 4)),
    Case("two feature axes", (4, 3, 2), axis=(1, 2)),
    Case("two feature axes, apart", (3, 4, 2), axis=(-1, 0)),
    Case("many rows", (1000, 4)),
    Case("mask rows", (8, 5), mask="rows"),
    Case("mask elements", (9, 5), mask="elements"),
    Case("mask elements, no parameters", (9, 5), -1, "elements", False, False),
    Case("mask images", (5, 3, 3, 2), mask="rows"),
    Case("mask channel first", (6, 3, 4), axis=1, mask="elements"),
    Case("mask two feature axes", (9, 3, 2), axis=(1, 2), mask="elements"),
    Case("mask a whole feature", (8, 5), mask="empty feature"),
    Case("mask everything", (8, 5), mask="nothing"),
]

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32]

case_ids = {"ids": lambda c: c.name if isinstance(c, Case) else None}


def tolerance(dtype, n=1):
    """Relative to values of size 1: the result's rounding, plus that of n float32 sums.

    Their random walk times 4, for what the sums are then multiplied with: |mean| / std
    and 1 / std are of that size in the cases.
    """
    rounding = float(jnp.finfo(dtype).eps)
    return rounding + 4 * float(jnp.finfo(jnp.float32).eps) * max(n, 4) ** 0.5


def assert_close(actual, desired, dtype, n=1):
    """Within `tolerance`, relative to the largest of `desired` (at least 1)."""
    desired = np.asarray(desired)
    actual = np.asarray(actual)
    wide = np.complex128 if np.iscomplexobj(actual) else np.float64
    size = max(1.0, float(np.abs(desired).max(initial=0)))
    np.testing.assert_allclose(
        actual.astype(wide), desired, rtol=0, atol=tolerance(dtype, n) * size
    )
