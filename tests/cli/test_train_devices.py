"""`python -m jaxbn train` over several devices, and in several processes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from cases import FUSES_SUMS
from runs import train

from jaxbn.cli import _digits, _files
from jaxbn.cli._settings import DEFAULTS
from jaxbn.cli._training import Trainer

# 2 epochs of 22 steps.
SHORT = ("--model", "mlp", "--batch-size", 64, "--epochs", 2)
ENDLESS = ("--model", "mlp", "--batch-size", 64, "--epochs", 10**6)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def group(
    port: int, process: int, processes: int = 2, host: str = "127.0.0.1"
) -> tuple[object, ...]:
    coordinator = ("--coordinator", f"{host}:{port}")
    return *coordinator, "--num-processes", processes, "--process-id", process


class Processes:
    """`train` in processes of their own; none outlives its test."""

    def __init__(self):
        self.all: list[subprocess.Popen[str]] = []

    def start(self, *flags: object, code: str = "", **env: str) -> None:
        """One more process, with one CPU device, after some code."""
        process = runs.start(code, *flags, **{"XLA_FLAGS": "", **env})
        self.all.append(process)

    def pair(
        self, *flags: object, code: str = "", host: str = "127.0.0.1", **env: str
    ) -> None:
        """Processes 0 and 1 of 2."""
        port = free_port()
        for process in range(2):
            self.start(*group(port, process, host=host), *flags, code=code, **env)

    def end(self, process: int, seconds: float = 120) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of one that ends within some seconds."""
        out, err = self.all[process].communicate(timeout=seconds)
        return self.all[process].returncode, out, err

    def wait_for_checkpoint(self, folder: Path, steps: int) -> None:
        """Until one with so many steps is there."""
        deadline = time.monotonic() + 120
        while step_in(folder) < steps:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.all), self.end(0)
            time.sleep(0.1)


@pytest.fixture
def processes():
    started = Processes()
    yield started
    for process in started.all:
        process.kill()
        process.communicate()


def step_in(folder: Path) -> int:
    return _files.load_checkpoints(folder).get("jaxbn", {"step": -1})["step"]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to compare with; nothing is written to it."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert train(*SHORT, "--out", folder) == 0
    return folder


def assert_same_run(folder: Path, other: Path) -> None:
    """The same up to the order in which float32 numbers were added.

    This holds for `mlp`, whose sigmoids are smooth, for some hundred steps: here the
    largest difference is about 2e-6. With the ReLUs of `cnn` a rounding error sooner
    or later moves a zero, and then everything by 1e-4; the first steps agree.
    """
    a, b = (_files.load_checkpoints(path)["jaxbn"] for path in (folder, other))
    assert a["settings"] == b["settings"]
    assert a["accuracies"].tolist() == b["accuracies"].tolist()
    np.testing.assert_allclose(a["losses"], b["losses"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        a["state"],
        b["state"],
    )


# Several devices


def test_eight_devices_train_as_one(one_device, tmp_path):
    assert train(*SHORT, "--devices", 8, "--out", tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", one_device)


def test_convolutions_begin_the_same():
    from jaxbn.cli._mesh import Mesh

    digits, networks = _digits.load(), []
    for count in (1, 8):
        mesh = Mesh(jax.devices()[:count])
        trainer = Trainer(DEFAULTS["cnn"], "jaxbn", mesh)
        network = trainer.start()
        network.state = mesh.replicate(network.state)
        steps = trainer.advance(network, digits)
        for _ in range(5):
            next(steps)
        networks.append(network)
    one, eight = networks
    np.testing.assert_allclose(one.losses, eight.losses, rtol=1e-5)
    # A sum that XLA:CPU makes a tree of is another one on each number of devices.
    tolerance = 1e-5 if FUSES_SUMS else 5e-5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        *(network.state.batch_stats for network in networks),
    )


def test_checkpoint_does_not_depend_on_the_number_of_devices(one_device, tmp_path):
    folder = tmp_path / "run"
    flags = (*SHORT[:4], "--devices", 4, "--epochs", 1)
    assert train(*flags, "--out", folder) == 0
    for devices, epochs in ((2, 2), (8, 3), (1, 4)):
        resumed = ("--resume", "--out", folder, "--devices", devices)
        assert train(*resumed, "--epochs", epochs) == 0
        if epochs == 2:
            assert_same_run(folder, one_device)
    assert step_in(folder) == 4 * 22


# Several processes


def test_two_processes_train_as_one(one_device, tmp_path, processes):
    # A proxy is not asked for the way to 127.0.0.1.
    nowhere = "http://127.0.0.1:9"
    folder = tmp_path / "run"
    flags = (*SHORT, "--out", folder, "--devices", 2)
    processes.pair(*flags, http_proxy=nowhere, https_proxy=nowhere)
    code, out, err = processes.end(0)
    assert (code, err) == (0, "")
    assert "test accuracy" in out
    assert "Gloo" not in out
    assert processes.end(1) == (0, "", "")
    assert_same_run(folder, one_device)
    names = {"curves.png", "jaxbn.msgpack", "metrics.json"}
    assert {path.name for path in folder.iterdir()} == names


def listening(process: int) -> set[str]:
    """The addresses that a process listens on, as in /proc/net/tcp."""
    links = [os.readlink(path) for path in Path(f"/proc/{process}/fd").iterdir()]
    sockets = {link.removeprefix("socket:[").removesuffix("]") for link in links}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in sockets:
                found.add(words[1].partition(":")[0])
    return found


def test_ctrl_c_in_one_process_stops_both(one_device, tmp_path, processes):
    folder = shutil.copytree(one_device, tmp_path / "run")  # of one device
    # Another of the machine's own addresses, where there is a second one.
    host = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
    flags = ("--resume", "--out", folder, "--epochs", 10**6)
    processes.pair(*flags, host=host)
    processes.wait_for_checkpoint(folder, 3 * 22)
    if sys.platform == "linux":
        # The coordinator where it is told; gloo where the way to it begins.
        mapped = "0000000000000000FFFF0000"
        told = {"0200007F", mapped + "0200007F"}
        ways = {"0100007F", mapped + "0100007F"}
        first, second = (listening(process.pid) for process in processes.all)
        assert first & told
        assert first & ways
        assert first <= told | ways
        assert second
        assert second <= ways
    processes.all[1].send_signal(signal.SIGINT)
    code, out, _ = processes.end(0)
    assert code == 130
    assert "interrupted" in out
    assert processes.end(1) == (130, "", "")
    assert step_in(folder) >= 3 * 22


@pytest.mark.parametrize("victim", [0, 1])
def test_none_outlives_a_process_that_is_killed(victim, tmp_path, processes):
    folder = tmp_path / "run"
    processes.pair(*ENDLESS, "--out", folder)
    processes.wait_for_checkpoint(folder, 22)
    processes.all[victim].kill()
    code, _, err = processes.end(1 - victim, seconds=60)
    # JAX may be the first to see that the coordinator is gone, and end this process
    # in a way of its own, in the middle of our line.
    assert code not in (0, 130)
    if victim == 1:
        assert code == 1
        assert f"jaxbn train: error: process {1 - victim}: " in err
    epochs = 1 + step_in(folder) // 22  # the checkpoint is intact
    assert train("--resume", "--out", folder, "--epochs", epochs) == 0
    assert step_in(folder) == 22 * epochs


def test_none_outlives_a_process_whose_disk_is_full(tmp_path, processes):
    code = "import resource as r\nr.setrlimit(r.RLIMIT_FSIZE, (10_000, 10_000))\n"
    processes.pair(*ENDLESS, "--out", tmp_path / "run", code=code)
    line = f"process 0: cannot write {tmp_path}/run/jaxbn.msgpack: File too large"
    code, _, err = processes.end(0)
    assert (code, err) == (2, f"jaxbn train: error: {line}\n")
    code, _, err = processes.end(1, seconds=60)
    assert code not in (0, 130)  # JAX may be the first to see it, as above
    assert not list((tmp_path / "run").iterdir())


def test_none_waits_for_a_process_that_hangs(tmp_path, processes):
    code = "from jaxbn.cli import _watch as w\nw.SILENT_SECONDS = 8\n"
    processes.pair(*ENDLESS, "--out", tmp_path / "run", code=code)
    processes.wait_for_checkpoint(tmp_path / "run", 22)
    processes.all[1].send_signal(signal.SIGSTOP)
    line = "jaxbn train: error: process 0: no sign of life from process 1\n"
    code, _, err = processes.end(0, seconds=40)
    assert code == 1, err
    assert err.startswith(line)  # JAX may log the loss too, if it sees it in time


def test_processes_wait_for_each_other_for_a_time(tmp_path, processes):
    code = "from jaxbn.cli import _watch as w\nw.JOIN_SECONDS = 2\n"
    port = free_port()
    flags = (*SHORT, "--out", tmp_path / "run")
    processes.start(*group(port, 1), *flags, code=code)
    line = "jaxbn train: error: process 1: no sign of life from process 0\n"
    code, out, err = processes.end(0, seconds=60)
    assert (code, out) == (1, "")
    assert err.startswith(line)  # JAX may log the loss too
    assert not list(tmp_path.iterdir())


def test_processes_must_agree(tmp_path, processes):
    port = free_port()
    for process in range(2):
        flags = (*SHORT, "--out", tmp_path / "run", "--seed", process)
        processes.start(*group(port, process), *flags)
    for process in range(2):
        line = f"process {process}: --seed: {process} here, {1 - process} in process"
        code, _, err = processes.end(process)
        assert code == 2
        assert err == f"jaxbn train: error: {line} {1 - process}\n"


# What is refused


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--devices", "0"), "--devices"),
        (("--devices", "9", "--batch-size", "9"), "9 of 8 cpu devices"),
        (("--devices", "7"), "--batch-size: must be a multiple of 7"),
        (("--process-id", "0"), "--coordinator and --num-processes not given"),
        (("--coordinator", "127.0.0.1:80"), "--num-processes and --process-id"),
        (group(80, 2), "--process-id: must be less than --num-processes 2; got 2"),
        (group(80, -1), "--process-id"),
        (group(80, 0, processes=0), "--num-processes"),
        (group(80, 0, processes=7), "--batch-size: must be a multiple of 7"),
        (group(0, 0), "--coordinator: must be HOST:PORT"),
        (group(65536, 0), "--coordinator"),
        (("--coordinator", "127.0.0.1"), "--coordinator"),
        (("--coordinator", ":80"), "--coordinator"),
        (("--coordinator", "[::1]:"), "--coordinator"),
    ],
)
def test_bad_flag_is_one_line(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    jax.devices()  # as many as there are before `--devices` asks for more
    with pytest.raises(SystemExit) as caught:
        train(*flags)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.startswith("jaxbn train: error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_port_that_is_taken_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(SystemExit) as caught:
            train(*group(port, 0))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"--coordinator: cannot listen on 127.0.0.1 port {port}" in error
    assert error.count("\n") == 1


def test_one_process_needs_no_network(one_device, tmp_path):
    flags = (*SHORT, "--out", tmp_path / "run")
    assert train(*group(free_port(), 0, processes=1), *flags) == 0
    assert (tmp_path / "run" / "jaxbn.msgpack").read_bytes() == (
        one_device / "jaxbn.msgpack"
    ).read_bytes()
