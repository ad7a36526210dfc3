"""`jaxbn train` over several devices, and in several processes."""

import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from cases import FUSES_SUMS
from runs import checkpoint, metrics, steps, train

from jaxbn.cli.train import DEFAULTS, NORMS
from jaxbn.cli.training import Mesh, Settings, Trainer, load_digits

pytestmark = pytest.mark.processes

# 2 epochs of 22 steps.
SHORT = ("--model", "mlp", "--norm", "jaxbn", "--batch-size", 64, "--epochs", 2)
ENDLESS = (*SHORT[:-1], 10**6)


class Processes:
    """The processes 0 and 1 of a run; none outlives its test."""

    def __init__(self):
        self.all: list[subprocess.Popen[str]] = []

    def start(self, *flags: object, own: tuple = ((), ()), **env: str) -> None:
        """Start both, each with one CPU device, and with flags of its own."""
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{sock.getsockname()[1]}"
        for process in range(2):
            join = ("--join", address, 2, process)
            words = (*join, *flags, *own[process])
            self.all.append(runs.start("", *words, **{"XLA_FLAGS": "", **env}))

    def end(self, process: int, seconds: int = 240) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of one that ends by itself."""
        out, err = self.all[process].communicate(timeout=seconds)
        return self.all[process].returncode, out, err

    def wait_for_checkpoint(self, folder: Path) -> None:
        while not steps(folder):
            assert all(process.poll() is None for process in self.all), self.end(0)
            time.sleep(0.1)


@pytest.fixture
def processes():
    started = Processes()
    yield started
    for process in started.all:
        process.kill()
        process.communicate()


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
    (seen, states), (other_seen, other_states) = map(checkpoint, (folder, other))
    assert seen["settings"] == other_seen["settings"]
    assert seen["accuracies"] == other_seen["accuracies"]
    for norm, losses in seen["losses"].items():
        np.testing.assert_allclose(losses, other_seen["losses"][norm], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        states,
        other_states,
    )


# Several devices


def test_convolutions_begin_the_same():
    settings = Settings("cnn", "digits", NORMS[:1], seed=0, **DEFAULTS["cnn"])
    data, trainers = load_digits(), []
    for count in (1, 8):
        mesh = Mesh(jax.devices()[:count])
        trainer = Trainer(settings, "jaxbn", data, mesh)
        trainer.start()
        for _ in range(5):
            trainer.advance()
        trainers.append(trainer)
    one, eight = trainers
    np.testing.assert_allclose(one.losses, eight.losses, rtol=1e-5)
    # A sum that XLA:CPU makes a tree of is another one on each number of devices.
    tolerance = 1e-5 if FUSES_SUMS else 5e-5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        *(trainer.state.batch_stats for trainer in trainers),
    )


def test_checkpoint_does_not_depend_on_the_number_of_devices(one_device, tmp_path):
    folder = tmp_path / "run"
    flags = (*SHORT[:-2], "--devices", 4, "--epochs", 1)
    assert train(*flags, "--out", folder) == 0
    assert train("--resume", "--out", folder, "--devices", 8, "--epochs", 2) == 0
    assert_same_run(folder, one_device)


# Several processes


def test_two_processes_train_and_resume_as_one(one_device, tmp_path, processes):
    # A proxy is not asked for the way to 127.0.0.1.
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    folder = tmp_path / "run"
    flags = (*SHORT[:-1], 1, "--out", folder, "--devices", 2)
    processes.start(*flags, **nowhere)
    for process in range(2):
        code, out, err = processes.end(process)
        assert (code, err) == (0, "")
        assert ("test accuracy" in out) == (process == 0)
    assert steps(folder) == 22
    assert train("--resume", "--epochs", 2, "--out", folder) == 0
    assert_same_run(folder, one_device)
    rows = [metrics(each)["results"]["jaxbn"] for each in (folder, one_device)]
    for name in ("training_loss", "test_accuracy", "test_accuracy_running_statistics"):
        np.testing.assert_allclose(rows[0][name], rows[1][name], rtol=1e-5)
    names = {"checkpoints", "curves.png", "metrics.json"}
    assert {path.name for path in folder.iterdir()} == names


def test_ctrl_c_in_one_process_stops_both(tmp_path, processes):
    folder = tmp_path / "run"
    processes.start(*ENDLESS, "--out", folder)
    processes.wait_for_checkpoint(folder)
    processes.all[1].send_signal(signal.SIGINT)
    code, out, err = processes.end(0)
    assert (code, err) == (130, "")
    assert "interrupted at step" in out
    assert processes.end(1)[0] == 130
    assert metrics(folder)["results"]["jaxbn"]["steps"] == steps(folder)


@pytest.mark.parametrize("victim", [0, 1])
def test_none_outlives_a_process_that_is_killed(victim, tmp_path, processes):
    folder = tmp_path / "run"
    processes.start(*ENDLESS, "--out", folder)
    processes.wait_for_checkpoint(folder)
    processes.all[victim].kill()
    code, _, err = processes.end(1 - victim, seconds=120)
    assert code not in (0, 130)
    if victim == 1:  # of process 0, the coordinator, JAX may be the first to know
        assert "jaxbn train: error: " in err
    epochs = 1 + steps(folder) // 22  # the last checkpoint restores
    assert train("--resume", "--out", folder, "--epochs", epochs) == 0
    assert steps(folder) == 22 * epochs


def test_processes_must_agree(tmp_path, processes):
    processes.start(
        *SHORT, "--out", tmp_path / "run", own=(("--seed", 0), ("--seed", 1))
    )
    for process in range(2):
        code, _, err = processes.end(process)
        assert code == 2
        line = "jaxbn train: error: the processes differ in flags, or in what --out"
        assert line in err


def test_port_that_is_taken_is_said(tmp_path, processes):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        flags = ("--join", address, 2, 0, "--out", tmp_path / "run")
        processes.all.append(runs.start("", *flags, XLA_FLAGS=""))
        code, _, err = processes.end(0)
    assert code != 0
    assert address in err


def test_one_process_needs_no_other(one_device, tmp_path, processes):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    flags = ("--join", address, 1, 0, *SHORT, "--out", tmp_path / "run")
    processes.all.append(runs.start("", *flags))
    assert processes.end(0)[0] == 0
    runs.assert_same_bits(tmp_path / "run", one_device)
