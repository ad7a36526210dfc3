"""Training: arrays in, arrays out. Nothing here reads, writes or prints."""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxbn.cli import models
from jaxbn.cli.digits import Digits, batches

# Steps between two measurements of the test accuracy.
MEASURE_EVERY = 10


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
        self.model: Any = models.create(settings.model, norm)
        # Plain SGD for `mlp`, as in the paper. The rate is constant, so that a step
        # does not depend on how many are to follow it.
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
        images, labels, size = *self._data[:2], self._settings.batch_size
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
