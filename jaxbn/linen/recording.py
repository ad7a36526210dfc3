"""Which recording is going on: a context around the call of a Linen model."""

import contextlib
import contextvars
from collections.abc import Iterator

from jaxbn._core.moments import Moments
from jaxbn._models.measure import Recording

# The variables that hold the recorded moments, beside mean and var.
RECORDED = tuple(f"recorded_{name}" for name in Moments._fields)

# In place of an argument that each model would have to hand down to its layers.
_ACTIVE: contextvars.ContextVar[Recording | None] = contextvars.ContextVar(
    "recording", default=None
)


def active() -> Recording | None:
    """Return the recording that is going on, if any."""
    return _ACTIVE.get()


@contextlib.contextmanager
def activate(recording: Recording) -> Iterator[None]:
    """Let `active` return `recording`."""
    token = _ACTIVE.set(recording)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
