"""Training: arrays in, arrays out. Nothing here reads, writes or prints."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbn.cli import _digits, _models
from jaxbn.cli._mesh import Mesh, on_one_device
from jaxbn.cli._settings import Settings

# Steps between two measurements of the test accuracy.
MEASURE_EVERY = 10


class TrainState(NamedTuple):
    """All that one step changes."""

    params: Any
    batch_stats: Any
    opt_state: Any


@dataclasses.dataclass
class Network:
    """A network on its way: its state, and what was seen so far."""

    state: TrainState
    losses: list[float] = dataclasses.field(default_factory=list)  # of every step
    accuracies: list[float] = dataclasses.field(
        default_factory=list
    )  # at 0, 10, 20, ...
    seconds: list[float] = dataclasses.field(default_factory=list)  # in this process

    @property
    def step(self) -> int:
        """The number of steps taken."""
        return len(self.losses)


class Trainer:
    """One network with its optimizer, and the two functions that are compiled."""

    def __init__(self, settings: Settings, norm: str, mesh: Mesh | None = None):
        self.settings = settings
        self.mesh = mesh or Mesh(jax.local_devices()[:1])
        self.model = _models.create(settings.model, norm)
        # Plain SGD for `mlp`, as in the paper. The rate is constant, so that a step
        # does not depend on how many are to follow it.
        self.optimizer = optax.sgd(
            settings.learning_rate,
            momentum=0.9 if settings.model == "cnn" else None,
        )
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=self.mesh.whole)
        self.num_right = jax.jit(self._num_right, static_argnums=3)

    def start(self) -> Network:
        """Step 0: the same weights for every norm."""
        images = jnp.zeros((self.settings.batch_size, 8, 8, 1), jnp.float32)
        key = jax.random.key(self.settings.seed)
        variables = self.model.init(key, images, train=True)
        params, stats = variables["params"], variables.get("batch_stats", {})
        return Network(TrainState(params, stats, self.optimizer.init(params)))

    def _apply(
        self, params: Any, batch_stats: Any, images: jax.Array, train: bool
    ) -> tuple[jax.Array, Any]:
        logits, updated = self.model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=train,
            mutable=["batch_stats"],
        )
        return logits, updated.get("batch_stats", {})

    def _step(
        self, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        def mean_loss(params: Any) -> tuple[jax.Array, Any]:
            logits, stats = self._apply(params, state.batch_stats, images, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), stats

        (loss, stats), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(grads, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, stats, opt_state), loss

    def _num_right(
        self, state: TrainState, images: jax.Array, labels: jax.Array, batch: bool
    ) -> jax.Array:
        """How many are recognized, with batch or with running statistics."""
        logits, _ = self._apply(state.params, state.batch_stats, images, train=batch)
        return jnp.sum(logits.argmax(-1) == labels)

    def steps_per_epoch(self, digits: _digits.Digits) -> int:
        """Full batches in the training set."""
        return len(digits.train_labels) // self.settings.batch_size

    def advance(self, network: Network, digits: _digits.Digits) -> Iterator[None]:
        """Bring `network` to the last epoch's end, stopping after every step.

        Step n depends on the settings and on step n - 1 alone; so the caller may save
        at any stop, and a run that is taken up there ends in the same bits.
        """
        epoch_steps = self.steps_per_epoch(digits)
        if not network.accuracies:
            network.accuracies.append(self.measure(network, digits))
        while network.step < self.settings.epochs * epoch_steps:
            epoch, done = divmod(network.step, epoch_steps)
            batches = _digits.batches(
                len(digits.train_labels),
                self.settings.batch_size,
                self.settings.seed,
                epoch,
            )
            for batch in batches[done:]:
                images = self.mesh.share(digits.train_images, batch)
                labels = self.mesh.share(digits.train_labels, batch)
                begun = time.perf_counter()
                network.state, loss = self.step(network.state, images, labels)
                network.losses.append(float(loss))  # waits for the step to be done
                network.seconds.append(time.perf_counter() - begun)
                if network.step % MEASURE_EVERY == 0:
                    network.accuracies.append(self.measure(network, digits))
                yield

    def measure(
        self, network: Network, digits: _digits.Digits, batch: bool = False
    ) -> float:
        """The share of the test set that is recognized; nothing is updated.

        Each process does this for itself, on one device: 360 images need not be split.
        """
        state = on_one_device(network.state)
        images, labels = digits.test_images, digits.test_labels
        # Divided here: in float32, 324 of 360 are less than 90 %.
        return int(self.num_right(state, images, labels, batch)) / len(labels)
