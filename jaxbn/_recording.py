"""Recording: the batch norms of a model note the moments of what they are given.

A context that `recalibrate` opens and every batch norm module looks at. It stands in
place of an argument that each model would have to hand down.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxbn._moments import Moments

# The names of the variables that hold the moments, beside mean and var.
NAMES = tuple(f"recorded_{name}" for name in Moments._fields)


@dataclasses.dataclass
class Recording:
    """What the modules are to do; the path and features' shape of each one called."""

    use_running_average: bool
    called: list[tuple[Any, tuple[int, ...]]] = dataclasses.field(default_factory=list)


_ACTIVE: contextvars.ContextVar[Recording | None] = contextvars.ContextVar(
    "recording", default=None
)


def active() -> Recording | None:
    """The recording that is going on, if any."""
    return _ACTIVE.get()


@contextlib.contextmanager
def record(use_running_average: bool) -> Iterator[Recording]:
    """Batch norms within normalize as told, update nothing, and record their input."""
    recording = Recording(use_running_average)
    token = _ACTIVE.set(recording)
    try:
        yield recording
    finally:
        _ACTIVE.reset(token)
