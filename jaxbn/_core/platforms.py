"""What differs between CPU, GPU and TPU: how passes are kept apart, and sums are taken.

Here are all primitives and their lowerings: fusion barriers on the CPU, one sum for two
on a GPU, a guess on a TPU, an error for what may be traced but not run, and a mark on
a value.

They are primitives because `lax.platform_dependent` and `lax.cond` lose types: in a
vmap over a shard_map with `spmd_axis_name`, their results no longer vary over that axis
(JAX 0.10 to 0.12), and JAX then sums cotangents that it must not.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr as Jaxpr
from jax.extend.core import JaxprEqn as JaxprEqn
from jax.extend.core import Primitive
from jax.extend.core import Var as Var
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir


def barrier_on_cpu(*arrays: jax.Array) -> list[jax.Array]:
    """Return `arrays` behind a fusion barrier on the CPU, and unchanged elsewhere.

    XLA:CPU takes what two passes over a big array have in common, x - mean or a float32
    copy of a bfloat16 x, for one array and writes it out; a barrier hides that both see
    the same x. XLA merges barriers with equal operands, so each one needs an operand
    of its own. On a GPU or TPU such passes are fused anyway, and a barrier would make
    XLA write out whatever stands in front of it, as the derivative of a relu does.
    """
    return _barrier.bind(*arrays)


_barrier = Primitive("barrier_on_cpu")
_barrier.multiple_results = True
_barrier.def_impl(lambda *arrays: list(arrays))
_barrier.def_abstract_eval(lambda *types: list(types))
ad.primitive_jvps[_barrier] = lambda primals, tangents: (
    barrier_on_cpu(*primals),
    tangents,
)
batching.primitive_batchers[_barrier] = lambda arrays, axes: (
    barrier_on_cpu(*arrays),
    axes,
)
mlir.register_lowering(_barrier, lambda context, *arrays: list(arrays))
mlir.register_lowering(
    _barrier,
    lambda context, *arrays: stablehlo.OptimizationBarrierOp(arrays).results,
    platform="cpu",
)


def pair_sum(
    a: jax.Array, b: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Return the sums of a and b, which have one shape and dtype, over `axes`.

    On a GPU they are the real and the imaginary part of one complex sum, with the same
    digits. XLA:GPU decides for each sum whether to recompute what stands in front of
    it, the derivative of a relu for instance, or to write that out, which takes a pass
    more. One sum is decided once: a training step of ResNet-50 in bfloat16 moves 7 %
    fewer bytes. XLA:CPU has fast kernels for plain sums alone. XLA:TPU needs no such
    help, and would partition a complex sum into all-gathers.
    """
    if jnp.iscomplexobj(a):
        return _sum_each(a, b, axes=axes)
    return tuple(_pair_sum.bind(a, b, axes=axes))


def _sum_each(a, b, *, axes):
    return a.sum(axes), b.sum(axes)


def _sum_as_complex(a, b, *, axes):
    sums = lax.complex(a, b).sum(axes)
    return sums.real, sums.imag


def _pair_sum_types(a, b, *, axes):
    total = functools.partial(lax.reduce_sum_p.abstract_eval, axes=axes)
    return [total(a, out_sharding=None)[0], total(b, out_sharding=None)[0]]


def _pair_sum_jvp(primals, tangents, *, axes):
    a, b = map(ad.instantiate_zeros, tangents)
    return _pair_sum.bind(*primals, axes=axes), _sum_each(a, b, axes=axes)


def _pair_sum_batch(arrays, dims, *, axes):
    mapped_axes = tuple(axis + 1 for axis in axes)
    if None in dims:  # not to be broadcast: nobody knows on which mesh
        return [
            x.sum(axes) if at is None else jnp.moveaxis(x, at, 0).sum(mapped_axes)
            for x, at in zip(arrays, dims, strict=True)
        ], [None if at is None else 0 for at in dims]
    a, b = (jnp.moveaxis(x, at, 0) for x, at in zip(arrays, dims, strict=True))
    return _pair_sum.bind(a, b, axes=mapped_axes), (0, 0)


_pair_sum = Primitive("pair_sum")
_pair_sum.multiple_results = True
_pair_sum.def_impl(_sum_each)
_pair_sum.def_abstract_eval(_pair_sum_types)
ad.primitive_jvps[_pair_sum] = _pair_sum_jvp
batching.primitive_batchers[_pair_sum] = _pair_sum_batch
mlir.register_lowering(_pair_sum, mlir.lower_fun(_sum_each))
mlir.register_lowering(_pair_sum, mlir.lower_fun(_sum_as_complex), platform="gpu")


def guess_on_tpu(
    way: Callable[..., Sequence[jax.Array]], *args: jax.Array | None
) -> list[jax.Array]:
    """Return shift, offset and var of x by way(x, None, *others): `args` has a guess.

    On a TPU take way(x, guess, *others) if each |offset| there is at most 1.5 std: XLA
    takes sums about what is known before x in the epilogue of the convolution that
    makes x. All rows of a vmap share one branch, where `lax.cond` would run both.
    """
    return _guess.bind(*args, way=way)


def _no_guess(x, _, *others, way):
    return jax.jit(way, inline=True)(x, None, *others)  # JAX keeps traces of a jit


def _guess_first(x, guess, *others, way):
    guess = jnp.where(jnp.isfinite(guess), guess, 0)
    shift, offset, var = way(x, guess, *others)
    # 0 * offset has the type of the other shift: where it varies, and how it lies.
    near = shift + 0 * offset, offset, var
    # Not by squares, which underflow and overflow.
    is_near = (abs(offset) <= 1.5 * lax.sqrt(var)) & (var < jnp.inf)
    return lax.cond(is_near.all(), lambda: near, lambda: way(x, None, *others))


def _guess_jvp(primals, tangents, way):
    x, _, *others = primals
    out = _guess.bind(*primals, way=way)
    dx = ad.instantiate_zeros(tangents[0])
    return out, jax.jvp(lambda x: way(x, out[0], *others), (x,), (dx,))[1]


def _guess_batch(args, dims, way):
    x, guess, *others = args
    at, guess_at, *dims = dims
    if at is None and set(dims) == {None}:  # many guesses for one x
        return way(x, None, *others), (None, None, None)
    way = jax.vmap(way, (at, 0, *dims))
    if at is None or jax.typeof(x).sharding.spec[at]:  # one x, or rows on many devices
        return way(x, None, *others), (0, 0, 0)
    guess = batching.bdim_at_front(guess, guess_at, x.shape[at])
    return _guess.bind(x, guess, *others, way=way), (0, 0, 0)


_guess = Primitive("guess_on_tpu")
_guess.multiple_results = True
_guess.def_impl(lambda x, _, *others, way: way(x, None, *others))
_guess.def_abstract_eval(
    lambda x, _, *others, way: jax.make_jaxpr(way)(x, None, *others).out_avals
)
ad.primitive_jvps[_guess] = _guess_jvp
batching.primitive_batchers[_guess] = _guess_batch
mlir.register_lowering(_guess, mlir.lower_fun(_no_guess))
mlir.register_lowering(_guess, mlir.lower_fun(_guess_first), platform="tpu")


def traced_only(y: jax.Array, error: Exception) -> jax.Array:
    """Return y for its shape alone; to compile or run what computes it raises `error`.

    JAX does not tell a traced function whether it is traced for its shapes
    (`jax.eval_shape`) or to be run. A primitive without a lowering tells them apart.
    """
    return _traced_only.bind(y, error=error)


def _fail(*_: object, error: Exception) -> NoReturn:
    raise error


_traced_only = Primitive("traced_only")
_traced_only.def_impl(_fail)
_traced_only.def_abstract_eval(lambda y, *, error: y)
# The cotangent goes through it too: where only a gradient is asked for, y is not there.
ad.deflinear2(_traced_only, lambda dy, _, *, error: [traced_only(dy, error)])
batching.primitive_batchers[_traced_only] = lambda arrays, axes, *, error: (
    traced_only(arrays[0], error),
    axes[0],
)
mlir.register_lowering(_traced_only, _fail)


def mark(x: jax.Array, array: jax.Array, note: Hashable) -> jax.Array:
    """Return x, by an equation of primitive `MARK` in a jaxpr that carries `note`.

    `array` is an operand as well, so that a walk over the jaxpr sees which one it is.
    """
    return MARK.bind(x, array, note=note)


MARK = Primitive("mark")
MARK.def_impl(lambda x, array, *, note: x)
MARK.def_abstract_eval(lambda x, array, *, note: x)
ad.primitive_jvps[MARK] = lambda primals, tangents, *, note: (
    mark(primals[0], primals[1], note),
    tangents[0],
)
batching.primitive_batchers[MARK] = lambda arrays, axes, *, note: (
    mark(arrays[0], arrays[1], note),
    axes[0],
)
mlir.register_lowering(MARK, lambda context, x, array, *, note: [x])
