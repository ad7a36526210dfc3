"""`python -m jaxbn bench`: beside other libraries, against a floor."""

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

from jaxbn.cli._arguments import CommandError, integer_from
from jaxbn.cli._bench_peers import OURS, PEERS
from jaxbn.cli._bench_suite import (
    DEFAULT_SUITES,
    DTYPES,
    MODES,
    QUICK_MODES,
    SUITES,
    groups,
)

SUMMARY = "measure time and memory beside other libraries' batch norm"

DESCRIPTION = """\
Measure jaxbn beside every batch norm that is installed, on the current backend, over
layers as they occur. All are compiled beforehand and called in turn, in an order that
changes from round to round; PyTorch, on the CPU, has a process of its own, which sleeps
while it is not asked. Medians are shown.

columns:
  ms        of one call, which returns all that a training step would use
  copies    the time over that of x * a + b in the same rounds, for each layer. The
            floor of forward + backward is 4, where x does not fit a cache: x is read
            4 times, dy twice, y and dx are written, and a copy is one of each
  over jaxbn            the time over jaxbn's: more than 1 is slower than jaxbn
  sizes accessed        the bytes that XLA counts in all operations, over those of x;
            for the part of x whose mean jaxbn takes first, on the CPU, XLA counts up
            to a whole x
  sizes temp., kept     likewise, of temporaries, and of what JAX keeps for the backward

Memory that was freed is used again (under glibc malloc is set so, for PyTorch too):
pages from the system would cost more than all passes over them. Small layers stay in a
cache, where a copy is cheap beside the call itself. The chain, eight layers in one
program, is the nearest to a training step.

examples:
  python -m jaxbn bench --quick                          a minute or so
  python -m jaxbn bench --suite critic tabular --dtype bfloat16
  python -m jaxbn bench --peers flax-fast --mode chain   one other library

Ctrl-C prints and writes what there is until then.

exit code: 0; 1 a demo package is missing; 2 a wrong flag or file; 130 after Ctrl-C
"""

QUICK_ROUNDS, ROUNDS = 9, 25
# A group of a slow layer gets fewer rounds, unless --rounds is given.
QUICK_SECONDS, SECONDS = 1.5, 2.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""

    def several(flag: str, names: Iterable[str], help: str) -> None:
        names = tuple(names)
        parser.add_argument(flag, nargs="+", choices=names, metavar="NAME", help=help)

    peers = [name for name in PEERS if name != OURS]
    modes = "; ".join(f"{name}: {text}" for name, text in MODES.items())
    several(
        "--suite",
        SUITES,
        f"layers: {', '.join(SUITES)}; tiny takes seconds (default: all but tiny)",
    )
    several("--peers", peers, f"beside jaxbn: {', '.join(peers)} (default: all)")
    several("--dtype", DTYPES, f"of x: {', '.join(DTYPES)} (default: all)")
    several("--mode", MODES, f"{modes} (default: all)")
    parser.add_argument(
        "--rounds",
        type=integer_from(1),
        metavar="N",
        help=f"of calls in each group (default: as many as fit into {SECONDS:g} s, "
        f"from 3 to {ROUNDS})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one layer of each suite, few rounds, and unless --mode is given only "
        "forward+backward and chain",
    )
    contents = {"json": "all figures", "png": "the chart, copies against the floor"}
    for name, content in contents.items():
        path = Path("runs", "bench", f"bench.{name}")
        parser.add_argument(
            f"--{name}",
            type=Path,
            metavar="FILE",
            default=path,
            help=f"where to write {content}; replaced if it exists (default: {path})",
        )
    parser.add_argument(
        "--seed",
        type=integer_from(0, 2**31 - 1),
        metavar="N",
        default=0,
        help="decides the inputs and the order of the calls (default: 0)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    modes = args.mode or (QUICK_MODES if args.quick else MODES)
    suites, dtypes, peers, modes = (
        tuple(dict.fromkeys(names))
        for names in (
            args.suite or DEFAULT_SUITES,
            args.dtype or DTYPES,
            args.peers or [name for name in PEERS if name != OURS],
            modes,
        )
    )
    chosen = groups(suites, dtypes, modes, quick=args.quick)
    if not chosen:
        raise CommandError(
            f"there is nothing to measure: no layer of {', '.join(suites)} has the "
            f"mode {' or '.join(modes)}"
        )
    if args.json == args.png:
        raise CommandError(f"--json and --png are the same file {args.json}")

    from jaxbn.cli import _bench_run  # matplotlib and others: not for --help

    limits = (args.rounds, math.inf)
    if args.rounds is None:
        limits = (QUICK_ROUNDS, QUICK_SECONDS) if args.quick else (ROUNDS, SECONDS)
    settings = {
        "suite": suites,
        "peers": peers,
        "dtype": dtypes,
        "mode": modes,
        "quick": args.quick,
        "rounds": args.rounds,
        "seed": args.seed,
    }
    return _bench_run.execute(
        _bench_run.Plan(
            groups=chosen,
            peers=[OURS, *peers],
            limits=_bench_run.Limits(*limits),
            seed=args.seed,
            json=args.json,
            png=args.png,
            settings=settings,
        )
    )
