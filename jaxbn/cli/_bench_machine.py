"""On what the figures were made."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Iterable
from typing import Any

import jax


def describe(distributions: Iterable[str]) -> dict[str, Any]:
    """The machine, the device, the date and the versions; None for what is not told."""
    names = dict.fromkeys(["jaxbn", "jax", "jaxlib", *distributions])
    on_cpu = jax.default_backend() == "cpu"
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
        "backend": jax.default_backend(),
        "device": _cpu_model() if on_cpu else jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
    }


def line(machine: dict[str, Any]) -> str:
    """The same for people."""
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    memory = machine["memory_gib"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores"
        + (f", {memory:.0f} GiB" if memory else "")
        + f"; JAX on {machine['backend']}"
        + (f" ({machine['device']})" if machine["backend"] != "cpu" else "")
        + f"; Python {machine['python']}, {versions}; {machine['date'][:10]}"
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a folder, say


def _cpu_model() -> str:
    try:
        for text in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None  # not POSIX
