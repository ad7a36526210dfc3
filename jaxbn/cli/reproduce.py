"""`python -m jaxbn reproduce`: what the papers found, on small real data."""

import argparse
from pathlib import Path

from jaxbn.cli._arguments import integer_from
from jaxbn.cli._reproduce_settings import EXPERIMENTS

SUMMARY = "repeat what the papers found: small, one-class and large batches"

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

The settings, with the reasons for them, are in jaxbn/cli/_reproduce_settings.py; they
were written before the first run. The papers' figures are of other networks and data:
what is to be compared is the order of the rows, not their values.

examples:
  python -m jaxbn reproduce one-class
  python -m jaxbn reproduce momentum --seeds 10

Ctrl-C prints and writes what is finished until then.

exit code: 0; 1 a demo package is missing; 2 a wrong flag or file; 130 after Ctrl-C
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument(
        "experiment",
        choices=tuple(EXPERIMENTS),
        metavar="EXPERIMENT",
        help=f"one of {', '.join(EXPERIMENTS)}",
    )
    parser.add_argument(
        "--seeds",
        type=integer_from(1, 100),
        metavar="N",
        default=5,
        help="seeds 0 to N - 1, each with its weights and batches (default: 5)",
    )
    parser.add_argument(
        "--epochs",
        type=integer_from(1),
        metavar="N",
        help="at most so many passes over the training set, for a quick look",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where to write all figures (default: runs/reproduce/<experiment>.json)",
    )


def run(args: argparse.Namespace) -> int:
    """Train, print and write."""
    from jaxbn.cli import _reproduce_run  # JAX and others: not for --help

    json = args.json or Path("runs", "reproduce", f"{args.experiment}.json")
    return _reproduce_run.execute(args.experiment, args.seeds, args.epochs, json)
