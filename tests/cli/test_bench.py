"""`jaxbn bench`: what it counts, whom it names, what it leaves behind."""

import functools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FUSES_SUMS, fuses_sums

import jaxbn
from jaxbn.__main__ import main
from jaxbn.cli import bench as command
from jaxbn.cli.bench import cases, layers, measure
from jaxbn.cli.bench.cases import Case, Group
from jaxbn.cli.bench.layers import PEERS, Peer

JAX_PEERS = [name for name, peer in PEERS.items() if peer.build is not None]
TINY = [case for case in cases.CASES if case.suite == "tiny"]

# One small layer, few rounds.
SHORT = ("--suite", "tiny", "--quick", "--dtype", "float32", "--rounds", "3")


@pytest.fixture(autouse=True)
def lenient_promotion():
    """Not every library is strict."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def bench(folder, *flags):
    return main(["bench", *map(str, flags), "--json", f"{folder}/bench.json"])


def figures(folder):
    return json.loads((folder / "bench.json").read_text())


def imported(name):
    """The `build` of a peer; skips the test where it is not installed."""
    _, missing = layers.find([name])
    if missing:
        pytest.skip(missing[name])
    return PEERS[name].build


# What it counts


@fuses_sums
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", TINY[:2], ids=str)
def test_jaxbn_moves_ten_sizes_and_the_part_and_keeps_one(case, dtype):
    x = jnp.ones(case.shape, dtype)
    group = Group(case, dtype, "forward+backward")
    program = measure.program("jaxbn", group, x, x)
    # XLA counts all of x for the part whose mean is the shift.
    assert 10 * x.nbytes <= program.bytes_accessed <= 11.5 * x.nbytes
    assert program.residual_bytes == x.nbytes
    assert program.temp_bytes < 0.01 * x.nbytes


def test_copy_moves_two_sizes_and_flax_keeps_more():
    x = jnp.ones((64, 16, 16, 4), "bfloat16")
    program = measure.copy(x)
    assert program.bytes_accessed == pytest.approx(2 * x.nbytes, rel=0.001)
    (y,) = program.call(x, x)
    np.testing.assert_array_equal(y, x)
    group = Group(TINY[0], "bfloat16", "forward+backward")
    flax = measure.program("flax-fast", group, x, x)
    assert flax.residual_bytes >= 2 * x.nbytes


def test_all_reduces_over_two_devices():
    def count(name, *, named):
        return measure.all_reduces(PEERS[name].build, named=named)

    assert count("jaxbn", named=True) == {"forward": 1, "forward+backward": 2}
    assert count("jaxbn", named=False) == {"forward": 2, "forward+backward": 3}
    assert count("flax-fast", named=True) == {"forward": 1, "forward+backward": 2}


# Whether all contenders compute the same


def expected(x, dy, axis, num_layers):
    """y, dx, dscale and dbias of jaxbn, in a chain."""
    params, state = jaxbn.init(x.shape[axis])

    def chain(x, params):
        for one in params:
            x, _ = jaxbn.batch_norm(x, one, state, train=True, axis=axis)
        return x

    @jax.jit
    def run():
        y, vjp = jax.vjp(chain, x, [params] * num_layers)
        return [y, *jax.tree.leaves(vjp(dy))]

    return run()


def random_pair(shape, dtype="float32"):
    draws = np.random.default_rng(0).normal(1, 2, (2, *shape))
    return [jnp.asarray(each, dtype) for each in draws]


def close(found, wanted, tolerance=1e-4, scale=0.0):
    found, wanted = np.float64(found), np.float64(wanted)
    if found.size != wanted.size:
        return False
    largest = max(np.abs(wanted).max(), scale)
    return np.abs(found.reshape(wanted.shape) - wanted).max() <= tolerance * largest


@pytest.mark.parametrize(("axis", "dtype"), [(-1, "float32"), (1, "bfloat16")])
@pytest.mark.parametrize("name", JAX_PEERS)
def test_peer_computes_batch_norm(name, axis, dtype):
    build = imported(name)
    case = Case("test", (6, 5, 4, 5), axis)
    x, dy = random_pair(case.shape, dtype)
    layer = build(x[:2], axis, None)
    step = jax.jit(functools.partial(measure.forward_backward, layer))
    y, state, (dx, dparams) = step(x, dy, layer.params, layer.state)
    assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
    tolerance = {"float32": 1e-4, "bfloat16": 0.03}[dtype]
    wanted_y, wanted_dx, dscale, dbias = expected(x, dy, axis, 1)
    assert close(y, wanted_y, tolerance)
    assert close(dx, wanted_dx, tolerance)
    mean = 0.1 * jaxbn.batch_moments(x, axis=axis).mean  # the momentum
    # Every library has names of its own for the leaves.
    for wanted, tree in ((dscale, dparams), (dbias, dparams), (mean, state)):
        leaves = [each for each in jax.tree.leaves(tree) if each.dtype == jnp.float32]
        assert any(close(leaf, wanted, tolerance) for leaf in leaves)
    y = measure.infer(layer, x, dy, layer.params, layer.state)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)


@pytest.mark.parametrize("mode", ["forward+backward", "chain"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_torch_computes_batch_norm(axis, mode):
    imported("torch")
    x, dy = random_pair((6, 5, 4, 3))
    group = Group(Case("test", x.shape, axis), "float32", mode)
    found = [each.detach() for each in measure.torch_program(group, x, dy).call(x, dy)]
    if axis == -1:
        found[:2] = [each.permute(0, 2, 3, 1) for each in found[:2]]
    wanted = expected(x, dy, axis, group.num_layers)
    for one, other in zip(found, wanted, strict=True):
        # Through several layers only rounding is left of dx and dscale.
        assert close(one, other, scale=np.abs(dy).max())


# What is measured


def test_suites():
    groups = cases.groups(cases.SUITES, cases.DTYPES, cases.MODES, quick=False)
    assert len(set(groups)) == len(groups)
    shapes = [group.case.shape for group in groups]
    for shape in ((32, 112, 112, 64), (32, 7, 7, 2048), (256, 256), (256, 2048)):
        assert shape in shapes
    assert {group.mode for group in groups} == set(cases.MODES)
    quick = cases.groups(cases.SUITES, cases.DTYPES, cases.MODES, quick=True)
    assert {group.case.suite for group in quick} == set(cases.SUITES)


def test_inputs_on_a_gpu_do_not_fit_its_cache(monkeypatch):
    case = Case("test", (256, 256))
    assert len(measure.inputs(case, "float32")) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(measure, "CACHE_BYTES", 2**21)
    pairs = measure.inputs.__wrapped__(case, "float32")
    assert sum(x.nbytes + dy.nbytes for x, dy in pairs) >= 2**21
    assert not np.array_equal(pairs[0][0], pairs[1][0])


def test_rounds_interleave_and_drop_what_fails(monkeypatch):
    log = []

    def time_calls(program, turns, calls):
        log.append(program)
        if log.count("flax-fast") == 4 and program == "flax-fast":
            raise MemoryError("no\nmore")
        return calls * {"copy": 1.0, "jaxbn": 5.0, "flax-fast": 6.0}[program]

    monkeypatch.setattr(measure, "time_calls", time_calls)
    monkeypatch.setattr(measure, "program", lambda name, *_: name)
    monkeypatch.setattr(measure, "summarize", lambda group, samples, *_: samples)
    group = Group(TINY[2], "float32", "inference")
    samples, failures = measure.measure(group, ["jaxbn", "flax-fast"], 5, 1e9, print)
    assert samples[:2] == [{"copy": 1.0, "jaxbn": 5.0, "flax-fast": 6.0}] * 2
    assert samples[2:] == [{"copy": 1.0, "jaxbn": 5.0}] * 3
    assert [each["error"] for each in failures] == ["MemoryError: no more"]
    assert log.count("flax-fast") == 4
    assert log.index("flax-fast") < len(log) - log[::-1].index("jaxbn") - 1


def test_rows_are_trusted_above_the_floor_and_where_times_agree():
    def rows(mode, *seconds):
        samples = [dict(zip(("copy", "jaxbn", "nnx"), s, strict=True)) for s in seconds]
        compiled = dict.fromkeys(samples[0], measure.Program(lambda x, dy: None))
        return measure.summarize(Group(TINY[0], "float32", mode), samples, 1, compiled)

    def trusted(*args):
        return [row["trusted"] for row in rows(*args)]

    assert trusted("forward+backward", *[(1.0, 5.0, 6.0)] * 3) == [True] * 3
    assert trusted("forward+backward", *[(1.0, 3.9, 6.0)] * 3) == [True, False, True]
    assert trusted("inference", *[(1.0, 0.9, 1.1)] * 3) == [True] * 3
    unsteady = [(1.0, 5.0, 6.0), (1.0, 5.0, 9.0), (1.0, 5.0, 6.0)]
    assert trusted("forward+backward", *unsteady) == [True, True, False]
    busy = [(1.0, 5.0, 6.0), (1.5, 5.0, 6.0), (1.0, 5.0, 6.0)]
    assert trusted("forward+backward", *busy) == [False] * 3

    chains = [each for f in (2.0, 8.0) for each in rows("chain", (1.0, 16.0, 16.0 * f))]
    assert [row["copies"] for row in chains[:3]] == [1, 2, 4]
    means = command.geometric_means(chains)
    assert means == {"nnx": {"chain": {"float32": pytest.approx(4)}}}


# What it leaves behind


def test_a_run_and_what_cannot_take_part(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise ValueError("out of\norder")

    tmp_path.joinpath("no_import.py").write_text("raise OSError('no library')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PEERS, "haiku", Peer("no_such_module", "dm-haiku", broken))
    monkeypatch.setitem(PEERS, "nnx", Peer("no_import", "nnx", broken))
    monkeypatch.setitem(PEERS, "flax-stable", Peer("flax", "flax", broken))
    peers = ("flax-fast", "flax-stable", "nnx", "haiku")
    modes = ("forward+backward", "inference")
    folder = tmp_path / "new"
    assert bench(folder, *SHORT, "--mode", *modes, "--peers", *peers) == 0
    out = capsys.readouterr().out
    assert out.startswith("measuring 2 groups")
    assert "without nnx: nnx cannot be imported: no library" in out
    assert "flax-stable failed in 64x16x16x4 float32 inference: ValueError:" in out
    assert "all-reduces over 2 devices" in out

    content = figures(folder)
    assert (content["interrupted"], content["floor_in_copies"]) == (False, 4)
    assert content["missing"]["haiku"] == "dm-haiku is not installed"
    assert content["machine"]["versions"]["jax"] == jax.__version__
    assert content["settings"]["peers"] == [*peers]
    contenders = ("copy", "jaxbn", "flax-fast")
    names = [(row["mode"], row["contender"]) for row in content["rows"]]
    assert names == [(mode, name) for mode in modes for name in contenders]
    for row in content["rows"]:
        assert (row["shape"], row["rounds"]) == ([64, 16, 16, 4], 3)
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        kept = row["sizes_residual"]
        gradients = row["mode"] == "forward+backward" and row["contender"] != "copy"
        assert kept is not None if gradients else kept is None
    ours = content["rows"][1]
    if FUSES_SUMS:
        assert 10 <= ours["sizes_accessed"] <= 11.5
    assert ours["over_jaxbn"] == 1
    assert content["all_reduces"]["jaxbn"]["jit"]["forward+backward"] == 3
    assert set(content["geometric_means"]["flax-fast"]) == {"forward+backward"}
    busy = sum(not row["trusted"] for row in content["rows"])
    assert (f"{busy} of 6 rows have a ?" in out) == bool(busy)
    assert [path.name for path in folder.iterdir()] == ["bench.json"]


@pytest.mark.parametrize("finished", [0, 1])
def test_ctrl_c_keeps_what_it_has(tmp_path, monkeypatch, capsys, finished):
    real = measure.measure

    def interrupted(group, *args):
        if group.mode == ("inference" if finished else "forward+backward"):
            signal.raise_signal(signal.SIGINT)
        return real(group, *args)

    monkeypatch.setattr(measure, "measure", interrupted)
    monkeypatch.setitem(PEERS, "haiku", Peer("no_such_module", "dm-haiku", None))
    flags = ("--mode", "forward+backward", "inference", "chain", "--peers", "haiku")
    if finished:
        assert bench(tmp_path, *SHORT, *flags) == 130
        assert "interrupted" in capsys.readouterr().out
        content = figures(tmp_path)
        assert content["interrupted"] is True
        assert [row["contender"] for row in content["rows"]] == ["copy", "jaxbn"]
        return
    with pytest.raises(SystemExit) as caught:
        bench(tmp_path, *SHORT, *flags)
    assert caught.value.code == 130
    assert "nothing was written yet" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peers", "jaxbn"], "invalid choice: 'jaxbn'"),
        (["--rounds", "0"], "must be an integer of at least 1"),
        (["--suite", "critic", "--mode", "chain"], "there is nothing to measure"),
        (["--mode", "forward"], "invalid choice: 'forward'"),
        (["--json", "."], "argument --json: . is a folder"),
        (["--json", "a_file/bench.json"], "argument --json: cannot write to a_file"),
        (["--json", "/proc/x/bench.json"], "argument --json: cannot write to /proc/x"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusal_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("a_file").touch()
    with pytest.raises(SystemExit) as caught:
        main(["bench", *flags])
    out, error = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert error.startswith("jaxbn bench: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "runs" / "bench" / "bench.json").exists()
