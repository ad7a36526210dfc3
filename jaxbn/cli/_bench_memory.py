"""Memory that a process frees stays its own, as it does on a GPU.

With glibc's defaults a large array is new pages from the system each time: 60 ms for
100 MB on the machine where this was written, where copying them takes 10. What would be
timed is Linux.
"""

import contextlib
import ctypes

# One arena, no mmap, nothing trimmed: for a process that is yet to begin, ...
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}
# ... and for this one, by the numbers that malloc.h gives them.
_MALLOPT = {-8: 1, -4: 0, -1: 2**31 - 1}


def keep_freed_memory() -> None:
    """Set malloc so, where there is a glibc; to be called before JAX begins."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)
