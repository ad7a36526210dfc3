"""`python -m jaxbn check`: this machine's batch norms against float64 on the host."""

import argparse
from pathlib import Path

from jaxbn.cli._arguments import integer_from

SUMMARY = "compare values and gradients on this machine with float64 on the host"

DESCRIPTION = """\
Compute batch norms on the devices at hand, and the same in float64 NumPy on the host:
y, the running statistics and the gradients of x, scale and bias, in training and in
inference, for every dtype; with a mask over NaN padding, with channels first, at a mean
of 10,000 standard deviations; and, on several devices, over all of them.

An error is the largest absolute difference, relative to the largest value (at least 1).
It may be the spacing of the dtype, plus 32 spacings of the arithmetic (float32 at
least) times the mean in standard deviations, for sums and for what they are
multiplied with.

examples:
  python -m jaxbn check
  python -m jaxbn check --devices 8 --json check.json

exit code: 0 all is well; 1 something FAILED, or a demo package is missing; 2 a flag
is wrong
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument(
        "--devices",
        type=integer_from(1),
        metavar="N",
        help="make N virtual devices of the CPU",
    )
    parser.add_argument(
        "--seed", type=integer_from(0), default=0, metavar="N", help="of the data"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all figures there"
    )


def run(args: argparse.Namespace) -> int:
    """Check, print, and say by the exit code whether all is well."""
    from jaxbn.cli import _check_run  # rich and others: not for --help

    return _check_run.execute(args.devices, args.seed, args.json)
