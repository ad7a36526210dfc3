"""Training the networks of all seeds at once: arrays in, arrays out."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbn.cli import _models
from jaxbn.cli._digits import Digits
from jaxbn.cli._reproduce_batches import batches
from jaxbn.cli._reproduce_settings import (
    D_MAX,
    R_MAX,
    RAMP_BEGIN,
    RAMP_D_MAX,
    RAMP_R_MAX,
    Variant,
)
from jaxbn.cli._training import TrainState
from jaxbn.linen import BatchNorm, BatchRenorm, recalibrate


class Accuracies(NamedTuple):
    """On the test set, one number for each seed, by what normalizes."""

    running: list[float]
    recalibrated: list[float]
    batch: list[float]


def norm_layer(variant: Variant, updates: int) -> Any:
    """The layer of a variant, for a run of so many updates."""
    if variant.norm == "batch":
        return functools.partial(
            BatchNorm,
            momentum=variant.momentum,
            ghost_batch_size=variant.ghost_batch_size,
        )

    def ramp(least: float, most: float, end: float) -> optax.Schedule:
        begin, length = int(RAMP_BEGIN * updates), int((end - RAMP_BEGIN) * updates)
        return optax.linear_schedule(least, most, max(1, length), begin)

    return functools.partial(
        BatchRenorm,
        momentum=variant.momentum,
        r_max=ramp(1.0, R_MAX, RAMP_R_MAX),
        d_max=ramp(0.0, D_MAX, RAMP_D_MAX),
    )


def train(
    variant: Variant, digits: Digits, seeds: int, every_epoch: bool
) -> Iterator[Accuracies | None]:
    """Train one network for each seed from 0, and yield after every epoch.

    Networks of the same seed begin with the same weights, whatever the variant.

    Yields:
      What was measured after this epoch, if it was measured: each of them or the last.
    """
    labels = digits.train_labels

    def indices(epoch: int) -> np.ndarray:
        args = (labels, variant.batch_size, variant.classes)
        return np.stack([batches(*args, seed, epoch) for seed in range(seeds)])

    updates = variant.epochs * indices(0).shape[1]
    program = _Program(variant, updates, digits)
    keys = jnp.stack([jax.random.key(seed) for seed in range(seeds)])
    states = program.start(keys)
    for epoch in range(variant.epochs):
        states = program.epoch(states, jnp.asarray(indices(epoch)))
        jax.block_until_ready(states)  # for the progress bar
        measured = None
        if every_epoch or epoch == variant.epochs - 1:
            right = program.num_right(states)
            total = len(digits.test_labels)
            measured = Accuracies(*([int(n) / total for n in row] for row in right))
        yield measured


class _Program:
    """The compiled functions of one variant, over a leading axis of seeds."""

    def __init__(self, variant: Variant, updates: int, digits: Digits):
        self._images = jnp.asarray(digits.train_images)
        self._labels = jnp.asarray(digits.train_labels)
        self._test = jnp.asarray(digits.test_images), jnp.asarray(digits.test_labels)
        self._model = _models.MLP(norm=norm_layer(variant, updates))
        rate: Any = variant.learning_rate
        if variant.decay:
            rate = optax.linear_schedule(rate, 0.0, updates)
        self._optimizer = optax.sgd(rate)
        self._batch_size = variant.batch_size
        self.start = jax.jit(jax.vmap(self._start))
        self.epoch = jax.jit(jax.vmap(self._epoch), donate_argnums=0)
        self.num_right = jax.jit(jax.vmap(self._num_right))

    def _start(self, key: jax.Array) -> TrainState:
        images = self._images[: self._batch_size]
        variables = self._model.init(key, images, train=True)
        params = variables["params"]
        opt_state = self._optimizer.init(params)
        return TrainState(params, variables["batch_stats"], opt_state)

    def _epoch(self, state: TrainState, indices: jax.Array) -> TrainState:
        return jax.lax.scan(self._step, state, indices)[0]

    def _step(self, state: TrainState, batch: jax.Array) -> tuple[TrainState, None]:
        images, labels = self._images[batch], self._labels[batch]

        def mean_loss(params: Any) -> tuple[jax.Array, Any]:
            logits, updated = self._model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        grads, stats = jax.grad(mean_loss, has_aux=True)(state.params)
        changes, opt_state = self._optimizer.update(grads, state.opt_state)
        params: Any = optax.apply_updates(state.params, changes)
        return TrainState(params, stats, opt_state), None

    def _num_right(self, state: TrainState) -> tuple[jax.Array, ...]:
        """How many are recognized: running, recalibrated and batch statistics."""
        images, labels = self._test
        running = {"params": state.params, "batch_stats": state.batch_stats}

        def recalibrated(images: jax.Array) -> dict[str, Any]:
            # All in one batch: exact at every layer.
            return recalibrate(self._model, running, [images], train=False)

        def right(variables: Any) -> jax.Array:
            logits: Any = self._model.apply(variables, images, train=False)
            return jnp.sum(logits.argmax(-1) == labels)

        return (
            right(running),
            right(recalibrated(self._images)),
            right(recalibrated(images)),
        )
