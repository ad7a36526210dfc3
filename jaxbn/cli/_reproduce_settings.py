"""The settings of `reproduce`, each with its reason; written before the first run.

The network is `_models.MLP`, the first paper's: in one program with its batches it is
a hundred times as fast on a CPU as a convolution, so that 5 seeds take a minute. With
batches of 2, batch norm leaves no more of a feature than its sign there.
"""

import dataclasses
import math

# That of `train --model mlp`, and its batches: a rate that suits the network without
# batch norm, and with which the one with batch norm does well.
LEARNING_RATE, BATCH_SIZE = 1.0, 60

# Of the running statistics: the Batch Renormalization paper's, where a run is long.
MOMENTUM = 0.99
# That of `train`, where a run has a hundred updates or so: 0.99 would not forget the
# initial statistics.
SHORT_MOMENTUM = 0.9

# Renorm begins as batch norm and lets go in a line. The paper's 5,000, 25,000 (d_max)
# and 40,000 (r_max) updates of 160,000, as shares of a run; its r_max and d_max.
RAMP_BEGIN, RAMP_D_MAX, RAMP_R_MAX = 1 / 32, 5 / 32, 1 / 4
R_MAX, D_MAX = 3.0, 5.0


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a table: a network and how it is trained."""

    group: str
    name: str
    norm: str  # "batch" or "renorm"
    batch_size: int
    learning_rate: float
    epochs: int
    momentum: float = MOMENTUM
    ghost_batch_size: int | None = None
    classes: int | None = None  # in each batch; None is any
    # In a line to 0, so that it is not the last few batches that decide.
    decay: bool = True


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One table."""

    title: str
    variants: tuple[Variant, ...]
    paper: str
    every_epoch: bool = False  # or only the last one


# Batches of 2 and 4. The rate is proportional to the batch (Goyal et al. 2017): in an
# epoch all networks then go equally far. Ghost batches of 2 and 4 are within a batch of
# 60, with its rate: small are the batches that normalize, not those of a step. In 30
# epochs batches of 60 make 690 steps, with which `train` comes to 97 % or so.
SMALL_EPOCHS = 30


def _small(size: int) -> tuple[Variant, ...]:
    group, rate = f"batches of {size}", LEARNING_RATE * size / BATCH_SIZE
    ghost = f"ghost batches of {size} in {BATCH_SIZE}"
    return (
        Variant(group, "batch norm", "batch", size, rate, SMALL_EPOCHS),
        Variant(group, "batch renorm", "renorm", size, rate, SMALL_EPOCHS),
        Variant(
            group,
            ghost,
            "batch",
            BATCH_SIZE,
            LEARNING_RATE,
            SMALL_EPOCHS,
            ghost_batch_size=size,
        ),
    )


# Batches of 32 of one or two classes; 32 is the paper's minibatch (of 16 classes, two
# images each). A step with one class adds nearly rate * (1 + 100 / 4) to its logit,
# from the bias and from 100 sigmoids near 1/2: with 0.03 that is less than 1, so that
# no step overrules all that were before it. 160 epochs make up for the small rate, and
# let renorm begin after more than 100 updates, when the running statistics are warm.
# Ghost batches of 8: a quarter of the batch, with as few classes.
CLASS_BATCH_SIZE, CLASS_RATE, CLASS_EPOCHS, CLASS_GHOST = 32, 0.03, 160, 8


def _classes(classes: int) -> tuple[Variant, ...]:
    group = "one class in a batch" if classes == 1 else f"{classes} classes in a batch"

    def variant(name: str, norm: str, ghost: int | None = None) -> Variant:
        return Variant(
            group,
            name,
            norm,
            CLASS_BATCH_SIZE,
            CLASS_RATE,
            CLASS_EPOCHS,
            classes=classes,
            ghost_batch_size=ghost,
        )

    return (
        variant("batch norm", "batch"),
        variant("batch renorm", "renorm"),
        variant(
            f"ghost batches of {CLASS_GHOST} in {CLASS_BATCH_SIZE}",
            "batch",
            CLASS_GHOST,
        ),
    )


# The first 12 epochs of `train --model mlp`, whose rate is constant: 276 steps in which
# weights move quickly. Momentum does not enter training: the rows of both have the same
# weights, and differ in the running statistics alone.
MOMENTUM_EPOCHS = 12


def _momentum(momentum: float) -> Variant:
    return Variant(
        f"momentum {momentum}",
        "batch norm",
        "batch",
        BATCH_SIZE,
        LEARNING_RATE,
        MOMENTUM_EPOCHS,
        momentum=momentum,
        decay=False,
    )


# 704 = 11 * 64 is as large as lets an epoch have two batches. Its rate grows with the
# root of the batch, so that steps are equally noisy (Hoffer et al.). For the same 60
# epochs as the small batches (`train`'s), and for as many updates, 11 times as long.
SMALL_BATCH, LARGE_BATCH, LARGE_EPOCHS = 64, 704, 60


def _large() -> tuple[Variant, ...]:
    times = LARGE_BATCH // SMALL_BATCH
    rate = LEARNING_RATE * math.sqrt(times)
    ghosts = {
        f"batches of {LARGE_BATCH}": None,
        f"ghost batches of {SMALL_BATCH} in {LARGE_BATCH}": SMALL_BATCH,
    }
    small = Variant(
        "as many epochs",
        f"batches of {SMALL_BATCH}",
        "batch",
        SMALL_BATCH,
        LEARNING_RATE,
        LARGE_EPOCHS,
        momentum=SHORT_MOMENTUM,
    )
    large = (
        Variant(
            group,
            name,
            "batch",
            LARGE_BATCH,
            rate,
            epochs,
            momentum=SHORT_MOMENTUM,
            ghost_batch_size=ghost,
        )
        for group, epochs in (
            ("as many epochs", LARGE_EPOCHS),
            ("as many updates", times * LARGE_EPOCHS),
        )
        for name, ghost in ghosts.items()
    )
    return (small, *large)


EXPERIMENTS = {
    "small-batches": Experiment(
        "batches of 2 and 4: batch norm, renorm, ghost batches",
        (
            Variant(
                f"batches of {BATCH_SIZE}",
                "batch norm",
                "batch",
                BATCH_SIZE,
                LEARNING_RATE,
                SMALL_EPOCHS,
            ),
            *_small(2),
            *_small(4),
        ),
        "Ioffe 2017 (Inception-v3 on ImageNet, microbatches of 4): batch norm 74.2 %, "
        "batch renorm 76.5 %",
    ),
    "one-class": Experiment(
        "batches of one class, and of two",
        (*_classes(1), *_classes(2)),
        "Ioffe 2017 (Inception-v3 on ImageNet, batches of 32 with two images of each "
        "of 16 classes): batch renorm 78.5 %",
    ),
    "momentum": Experiment(
        "running, recalibrated and batch statistics, epoch by epoch",
        (_momentum(0.9), _momentum(0.99)),
        "Wu & Johnson 2021, section 3 (ResNet-50 on ImageNet): while the weights move, "
        "running averages lag behind them, and recalibrated statistics do not",
        every_epoch=True,
    ),
    "large-batch": Experiment(
        "a large batch, with and without ghost batches",
        _large(),
        "Hoffer, Hubara & Soudry 2017 (ResNet-44 on CIFAR-10): large batches with as "
        "many epochs generalize worse; ghost batches make up for a part, as many "
        "updates for the rest",
    ),
}
