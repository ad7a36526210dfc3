"""`python -m jaxbn inspect`: every batch norm of a checkpoint, the worst one first."""

import argparse
from pathlib import Path

SUMMARY = "look at every batch norm of a checkpoint, and find the one that is spoiled"

DESCRIPTION = """\
Show each batch norm of a checkpoint: channels that are dead (variance near 0), whose
scale is near 0, and whose mean is so many standard deviations away from 0 that float16
or bfloat16 would lose them.

Of what `train` has written, also how far the running statistics are from those of the
training digits: the divergence KL(data || running) of two normals, in nats, mean over
the channels, and the channel where it is worst. The layer where it is largest comes
first. Each layer is measured with its input normalized by true statistics, so that a
spoiled layer does not make those after it look bad. 0.5 is a mean that is one standard
deviation off; in many layers at once much less is felt, and so the test accuracy is
shown with and without the damage.

CHECKPOINT is a file of `train`, the folder of a run, or any model's Flax variables with
`batch_stats` in them (flax.serialization.to_bytes); these are shown without divergence.

examples:
  python -m jaxbn inspect runs/cnn
  python -m jaxbn inspect runs/cnn/flax.msgpack --json flax.json

exit code: 0; 1 a demo package is missing; 2 a wrong flag or file
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a msgpack file, or the folder of a run",
    )
    for name, what in (("json", "all figures"), ("png", "the picture")):
        parser.add_argument(
            f"--{name}",
            type=Path,
            metavar="FILE",
            help=f"where to write {what} (default: beside the checkpoint, "
            f"<name>.inspect.{name})",
        )


def run(args: argparse.Namespace) -> int:
    """Inspect, print and write."""
    from jaxbn.cli import _inspect_run  # matplotlib and others: not for --help

    return _inspect_run.execute(args.checkpoint, args.json, args.png)
