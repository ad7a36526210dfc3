"""One batch norm, to be compiled for chips that are described, not there."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn

FEATURES = 256
# On each chip, and too large for the 128 MiB beside the cores of a v5e: XLA would copy
# x there, and count the copy.
LOCAL = (512, 32, 32, FEATURES)
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])

batch_norm = functools.partial(jaxbn.batch_norm, train=True)


def with_relu(norm, *args):
    y, state = norm(*args)
    return jax.nn.relu(y), state


def arguments(chips, dtype, images=LOCAL[0]):
    """A mesh of the chips, and on it shapes of (x, dy, params, state)."""
    mesh = Mesh(chips, ("chips",), axis_types=(AxisType.Auto,))

    def on_mesh(spec, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    x = on_mesh(P("chips"), (images * mesh.size, *LOCAL[1:]), dtype)
    params, state = jax.tree.map(
        lambda a: on_mesh(P(), a.shape, a.dtype), jaxbn.init(FEATURES)
    )
    return mesh, (x, x, params, state)


def forward(norm, x, dy, params, state):
    del dy
    return norm(x, params, state)


def both(norm, x, dy, params, state):
    """Forward and backward, of all that a training step would use."""
    y, vjp, state = jax.vjp(lambda *a: norm(*a, state), x, params, has_aux=True)
    # In a network dy comes from y: no sum over dy can join the forward pass.
    y, dy = jax.lax.optimization_barrier((y, dy))
    return y, state, *vjp(dy)


def compiled(step, args, options=None):
    return jax.jit(step).lower(*args).compile(compiler_options=options)
