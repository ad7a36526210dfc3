"""What one process of a run of tests has compiled, others with the same flags read.

So do the processes that a test starts, unless it hides JAX's variables from them. Those
alone that import this module write, too: they leave no half of a file where another
would find it.
"""

import contextlib
import os
import tempfile
from os import replace  # a test may put another in its place

import jax
from jax._src.lru_cache import LRUCache

COMPILED = "JAXBN_TESTS_COMPILED"
if COMPILED not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="jaxbn-tests-")
    os.environ[COMPILED] = os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    # Longer than any compilation: nothing is written.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
    if jax.__version_info__ < (0, 10, 2):  # it complains, on stderr, of what it reads
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

jax.config.update("jax_compilation_cache_dir", os.environ[COMPILED])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def put_whole(self, key, value):
    """As JAX's, but no process can read the half of a file."""
    path = os.path.join(self.path, f"{key}-cache")
    if os.path.exists(path):
        return
    with contextlib.suppress(OSError):  # a test may leave no room
        with tempfile.NamedTemporaryFile(dir=self.path, delete=False) as file:
            file.write(value)
        replace(file.name, path)


LRUCache.put = put_whole
