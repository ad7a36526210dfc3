"""Passes over a big array, kept apart on the CPU.

XLA:CPU takes what two passes have in common, x - mean or a float32 copy of a bfloat16
x, for one array and writes it out; a barrier hides that both see the same x. On a GPU
or TPU such passes are fused anyway, and a barrier would make XLA write out whatever
stands in front of it, as the derivative of a relu does.

A primitive, since `lax.platform_dependent`, a branch, loses types on the way: in a vmap
over a shard_map with `spmd_axis_name`, its results no longer vary over that axis (JAX
0.10 to 0.12), and JAX then sums cotangents that it must not.
"""

import jax
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir


def apart_on_cpu(*arrays: jax.Array) -> list[jax.Array]:
    """`arrays`; on the CPU, as if newly made once the last of them is known."""
    return _apart.bind(*arrays)


_apart = Primitive("apart_on_cpu")
_apart.multiple_results = True
_apart.def_impl(lambda *arrays: list(arrays))
_apart.def_abstract_eval(lambda *types: list(types))
ad.primitive_jvps[_apart] = lambda primals, tangents: (apart_on_cpu(*primals), tangents)
batching.primitive_batchers[_apart] = lambda arrays, axes: (apart_on_cpu(*arrays), axes)
mlir.register_lowering(_apart, lambda context, *arrays: list(arrays))
mlir.register_lowering(
    _apart,
    lambda context, *arrays: stablehlo.OptimizationBarrierOp(arrays).results,
    platform="cpu",
)
