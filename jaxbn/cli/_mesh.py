"""The devices of a run: each has its share of every batch, and all of the state."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


class Mesh:
    """Devices in a row, of this process or of several.

    Under plain `jit` nothing else is needed to train in parallel: XLA splits the
    computation as its batch is split, and what is computed of the batch, such as its
    mean loss and the statistics of its norms, remains that of the whole batch.
    """

    def __init__(self, devices: Sequence[Any]):
        mesh = jax.sharding.Mesh(np.asarray(devices), ("examples",))
        self.size = len(devices)
        self.split = NamedSharding(mesh, PartitionSpec("examples"))
        self.whole = NamedSharding(mesh, PartitionSpec())
        self._sum = jax.jit(jnp.sum, out_shardings=self.whole)

    def share(self, examples: np.ndarray, batch: np.ndarray) -> jax.Array:
        """`examples[batch]`, of which each process loads what its devices need."""

        def part(index: Any) -> np.ndarray:
            return examples[batch[index[0]]]

        shape = (len(batch), *examples.shape[1:])
        return jax.make_array_from_callback(shape, self.split, part)

    def replicate(self, tree: Any) -> Any:
        """The same arrays, which every process has, on every device."""

        def everywhere(leaf: jax.Array) -> jax.Array:
            return jax.make_array_from_callback(
                leaf.shape, self.whole, lambda index: leaf[index]
            )

        return jax.tree.map(everywhere, tree)

    def any(self, flag: bool) -> bool:
        """Whether it is True in any process; waits until each of them has asked."""
        if self.split.is_fully_addressable:
            return flag
        flags = np.full(self.size, flag, np.int32)  # gloo adds integers, not booleans
        return int(self._sum(self.share(flags, np.arange(self.size)))) > 0


def on_one_device(tree: Any) -> Any:
    """Replicated arrays, as a device of this process has them."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
