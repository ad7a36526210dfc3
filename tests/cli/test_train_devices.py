"""`jaxbn train` over several devices, and in several processes."""

import signal
import socket
import time

import jax
import numpy as np
import pytest
import runs
from runs import SHORT, checkpoint, metrics, steps, train

pytestmark = pytest.mark.processes

ENDLESS = (*SHORT[:-1], 10**6)


@pytest.fixture
def join():
    """Start both processes of a run, each with one CPU device; none outlives it all."""
    started = []

    def start(*flags, own=((), ()), **env):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{sock.getsockname()[1]}"
        for i in range(2):
            words = ("--join", address, 2, i, *flags, *own[i])
            started.append(runs.start("", *words, **{"XLA_FLAGS": "", **env}))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end(process, seconds=240):
    """Exit code, stdout and stderr of a process that ends by itself."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for_checkpoint(folder, processes):
    while not steps(folder):
        assert all(each.poll() is None for each in processes), end(processes[0])
        time.sleep(0.1)


def assert_same_run(folder, other):
    """The same up to the order in which float32 numbers were added.

    This holds for `mlp`, whose sigmoids are smooth, for some hundred steps: here the
    largest difference is about 2e-6.
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


def test_checkpoint_does_not_depend_on_the_number_of_devices(short_run, tmp_path):
    folder = tmp_path / "run"
    assert train(*SHORT[:-1], 1, "--devices", 4, "--out", folder) == 0
    assert train("--resume", "--out", folder, "--devices", 8, "--epochs", 2) == 0
    assert_same_run(folder, short_run)


def test_two_processes_train_and_resume_as_one(short_run, tmp_path, join):
    # A proxy is not asked for the way to 127.0.0.1.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    folder = tmp_path / "run"
    flags = (*SHORT[:-1], 1, "--out", folder, "--devices", 2)
    for i, process in enumerate(join(*flags, **nowhere)):
        code, out, err = end(process)
        assert (code, err) == (0, "")
        assert ("test accuracy" in out) == (i == 0)
    assert steps(folder) == 22
    assert train("--resume", "--epochs", 2, "--out", folder) == 0
    assert_same_run(folder, short_run)
    rows = [metrics(each)["results"]["jaxbn"] for each in (folder, short_run)]
    for name in ("training_loss", "test_accuracy", "test_accuracy_running_statistics"):
        np.testing.assert_allclose(rows[0][name], rows[1][name], rtol=1e-5)
    names = {"checkpoints", "curves.png", "metrics.json"}
    assert {path.name for path in folder.iterdir()} == names


def test_ctrl_c_in_one_process_stops_both(tmp_path, join):
    folder = tmp_path / "run"
    first, second = processes = join(*ENDLESS, "--out", folder)
    wait_for_checkpoint(folder, processes)
    second.send_signal(signal.SIGINT)
    code, out, err = end(first)
    assert (code, err) == (130, "")
    assert "interrupted at step" in out
    assert end(second)[0] == 130
    assert metrics(folder)["results"]["jaxbn"]["steps"] == steps(folder)


@pytest.mark.parametrize("victim", [0, 1])
def test_none_outlives_a_process_that_is_killed(victim, tmp_path, join):
    folder = tmp_path / "run"
    processes = join(*ENDLESS, "--out", folder)
    wait_for_checkpoint(folder, processes)
    processes[victim].kill()
    code, _, err = end(processes[1 - victim], seconds=120)
    assert code not in (0, 130)
    if victim == 1:  # of process 0, the coordinator, JAX may be the first to know
        assert "jaxbn train: error: " in err
    epochs = 1 + steps(folder) // 22  # the last checkpoint restores
    assert train("--resume", "--out", folder, "--epochs", epochs) == 0
    assert steps(folder) == 22 * epochs


def test_processes_must_agree(tmp_path, join):
    own = (("--seed", 0), ("--seed", 1))
    for process in join(*SHORT, "--out", tmp_path / "run", own=own):
        code, _, err = end(process)
        assert code == 2
        line = "jaxbn train: error: the processes differ in flags, or in what --out"
        assert line in err
