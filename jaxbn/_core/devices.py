"""Named axes, shardings and varying types: what devices share, and what JAX asks for.

All differences between JAX versions are met in this file, and those between
`shard_map`, `pmap` and `vmap(axis_name=...)`.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxbn._axes import Features, is_int

# What users give; `check_devices` makes `Devices` of them.
AxisName = Hashable | Sequence[Hashable] | None
AxisIndexGroups = Sequence[Sequence[int]] | None

Groups = tuple[tuple[int, ...], ...] | None


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that share one batch: those of the named axes, or of one group.

    Attributes:
        names: The named axes; None for one device, or for plain jit over shards.
        groups: Groups of indices on the named axes, each a batch of its own.
    """

    names: tuple[Hashable, ...] | None = None
    groups: Groups = None

    @property
    def number(self) -> int:
        """How many devices share one batch."""
        if self.names is None:
            return 1
        return len(self.groups[0]) if self.groups else lax.axis_size(self.names)

    def axis_index(self) -> jax.Array | None:
        """Return the index of this device on the named axes.

        The backward pass takes the index from the forward pass: under grad of vmap, no
        axis is bound there.
        """
        return None if self.names is None else lax.axis_index(self.names)

    def gather(self, value: jax.Array, index: jax.Array | None) -> jax.Array:
        """Stack the values of the devices that share this one's batch, in front.

        This is a sum of one-hot tables: one all-reduce, whose result is typed as equal
        on all devices (that of `lax.all_gather` is not), with groups under every
        transformation (natively they fail under vmap and under check_vma).
        """
        groups = self.groups
        size = sum(map(len, groups)) if groups else lax.axis_size(self.names)
        rows = jnp.arange(size, dtype=jnp.int32).reshape((-1,) + (1,) * value.ndim)
        table = lax.psum(jnp.where(rows == index, value[None], 0), self.names)
        if groups is None:
            return table
        group_of = {i: k for k, group in enumerate(groups) for i in group}
        members = [groups[group_of[i]] for i in range(size)]
        return table[jnp.array(members, jnp.int32)[index]]

    def sum(self, value: jax.Array, index: jax.Array | None) -> jax.Array:
        """Return the sum of `value` over the devices that share one batch."""
        if self.names is None:
            return value
        if self.groups is None:
            return lax.psum(value, self.names)
        return self.gather(value, index).sum(0)


# Under plain jit over shards, too: there x is one array, and nothing is named.
ONE_DEVICE = Devices()


def check_devices(axis_name: AxisName, groups: AxisIndexGroups) -> Devices:
    """Return the devices of bound, distinct names and of groups that fit them."""
    if axis_name is None:
        if groups is not None:
            raise ValueError("`axis_index_groups` needs `axis_name`; got None")
        return ONE_DEVICE
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    if not all(isinstance(name, Hashable) for name in names):
        raise TypeError(f"`axis_name` must be a name or several; got {axis_name!r}")
    if len(set(names)) < len(names):
        # JAX 0.11 and 0.12 abort the process on a doubled name.
        raise ValueError(f"`axis_name` must name each axis once; got {axis_name!r}")
    for name in names:
        _check_bound(name)
    return Devices(names, _check_groups(groups, lax.axis_size(names)))


def _check_bound(name: Hashable) -> None:
    try:
        lax.axis_size(name)
    except (NameError, ValueError):  # ValueError where the name is an int
        bound = tuple(jax.sharding.get_abstract_mesh().manual_axes)
        raise ValueError(
            f"`axis_name` {name!r} is not bound here; it must be an axis of the "
            f"surrounding shard_map, vmap or pmap (shard_map binds {bound})"
        ) from None


def _check_groups(groups: AxisIndexGroups, size: int) -> Groups:
    if groups is None:
        return None
    try:
        held = tuple(tuple(group) for group in groups)
    except TypeError:  # something else than groups
        held = ()
    members = [i for group in held for i in group]
    one_size = len({len(group) for group in held}) == 1
    if not (
        all(map(is_int, members)) and one_size and sorted(members) == [*range(size)]
    ):
        raise ValueError(
            f"`axis_index_groups` must be groups of one size that hold each of the "
            f"{size} indices of `axis_name` once; got {groups!r}"
        )
    return tuple(tuple(map(int, group)) for group in held)


def num_shards(x: jax.Array, axis: int) -> int:
    """Return how many devices share an axis of x on an explicit mesh, elsewhere 1."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def varying_beyond(a: jax.Array, b: jax.Array) -> tuple[Hashable, ...]:
    """Return the axes of a shard_map over which b varies and a does not."""
    return tuple(sorted(_varying(b) - _varying(a), key=str))


def may_branch(x: jax.Array, guess: jax.Array) -> bool:
    """Return whether a branch on real x and `guess` is safe, and varies as x does."""
    mesh = jax.sharding.get_abstract_mesh()
    # If so, devices could disagree on a branch with collectives over the other axes.
    partly = 0 < len(mesh.manual_axes) < len(mesh.axis_names)
    return not (partly or varying_beyond(x, guess) or jnp.iscomplexobj(x))


def all_over(names: tuple[Hashable, ...], flags: jax.Array) -> jax.Array:
    """Return where `flags` are True on all devices of the named axes."""
    if not names:
        return flags
    return lax.pmin(flags.astype(jnp.int32), names) > 0


def split_rows(x: jax.Array, size: int) -> jax.Array:
    """Return x with its rows as two axes, (blocks, `size` rows of one block)."""
    blocks = x.shape[0] // size
    if blocks % num_shards(x, 0):  # JAX cuts no block on an explicit mesh
        x = _reshard(x, x, PartitionSpec(None, *jax.typeof(x).sharding.spec[1:]))
    return x.reshape(blocks, size, *x.shape[1:])


def replicate_rows(table: jax.Array) -> jax.Array:
    """Return `table` with all its rows on each device, sent in one collective."""
    spec = jax.typeof(table).sharding.spec
    table = _reshard(table, table, PartitionSpec(None, *spec[1:]))
    # Under plain jit, XLA makes a collective of a gather, the one that all consumers
    # need. The barrier hides that it changes nothing.
    return table[lax.optimization_barrier(jnp.arange(table.shape[0]))]


def shard_as_features(
    param: jax.Array | None, x: jax.Array, features: Features
) -> jax.Array | None:
    """Reshard `param` (None stays None) as the features of x, on an explicit mesh.

    There a sharding is part of a type, and those of parameter and gradient must agree;
    JAX transposes this reshard.
    """
    if param is None:
        return None
    spec = jax.typeof(x).sharding.spec
    return _reshard(param, x, PartitionSpec(*(spec[i] for i in features)))


def shard_as(array: jax.Array, like: jax.Array) -> jax.Array:
    """Return `array` with the sharding of `like`, on an explicit mesh."""
    return _reshard(array, array, jax.typeof(like).sharding.spec)


def _reshard(array: jax.Array, on: jax.Array, spec: PartitionSpec) -> jax.Array:
    mesh = jax.typeof(on).sharding.mesh
    if not mesh.explicit_axes or jax.typeof(array).sharding.spec == spec:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, spec))


def cast_to_one_varying_set(
    devices: Devices, *arrays: jax.Array | None
) -> tuple[Any, ...]:
    """Cast `arrays` (None stays None) to one set of device-varying axes.

    Under shard_map's check_vma a derivative rule must return cotangents that vary as
    its arguments do. When all arguments vary over the same axes, local cotangents are
    right, and JAX transposes these casts into the sums over devices.
    """
    names = devices.names or ()
    # An axis of vmap, of pmap or without check_vma has no such type.
    varying = {name for name in names if name in _varying(lax.axis_index(name))}
    varying = varying.union(*(_varying(a) for a in arrays if a is not None))

    def cast(array):
        missing = varying - _varying(array)
        if not missing:
            return array
        return lax.pcast(array, tuple(sorted(missing, key=str)), to="varying")

    return tuple(None if a is None else cast(a) for a in arrays)


def _varying(array: jax.Array) -> frozenset[Hashable]:
    return jax.typeof(array).manual_axis_type.varying
