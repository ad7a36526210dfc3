"""`python -m jaxbn train`: real data, from the first step to the learning curves."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from jaxbn.cli._arguments import CommandError, integer_from, positive_float
from jaxbn.cli._settings import DEFAULTS, NORMS, Settings

SUMMARY = "train a small network on handwritten digits, with and without batch norm"

DESCRIPTION = """\
Train a small network on scikit-learn's 1,797 handwritten digits (360 of them, every
class in its proportion, are kept for testing), with one or more kinds of
normalization, one after the other, from the same weights and with the same batches.

examples:
  python -m jaxbn train                                 a CNN to 97 % and more
  python -m jaxbn train --model mlp --norm jaxbn none   what batch norm is good for
  python -m jaxbn train --norm jaxbn flax               the same curve twice
  python -m jaxbn train --resume                        after Ctrl-C, or to go on
  python -m jaxbn train --devices 8                     batches split eight ways

several processes, each with a device, or two with --devices 2 (one line for each):
  python -m jaxbn train --coordinator HOST:PORT --num-processes 2 --process-id 0
  python -m jaxbn train --coordinator HOST:PORT --num-processes 2 --process-id 1
The other flags are the same for all. Process 0 alone prints and writes; only for
--resume must the others see its folder, too, which they read. All listen on HOST's
network only, without encryption or passwords: let it be one you trust. They wait a
minute for each other. If one dies, the others end with an error within half a minute,
and the last checkpoint is intact; Ctrl-C in one stops all.

written to the folder --out:
  <norm>.msgpack   checkpoint (flax.serialization): weights, statistics, optimizer, step
  metrics.json     the settings, the final table, the loss of each step
  curves.png       test accuracy and training loss against steps

Ctrl-C stops after the current step and writes all of these; even after kill -9, a
resumed run ends in the same bits as one that was never stopped. A checkpoint does not
depend on the number of devices; the last bits of its numbers do.

exit code: 0; 1 a demo package is missing, or another process has died; 2 a wrong flag
or file; 130 after Ctrl-C
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags. A default of None lets a resumed run keep its own."""

    def defaults(name: str) -> str:
        values = (f"{getattr(DEFAULTS[model], name)} for {model}" for model in DEFAULTS)
        return "default: " + ", ".join(values)

    parser.add_argument(
        "--model",
        choices=tuple(DEFAULTS),
        help="cnn: a residual network of 5 convolutions, SGD with momentum; mlp: 3 "
        "hidden layers of 100 sigmoids, plain SGD (Ioffe & Szegedy 2015, section 4.1) "
        "(default: cnn)",
    )
    parser.add_argument(
        "--norm",
        nargs="+",
        choices=NORMS,
        help="jaxbn.linen.BatchNorm, no normalization, flax.linen.BatchNorm: one or "
        "more, in this order; with --resume, added to those of the run "
        "(default: jaxbn)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where to write; an earlier run there is moved to FOLDER.1, FOLDER.2, "
        "..., unless --resume is given (default: runs/<model>)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, with its settings; --epochs and --norm may "
        "extend it, the rest cannot be changed; where there is no run yet, begin one",
    )
    parser.add_argument(
        "--epochs",
        type=integer_from(1),
        metavar="N",
        help=f"passes over the training set ({defaults('epochs')})",
    )
    parser.add_argument(
        "--batch-size",
        type=integer_from(2),
        metavar="N",
        help=f"images in a batch, at least 2 ({defaults('batch_size')})",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive_float,
        metavar="RATE",
        help=f"constant ({defaults('learning_rate')})",
    )
    parser.add_argument(
        "--seed",
        type=integer_from(0, 2**31 - 1),
        metavar="N",
        help="decides the first weights and the order of the batches (default: 0)",
    )
    parser.add_argument(
        "--devices",
        type=integer_from(1),
        metavar="N",
        help="split each batch, of which N must be a divisor, over N devices; a CPU "
        "is made into N (default: 1)",
    )
    parser.add_argument(
        "--coordinator",
        type=_address,
        metavar="HOST:PORT",
        help="train with other processes: where process 0 listens, and the others "
        "find it",
    )
    parser.add_argument(
        "--num-processes",
        type=integer_from(1),
        metavar="N",
        help="how many there are; the batch is split over the devices of all",
    )
    parser.add_argument(
        "--process-id",
        type=integer_from(0),
        metavar="I",
        help="which of them this one is, from 0",
    )


def _address(text: str) -> tuple[str, int]:
    """The type of --coordinator."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # as IPv6 is written
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise argparse.ArgumentTypeError(f"must be HOST:PORT; got {text!r}")
    return host, int(port)


def _group(args: argparse.Namespace) -> dict[str, Any]:
    """Devices and processes, as far as they were named."""
    names = ("coordinator", "num_processes", "process_id")
    group = {name: getattr(args, name) for name in names}
    missing = ["--" + name.replace("_", "-") for name in names if group[name] is None]
    if len(missing) == len(names):
        return {"devices": args.devices}
    if missing:
        raise CommandError(
            "--coordinator, --num-processes and --process-id belong together; "
            f"{' and '.join(missing)} not given"
        )
    if args.process_id >= args.num_processes:
        raise CommandError(
            f"argument --process-id: must be less than --num-processes "
            f"{args.num_processes}; got {args.process_id}"
        )
    return {"devices": args.devices} | group


def run(args: argparse.Namespace) -> int:
    """Train, and write what came of it."""
    names = [field.name for field in dataclasses.fields(Settings)]
    given = {
        name: value for name in names if (value := getattr(args, name)) is not None
    }
    if "norm" in given:
        given["norm"] = tuple(given["norm"])
        if len(set(given["norm"])) < len(given["norm"]):
            raise CommandError("argument --norm: name each norm only once")
    folder = args.out or Path("runs", given.get("model", "cnn"))

    group = _group(args)

    # scikit-learn, matplotlib and others: not for --help
    from jaxbn.cli import _processes, _run

    group = _processes.Group(**group)
    plan = _run.prepare(
        given, folder, resume=args.resume, num_devices=group.num_devices
    )
    with _processes.joined(group, plan.in_common()) as mesh:
        return _run.execute(_run.begin(plan, mesh))
