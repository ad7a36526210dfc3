"""Flags and their errors: whatever is wrong is said in one line."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn


class CommandError(Exception):
    """The command cannot do what was asked; the message says why in one line."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage above it."""

    def __init__(self, **kwargs: Any):
        # A flag that is abbreviated today is ambiguous when the next one is added.
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after one line on stderr."""
        self.fail(message, status=2)

    def fail(self, message: str, *, status: int) -> NoReturn:
        """Exit with this code after one line on stderr."""
        line = printable(" ".join(message.split()))
        self.exit(status, f"{self.prog}: error: {line}\n")


def printable(text: str) -> str:
    """Text out of somebody's file, made such that it cannot steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def integer_from(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of a flag that takes an integer between low and high, both included."""
    wanted = f"an integer of at least {low}"
    if high is not None:
        wanted = f"an integer from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {wanted}; got {text!r}")
        return value

    return parse


def positive_float(text: str) -> float:
    """The type of a flag that takes a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number > 0; got {text!r}")
    return value
