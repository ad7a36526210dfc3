"""What a batch norm of NNX records while it is measured."""

import jax
from flax import nnx

from jaxbn._core.moments import Moments, merge_moments
from jaxbn._models.measure import Path, Recording, empty_moments


class Recorded(nnx.Module):
    """The moments of what a batch norm was given so far, as an attribute of it.

    The variables have the type of the running statistics, so that the model's vmaps and
    scans over layers treat them alike. The recording is an attribute, not a context as
    in Linen: `nnx.jit` retraces for other attributes, and would not for a context.
    """

    num_elements: nnx.BatchStat[jax.Array]
    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]

    def __init__(self, recording: Recording, path: Path, mean: jax.Array):
        self.recording = recording
        self.path = path
        empty = empty_moments(mean)
        self.num_elements = nnx.BatchStat(empty.num_elements)
        self.mean = nnx.BatchStat(empty.mean)
        self.var = nnx.BatchStat(empty.var)

    @property
    def moments(self) -> Moments:
        """What was recorded so far."""
        return Moments(self.num_elements[...], self.mean[...], self.var[...])

    def add(self, batch: Moments) -> None:
        """Add the moments of another batch."""
        so_far = self.moments
        pairs = zip(batch, so_far, strict=True)
        batch = Moments(*(new.astype(old.dtype) for new, old in pairs))
        num_elements, mean, var = merge_moments(so_far, batch)
        self.num_elements.set_value(num_elements)
        self.mean.set_value(mean)
        self.var.set_value(var)
