"""`jaxbn reproduce`: what the papers found, on small real data."""

import argparse
import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.cli import common

# The settings, each with its reason, were written before the first run. The network is
# `training.MLP`, that of the first paper: in one program with its batches it is a
# hundred times as fast on a CPU as a convolution, so that 5 seeds take a minute. With
# batches of 2, batch norm leaves no more of a feature than its sign there.

# Those of `train --model mlp`: a rate that suits the network without batch norm, and
# with which the one with batch norm does well.
LEARNING_RATE, BATCH_SIZE = 1.0, 60

# Renorm begins as batch norm and lets go in a line. The paper's 5,000, 25,000 (d_max)
# and 40,000 (r_max) updates of 160,000, as shares of a run; its r_max and d_max.
RAMP_BEGIN, RAMP_D_MAX, RAMP_R_MAX = 1 / 32, 5 / 32, 1 / 4
R_MAX, D_MAX = 3.0, 5.0

HOW = ("running", "recalibrated", "batch")  # see DESCRIPTION


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a table: a network and how it is trained."""

    group: str
    name: str
    epochs: int
    batch_size: int = BATCH_SIZE
    learning_rate: float = LEARNING_RATE
    norm: str = "batch"  # or "renorm"
    momentum: float = 0.99  # the Batch Renormalization paper's, where a run is long
    ghost_batch_size: int | None = None
    classes: int | None = None  # in each batch; None is any
    # The rate goes in a line to 0, so that it is not the last few batches that decide.
    decay: bool = True


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One table."""

    title: str
    paper: str
    variants: tuple[Variant, ...]
    every_epoch: bool = False  # or only the last one


def _small() -> Iterator[Variant]:
    # Batches of 2 and 4. The rate is proportional to the batch (Goyal et al. 2017): in
    # an epoch all networks then go equally far. Ghost batches of 2 and 4 are within a
    # batch of 60, with its rate: small are the batches that normalize, not those of a
    # step. In 30 epochs batches of 60 make 690 steps, with which `train` comes to 97 %.
    yield Variant(f"batches of {BATCH_SIZE}", "batch norm", 30)
    for n in (2, 4):
        make = functools.partial(Variant, f"batches of {n}", epochs=30)
        small: Any = {"batch_size": n, "learning_rate": LEARNING_RATE * n / BATCH_SIZE}
        yield make("batch norm", **small)
        yield make("batch renorm", **small, norm="renorm")
        yield make(f"ghost batches of {n} in {BATCH_SIZE}", ghost_batch_size=n)


def _classes() -> Iterator[Variant]:
    # Batches of 32 of one or two classes; 32 is the paper's minibatch (of 16 classes,
    # two images each). A step with one class adds nearly rate * (1 + 100 / 4) to its
    # logit, from the bias and from 100 sigmoids near 1/2: with 0.03 that is less than
    # 1, so that no step overrules all that were before it. 160 epochs make up for the
    # small rate, and let renorm begin after more than 100 updates, when the running
    # statistics are warm. Ghost batches of 8: a quarter, with as few classes.
    few: Any = {"epochs": 160, "batch_size": 32, "learning_rate": 0.03}
    for n, group in ((1, "one class in a batch"), (2, "2 classes in a batch")):
        make = functools.partial(Variant, group, classes=n, **few)
        yield make("batch norm")
        yield make("batch renorm", norm="renorm")
        yield make("ghost batches of 8 in 32", ghost_batch_size=8)


def _momentum() -> Iterator[Variant]:
    # The first 12 epochs of `train --model mlp`, whose rate is constant: 276 steps in
    # which weights move quickly. Momentum does not enter training: the rows of both
    # have the same weights, and differ in the running statistics alone.
    for each in (0.9, 0.99):
        yield Variant(f"momentum {each}", "batch norm", 12, momentum=each, decay=False)


def _large() -> Iterator[Variant]:
    # 704 = 11 * 64 is as large as lets an epoch have two batches. Its rate grows with
    # the root of the batch, so that steps are equally noisy (Hoffer et al.). For
    # `train`'s 60 epochs, and for as many updates, 11 times as long. Momentum is
    # `train`'s: in a hundred updates 0.99 would not forget the initial statistics.
    yield Variant("as many epochs", "batches of 64", 60, 64, momentum=0.9)
    rate = LEARNING_RATE * math.sqrt(11)
    large: Any = {"batch_size": 704, "learning_rate": rate, "momentum": 0.9}
    for group, epochs in (("as many epochs", 60), ("as many updates", 11 * 60)):
        yield Variant(group, "batches of 704", epochs, **large)
        ghost = "ghost batches of 64 in 704"
        yield Variant(group, ghost, epochs, **large, ghost_batch_size=64)


EXPERIMENTS = {
    "small-batches": Experiment(
        "batches of 2 and 4: batch norm, renorm, ghost batches",
        "Ioffe 2017 (Inception-v3 on ImageNet, microbatches of 4): batch norm 74.2 %, "
        "batch renorm 76.5 %",
        tuple(_small()),
    ),
    "one-class": Experiment(
        "batches of one class, and of two",
        "Ioffe 2017 (Inception-v3 on ImageNet, batches of 32 with two images each "
        "of 16 classes): batch renorm 78.5 %",
        tuple(_classes()),
    ),
    "momentum": Experiment(
        "running, recalibrated and batch statistics, epoch by epoch",
        "Wu & Johnson 2021, section 3 (ResNet-50 on ImageNet): while the weights move, "
        "running averages lag behind them, and recalibrated statistics do not",
        tuple(_momentum()),
        every_epoch=True,
    ),
    "large-batch": Experiment(
        "a large batch, with and without ghost batches",
        "Hoffer, Hubara & Soudry 2017 (ResNet-44 on CIFAR-10): large batches with as "
        "many epochs generalize worse; ghost batches make up for a part, as many "
        "updates for the rest",
        tuple(_large()),
    ),
}

_NAMES = "\n".join(f"  {name:15}{each.title}" for name, each in EXPERIMENTS.items())

DESCRIPTION = f"""\
Train a small network (3 hidden layers of 100 sigmoids) on scikit-learn's handwritten
digits with one seed after another, all at once, and show its accuracy on the 360 test
digits, as mean, least and greatest over the seeds. Each network is tested thrice,
normalizing by

  running        the running statistics, as inference does
  recalibrated   the exact statistics of the training digits (jaxbn.linen.recalibrate)
  batch          those of the test digits, all in one batch

experiments:
{_NAMES}

The settings, with the reasons for them, are in jaxbn/cli/reproduce.py. The papers'
figures are of other networks and data: compare the order of the rows, not their values.

Ctrl-C prints and writes what is finished until then.

example: jaxbn reproduce momentum --seeds 10
"""


def add_arguments(parser: common.Parser) -> None:
    """Add the flags."""
    parser.add_argument("experiment", choices=[*EXPERIMENTS], help="see above")
    text = "seeds 0 to N - 1, each with its weights and batches (default: 5)"
    parser.add_number("--seeds", text, default=5)
    text = "at most so many passes over the training set, for a quick look"
    parser.add_number("--epochs", text)
    text = "where to write all figures (default: runs/reproduce/EXPERIMENT.json)"
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)


def run(args: argparse.Namespace) -> int:
    """Train, print and write."""
    name, seeds = args.experiment, args.seeds
    file = args.json or Path("runs", "reproduce", f"{name}.json")
    common.make_room("--json", file)
    experiment = EXPERIMENTS[name]
    variants = [
        dataclasses.replace(each, epochs=min(args.epochs or each.epochs, each.epochs))
        for each in experiment.variants
    ]
    common.first_line(f"training {seeds} networks at once: {experiment.title}")
    out = common.console()
    rows: list[dict[str, Any]] = []
    # Ctrl-C counts between epochs: raised inside JAX, it can crash the process.
    with common.deferred_interrupts() as interrupted, common.progress(out) as bar:
        from jaxbn.cli import training

        data, device = training.load_digits(), jax.devices()[0].device_kind
        content: dict[str, Any] = {"experiment": name, "title": experiment.title}
        content |= {"paper": experiment.paper, "jax": jax.__version__, "device": device}
        content |= {"seeds": seeds, "complete": False, "rows": rows}
        task = bar.add_task("epochs", total=sum(x.epochs for x in variants), seen="")
        for variant in itertools.takewhile(lambda _: not interrupted(), variants):
            bar.update(task, seen=f"{variant.group}: {variant.name}")
            measured = train(variant, data, seeds, experiment.every_epoch)
            for epoch, shares in enumerate(measured, 1):
                bar.advance(task)
                if shares:
                    accuracy = {
                        how: {"of_each_seed": each, "mean": statistics.fmean(each)}
                        | {"min": min(each), "max": max(each)}
                        for how, each in shares.items()
                    }
                    row = {"variant": dataclasses.asdict(variant), "epoch": epoch}
                    rows.append(row | {"test_accuracy": accuracy})
                    common.write_json(file, content)
                if interrupted():
                    break
    if not rows:
        raise KeyboardInterrupt
    content["complete"] = not interrupted()
    common.write_json(file, content)
    out.print(_table(experiment, rows, seeds), experiment.paper, sep="\n")
    out.print("Other networks, other data: compare the order of rows, not values.")
    out.print(f"written: {file}")
    if interrupted():
        out.print("interrupted: that is what was finished until then")
    return interrupted()


def _table(experiment: Experiment, rows: list[dict[str, Any]], seeds: int) -> Any:
    """Return a line for each row, and a section for each group."""
    table = common.table("", *HOW, title=experiment.title)
    table.caption = f"test accuracy in %: mean (least–greatest) of {seeds} seeds"
    for group, members in itertools.groupby(rows, lambda row: row["variant"]["group"]):
        table.add_row(group, style="bold")
        for row in members:
            label = f"  {row['variant']['name']}, epoch {row['epoch']}"
            form = "{mean:.1%} ({min:.1%}–{max:.1%})"
            cells = map(form.format_map, row["test_accuracy"].values())
            table.add_row(label, *(cell.replace("%", "") for cell in cells))
    return table


def batches(labels: np.ndarray, variant: Variant, seed: int, epoch: int) -> np.ndarray:
    """Return the indices of one epoch: (steps, batch_size), none of them twice.

    The classes of a batch have equal numbers of examples in it.
    """
    size, classes = variant.batch_size, variant.classes
    if classes is None:
        from jaxbn.cli import training

        return training.batches(len(labels), size, seed, epoch)
    rng = np.random.default_rng([seed, epoch])
    share = size // classes  # what one class adds to a batch
    parts = []
    for label in rng.permutation(np.unique(labels)):
        order = rng.permutation(np.flatnonzero(labels == label))
        parts.append(order[: len(order) // share * share].reshape(-1, share))
    # The parts lie class by class. A step takes them from places that are further apart
    # than any class is long, so that its classes differ.
    together = np.concatenate(parts)
    steps = len(together) // classes
    together = together[: steps * classes].reshape(classes, steps, share)
    together = together.transpose(1, 0, 2).reshape(steps, size)
    # And mixed within a step, for ghost batches.
    return rng.permuted(together[rng.permutation(steps)], axis=1)


def norm_layer(variant: Variant, updates: int) -> Any:
    """Return the layer of a variant, for a run of so many updates."""
    import optax

    from jaxbn.linen import BatchNorm, BatchRenorm

    if variant.norm == "batch":
        options = {"ghost_batch_size": variant.ghost_batch_size}
        return functools.partial(BatchNorm, momentum=variant.momentum, **options)

    def ramp(least: float, most: float, end: float) -> optax.Schedule:
        begin, length = int(RAMP_BEGIN * updates), int((end - RAMP_BEGIN) * updates)
        return optax.linear_schedule(least, most, max(1, length), begin)

    limits = {"r_max": ramp(1, R_MAX, RAMP_R_MAX), "d_max": ramp(0, D_MAX, RAMP_D_MAX)}
    return functools.partial(BatchRenorm, momentum=variant.momentum, **limits)


def train(
    variant: Variant, digits: Any, seeds: int, every_epoch: bool
) -> Iterator[dict[str, list[float]] | None]:
    """Train one network for each seed from 0, and yield after every epoch.

    Networks of the same seed begin with the same weights, whatever the variant.

    Yields:
      What was measured after this epoch, if it was measured: each of them or the last.
    """
    import optax

    from jaxbn.cli import training
    from jaxbn.linen import recalibrate

    def indices(epoch: int) -> np.ndarray:
        each = (batches(digits.train_labels, variant, s, epoch) for s in range(seeds))
        return np.stack([*each])

    images, test_images, labels, test_labels = map(jnp.asarray, digits)
    updates = variant.epochs * indices(0).shape[1]
    model = training.MLP(norm=norm_layer(variant, updates))
    rate = variant.learning_rate
    rates = optax.linear_schedule(rate, 0.0 if variant.decay else rate, updates)
    parts = model, optax.sgd(rates)
    first = images[: variant.batch_size]
    start = functools.partial(training.first_state, *parts, images=first)
    step = functools.partial(training.next_state, *parts)

    def train_epoch(state: Any, batches: jax.Array) -> Any:
        def take(state: Any, batch: jax.Array) -> Any:
            return step(state, images[batch], labels[batch])

        return jax.lax.scan(take, state, batches)[0]

    def count_right(state: Any) -> list[jax.Array]:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        # All in one batch: exact at every layer.
        exact = functools.partial(recalibrate, model, variables, train=False)
        states = state, *(state._replace(**exact([x])) for x in (images, test_images))
        right = functools.partial(training.count_right, model)
        return [right(each, test_images, test_labels) for each in states]

    next_epoch = jax.jit(jax.vmap(train_epoch), donate_argnums=0)
    num_right = jax.jit(jax.vmap(count_right))
    keys = jnp.stack([jax.random.key(seed) for seed in range(seeds)])
    states = jax.jit(jax.vmap(start))(keys)
    for epoch in range(variant.epochs):
        states = next_epoch(states, jnp.asarray(indices(epoch)))
        jax.block_until_ready(states)  # for the progress bar
        if every_epoch or epoch == variant.epochs - 1:
            shares = np.asarray(num_right(states)) / len(digits.test_labels)
            yield dict(zip(HOW, shares.tolist(), strict=True))
        else:
            yield None
