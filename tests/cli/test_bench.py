"""`python -m jaxbn bench`: what it counts, whom it names, what it leaves behind."""

import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FUSES_SUMS, fuses_sums

import jaxbn
from jaxbn.__main__ import main
from jaxbn.cli import (
    _bench_collectives,
    _bench_measure,
    _bench_peers,
    _bench_programs,
    _bench_results,
    _bench_session,
    _bench_suite,
    _bench_torch,
    _bench_worker,
)
from jaxbn.cli._bench_peers import PEERS, Peer
from jaxbn.cli._bench_suite import DTYPES, MODES, SUITES, Case, Group

JAX_PEERS = [name for name, peer in PEERS.items() if peer.build is not None]

# One small layer, one mode, one other library: a second or two.
SHORT = ("--suite", "tiny", "--quick", "--dtype", "float32", "--rounds", "3")
ONE_MODE = (*SHORT, "--mode", "forward+backward", "--peers")


@pytest.fixture(autouse=True)
def lenient_promotion():
    """Not every library is strict."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def bench(folder: Path, *flags: object) -> int:
    files = ("--json", folder / "bench.json", "--png", folder / "bench.png")
    return main(["bench", *map(str, (*flags, *files))])


def figures(folder: Path) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "bench.json").read_text(), parse_constant=refuse)


def need(name: str) -> None:
    pytest.importorskip(PEERS[name].module)


def imported(name: str) -> Any:
    """The `build` of a peer; skips the test where it is not installed."""
    found, missing = _bench_peers.find([name])
    if missing:
        pytest.skip(missing[name])
    return PEERS[found[0]].build


# What it counts


@fuses_sums
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SUITES["tiny"][:2], ids=str)
def test_jaxbn_moves_ten_sizes_and_the_part_and_keeps_one(case, dtype):
    x = jnp.ones(case.shape, dtype)
    group = Group(case, dtype, "forward+backward")
    program = _bench_programs.program(_bench_peers.PEERS["jaxbn"].build, group, x)
    # XLA counts all of x for the part whose mean is the shift.
    assert 10 * x.nbytes <= program.bytes_accessed <= 11.5 * x.nbytes
    assert program.residual_bytes == x.nbytes
    assert program.temp_bytes < 0.01 * x.nbytes


def test_copy_moves_two_sizes():
    x = jnp.ones((64, 16, 16, 4))
    program = _bench_programs.copy(x)
    assert program.bytes_accessed == pytest.approx(2 * x.nbytes, rel=0.001)
    (y,) = program.call(x, x)
    np.testing.assert_array_equal(y, x)


def test_flax_keeps_more():
    case = SUITES["tiny"][0]
    x = jnp.ones(case.shape, "bfloat16")
    group = Group(case, "bfloat16", "forward+backward")
    program = _bench_programs.program(PEERS["flax-fast"].build, group, x)
    assert program.residual_bytes >= 2 * x.nbytes


def test_all_reduces_over_two_devices():
    mesh = _bench_collectives.two_devices()
    assert mesh is not None

    def count(name: str, *, named: bool) -> dict[str, int] | None:
        return _bench_collectives.all_reduces(PEERS[name].build, mesh, named=named)

    assert count("jaxbn", named=True) == {"forward": 1, "forward+backward": 2}
    assert count("jaxbn", named=False) == {"forward": 2, "forward+backward": 3}
    assert count("flax-fast", named=True) == {"forward": 1, "forward+backward": 2}


# Whether all contenders compute the same


def expected(x: jax.Array, dy: jax.Array, axis: int, num_layers: int) -> list[Any]:
    """y, dx, dscale and dbias of jaxbn, in a chain."""
    params, state = jaxbn.init(x.shape[axis])

    def chain(x: jax.Array, params: Any) -> jax.Array:
        for one in params:
            x, _ = jaxbn.batch_norm(x, one, state, train=True, axis=axis)
        return x

    @jax.jit
    def run() -> Any:
        y, vjp = jax.vjp(chain, x, [params] * num_layers)
        return [y, *jax.tree.leaves(vjp(dy))]

    return run()


def random_pair(shape: tuple[int, ...], dtype: str = "float32") -> list[jax.Array]:
    draws = np.random.default_rng(0).normal(1, 2, (2, *shape))
    return [jnp.asarray(each, dtype) for each in draws]


def assert_close(found: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    wanted = np.float64(wanted)
    atol = tolerance * np.abs(wanted).max()
    np.testing.assert_allclose(np.float64(found), wanted, rtol=0, atol=atol)


def assert_among(found: Any, wanted: jax.Array, tolerance: float) -> None:
    """One of the leaves is what is wanted: every library has names of its own."""
    errors = []
    for leaf in jax.tree.leaves(found):
        try:
            assert_close(jnp.reshape(leaf, wanted.shape), wanted, tolerance)
            return
        except (AssertionError, TypeError) as error:
            errors.append(str(error))
    raise AssertionError("\n".join(errors))


@pytest.mark.parametrize(("axis", "dtype"), [(-1, "float32"), (1, "bfloat16")])
@pytest.mark.parametrize("name", JAX_PEERS)
def test_peer_computes_batch_norm(name, axis, dtype):
    build = imported(name)
    case = Case("test", (6, 5, 4, 5), axis)
    x, dy = random_pair(case.shape, dtype)
    layer = build(_bench_programs.sample(case, dtype), axis, None)
    step = jax.jit(functools.partial(_bench_programs.forward_backward, layer))
    y, state, (dx, dparams) = step(x, dy, layer.params, layer.state)
    assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
    tolerance = {"float32": 1e-4, "bfloat16": 0.03}[dtype]
    wanted_y, wanted_dx, dscale, dbias = expected(x, dy, axis, 1)
    assert_close(y, wanted_y, tolerance)
    assert_close(dx, wanted_dx, tolerance)
    assert_among(dparams, dscale, tolerance)
    assert_among(dparams, dbias, tolerance)
    mean = jaxbn.batch_moments(x, axis=axis).mean
    assert_among(state, 0.1 * mean, tolerance)  # the momentum
    y = layer.infer(x, layer.params, state)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)


def test_torch_computes_batch_norm():
    need("torch")
    code = """if True:
        import json, runpy, sys, torch
        step = runpy.run_path(sys.argv[1])["step"]
        for pair, axis, num_layers in json.load(sys.stdin):
            mode = "chain" if num_layers > 1 else "forward+backward"
            run = step(*map(torch.tensor, pair), mode, axis, num_layers)
            y, dx, *dparams = run()
            if axis == -1:
                assert y.is_contiguous(memory_format=torch.channels_last)
                y, dx = y.permute(0, 2, 3, 1), dx.permute(0, 2, 3, 1)
            print(json.dumps([each.tolist() for each in (y, dx, *dparams)]))
    """
    pair = random_pair((6, 5, 4, 3))
    cases = [(axis, num_layers) for axis in (-1, 1) for num_layers in (1, 3)]
    asked = json.dumps([([a.tolist() for a in pair], *case) for case in cases])
    done = subprocess.run(
        [sys.executable, "-c", code, _bench_torch.__file__],
        input=asked,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for case, line in zip(cases, done.stdout.splitlines(), strict=True):
        wanted = expected(*pair, *case)
        for one, other in zip(json.loads(line), wanted, strict=True):
            # Through several layers only rounding is left of dx and dscale.
            scale = max(np.abs(pair[1]).max(), np.abs(other).max())
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("mode", "shape", "axis"),
    [
        ("conv", (4, 4, 4, 3), -1),
        ("conv", (4, 3, 4, 4, 4), 1),
        ("chain", (4, 3), -1),
    ],
)
def test_nets(mode, shape, axis):
    group = Group(Case("test", shape, axis), "float32", mode)
    x = jnp.ones(shape)
    program = _bench_programs.program(PEERS["jaxbn"].build, group, x)
    assert program.call(x, x)[0].shape == shape


# What is measured


def test_suites():
    groups = _bench_suite.groups(
        _bench_suite.DEFAULT_SUITES, DTYPES, MODES, quick=False
    )
    assert len(set(groups)) == len(groups)
    shapes = [group.case.shape for group in groups]
    for shape in ((32, 112, 112, 64), (32, 7, 7, 2048), (256, 256), (256, 2048)):
        assert shape in shapes
    assert {group.mode for group in groups} == set(MODES)
    quick = _bench_suite.groups(_bench_suite.DEFAULT_SUITES, DTYPES, MODES, quick=True)
    assert {group.case.suite for group in quick} == set(_bench_suite.DEFAULT_SUITES)


def test_inputs_on_a_gpu_do_not_fit_its_cache(monkeypatch):
    case = Case("test", (256, 256))
    assert len(_bench_measure.inputs(case, "float32", 0)) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_bench_measure, "CACHE_BYTES", 2**21)
    pairs = _bench_measure.inputs(case, "float32", 0)
    assert sum(x.nbytes + dy.nbytes for x, dy in pairs) >= 2**21
    assert not np.array_equal(pairs[0][0], pairs[1][0])


def test_rounds_interleave_and_drop_what_fails(monkeypatch):
    log, failures = [], []

    def good(calls: int) -> float:
        log.append("good")
        return 2.0 * calls

    def bad(calls: int) -> float:
        log.append("bad")
        if log.count("bad") == 3:
            raise MemoryError("no more")
        return 1.0 * calls

    samples = list(
        _bench_measure.rounds(
            {"good": good, "bad": bad},
            10,
            _bench_measure.Limits(5, math.inf),
            random.Random(0),
            lambda: False,
            lambda name, error: failures.append((name, str(error))),
        )
    )
    assert samples[:2] == [{"good": 2.0, "bad": 1.0}] * 2
    assert samples[2:] == [{"good": 2.0}] * 3
    assert failures == [("bad", "no more")]
    assert log.count("bad") == 3


def test_geometric_means():
    group = Group(SUITES["tiny"][0], "float32", "chain")
    rows = []
    for factor in (2.0, 8.0):
        sample = {"copy": 1.0, "jaxbn": 16.0, "nnx": 16.0 * factor}
        rows += _bench_results.rows(group, [sample] * 3, 1, {})
    assert [row.copies for row in rows[:3]] == [1, 2, 4]
    means = _bench_results.geometric_means(rows)
    assert means == {"nnx": {"chain": {"float32": pytest.approx(4)}}}


# What it leaves behind


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A whole run of two modes with two libraries, one of which is not installed."""
    folder = tmp_path_factory.mktemp("bench") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PEERS, "haiku", Peer("no_such_module", "dm-haiku", None))
        with jax.numpy_dtype_promotion("standard"):
            flags = ("--mode", "forward+backward", "inference")
            code = bench(folder, *SHORT, "--peers", "flax-fast", "haiku", *flags)
    assert code == 0
    return folder


def test_json(run):
    content = figures(run)
    assert content["interrupted"] is False
    assert content["failures"] == []
    assert content["floor_in_copies"] == 4
    machine = content["machine"]
    assert machine["versions"]["jax"] == jax.__version__
    assert {"jaxbn", "jaxlib", "flax"} <= set(machine["versions"])
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["backend"] == "cpu"
    assert machine["date"][:2] == "20"
    assert content["settings"]["peers"] == ["flax-fast", "haiku"]
    names = [(row["mode"], row["contender"]) for row in content["rows"]]
    contenders = ("copy", "jaxbn", "flax-fast")
    modes = ("forward+backward", "inference")
    assert names == [(mode, name) for mode in modes for name in contenders]
    for row in content["rows"]:
        assert row["shape"] == [64, 16, 16, 4]
        assert row["rounds"] == 3
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        assert row["copies"] > 0
        kept = row["sizes_residual"]
        gradients = row["mode"] == "forward+backward" and row["contender"] != "copy"
        assert kept is not None if gradients else kept is None
    jaxbn_row = content["rows"][1]
    if FUSES_SUMS:
        assert 10 <= jaxbn_row["sizes_accessed"] <= 11.5
    assert jaxbn_row["over_jaxbn"] == 1
    assert content["all_reduces"]["jaxbn"]["jit"]["forward+backward"] == 3
    means = content["geometric_means"]
    assert set(means) == {"flax-fast"}
    assert set(means["flax-fast"]) == {"forward+backward"}


def test_png(run):
    assert (run / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in run.iterdir()) == ["bench.json", "bench.png"]


def test_missing_peer_is_named(run):
    assert figures(run)["missing"] == {"haiku": "dm-haiku is not installed"}


def test_broken_peers_are_named(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise ValueError("out of\norder")

    monkeypatch.setattr(_bench_collectives, "two_devices", lambda: None)
    tmp_path.joinpath("no_import.py").write_text("raise OSError('no library')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PEERS, "nnx", Peer("no_import", "nnx", broken))
    monkeypatch.setitem(PEERS, "flax-fast", Peer("flax", "flax", broken))
    assert bench(tmp_path, *ONE_MODE, "nnx", "flax-fast") == 0
    output = capsys.readouterr().out
    assert "without nnx: nnx cannot be imported: OSError('no library')" in output
    assert "flax-fast failed in 64x16x16x4 float32 forward+backward" in output
    assert "ValueError: out of order" in output
    content = figures(tmp_path)
    assert [row["contender"] for row in content["rows"]] == ["copy", "jaxbn"]
    assert content["all_reduces"] == {}
    assert content["failures"][0]["contender"] == "flax-fast"


# Ctrl-C


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    measure = _bench_session.rows

    def interrupted(group: Group, samples: list, *args: Any) -> Any:
        if group.mode == "inference":
            assert len(samples) == 2
        return measure(group, samples, *args)

    sample, calls = _bench_measure.timer, [0]

    def counted(*args: Any) -> Any:
        seconds = sample(*args)

        def timed(num_calls: int) -> float:
            calls[0] += 1
            # In the third round of the second mode: after 4 calls of the copy for the
            # number of calls, and 3 rounds of 2, then 4 again and 2 rounds of 2.
            if calls[0] == 4 + 3 * 2 + 4 + 2 * 2 + 1:
                press_ctrl_c()
            return seconds(num_calls)

        return timed

    monkeypatch.setattr(_bench_measure, "timer", counted)
    monkeypatch.setattr(_bench_session, "rows", interrupted)
    monkeypatch.setitem(PEERS, "haiku", Peer("no_such_module", "dm-haiku", None))
    flags = ("--mode", "forward+backward", "inference", "conv", "--peers", "haiku")
    assert bench(tmp_path, *SHORT, *flags) == 130
    output = capsys.readouterr().out
    assert "interrupted" in output
    assert "forward+backward" in output
    content = figures(tmp_path)
    assert content["interrupted"] is True
    rounds = [(row["mode"], row["rounds"]) for row in content["rows"]]
    assert rounds == [("forward+backward", 3)] * 2 + [("inference", 2)] * 2
    assert (tmp_path / "bench.png").exists()


def test_ctrl_c_before_the_first_figure_leaves_no_file(tmp_path, monkeypatch):
    inputs = _bench_measure.inputs

    def interrupted(*args: Any) -> Any:
        press_ctrl_c()
        return inputs(*args)

    monkeypatch.setattr(_bench_measure, "inputs", interrupted)
    assert bench(tmp_path, *ONE_MODE, "flax-fast") == 130
    assert list(tmp_path.iterdir()) == []


# The process of PyTorch


def test_worker_ends_with_its_stdin_and_not_with_ctrl_c():
    with _bench_worker.Worker() as worker:
        with pytest.raises(_bench_worker.WorkerError, match="nothing was built"):
            worker.seconds(1)
        worker.process.send_signal(signal.SIGINT)
        with pytest.raises(_bench_worker.WorkerError, match="nothing was built"):
            worker.seconds(1)
        assert worker.alive
    assert worker.process.returncode == 0


def test_killed_worker_is_an_error():
    with _bench_worker.Worker() as worker:
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(_bench_worker.WorkerError, match="its process ended"):
            worker.seconds(1)
        assert not worker.alive


def test_torch_is_timed_beside_the_others_until_its_process_dies(tmp_path, monkeypatch):
    need("torch")
    workers = []

    class Fragile(_bench_worker.Worker):
        def seconds(self, calls: int) -> float:
            workers.append(self)
            if len(workers) == 5:  # in the second round of the second mode
                self.process.kill()
            return super().seconds(calls)

    monkeypatch.setattr(_bench_session, "Worker", Fragile)
    monkeypatch.setattr(_bench_collectives, "two_devices", lambda: None)
    flags = ("--mode", "forward", "inference", "forward+backward", "--peers", "torch")
    assert bench(tmp_path, *SHORT, *flags) == 0
    content = figures(tmp_path)
    timed = {(row["mode"], row["contender"]) for row in content["rows"]}
    assert ("forward", "torch") in timed
    assert ("inference", "torch") not in timed
    assert ("forward+backward", "jaxbn") in timed
    (failure,) = content["failures"]
    assert failure["contender"] == "torch"
    assert "its process ended" in failure["error"]
    assert workers[0].process.returncode == -signal.SIGKILL


def test_run_leaves_no_process(tmp_path):
    """Also when the run itself is killed."""
    code = "import sys; from jaxbn.cli._bench_worker import Worker; w = Worker(); "
    code += "print(w.process.pid, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    state = Path(f"/proc/{pid}/stat")
    for _ in range(200):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


# Wrong flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite", "imagenet"], "invalid choice: 'imagenet'"),
        (["--peers", "jaxbn"], "invalid choice: 'jaxbn'"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--mode", "backward"], "invalid choice: 'backward'"),
        (["--rounds", "0"], "must be an integer of at least 1"),
        (["--seed", "-1"], "must be an integer from 0"),
        (["--suite", "critic", "--mode", "conv"], "there is nothing to measure"),
        (["--json", "same", "--png", "same"], "the same file"),
        (["--json", "."], "cannot write the file"),
        (["--json", "a_file/bench.json"], "a_file"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusal_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("a_file").touch()
    with pytest.raises(SystemExit) as caught:
        main(["bench", *flags])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxbn bench: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "runs" / "bench" / "bench.json").exists()
