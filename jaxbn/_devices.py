"""Named axes: what the devices that share one batch say to each other.

Every difference between JAX versions, and between `shard_map`, `pmap` and
`vmap(axis_name=...)`, is met in this file.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxbn import _checks

AxisName = Hashable | tuple[Hashable, ...] | None
Groups = tuple[tuple[int, ...], ...] | None


def check_axis_name(axis_name: Any, groups: Any) -> tuple[AxisName, Groups]:
    """Both as hashable values; names that are unbound or doubled are refused."""
    if axis_name is None:
        if groups is not None:
            raise ValueError("`axis_index_groups` needs `axis_name`; got None")
        return None, None
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    if not all(isinstance(name, Hashable) for name in names):
        raise TypeError(f"`axis_name` must be a name or several; got {axis_name!r}")
    if len(set(names)) < len(names):
        # JAX 0.11 and 0.12 abort the process on a doubled name.
        raise ValueError(f"`axis_name` must name each axis once; got {axis_name!r}")
    for name in names:
        _check_bound(name)
    return names, _check_groups(groups, lax.axis_size(names))


def _check_bound(name: Hashable) -> None:
    try:
        lax.axis_size(name)
    except (NameError, ValueError):  # the second one of an int
        bound = tuple(jax.sharding.get_abstract_mesh().manual_axes)
        raise ValueError(
            f"`axis_name` {name!r} is not bound here; it must be an axis of the "
            f"surrounding shard_map, vmap or pmap (shard_map binds {bound})"
        ) from None


def _check_groups(groups: Sequence[Sequence[int]] | None, size: int) -> Groups:
    if groups is None:
        return None
    try:
        held = tuple(tuple(group) for group in groups)
    except TypeError:  # something else than groups
        held = ()
    members = [i for group in held for i in group]
    ints = all(map(_checks.is_int, members))
    one_size = len({len(group) for group in held}) == 1
    if not (ints and one_size and sorted(members) == list(range(size))):
        raise ValueError(
            f"`axis_index_groups` must be groups of one size that hold each of the "
            f"{size} indices of `axis_name` once; got {groups!r}"
        )
    return tuple(tuple(map(int, group)) for group in held)


def group_size(axis_name: AxisName, groups: Groups) -> int:
    """How many devices share one batch."""
    if axis_name is None:
        return 1
    return len(groups[0]) if groups else lax.axis_size(axis_name)


def position(axis_name: AxisName) -> jax.Array | None:
    """The index of this device on the named axes.

    Taken in the forward pass and handed to the backward one, where JAX binds no axis
    (under grad of vmap).
    """
    return None if axis_name is None else lax.axis_index(axis_name)


def gather(
    value: jax.Array, axis_name: AxisName, groups: Groups, index: jax.Array | None
) -> jax.Array:
    """The values of the devices that share this one's batch, stacked in front.

    A sum of one-hot tables: one all-reduce, a result that is typed as equal on all
    devices (that of `lax.all_gather` is not), and groups under every transformation
    (natively they fail under vmap and under shard_map's check_vma).
    """
    size = sum(map(len, groups)) if groups else lax.axis_size(axis_name)
    rows = jnp.arange(size, dtype=jnp.int32).reshape((-1,) + (1,) * value.ndim)
    table = lax.psum(jnp.where(rows == index, value[None], 0), axis_name)
    if groups is None:
        return table
    group_of = {i: k for k, group in enumerate(groups) for i in group}
    members = [groups[group_of[i]] for i in range(size)]
    return table[jnp.array(members, jnp.int32)[index]]


def group_sum(
    value: jax.Array, axis_name: AxisName, groups: Groups, index: jax.Array | None
) -> jax.Array:
    """The sum of `value` over the devices that share one batch."""
    if axis_name is None:
        return value
    if groups is None:
        return lax.psum(value, axis_name)
    return gather(value, axis_name, groups, index).sum(0)


def num_shards(x: jax.Array, axis: int) -> int:
    """How many devices share an axis of x, on an explicit mesh; elsewhere 1."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def varying_beyond(a: jax.Array, b: jax.Array) -> tuple[Hashable, ...]:
    """The axes of a shard_map over which b varies and a does not."""
    return tuple(sorted(_varying(b) - _varying(a), key=str))


def all_over(names: tuple[Hashable, ...], flags: jax.Array) -> jax.Array:
    """Where `flags` are True on all devices of the named axes."""
    if not names:
        return flags
    return lax.pmin(flags.astype(jnp.int32), names) > 0


def split_rows(x: jax.Array, blocks: int) -> jax.Array:
    """Return x with its rows as two axes, (blocks, rows of one block)."""
    if blocks % num_shards(x, 0):  # JAX cuts no block on an explicit mesh
        x = _reshard(x, x, PartitionSpec(None, *jax.typeof(x).sharding.spec[1:]))
    return x.reshape(blocks, -1, *x.shape[1:])


def replicate_rows(table: jax.Array) -> jax.Array:
    """`table` with all its rows on each device, sent in one collective."""
    spec = jax.typeof(table).sharding.spec
    table = _reshard(table, table, PartitionSpec(None, *spec[1:]))
    # Under plain jit, XLA makes a collective of a gather, the one that all consumers
    # need. The barrier hides that it changes nothing.
    return table[lax.optimization_barrier(jnp.arange(table.shape[0]))]


def lay_out_as_features(param: Any, x: jax.Array, features: tuple[int, ...]) -> Any:
    """`param` (None stays None) sharded as the features of x, on an explicit mesh.

    There a sharding is part of a type, and those of parameter and gradient must agree;
    JAX transposes this reshard.
    """
    if param is None:
        return None
    spec = jax.typeof(x).sharding.spec
    return _reshard(param, x, PartitionSpec(*(spec[i] for i in features)))


def lay_out_as(array: jax.Array, like: jax.Array) -> jax.Array:
    """`array` with the sharding of `like`, on an explicit mesh."""
    return _reshard(array, array, jax.typeof(like).sharding.spec)


def _reshard(array: jax.Array, on: jax.Array, spec: PartitionSpec) -> jax.Array:
    mesh = jax.typeof(on).sharding.mesh
    if not mesh.explicit_axes or jax.typeof(array).sharding.spec == spec:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, spec))


def vary_together(axis_name: AxisName, *arrays: Any) -> tuple[Any, ...]:
    """Casts `arrays` (None stays None) to one set of device-varying axes.

    Under shard_map's check_vma a derivative rule must return cotangents that vary as
    its arguments do. When all arguments vary over the same axes, local cotangents are
    right, and JAX transposes these casts into the sums over devices.
    """
    names = axis_name if isinstance(axis_name, tuple) else ()
    # An axis of vmap, of pmap or without check_vma has no such type.
    varying = {name for name in names if name in _varying(lax.axis_index(name))}
    varying = varying.union(*(_varying(a) for a in arrays if a is not None))

    def cast(array):
        missing = varying - _varying(array)
        if not missing:
            return array
        return lax.pcast(array, tuple(sorted(missing, key=str)), to="varying")

    return tuple(None if a is None else cast(a) for a in arrays)


def _varying(array: Any) -> frozenset[Any]:
    return jax.typeof(array).manual_axis_type.varying
