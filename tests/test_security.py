"""Security: nothing is unpickled, nobody is called, no file steers a terminal."""

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
from flax import serialization
from runs import refusal

import jaxbn
from jaxbn.__main__ import main

SOURCES = sorted(Path(jaxbn.__file__).parent.rglob("*.py"))

# Modules that run what a file says, or that call somebody.
UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLERS = {"ftplib", "http", "httpx", "requests", "smtplib", "urllib", "urllib3"}
CALLERS |= {"socket", "subprocess"}


def breaches(path):
    """What a file imports or calls that it should not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from {name.partition(".")[0] for name in names} & (UNPICKLERS | CALLERS)
        if isinstance(node, ast.Call):
            called = {getattr(node.func, "id", None)}
            yield from called & {"eval", "exec", "__import__"}
            yield from {word.arg for word in node.keywords} & {"allow_pickle", "shell"}


def test_no_module_unpickles_evaluates_or_calls():
    assert {path.name: [*breaches(path)] for path in SOURCES if [*breaches(path)]} == {}


class Trap:
    """Pickled, it makes a folder where it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def object_array(trap: bytes) -> bytes:
    """An array of objects, as a Flax checkpoint would hold one."""
    array = msgpack.packb(((1,), "O", trap.ljust(8)))
    return msgpack.packb({"format": 1, "state": msgpack.ExtType(1, array)})


@pytest.mark.parametrize("disguise", [bytes, object_array], ids=["pickle", "objects"])
def test_pickle_is_refused_and_not_run(disguise, tmp_path, capsys):
    trap = pickle.dumps(Trap(tmp_path / "trapped"))
    path = tmp_path / "model.msgpack"
    path.write_bytes(disguise(trap))
    line = refusal(capsys, path, command="inspect")
    assert f"{path} is not a Flax checkpoint" in line
    assert not (tmp_path / "trapped").exists()
    pickle.loads(trap)
    assert (tmp_path / "trapped").exists()  # it would have worked


# A name that clears the screen, one that is markup, one that is TeX.
NAMES = ("\x1b[2J\x07", "[/red]", "$a_{$")


def test_names_in_a_checkpoint_do_not_steer_the_terminal(tmp_path, capsys):
    nan = {"mean": np.full(3, np.nan, np.float32), "var": np.ones(3, np.float32)}
    variables = {"batch_stats": dict.fromkeys(NAMES, nan), "params": {}}
    path = tmp_path / "$a_{$.msgpack"
    path.write_bytes(serialization.msgpack_serialize(variables))
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    for name in ("?[2J?", *NAMES[1:]):
        assert out.count(name) >= 2  # in the table, and as not finite
    assert "\x1b" not in out


# Imported by every Python process, before all else; and nothing can swallow an exit.
WATCH = """
import os, sys

def watch(event, args):
    if event in {
        "pickle.find_class", "socket.bind", "socket.connect", "socket.sendto",
        "socket.getaddrinfo", "socket.gethostbyaddr", "socket.gethostbyname",
    }:
        os.write(2, f"CAUGHT {event} {args}".encode())
        os._exit(99)

sys.addaudithook(watch)
"""

COMMANDS = """
import jax, jax.export, jax.numpy as jnp, jaxbn
from jaxbn.__main__ import main

def run(*words):
    assert main(list(words)) == 0, words

short = ["--model", "mlp", "--out", "run"]
run("train", *short, "--epochs", "1")
run("train", *short, "--epochs", "2", "--resume")
run("inspect", "run")
run("check")
tiny = ["--suite", "tiny", "--dtype", "float32", "--mode", "inference"]
run("bench", *tiny, "--rounds", "1", "--peers", "flax-fast")

def step(x, params, state):
    return jaxbn.batch_norm(x, params, state, train=True)

args = jnp.ones((4, 3)), *jaxbn.init(3)
program = jax.export.export(jax.jit(step))(*args).serialize()
y, state = jax.export.deserialize(program).call(*args)
assert state.num_updates == 1
print("ALL DONE")
"""


def watched(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which, and in whose children, the above is fatal."""
    (folder / "sitecustomize.py").write_text(WATCH)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.processes
def test_commands_unpickle_nothing_and_call_nobody(tmp_path):
    done = watched(COMMANDS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ALL DONE\n")
    assert "CAUGHT" not in done.stderr  # by a child


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('192.0.2.1', 9), 0.1)",
        "import pickle, os; pickle.loads(pickle.dumps(os.getpid))",
        "import subprocess, sys; word = 'import socket; socket.gethostbyname(\"x\")'; "
        "sys.exit(subprocess.run([sys.executable, '-c', word]).returncode)",
    ],
    ids=["tcp", "pickle", "child"],
)
def test_watch_would_have_seen_it(code, tmp_path):
    done = watched(code, tmp_path)
    assert done.returncode == 99
    assert "CAUGHT" in done.stderr
