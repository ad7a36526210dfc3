"""Recording: the batch norms of a model note the moments of what they are given."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import _shapes
from jaxbn._moments import Moments, batch_moments

HINT = "put it together with another one; if x is all there is, write [x]"

# The names of the variables that hold the moments in Linen, beside mean and var.
NAMES = tuple(f"recorded_{name}" for name in Moments._fields)


@dataclasses.dataclass(eq=False)
class Recording:
    """What the modules are to do; the path and features' shape of each one called.

    They normalize as told, update nothing, and record their input.
    """

    use_running_average: bool
    called: list[tuple[Any, tuple[int, ...]]] = dataclasses.field(default_factory=list)

    def moments_of(
        self, path: Any, x: jax.Array, features: tuple[int, ...], mask: Any
    ) -> Moments:
        """The moments of what this module is given, with a count for each feature."""
        if not self.use_running_average:  # y would be the bias, and spoil what follows
            _shapes.check_count(x.shape, features, 1, "each of `batches`", HINT)
        batch = batch_moments(x, axis=features, mask=mask)
        self.called.append((path, batch.mean.shape))
        count = jnp.broadcast_to(batch.num_elements, batch.mean.shape)
        return batch._replace(num_elements=count)


def nothing(mean: jax.Array) -> Moments:
    """The moments of no data, of the shape and dtype of `mean`."""
    zeros = jnp.zeros_like(mean)
    return Moments(zeros.real, zeros, zeros.real)


# A model of Linen is called with a recording as its context; in place of an argument
# that each model would have to hand down.
_ACTIVE: contextvars.ContextVar[Recording | None] = contextvars.ContextVar(
    "recording", default=None
)


def active() -> Recording | None:
    """The recording that is going on, if any."""
    return _ACTIVE.get()


@contextlib.contextmanager
def activate(recording: Recording) -> Iterator[None]:
    """Within it, `active` is `recording`."""
    token = _ACTIVE.set(recording)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
