"""The rounding of a mean, and what it left out: mean + low has twice the bits.

A float32 mean is wrong by up to a spacing of its own size, 1e-7 |mean|. Over std that
is what every y is off by, and squared what the variance is.

On a GPU or TPU the mean of x - mean, which is small and hardly rounded, tells how much
it is (the corrected two-pass algorithm: Chan, Golub & LeVeque 1983; two numbers for
one: Dekker 1971). Its sum shares the pass that takes the variance.

On the CPU that costs passes of its own, made only where some feature's mean is far from
0 for its standard deviation. Elsewhere the sum of x itself is good enough, if it is one
of blocks, and float64 between them, which costs next to nothing: `in_two`.

Primitives, as in `_barriers`: under vmap and shard_map the types of a plain `lax.cond`
go wrong (JAX 0.10 to 0.12). To their derivatives, a correction is a constant.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxbn import _centered, _shapes

# In standard deviations: up to here the mean is off by 1e-6 of std at most.
FAR = 8.0

# Sums side by side; XLA:CPU is slow where they are wider than that together.
BLOCKS, WIDEST = 16, 8192


def in_two(
    x: jax.Array,
    mean: jax.Array,
    divisor: jax.Array,
    mask: jax.Array | None,
    features: tuple[int, ...],
) -> list[jax.Array]:
    """The mean of x, which is `mean` but for its rounding, and its low part."""
    return _bind(_in_two, [mean], x, divisor, mask, features)


def corrected(
    x: jax.Array,
    mean: jax.Array,
    low: jax.Array,
    var: jax.Array,
    divisor: jax.Array,
    mask: jax.Array | None,
    features: tuple[int, ...],
) -> list[jax.Array]:
    """Both parts of the mean, and the variance, less what rounding still left."""
    return _bind(_corrected, [mean, low, var], x, divisor, mask, features)


def _bind(primitive, vectors, x, divisor, mask, features):
    divisor = jnp.broadcast_to(divisor, vectors[0].shape)
    operands = [*vectors, x, divisor] + ([] if mask is None else [mask])
    return primitive.bind(*operands, features=features)


def _as_it_is(mean, *_, features):
    del features
    return [mean, jnp.zeros_like(mean)]


def _by_blocks(mean, x, divisor, *mask, features):
    """Of float32; half precision has no digits that would gain."""
    if x.dtype != jnp.float32 or mean.ndim == x.ndim or not _can_be_split(x):
        return _as_it_is(mean, features=features)
    x = _centered.zero_masked(x, (*mask, None)[0])
    reduced = _shapes.reduction_axes(features, x.ndim)
    # Beside the features if they are last, and away from them if not.
    axis = reduced[-1 if x.ndim - 1 in features else 0]
    size, most = x.shape[axis], max(1, WIDEST // mean.size)
    power_of_2 = 1 << (min(BLOCKS, most).bit_length() - 1)
    blocks = size if size <= most else math.gcd(size, power_of_2)
    x = x.reshape(*x.shape[:axis], -1, blocks, *x.shape[axis + 1 :])
    parts = x.sum([i + (i > axis) for i in reduced])
    with jax.enable_x64(True):
        total = parts.astype(jnp.float64).sum(sum(i < axis for i in features))
        exact = total / divisor.astype(jnp.float64)
        mean = exact.astype(jnp.float32)
        return [mean, (exact - mean.astype(jnp.float64)).astype(jnp.float32)]


def _lower_by_blocks(context, *operands, features):
    """Unless the program is one for several devices, which XLA may lay x over.

    An axis that is split in two may lie over them in neither; x would be gathered.
    """
    several = getattr(context.module_context.axis_context, "num_devices", 1) > 1
    function = _as_it_is if several else _by_blocks
    return mlir.lower_fun(function)(context, *operands, features=features)


def _can_be_split(x):
    """Not if its shape is symbolic, or its type says that it is sharded."""
    known = all(isinstance(size, int) for size in x.shape)
    return known and x.size > 0 and not any(jax.typeof(x).sharding.spec)


def _correct(mean, low, var, x, divisor, *mask, features):
    del low, var  # XLA:CPU may have taken var about a mean that it left unrounded
    masked = (*mask, None)[0]
    total = _centered.total(x, mean, masked, features)
    square = _centered.sum_of_squares(x, mean, masked, features, total) / divisor
    offset = total / divisor.astype(mean.dtype)
    better = mean + offset
    var = jnp.maximum(square - _centered.abs_squared(offset), 0)
    var = jnp.where(jnp.isfinite(square), var, square)  # inf - inf is NaN
    return [better, offset - (better - mean), var]


def _correct_if_far(*operands, features):
    """The same in a branch.

    Whose results are arrays, too: XLA:CPU would else take the division that makes a
    mean into every fusion that subtracts it, as a multiply-add that leaves it
    unrounded, and y would have another mean than the one that is returned.
    """
    mean, _, var, *_ = operands
    return lax.cond(
        jnp.any(abs(mean) > FAR * jnp.sqrt(var)),
        functools.partial(_correct, features=features),
        lambda mean, low, var, *_: [mean, low, var],
        *operands,
    )


def _correction(name, everywhere, lower_on_cpu, eager, like):
    """A primitive: `like` says which operand a result is like, None for a new one."""
    primitive = Primitive(name)
    primitive.multiple_results = True

    def types(*operands, features):
        del features
        return [operands[i or 0] for i in like]

    def derivative(primals, tangents, *, features):
        results = primitive.bind(*primals, features=features)
        return results, [
            jnp.zeros_like(result) if i is None else tangents[i]
            for i, result in zip(like, results, strict=True)
        ]

    def batched(operands, axes, *, features):
        """A mapped axis is one more feature axis, the first."""
        features = (0, *(i + 1 for i in features))
        operands = _with_axis_in_front(operands, axes)
        return primitive.bind(*operands, features=features), [0] * len(like)

    primitive.def_impl(eager)
    primitive.def_abstract_eval(types)
    ad.primitive_jvps[primitive] = derivative
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(everywhere))
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")
    return primitive


def _with_axis_in_front(arrays, axes):
    mapped = zip(arrays, axes, strict=True)
    size = next(a.shape[axis] for a, axis in mapped if axis is not None)
    return [
        jnp.broadcast_to(a, (size, *a.shape))
        if axis is None
        else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(arrays, axes, strict=True)
    ]


_in_two = _correction("mean_in_two", _as_it_is, _lower_by_blocks, _as_it_is, (0, None))
_corrected = _correction(
    "corrected_moments",
    _correct,
    mlir.lower_fun(_correct_if_far),
    _correct_if_far,
    (0, 1, 2),
)
