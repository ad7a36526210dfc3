"""Several devices: what they should give together, and ways to have them.

Arrays here have a leading axis of devices: x is `(8, rows, features)`, scale and bias
are `(8, features)`, one row of parameters per device. Tests jit what runs on them: on
forced devices anything eager takes minutes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assert_close
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn

NUM, ROWS, FEATURES = 8, 6, 3
ALL = [list(range(NUM))]
GROUPS = [[0, 3, 5, 6], [1, 2, 4, 7]]
EPSILON, MOMENTUM = 1e-3, 0.75  # every constant of the rule away from its default

batch_norm = functools.partial(
    jaxbn.batch_norm, train=True, epsilon=EPSILON, momentum=MOMENTUM
)


def mesh(**axes):
    kind = axes.pop("kind", AxisType.Auto)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (kind,) * len(axes))


def draw(lead=(NUM,), lead_params=None, seed=0):
    """Float32-exact (x, scale, bias, mask, dy, c); the masks' counts differ.

    c are the cotangents of the state's mean and var: a loss must be able to use it.
    """
    rng = np.random.default_rng(seed)
    lead_params = lead if lead_params is None else lead_params

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    # Every device has a mean of its own: a forgotten collective cannot go unseen.
    x = normal(*lead, ROWS, FEATURES) * 2 + 3 * normal(*lead, 1, FEATURES)
    scale = rng.uniform(0.5, 2, (*lead_params, FEATURES)).astype(np.float32)
    bias = normal(*lead_params, FEATURES)
    mask = rng.random(x.shape) < rng.uniform(0, 1, (*lead, 1, 1))
    mask[..., :3, :] = True  # with two elements dx is 0, and only rounding is seen
    return x, scale, bias, mask, normal(NUM, ROWS, FEATURES) + 0.5, normal(2, FEATURES)


def old_state():
    return jaxbn.State(
        jnp.array([1.0, -2.0, 3.0]), jnp.array([0.5, 1.5, 2.5]), jnp.array(4, jnp.int32)
    )


def states_after(batches):
    """`old_state` after training on batches, one by one, in float64."""
    mean, var, num_updates = map(np.float64, old_state())
    for rows in batches:
        _, new_mean, new_var = oracle.moments(rows)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * new_mean
        var = MOMENTUM * var + (1 - MOMENTUM) * new_var
    return mean, var, num_updates + len(batches)


def everywhere(*arrays):
    """One copy of each for each device."""
    return [np.broadcast_to(a, (NUM, *np.shape(a)[-1:])) for a in arrays]


def expected(x, scale, bias, mask, dy, batches=ALL):
    """(y, mean, var, dx, dscale, dbias), all with the devices in front.

    `batches` lists the devices that share one. With a scale for every row the oracle
    cannot be asked at once, but dx depends on it through `scale * dy` alone.
    """
    x = np.asarray(x, np.float64)
    mask = np.broadcast_to(True if mask is None else mask, x.shape)
    g, (scale, bias) = np.where(mask, dy, 0), np.stack([scale, bias])[..., None, :]
    y, dx, x_hat = np.zeros((3, *x.shape))
    mean, var = np.tile(np.stack(old_state()[:2])[:, None], (1, len(x), 1))
    for batch in batches:
        members = {"mask": mask[batch].reshape(-1, FEATURES)}
        rows = x[batch].reshape(-1, FEATURES)
        shape = x[batch].shape
        x_hat[batch] = oracle.forward(rows, epsilon=EPSILON, **members).reshape(shape)
        dy_hat = (g * scale)[batch].reshape(-1, FEATURES)
        dx[batch] = oracle.backward(dy_hat, rows, epsilon=EPSILON, **members)[
            0
        ].reshape(shape)
        count, *new = oracle.moments(rows, **members)
        for old, value in zip((mean, var), new, strict=True):
            moved = MOMENTUM * old[batch] + (1 - MOMENTUM) * value
            old[batch] = np.where(count > 0, moved, old[batch])
    y = np.where(mask, x_hat * scale + bias, 0)
    return y, mean, var, dx, (g * x_hat).sum(1), g.sum(1)


def local_loss(x, params, state, mask, dy, c, **static):
    """A loss of y and of the new state (a constant to it), and both of them."""
    y, new = batch_norm(x, params, state, mask=mask, **static)
    loss = (y * dy).sum() + (c[0] * new.mean).sum() + (c[1] * new.var).sum()
    return loss, (y, new.mean, new.var)


def gradients_of_all(f, argnums=(0, 1)):
    """The gradients of the sum of all losses, where f gives (losses, aux); and aux."""

    def total(*args):
        losses, aux = f(*args)
        return losses.sum(), aux

    return jax.grad(total, argnums, has_aux=True)


def over_devices(kind, f, in_axes):
    """F over the leading axes of its arguments (None: replicated), named "d"."""
    if kind == "pmap":
        return jax.pmap(f, axis_name="d", in_axes=in_axes)
    if kind == "vmap":
        return jax.vmap(f, in_axes, axis_name="d")

    def body(*args):
        args = [
            a if axis is None else jax.tree.map(lambda leaf: leaf[0], a)
            for a, axis in zip(args, in_axes, strict=True)
        ]
        return jax.tree.map(lambda leaf: leaf[None], f(*args))

    return jax.shard_map(
        body,
        mesh=mesh(d=NUM),
        in_specs=tuple(P() if axis is None else P("d") for axis in in_axes),
        out_specs=P("d"),
        check_vma=kind == "shard_map, check_vma",
    )


check_vma_or_not = pytest.mark.parametrize(
    "check_vma", [True, False], ids=["check_vma", "no check_vma"]
)
KINDS = ["shard_map, check_vma", "shard_map", "vmap", "pmap"]


NAMES = "y mean var dx dscale dbias"


def assert_all_close(actual, desired, where=""):
    """Both in the order of `expected`."""
    for name, a, d in zip(NAMES.split(), actual, desired, strict=True):
        try:
            assert_close(a, d, jnp.float32, NUM * ROWS)
        except AssertionError as error:
            raise AssertionError(f"{name} {where}: {error}") from None
