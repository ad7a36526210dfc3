"""Two formats of checkpoints, and what must survive them."""

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp


class Orbax:
    @staticmethod
    def save(path, tree):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)

    @staticmethod
    def restore(path, target=None):
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, target)


class MessagePack:
    @staticmethod
    def save(path, tree):
        path.write_bytes(flax.serialization.to_bytes(tree))

    @staticmethod
    def restore(path, target=None):
        return flax.serialization.from_bytes(target, path.read_bytes())


def draw(seed, shape=(8, 5, 3)):
    return np.random.default_rng(seed).normal(1, 2, shape).astype(np.float32)


def assert_identical(actual, desired):
    def same(path, a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))

    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree_util.tree_map_with_path(same, actual, desired)
