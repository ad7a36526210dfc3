"""`jaxbn bench`: beside other libraries, against a floor."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxbn.cli import common
from jaxbn.cli.bench import cases, layers, measure, programs, report

DESCRIPTION = """\
Measure jaxbn beside every batch norm that is installed, on the current backend, over
layers as they occur. All are compiled beforehand and called in turn, in an order that
changes from round to round. Medians are shown.

columns:
  ms        of one call, which returns all that a training step would use;
            with a ? the machine was too busy to trust the row
  copies    the time over that of x * a + b in the same rounds, for each layer. The
            floor of forward + backward is 4, where x does not fit a cache: x is read
            4 times, dy twice, y and dx are written, and a copy is one of each
  over jaxbn       the time over jaxbn's: more than 1 is slower than jaxbn
  sizes accessed   the bytes that XLA counts in all operations, over those of x (on the
                   CPU it counts a whole x for the part whose mean jaxbn takes first)
  sizes temp.      the bytes of temporaries, over those of x
  sizes kept       the bytes that JAX keeps for the backward pass, over those of x

examples:
  jaxbn bench --quick                         a minute or so
  jaxbn bench --suite critic --peers flax-fast --mode forward+backward inference

Ctrl-C prints and writes the layers that were measured until then.

exit code: 0; 1 a demo package is missing; 2 a wrong flag or file; 130 after Ctrl-C
"""

# Rounds, and the seconds after which a slow group gets no more.
QUICK_LIMITS, LIMITS = (9, 1.5), (25, 2.5)


def add_arguments(parser: common.Parser) -> None:
    """Add the flags."""

    def several(flag: str, names: Iterable[str], default: Iterable[str], text: str):
        help = f"{text} (default: all): {', '.join(names)}"
        choices = {"nargs": "+", "choices": [*names], "default": [*default]}
        parser.add_argument(flag, metavar="NAME", help=help, **choices)

    peers = [name for name in layers.PEERS if name != layers.OURS]
    several("--suite", cases.SUITES, cases.SUITES[:-1], "layers, tiny only if named")
    several("--peers", peers, peers, "libraries beside jaxbn")
    several("--dtype", cases.DTYPES, cases.DTYPES, "dtypes of x")
    modes = "what one call computes; chain is eight layers, the nearest to a real model"
    several("--mode", cases.MODES, (), modes)
    text = "rounds of calls (default: as many as fit into 2.5 s)"
    parser.add_number("--rounds", text)
    text = "few layers, few rounds, and the modes with gradients"
    parser.add_argument("--quick", action="store_true", help=text)
    text = "where to write all figures (default: %(default)s)"
    parser.add_file("--json", text, Path("runs", "bench", "bench.json"))


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    if not args.mode:
        args.mode = [*(cases.GRADIENT_MODES if args.quick else cases.MODES)]
    groups = cases.groups(args.suite, args.dtype, args.mode, quick=args.quick)
    if not groups:
        raise common.CommandError("there is nothing to measure: no layer has this mode")
    common.make_room("--json", args.json)
    common.first_line(f"measuring {len(groups)} groups: a layer, its dtype and a mode")
    measure.keep_freed_memory()
    common.virtual_devices(2)  # to count all-reduces; one of them has all threads
    found, missing = layers.find([layers.OURS, *args.peers])
    machine = report.machine({layers.PEERS[name].distribution for name in found})
    if "torch" in found and machine["backend"] != "cpu":
        found.remove("torch")
        missing["torch"] = "timed on the CPU only, and JAX is not on the CPU here"
    out = common.console()
    out.print(report.machine_line(machine))
    for name, reason in missing.items():
        out.print(f"without {name}: {reason}")

    rounds, seconds = QUICK_LIMITS if args.quick else LIMITS
    if args.rounds:
        rounds, seconds = args.rounds, float("inf")
    content: dict[str, Any] = {"machine": machine, "missing": missing}
    content["settings"] = {
        name: getattr(args, name)
        for name in ("suite", "peers", "dtype", "mode", "quick", "rounds")
    }
    content |= {"floor_in_copies": cases.FLOOR_IN_COPIES, "interrupted": False}
    content |= {"rows": [], "failures": [], "all_reduces": {}}
    # Ctrl-C counts at each `show`: raised inside JAX, it can crash the process.
    with common.deferred_interrupts() as interrupted, common.progress(out) as bar:
        task = bar.add_task("measuring", total=len(groups), seen="")

        def show(text: str) -> None:
            if interrupted():
                raise KeyboardInterrupt
            bar.update(task, seen=text)

        try:
            for group in groups:
                rows, failures = measure.measure(group, found, rounds, seconds, show)
                content["rows"] += rows
                content["failures"] += failures
                content["geometric_means"] = report.geometric_means(content["rows"])
                common.write_json(args.json, content)
                bar.advance(task)
            for name in found:
                show(f"counting all-reduces of {name}")
                if build := layers.PEERS[name].build:
                    content["all_reduces"][name] = {
                        "jit": programs.all_reduces(build, named=False),
                        "axis_name": programs.all_reduces(build, named=True),
                    }
        except KeyboardInterrupt:
            if not content["rows"]:
                raise
            content["interrupted"] = True
    common.write_json(args.json, content)
    for each in report.summary(content):
        out.print(each)
    out.print(f"all figures are in {args.json}")
    if content["interrupted"]:
        out.print("interrupted: that is what was measured until then")
    return interrupted()
