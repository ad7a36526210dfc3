"""That no process of a run outlives another."""

import contextlib
import itertools
import os
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax

from jaxbn.cli._arguments import CommandError

# Seconds that the processes wait for each other at the start, and for a sign of life.
JOIN_SECONDS = 60
SILENT_SECONDS = 15


class Watch:
    """Ends this process when another one gives no sign of life.

    A collective with a process that has died raises an error, or waits for ever; and
    a call to a coordinator that hangs does not return. So one thread exchanges signs
    of life by way of the coordinator, and a second one only looks at the clock.
    """

    def __init__(self, process_id: int, num_processes: int):
        self.process_id = process_id
        self.stopped = threading.Event()
        self.limit = JOIN_SECONDS
        others = [i for i in range(num_processes) if i != process_id]
        self.heard = dict.fromkeys(others, time.monotonic())
        self._once = threading.Lock()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self.stopped.wait(0.5):
            late = time.monotonic() - self.limit
            silent = [process for process, at in self.heard.items() if at < late]
            if silent:  # if the coordinator, process 0, is, then so are all
                self.end(f"no sign of life from process {silent[0]}", 1)

    def begin(self, client: Any) -> None:
        """All have joined: from now on they send signs of life."""
        self.heard = dict.fromkeys(self.heard, time.monotonic())
        self.limit = SILENT_SECONDS
        threading.Thread(target=self._exchange, args=[client], daemon=True).start()

    def _exchange(self, client: Any) -> None:
        seen = {}
        own = f"jaxbn/alive/{self.process_id}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no coordinator
            for number in itertools.count():
                client.key_value_set(own, str(number), allow_overwrite=True)
                for key, value in client.key_value_dir_get("jaxbn/alive/"):
                    if seen.get(key) != value:
                        seen[key] = value
                        self.heard[int(key.rpartition("/")[2])] = time.monotonic()
                if self.stopped.wait(1):
                    return

    def fail(self, error: BaseException) -> NoReturn:
        """End this process because of an error in it."""
        if isinstance(error, CommandError | OSError):
            self.end(str(error), 2)
        if isinstance(error, KeyboardInterrupt):
            self.end("interrupted", 130)
        if "Gloo" in str(error):  # a RuntimeError or a ValueError
            self.end("another process has ended, or cannot be reached", 1)
        traceback.print_exception(error)
        self.end("ended by the error above", 1)

    def end(self, message: str, status: int) -> NoReturn:
        """End this process, in whichever thread: with one line, and without waiting."""
        self._once.acquire()
        line = f"process {self.process_id}: {' '.join(message.split())}"
        print("jaxbn train: error:", line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        if self.process_id == 0:
            # JAX aborts those that lose their coordinator: let them say the same first.
            time.sleep(1)
        os._exit(status)
