"""Our side of the process in which PyTorch is timed."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

from jaxbn.cli import _bench_memory, _bench_torch
from jaxbn.cli._bench_suite import Group

# Idle threads sleep at once, whichever OpenMP this PyTorch was built with.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


class WorkerError(Exception):
    """PyTorch could not do it, or its process is gone."""


class Worker:
    """A process that times PyTorch on request, and is idle otherwise.

    A context manager: the process ends with it, and with ours, however that ends.
    """

    def __init__(self):
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `close`)
        self.process = subprocess.Popen(
            # By path and with -P: a folder with an inspect.py must not be on its path.
            [sys.executable, "-P", _bench_torch.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            env=os.environ | PASSIVE | _bench_memory.ENVIRONMENT,
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process; it takes its leave when its stdin ends."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.stderr.close()

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.process.poll() is None

    def build(self, group: Group, seed: int) -> None:
        """Make the layer of a group ready."""
        self._ask(
            build={
                "shape": group.case.shape,
                "dtype": group.dtype,
                "seed": seed,
                "mode": group.mode,
                "axis": group.case.axis,
                "num_layers": group.num_layers,
            }
        )

    def seconds(self, calls: int) -> float:
        """The time that some calls take."""
        return self._ask(time={"calls": calls})["seconds"]

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            self.stderr.seek(0)
            last = self.stderr.read().strip().splitlines()[-1:]
            raise WorkerError(": ".join([f"its process ended with code {code}", *last]))
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer
