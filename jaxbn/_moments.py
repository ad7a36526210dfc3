"""Moments of a batch: masks, several devices and exact merging, here and nowhere else.

Plain JAX, differentiable, and stable: the variance is the mean of |x - mean|^2, taken
in a second pass over x, never E[x^2] - E[x]^2.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxbn import _checks, _devices, _shapes
from jaxbn._centered import abs_squared, sum_of_squares, zero_masked
from jaxbn._rounding import corrected


class Moments(NamedTuple):
    """How many elements were counted, their mean and their biased variance.

    Attributes:
        num_elements: Per feature, a scalar or `(features,)`, real.
        mean: `(features,)`, at least float32; complex where x is.
        var: `(features,)`, the mean of |x - mean|^2, real.
    """

    num_elements: jax.Array
    mean: jax.Array
    var: jax.Array


def batch_moments(
    x: Any,
    *,
    axis: _shapes.Axis = -1,
    mask: Any = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
) -> Moments:
    """Count, mean and biased variance per feature, over all other axes.

    Equivalent to `jnp.mean` and `jnp.var` (with `where=mask`), except that float16 and
    bfloat16 are reduced in float32, that nothing to count gives zeros instead of NaN,
    and that values under the mask never matter, NaN included.

    With `axis_name` the devices' counts, means and variances travel in one all-reduce,
    as the rows of a table, and are merged exactly (Chan, Golub & LeVeque 1979) with
    weights equal to the counts. A sum of squares would need as few collectives but
    cancels (at mean/std = 1e4 the variance is wrong by a factor of ten); a second
    all-reduce around the common mean is as exact as the table, which was chosen for
    having one latency instead of two. A table has (devices, 3, features) entries.

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
        >>> print(n, mean, var)
        2.0 [ 2. 20.] [  1. 100.]
    """
    x = _shapes.check_x(x)
    features = _shapes.feature_axes(axis, x.ndim)
    mask = _shapes.check_mask(mask, x)
    names, groups = _devices.check_axis_name(axis_name, axis_index_groups)
    batch, _ = moments(x, mask, features, names, groups)
    return batch


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
        >>> print(jaxbn.merge_moments(*parts).var, jaxbn.batch_moments(x).var)
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
    merged, _ = _merge(jnp.stack([to_rows(a), to_rows(b)]))
    return merged


def moments(
    x: jax.Array,
    mask: jax.Array | None,
    features: tuple[int, ...],
    axis_name: _devices.AxisName,
    groups: _devices.Groups,
) -> tuple[Moments, jax.Array]:
    """`batch_moments` of arguments that were checked, and the low part of the mean."""
    batch, mean_low = _local_moments(x, mask, features)
    if axis_name is not None:
        index = _devices.position(axis_name)
        batch, mean_low = _merge(
            _devices.gather(to_rows(batch), axis_name, groups, index)
        )
    # So that a remat policy can keep these vectors, and recompute all that is large.
    batch = Moments(
        batch.num_elements,
        checkpoint_name(batch.mean, "batch_norm_mean"),
        checkpoint_name(batch.var, "batch_norm_var"),
    )
    return batch, checkpoint_name(mean_low, "batch_norm_mean")


def _local_moments(
    x: jax.Array, mask: jax.Array | None, features: tuple[int, ...]
) -> tuple[Moments, jax.Array]:
    reduced = _shapes.reduction_axes(features, x.ndim)
    dtype = _shapes.accumulation_dtype(x.dtype)
    num_elements = _count(x, mask, features)
    divisor = jnp.maximum(num_elements, 1)
    total = zero_masked(x.astype(dtype), mask).sum(reduced)

    mean = total / divisor.astype(dtype)
    var = sum_of_squares(x, mean, mask, features) / divisor
    mean, var, mean_low = corrected(x, mean, var, divisor, mask, features)
    return Moments(num_elements, mean, var), mean_low


def _count(
    x: jax.Array, mask: jax.Array | None, features: tuple[int, ...]
) -> jax.Array:
    """Counted elements per feature, a scalar where all features share the mask."""
    reduced = _shapes.reduction_axes(features, x.ndim)
    dtype = _shapes.real_dtype(_shapes.accumulation_dtype(x.dtype))
    if mask is None:
        return jnp.full((), math.prod(x.shape[i] for i in reduced), dtype)
    repeated = [x.shape[i] for i in reduced if mask.shape[i] != x.shape[i]]
    # In int32: a float32 sum of ones stops growing at 2**24.
    count = mask.sum(reduced, dtype=jnp.int32).astype(dtype) * math.prod(repeated)
    if all(n == 1 for n in count.shape):
        return count.reshape(())
    return jnp.broadcast_to(count, [x.shape[i] for i in features])


def check_moments(name: str, moments: Any) -> Moments:
    """`moments` with arrays that fit each other."""
    _checks.check_instance(name, moments, Moments, "a jaxbn.Moments")
    num_elements = _shapes.as_array(f"{name}.num_elements", moments.num_elements)
    mean = _shapes.check_array(f"{name}.mean", moments.mean)
    var = _shapes.check_array(f"{name}.var", moments.var)
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


def to_rows(m: Moments) -> jax.Array:
    """Moments as one array (3, features), to travel in one collective."""
    dtype = m.mean.dtype
    rows = jnp.broadcast_to(m.num_elements, m.mean.shape), m.mean, m.var
    return jnp.stack([row.astype(dtype) for row in rows])


def from_rows(rows: jax.Array) -> Moments:
    """The inverse of `to_rows`; the count then stands there for each feature."""
    return Moments(rows[0].real, rows[1], rows[2].real)


def _merge(rows: jax.Array) -> tuple[Moments, jax.Array]:
    """Moments of the union, from `to_rows` of disjoint parts stacked in front.

    And the low part of the mean, as if the means of the parts were exact.
    """
    num_elements, mean, var = jax.vmap(from_rows)(rows)
    total = num_elements.sum(0, keepdims=True)
    weight = num_elements / jnp.maximum(total, 1)
    mean = jnp.where(num_elements > 0, mean, 0)
    rough = _weighted_sum(weight, mean)
    # The rounding error of a weighted mean is of the size of the mean; that of this
    # correction, of the size of the differences.
    offset = _weighted_sum(weight, mean - rough)
    merged = rough + offset
    mean_low = offset - (merged - rough)
    between = abs_squared(mean - merged - mean_low)
    var = jnp.where(num_elements > 0, var + between, 0)
    return Moments(total[0], merged[0], _weighted_sum(weight, var)[0]), mean_low[0]


def _weighted_sum(weight: jax.Array, values: jax.Array) -> jax.Array:
    return (weight.astype(values.dtype) * values).sum(0, keepdims=True)
