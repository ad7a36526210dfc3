"""The rounding of a mean, and what it left out: mean + low has twice the bits.

A float32 mean is wrong by up to a spacing of its own size, 1e-7 |mean|. Over std that
is what every y is off by, and squared what the variance is. The mean of x - mean, which
is small and hardly rounded, tells how much it is (the corrected two-pass algorithm:
Chan, Golub & LeVeque 1983; two numbers for one: Dekker 1971). On a GPU or TPU its sum
shares the pass that takes the variance. On the CPU it costs passes of its own, made
only where some feature's mean is far from 0 for its standard deviation; where it is
near, sums of blocks of x do (`_blocks`).

A primitive, as in `_barriers`: under vmap and shard_map the types of a plain `lax.cond`
go wrong (JAX 0.10 to 0.12). To its derivatives, the correction is a constant.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxbn import _blocks, _centered, _devices
from jaxbn._quotient import quotient

# In standard deviations: up to here the mean is off by some 1e-6 of std at most.
FAR = 8.0


def corrected(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    divisor: jax.Array,
    mask: jax.Array | None,
    features: tuple[int, ...],
) -> list[jax.Array]:
    """Mean and variance of x less their error, and the low part of the mean."""
    divisor = jnp.broadcast_to(divisor, mean.shape)
    operands = [x, mean, var, divisor] + ([] if mask is None else [mask])
    return _corrected.bind(*operands, features=features)


def _correct(x, mean, var, divisor, *mask, features, in_one_pass=True):
    del var  # XLA:CPU may have taken it about a mean that it left unrounded
    masked = (*mask, None)[0]
    total = _centered.total(x, mean, masked, features)
    offset, rest = quotient(total, divisor)
    better = mean + offset
    low = offset - (better - mean) + rest
    # About the better mean, a constant has no squares at all.
    about, off = (mean, offset + rest) if in_one_pass else (better, low)
    square = _centered.sum_of_squares(x, about, masked, features) / divisor
    var = jnp.maximum(square - _centered.abs_squared(off), 0)
    var = jnp.where(jnp.isfinite(square), var, square)  # inf - inf is NaN
    return [better, var, low]


def _correct_if_far(x, mean, var, *rest, features, low=None):
    """The same in a branch.

    Whose results are arrays, too: XLA:CPU would else take the division that makes a
    mean into every fusion that subtracts it, as a multiply-add that leaves it
    unrounded, and y would have another mean than the one that is returned.
    """
    low = jnp.zeros_like(mean) if low is None else low
    return lax.cond(
        jnp.any(abs(mean) > FAR * jnp.sqrt(var)),
        functools.partial(_correct, features=features, in_one_pass=False),
        lambda x, mean, var, *_: [mean, var, low],
        x,
        mean,
        var,
        *rest,
    )


def _correct_by_blocks(x, mean, var, divisor, *mask, features):
    masked = (*mask, None)[0]
    mean, low = _blocks.mean_in_two(x, divisor, masked, features)
    var = _centered.sum_of_squares(x, mean, masked, features) / divisor
    return _correct_if_far(x, mean, var, divisor, *mask, features=features, low=low)


def _lower_on_cpu(context, *operands, features):
    """By blocks, unless x may lie over several devices: it would be gathered."""
    whole = _devices.lies_on_one_device(context)
    by_blocks = whole and _blocks.can_be_split(context.avals_in[0], features)
    rule = _correct_by_blocks if by_blocks else _correct_if_far
    return mlir.lower_fun(rule)(context, *operands, features=features)


def _derivative(primals, tangents, *, features):
    mean, var, low = _corrected.bind(*primals, features=features)
    _, dmean, dvar, *_ = tangents
    return [mean, var, low], [dmean, dvar, jnp.zeros_like(low)]


def _batched(operands, axes, *, features):
    """A mapped axis is one more feature axis, the first."""
    size = next(
        a.shape[axis]
        for a, axis in zip(operands, axes, strict=True)
        if axis is not None
    )
    operands = [
        jnp.broadcast_to(a, (size, *a.shape))
        if axis is None
        else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(operands, axes, strict=True)
    ]
    features = (0, *(i + 1 for i in features))
    return _corrected.bind(*operands, features=features), [0, 0, 0]


def _types(x, mean, var, *_, features):
    del x, features
    return [mean, var, mean]


_corrected = Primitive("corrected_moments")
_corrected.multiple_results = True
_corrected.def_impl(_correct_if_far)
_corrected.def_abstract_eval(_types)
ad.primitive_jvps[_corrected] = _derivative
batching.primitive_batchers[_corrected] = _batched
mlir.register_lowering(_corrected, mlir.lower_fun(_correct))
mlir.register_lowering(_corrected, _lower_on_cpu, platform="cpu")
