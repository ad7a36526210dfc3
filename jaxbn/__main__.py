"""`python -m jaxbn`: one command, one module in `jaxbn.cli`."""

import sys
from collections.abc import Sequence

from jaxbn.cli import bench, check, inspect, reproduce, train
from jaxbn.cli._arguments import CommandError, Parser

COMMANDS = {
    "train": train,
    "bench": bench,
    "check": check,
    "inspect": inspect,
    "reproduce": reproduce,
}

# What the commands import beyond the library's own dependencies.
DEMO = {"matplotlib", "optax", "rich", "sklearn"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 130 after Ctrl-C.

    Args:
      argv: The words after the program's name; by default those of this process.

    Returns:
      The exit code. What is wrong with the arguments is said in one line on stderr,
      and ends in `SystemExit(2)`; a missing demo package, likewise, in `SystemExit(1)`.
    """
    parser = Parser(prog="jaxbn", description="Batch normalization for JAX, shown.")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.SUMMARY, description=module.DESCRIPTION
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    args, unknown = parser.parse_known_args(argv)

    command: Parser = args.parser
    if unknown:  # said by the command; `parse_args` would leave out its name
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return args.run(args)
    except (CommandError, OSError) as error:
        command.error(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in DEMO:
            raise
        command.fail(
            f"{package} is not installed; run: pip install 'jaxbn[demo]'", status=1
        )
    except KeyboardInterrupt:  # before there was anything to keep
        return 130


if __name__ == "__main__":
    sys.exit(main())
