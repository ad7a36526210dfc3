"""A model that a traced function closes over: it has shapes, but cannot be updated.

`nnx.eval_shape(model, x)` needs no update of the running statistics, and a traced value
in a model that is not traced must never be written. Under `jit` the same program would
train without ever updating them, so that it is an error to compile or run it. JAX does
not say which of the two a function is traced for: hence a primitive without a lowering.
"""

from typing import Any, NoReturn

import jax
from flax.errors import TraceContextError
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def only_shape(y: jax.Array) -> jax.Array:
    """Y, for its shape: to compute it is an error."""
    return _only_shape.bind(y)


def _fail(*_: Any) -> NoReturn:
    raise TraceContextError(
        "Cannot update the running statistics of a BatchNorm that the traced function "
        "closes over: pass the model to it as an argument, or have nnx.merge make it "
        "there, with copy=True"
    )


_only_shape = Primitive("update_of_a_batch_norm_that_is_closed_over")
_only_shape.def_impl(_fail)
_only_shape.def_abstract_eval(lambda y: y)
# The cotangent goes through it too: where only a gradient is asked for, y is not there.
ad.deflinear2(_only_shape, lambda dy, _: [only_shape(dy)])
batching.primitive_batchers[_only_shape] = lambda arrays, axes: (
    only_shape(*arrays),
    *axes,
)
mlir.register_lowering(_only_shape, _fail)
