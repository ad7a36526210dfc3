"""What a training run is a function of, and what a resumed run may change."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxbn.cli._arguments import CommandError


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run."""

    model: str
    norm: tuple[str, ...]
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int = 0


NORMS = ("jaxbn", "none", "flax")

# The learning rate of `mlp` is one that suits the plain network (with 0.3 and 0.1 it
# takes 1.6 and 4 times as long to 90 %): the normalized one, which does well with all
# three, is not to win by a choice made for it.
DEFAULTS = {
    "cnn": Settings("cnn", ("jaxbn",), epochs=12, batch_size=64, learning_rate=0.05),
    "mlp": Settings("mlp", ("jaxbn",), epochs=60, batch_size=60, learning_rate=1.0),
}

# Step n is a function of these alone. A run may be resumed with more epochs or with
# further norms: what it had done is then a part of the longer run.
FIXED = ("model", "batch_size", "learning_rate", "seed")


def from_checkpoint(named: Mapping[str, Any]) -> Settings:
    """The settings that a checkpoint holds.

    Raises:
      Exception: Of any kind, where they are not ones that a run can have.
    """
    settings = Settings(**{**named, "norm": tuple(named["norm"])})
    usual = dataclasses.astuple(DEFAULTS[settings.model])
    values = dataclasses.astuple(settings)
    if [type(value) for value in values] != [type(value) for value in usual]:
        raise TypeError("its settings are not of the types of settings")
    if not set(settings.norm) <= set(NORMS):
        raise ValueError(f"its norms are not among {', '.join(NORMS)}")
    if not (
        settings.epochs >= 1
        and settings.batch_size >= 2
        and 0 < settings.learning_rate < math.inf
        and settings.seed >= 0
    ):
        raise ValueError("its settings are out of range")
    return settings


def settle(given: Mapping[str, Any], stored: Sequence[Settings]) -> Settings:
    """Settings from the flags, from the run that is resumed, and from the defaults.

    Args:
      given: The settings that were named on the command line.
      stored: Those in the checkpoints of the run that is resumed; empty for a new run.

    Returns:
      The settings of this run.

    Raises:
      CommandError: A flag contradicts a checkpoint.
    """
    for name in FIXED:
        for old in stored:
            here, there = given.get(name, getattr(stored[0], name)), getattr(old, name)
            if here != there:
                flag = "--" + name.replace("_", "-")
                raise CommandError(
                    f"{flag} {here} contradicts the run to resume, "
                    f"which was made with {flag} {there}"
                )
    chosen = dict(given)
    if stored:
        norms = [norm for old in stored for norm in old.norm]
        chosen["norm"] = tuple(dict.fromkeys([*norms, *given.get("norm", ())]))
        chosen.setdefault("epochs", max(old.epochs for old in stored))
        chosen |= {name: getattr(stored[0], name) for name in FIXED}
    return dataclasses.replace(DEFAULTS[chosen.get("model", "cnn")], **chosen)
