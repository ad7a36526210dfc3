"""What the commands share: flags, the first line, files and Ctrl-C.

This module imports neither JAX nor a demo package, and neither does the top of a
command's module: `--help`, a wrong flag and the first line come at once.

The flags are argparse's. Five commands with flat flags would be no shorter with typer
or tyro, `--help` would be slower, and one more package would have to be installed.
"""

import argparse
import contextlib
import io
import json
import math
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table


class CommandError(Exception):
    """The command cannot do what was asked; the message says why in one line."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage above it."""

    def __init__(self, **kwargs: Any):
        # A flag that is abbreviated today is ambiguous when the next one is added.
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs)

    def add_number(self, flag: str, text: str, low: int = 1, **kwargs: Any) -> None:
        """Add a flag that takes an integer of at least `low`."""
        kwargs.setdefault("type", integer_from(low))
        self.add_argument(flag, metavar="N", help=text, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after one line on stderr."""
        self.fail(f"error: {message}", status=2)

    def fail(self, message: str, *, status: int) -> NoReturn:
        """Exit with this code after one line on stderr."""
        line = printable(" ".join(message.split()))
        self.exit(status, f"{self.prog}: {line}\n")


def printable(text: str) -> str:
    """Return `text` with a question mark for each character that steers a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def integer_from(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Return the type of a flag that takes an integer from `low` to `high`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= (value := int(text)) <= high:
                return value
        wanted = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        raise argparse.ArgumentTypeError(f"must be an integer {wanted}; got {text!r}")

    return parse


def positive_float(text: str) -> float:
    """Parse the value of a flag that takes a finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"must be a finite number > 0; got {text!r}")


def first_line(text: str) -> None:
    """Print what the command does now, before it imports or computes anything slow."""
    print(f"{text} ...", flush=True)


def console(*, quiet: bool = False) -> "Console":
    """Return a console that prints text as it is: no markup, no colours of its own."""
    from rich.console import Console

    return Console(quiet=quiet, markup=False, highlight=False)


def progress(console: "Console") -> "Progress":
    """Return live bars, to be used as a context; the field `seen` stands behind a bar.

    A task with `total=None` is a bar that moves by itself: `compiling`, for example.
    """
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[seen]}", markup=False),
        progress.TimeElapsedColumn(),
        console=console,
    )


def table(*headings: str, words: int = 1, **options: Any) -> "Table":
    """Return a table without rows, in whose first columns are words, then numbers."""
    from rich import box
    from rich.table import Table

    made = Table(**{"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), **options})
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i < words else "right")
    return made


def cell(value: float | None, form: str) -> str:
    """Return a number in this format, and a dash for None."""
    return "–" if value is None else f"{value:{form}}"


def make_folder(flag: str, folder: Path) -> None:
    """Make the folder that a flag names, and refuse it before any work."""
    try:  # permissions do not tell: root may write to /proc by them
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        what = f"argument {flag}: cannot write to {folder}: {error.strerror}"
        raise CommandError(what) from error


def make_room(flag: str, path: Path) -> None:
    """Make the folder of a file that a flag names, and refuse it before any work."""
    make_folder(flag, path.parent)
    if path.is_dir():
        raise CommandError(f"argument {flag}: {path} is a folder")


def write(path: Path, data: bytes) -> None:
    """Replace a file in one step: whenever we are killed, it is the old or the new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # half a file may be what fills the disk
            temporary.unlink()
        raise CommandError(f"cannot write {path}: {error.strerror}") from error


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step; numbers that are not finite become null."""
    text = json.dumps(content, default=lambda array: array.tolist())
    finite = json.loads(text, parse_constant=lambda name: None)
    write(path, json.dumps(finite, indent=1).encode())


def write_png(path: Path, figure: "Figure") -> None:
    """Replace a picture in one step."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write(path, png.getvalue())


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], int]]:
    """Defer Ctrl-C and SIGTERM, so that neither cuts a step or a file in two.

    Yields:
      A function that returns the exit code for the signal that came, or 0: 130 after
      Ctrl-C, 143 after SIGTERM.
    """
    came: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, lambda num, _: came.append(num)) for each in signals]
    try:
        yield lambda: 128 + came[0] if came else 0
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


def virtual_devices(count: int | None) -> None:
    """Let JAX make `count` devices of the CPU; without effect once it has devices."""
    import jax

    if count:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
