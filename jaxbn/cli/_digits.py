"""The data: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""

from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NUM_TEST = 360


class Digits(NamedTuple):
    """Images (examples, 8, 8, 1), float32 in [0, 1], and labels (examples,), int32."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load() -> Digits:
    """1,437 digits to train on and 360 to test on, the same ones whatever the seed."""
    data: Any = load_digits()
    images = (data["images"] / 16).astype(np.float32)[..., None]
    labels = data["target"].astype(np.int32)
    split: Any = train_test_split(
        images, labels, test_size=NUM_TEST, stratify=labels, random_state=0
    )
    train_images, test_images, train_labels, test_labels = split
    return Digits(train_images, train_labels, test_images, test_labels)


def batches(num_examples: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Which examples make up each batch of one epoch: (steps, batch_size) indices.

    A function of its arguments alone, so that a run can be taken up anywhere. Every
    batch is full: those left over sit this epoch out, others in the next.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    steps = num_examples // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)
