"""Which examples make up each batch: of any classes, or of few."""

import numpy as np

from jaxbn.cli import _digits


def batches(
    labels: np.ndarray, batch_size: int, classes: int | None, seed: int, epoch: int
) -> np.ndarray:
    """Indices of one epoch, a function of the arguments alone.

    Args:
      labels: The training set's, (examples,).
      batch_size: Examples in each batch.
      classes: The number of classes in each batch, all with as many examples; None
        draws from all.
      seed: Of the run.
      epoch: Its number.

    Returns:
      (steps, batch_size) indices, none of them twice. As many steps in every epoch.

    Raises:
      ValueError: `classes` does not divide `batch_size`.
    """
    if classes is None:
        return _digits.batches(len(labels), batch_size, seed, epoch)
    if batch_size % classes:
        raise ValueError(f"{classes} classes do not divide a batch of {batch_size}")
    rng = np.random.default_rng([seed, epoch])
    size = batch_size // classes  # of what one class adds to a batch
    parts = []
    for label in rng.permutation(np.unique(labels)):
        order = rng.permutation(np.flatnonzero(labels == label))
        steps = len(order) // size
        parts.append(order[: steps * size].reshape(steps, size))
    # The parts lie class by class. A step takes them from places that are further apart
    # than any class is long, so that its classes differ.
    parts, longest = np.concatenate(parts), max(map(len, parts))
    steps = len(parts) // classes
    if classes > 1 and steps < longest:
        raise ValueError(f"there are too few classes for {classes} in each batch")
    together = parts[: steps * classes].reshape(classes, steps, size)
    together = together.transpose(1, 0, 2).reshape(steps, batch_size)
    # And mixed within a step, for ghost batches.
    return rng.permuted(together[rng.permutation(steps)], axis=1)
