"""Moments of a batch: counts under masks, means, variances, and how they are merged.

Plain JAX, differentiable, and stable: one pass over x - shift, where the shift is the
mean of a part of the batch, a share f of it (1/16 or so), and a constant for the
derivatives. With n elements per feature:

    offset = sum (x - shift) / n                     mean = shift + offset
    var    = sum |x - shift|^2 / n - |offset|^2

The subtraction costs |offset|^2 / var roundings. That is at most (1 - f) / f for ANY
data. Proof: the part's mean lies at a distance |offset| from the mean of all, and the
mean of the rest f / (1 - f) |offset| on the other side, so that

    var >= f |offset|^2 + (1 - f) |f / (1 - f) offset|^2 = f / (1 - f) |offset|^2

So there is no branch, but on a TPU, which tries the running mean first (`platforms`).
The mean is kept in two parts: the head is the mean, rounded, and the tail is what the
rounding left out. At mean/std 1e6, where a float32 mean is off by 0.06 std,
(x - head) - tail is right to 1e-7 std.

All passes over x have to subtract the same head. XLA makes a division by a constant a
multiplication, and computes that anew in each fusion that uses the quotient, where the
next addition may leave it unrounded (a multiply-add). So the last step of the shift is
a sum, and that of the offset a division by what is no constant: XLA stores either.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxbn import _axes, _checks
from jaxbn._axes import Axis, Features, abs_squared, centered, zero_masked
from jaxbn._core.devices import (
    AxisIndexGroups,
    AxisName,
    Devices,
    check_devices,
    may_branch,
    num_shards,
)
from jaxbn._core.platforms import barrier_on_cpu, guess_on_tpu


class Moments(NamedTuple):
    """How many elements were counted, their mean and their biased variance.

    Attributes:
        num_elements: Per feature, a scalar or `(features,)`, real.
        mean: `(features,)`, at least float32; complex where x is.
        var: `(features,)`, the mean of |x - mean|^2, real.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> moments = jaxbn.batch_moments(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
        >>> print(moments.num_elements, moments.mean, moments.var)
        2.0 [ 2. 20.] [  1. 100.]
    """

    num_elements: jax.Array
    mean: jax.Array
    var: jax.Array


class SplitMoments(NamedTuple):
    """Moments whose mean is head + tail, which has twice the digits of one number."""

    num_elements: jax.Array
    head: jax.Array
    tail: jax.Array
    var: jax.Array

    @property
    def rounded(self) -> Moments:
        """The same moments with the mean as one number."""
        return Moments(self.num_elements, self.head + self.tail, self.var)


def batch_moments(
    x: ArrayLike,
    *,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName = None,
    axis_index_groups: AxisIndexGroups = None,
) -> Moments:
    """Count, mean and biased variance per feature, over all other axes.

    Equivalent to `jnp.mean` and `jnp.var` (with `where=mask`), except that float16 and
    bfloat16 are reduced in float32, that nothing to count gives zeros instead of NaN,
    and that values under the mask never matter, NaN included.

    With `axis_name` the counts, the means (in two parts) and the variances of the
    devices travel in one all-reduce, as the rows of a table (devices, 4, features), and
    are merged exactly with weights equal to the counts (Chan, Golub & LeVeque 1979). A
    sum of squares would need as few collectives, but it cancels: at mean/std = 1e4 the
    variance is wrong by a factor of ten.

    Args:
        x: Floating point or complex, of any rank >= 1.
        axis: The feature axis or axes; statistics have their shape, ascending.
        mask: Boolean, of x's rank, broadcasting to x; True where an element counts.
        axis_name: The named axes whose devices share one batch.
        axis_index_groups: Groups of indices on `axis_name`, each a batch of its own.

    Returns:
        `Moments`; differentiable with respect to x in both modes.

    Raises:
        ValueError: An axis is out of range or doubled, `mask` does not broadcast, or
            `axis_name` is not bound.
        TypeError: x or `mask` has the wrong dtype.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0], [7.0, jnp.nan]])
        >>> mask = jnp.array([[True], [True], [False]])
        >>> n, mean, var = jaxbn.batch_moments(x, mask=mask)
        >>> print(n, mean.round(), var.round())
        2.0 [ 2. 20.] [  1. 100.]
    """
    x = _checks.check_x(x)
    features = _axes.feature_axes(axis, x.ndim)
    mask = _checks.check_mask(mask, x)
    devices = check_devices(axis_name, axis_index_groups)
    return moments(x, mask, features, devices).rounded


def merge_moments(a: Moments, b: Moments) -> Moments:
    r"""The moments of two sets of elements together, from the moments of each.

    Equivalent to `batch_moments` of the concatenated data. A side that counted nothing
    leaves the other as it is; nothing on both sides gives zeros.

    $$n = n_a + n_b \qquad \mu = \frac{n_a \mu_a + n_b \mu_b}{n} \qquad
    \sigma^2 = \frac{n_a \sigma_a^2 + n_b \sigma_b^2}{n} +
    \frac{n_a n_b}{n^2} (\mu_a - \mu_b)^2$$

    Args:
        a: Moments of shape `(features,)`.
        b: Moments of the same shape and dtypes.

    Returns:
        The merged moments; their variance is biased, as in `batch_moments`.

    Raises:
        ValueError: The shapes differ.
        TypeError: `a` or `b` is something else, or their dtypes differ or do not fit.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> x = jnp.arange(10.0).reshape(5, 2)
        >>> parts = jaxbn.batch_moments(x[:2]), jaxbn.batch_moments(x[2:])
        >>> print(jaxbn.merge_moments(*parts).var.round(), x.var(0).round())
        [8. 8.] [8. 8.]

    Source: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances", 1979.
    """
    a, b = check_moments("a", a), check_moments("b", b)
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            "`a` and `b` must have moments of one shape; got means of shape "
            f"{a.mean.shape} and {b.mean.shape}"
        )
    if a.mean.dtype != b.mean.dtype:
        raise TypeError(
            "`a` and `b` must have moments of one dtype; got "
            f"{a.mean.dtype} and {b.mean.dtype}"
        )
    rows = jnp.stack([to_rows(a), to_rows(b)], axis=1)
    num_elements, mean, var = from_rows(rows)
    return _merge(SplitMoments(num_elements, mean, jnp.zeros_like(mean), var)).rounded


def moments(
    x: jax.Array,
    mask: jax.Array | None,
    features: Features,
    devices: Devices,
    guess: jax.Array | None = None,
) -> SplitMoments:
    """Return the moments of arguments that were checked, with the mean in two parts."""
    batch = _local_moments(x, mask, features, guess)
    if devices.names is not None:
        rows = devices.gather(to_rows(batch), devices.axis_index())
        batch = _merge(SplitMoments(*from_rows(rows.swapaxes(0, 1))))
    # So that a remat policy can keep these vectors, and recompute all that is large.
    return SplitMoments(
        batch.num_elements,
        checkpoint_name(batch.head, "batch_norm_mean"),
        checkpoint_name(batch.tail, "batch_norm_mean"),
        checkpoint_name(batch.var, "batch_norm_var"),
    )


def _local_moments(
    x: jax.Array, mask: jax.Array | None, features: Features, guess: jax.Array | None
) -> SplitMoments:
    num_elements = _count(x, mask, features)
    args = (num_elements,) if mask is None else (num_elements, mask)
    way = _partial(_about, features=features)
    guessed = guess is not None and may_branch(x, guess)
    sums = guess_on_tpu(way, x, guess, *args) if guessed else way(x, None, *args)
    return SplitMoments(num_elements, *_split(*sums[:2]), sums[2])


_partial = functools.cache(functools.partial)  # one function, or JAX traces it anew


def _about(x, shift, num_elements, mask=None, *, features):
    """Return shift, offset and var; the shift is that of a part of x if it is None."""
    reduced = _axes.reduced_axes(features, x.ndim)
    divisor = jnp.maximum(num_elements, 1)
    shift = _shift(x, mask, features, divisor) if shift is None else shift
    shift = shift.astype(_axes.accumulation_dtype(x.dtype))
    x, shift = barrier_on_cpu(x, shift)
    total = centered(x, shift, mask, features).sum(reduced)
    # 0 * shift makes the divisor no constant: XLA may not drop it, as 0 * NaN is NaN.
    offset = total / (divisor + 0 * shift.real).astype(total.dtype)
    x, shift, divisor = barrier_on_cpu(x, shift, divisor)
    squares = abs_squared(centered(x, shift, mask, features)).sum(reduced)
    square = squares / divisor
    # An infinite square stays one; inf - inf would be NaN.
    largest = float(jnp.finfo(square.dtype).max)
    var = square - jnp.minimum(abs_squared(offset), largest)
    # Not below 0. (jnp.maximum would halve the derivatives at 0, of a constant x.)
    var -= lax.stop_gradient(jnp.minimum(var, 0))
    return shift, offset, var


def _shift(
    x: jax.Array, mask: jax.Array | None, features: Features, divisor: jax.Array
) -> jax.Array:
    """Return the mean of a part of x, or of all where no part is known: a constant."""
    dtype = _axes.accumulation_dtype(x.dtype)
    reduced = _axes.reduced_axes(features, x.ndim)
    if x.dtype != dtype:  # or XLA:CPU writes out the float32 copy of x
        (x,) = barrier_on_cpu(x)
    if mask is None and all(isinstance(n, int) for n in x.shape):
        x, reduced = _part(x, reduced)
        share = jnp.full((), 1 / max(math.prod(x.shape[i] for i in reduced), 1))
    else:
        share = _axes.expand(1 / divisor, features, x.ndim)
    x = zero_masked(x.astype(dtype), mask)
    return lax.stop_gradient((x * share.astype(dtype)).sum(reduced))


def _part(x: jax.Array, reduced: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """Return a sixteenth of x or more, and its axes to reduce; all of x if it is small.

    The part lies on every device that x lies on, so that nothing is sent. It is the
    middle of an axis behind the first one, which is the one that is mostly sharded.
    Where there is none, the rows are cut into k blocks and the part is the middle of
    each: with k the largest power of two that divides the rows, each block lies on one
    device.
    """
    for axis in reduced:
        if axis > 0 and x.shape[axis] >= 4 and num_shards(x, axis) == 1:
            return _middle(x, axis), reduced
    rows = x.shape[0]
    if 0 not in reduced or rows < 16:
        return x, reduced
    blocks = rows & -rows
    while rows // blocks < 16:
        blocks //= 2
    if blocks % num_shards(x, 0):
        return x, reduced
    x = x.reshape(blocks, rows // blocks, *x.shape[1:])
    return _middle(x, 1), (0, *(i + 1 for i in reduced))


def _middle(x: jax.Array, axis: int) -> jax.Array:
    size = x.shape[axis]
    taken = -(-size // 16)
    start = (size - taken) // 2
    return lax.slice_in_dim(x, start, start + taken, axis=axis)


def _split(shift: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return head and tail of shift + offset: the sum, a constant, and its error."""
    head = lax.stop_gradient(shift + offset)
    return head, (shift - head) + offset


def _count(x: jax.Array, mask: jax.Array | None, features: Features) -> jax.Array:
    """Return the counted elements per feature, a scalar if features share the mask."""
    reduced = _axes.reduced_axes(features, x.ndim)
    dtype = _axes.statistics_dtype(x.dtype)
    if mask is None:
        return jnp.full((), math.prod(x.shape[i] for i in reduced), dtype)
    repeated = [x.shape[i] for i in reduced if mask.shape[i] != x.shape[i]]
    # Not in float32, in which a sum of ones stops growing at 2**24.
    count = mask.astype(jnp.uint32).sum(reduced, dtype=jnp.uint32)
    count = count.astype(dtype) * math.prod(repeated)
    if all(n == 1 for n in count.shape):
        return count.reshape(())
    return jnp.broadcast_to(count, [x.shape[i] for i in features])


def check_moments(name: str, moments: Moments) -> Moments:
    """Return `moments` with arrays that fit each other."""
    _checks.check_instance(name, moments, Moments, "a jaxbn.Moments")
    num_elements = _checks.as_array(f"{name}.num_elements", moments.num_elements)
    mean = _checks.check_array(f"{name}.mean", moments.mean)
    var = _checks.check_array(f"{name}.var", moments.var)
    if var.shape != mean.shape or num_elements.shape not in ((), mean.shape):
        raise ValueError(
            f"`{name}` must have a mean and a var of one shape, and num_elements of "
            "that or a scalar; got num_elements, mean and var of shapes "
            f"{(num_elements.shape, mean.shape, var.shape)}"
        )
    if jnp.iscomplexobj(num_elements) or jnp.iscomplexobj(var):
        raise TypeError(
            f"`{name}` must have real num_elements and var; got dtypes "
            f"{num_elements.dtype} and {var.dtype}"
        )
    return Moments(num_elements, mean, var)


def to_rows(batch: Moments | SplitMoments) -> jax.Array:
    """Stack moments to one array (3 or 4, features), to travel in one collective."""
    num_elements, mean, *rest = batch
    # The product is laid out as the mean is, over a mesh and over named axes.
    count = num_elements.astype(mean.dtype) * jnp.ones_like(mean)
    rows = count, mean, *(row.astype(mean.dtype) for row in rest)
    # Not jnp.stack: under vmap of shard_map it refuses a count that is not mapped.
    return jnp.concatenate([row[None] for row in rows])


def from_rows(rows: jax.Array) -> list[jax.Array]:
    """Undo `to_rows`; the count then has one entry per feature."""
    return [rows[0].real, *(rows[i] for i in range(1, len(rows) - 1)), rows[-1].real]


def _merge(parts: SplitMoments) -> SplitMoments:
    """Merge the moments of disjoint parts, which lie on the first axis.

    With n elements in all, as in one batch:

        shift = sum n_i head_i / n, a constant        offset_i = head_i - shift + tail_i
        mean  = shift + sum n_i offset_i / n
        var   = sum n_i (var_i + |offset_i - offset|^2) / n
    """
    num_elements, head, tail, var = parts
    total = num_elements.sum(0, keepdims=True)
    weight = num_elements / jnp.maximum(total, 1)

    def mean(values: jax.Array) -> jax.Array:
        values = jnp.where(num_elements > 0, values, 0)
        return (weight.astype(values.dtype) * values).sum(0, keepdims=True)

    shift = lax.stop_gradient(mean(head))
    offsets = head - shift + tail
    offset = mean(offsets)
    var = mean(var + abs_squared(offsets - offset))
    head, tail = _split(shift[0], offset[0])
    return SplitMoments(total[0], head, tail, var[0])
