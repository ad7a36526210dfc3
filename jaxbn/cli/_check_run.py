"""Running `check`: devices, a progress bar, the table, the exit code."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxbn.cli import _bench_machine, _check_cases, _files


def execute(devices: int | None, seed: int, json_file: Path | None) -> int:
    """Check everything; 0 where all errors are within their tolerance, else 1.

    Raises:
      CommandError: The file cannot be written.
    """
    if json_file is not None:
        _files.make_room(json_file)
    if devices:
        # Has come too late where JAX has its devices.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", devices)
    console = Console()
    machine = _bench_machine.describe(["jax", "jaxlib", "numpy"])
    console.print(_bench_machine.line(machine), highlight=False)
    console.print(f"{jax.device_count()} x {jax.devices()[0].device_kind}")
    rows = []
    cases = list(_check_cases.cases())
    for case in track(cases, "checking", console=console, transient=True):
        errors = _check_cases.errors(case, seed)
        limit = case.tolerance()
        rows.append(
            {
                "dtype": np.dtype(case.dtype).name,
                "case": case.name,
                "tolerance": limit,
                "errors": errors,
                "failed": [name for name, error in errors.items() if error > limit],
            }
        )
    console.print(_table(rows))
    for row in rows:
        for name in row["failed"]:
            error = f"off by {row['errors'][name]:.0e}, may be {row['tolerance']:.0e}"
            console.print(f"FAILED: {row['dtype']}, {row['case']}: {name} is {error}")
    if json_file is not None:
        content = {"machine": machine, "seed": seed, "rows": rows}
        _files.write(json_file, json.dumps(content, indent=2, default=str).encode())
    failed = sum(bool(row["failed"]) for row in rows)
    console.print(f"{len(rows) - failed} of {len(rows)} are right")
    return 1 if failed else 0


def _table(rows: list[dict]) -> Table:
    groups = {
        "y": ("y", "y, inference"),
        "stats": ("mean", "var"),
        "gradients": ("dx", "dscale", "dbias"),
    }
    table = Table("dtype", "case", *groups, "may be", "", title="relative errors")
    for row in rows:
        worst = [
            max(row["errors"][name] for name in names) for names in groups.values()
        ]
        cells = [f"{error:.0e}" for error in (*worst, row["tolerance"])]
        verdict = "[bold red]no[/]" if row["failed"] else "ok"
        table.add_row(row["dtype"], row["case"], *cells, verdict)
    return table
