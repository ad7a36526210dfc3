"""`jaxbn bench`: what it counts, whom it names, what it leaves behind."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import FUSES_SUMS

from jaxbn.__main__ import main
from jaxbn.cli import bench as command
from jaxbn.cli.bench import cases, layers, measure
from jaxbn.cli.bench.cases import Case, Group
from jaxbn.cli.bench.layers import PEERS, Peer

pytestmark = pytest.mark.usefixtures("lenient")

TINY = [case for case in cases.CASES if case.suite == "tiny"]

# One small layer, few rounds.
SHORT = ("--suite", "tiny", "--quick", "--dtype", "float32", "--rounds", "3")


def bench(folder, *flags):
    return main(["bench", *map(str, flags), "--json", f"{folder}/bench.json"])


def figures(folder):
    return json.loads((folder / "bench.json").read_text())


# What it counts


def test_copy_moves_two_sizes_jaxbn_ten_and_flax_keeps_more():
    x = jnp.ones((64, 16, 16, 4), "bfloat16")
    copy = measure.copy(x)
    assert copy.bytes_accessed == pytest.approx(2 * x.nbytes, rel=0.001)
    np.testing.assert_array_equal(*copy.call(x, x), x)
    group = Group(TINY[0], "bfloat16", "forward+backward")
    ours, flax = (measure.program(each, group, x, x) for each in ("jaxbn", "flax-fast"))
    # XLA counts all of x for the part whose mean is the shift.
    if FUSES_SUMS:
        assert 10 * x.nbytes <= ours.bytes_accessed <= 11.5 * x.nbytes
        assert ours.temp_bytes < 0.01 * x.nbytes
    assert ours.residual_bytes == x.nbytes
    assert flax.residual_bytes >= 2 * x.nbytes


# Whether all contenders compute the same


def expected(x, dy, axis, num_layers):
    """y, dx, dscale and dbias of each layer of a chain."""
    xs, gradients = [np.float64(x)], []
    for _ in range(num_layers):
        xs.append(oracle.forward(xs[-1], axis=axis))
    y, dx = xs.pop(), np.float64(dy)
    while xs:
        steps = oracle.backward_steps(dx, xs.pop(), axis=axis)
        dx = steps["dx"]
        gradients += [steps["dscale"], steps["dbias"]]
    return [y, dx, *gradients]


def close(found, wanted, tolerance, scale=0.0):
    found, wanted = np.float64(found), np.float64(wanted)
    if found.size != wanted.size:
        return False
    largest = max(np.abs(wanted).max(), scale)
    return np.abs(found.reshape(wanted.shape) - wanted).max() <= tolerance * largest


def of_torch(tensor, axis):
    array = tensor.detach().float().numpy()
    return np.moveaxis(array, 1, axis) if array.ndim > 1 else array


@pytest.mark.parametrize(
    ("name", "axis", "dtype", "mode"),
    [
        *((name, -1, "float32", "forward+backward") for name in PEERS),
        *((name, 1, "bfloat16", "forward+backward") for name in PEERS),
        *((name, 1, "float32", "chain") for name in ("jaxbn", "torch")),
    ],
)
def test_peer_computes_batch_norm(name, axis, dtype, mode, monkeypatch):
    monkeypatch.setattr(cases, "CHAIN_LAYERS", 3)
    _, missing = layers.find([name])
    if missing:
        pytest.skip(missing[name])
    draws = np.random.default_rng(0).normal(1, 2, (2, 6, 5, 4, 5))
    x, dy = (jnp.asarray(each, dtype) for each in draws)
    group = Group(Case("test", x.shape, axis), dtype, mode)
    found = measure.program(name, group, x, dy).call(x, dy)
    inference = measure.program(name, group._replace(mode="inference"), x, dy)
    [inferred] = inference.call(x, dy)
    wanted = expected(x, dy, axis, group.num_layers)
    if name == "torch":
        found = [of_torch(each, axis) for each in found]
    else:
        assert (inferred.dtype, inferred.shape) == (x.dtype, x.shape)
        assert found[0].dtype == x.dtype
        wanted.append(0.1 * oracle.moments(np.float64(x), axis=axis)[1])  # the momentum
    # Through several layers only rounding is left of dx and dscale.
    scale = float(jnp.abs(dy).max()) if mode == "chain" else 0.0
    tolerance = {"float32": 1e-4, "bfloat16": 0.03}[dtype]
    assert close(found[0], wanted[0], tolerance)
    for each in wanted:  # every library has an order of its own
        assert any(close(array, each, tolerance, scale) for array in found)


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
    ours, flax = map(content["all_reduces"].get, ("jaxbn", "flax-fast"))
    assert (
        ours["axis_name"] == flax["axis_name"] == {"forward": 1, "forward+backward": 2}
    )
    assert ours["jit"] == {"forward": 2, "forward+backward": 3}
    assert set(content["geometric_means"]["flax-fast"]) == {"forward+backward"}
    busy = sum(not row["trusted"] for row in content["rows"])
    assert (f"{busy} of 6 rows have a ?" in out) == bool(busy)
    assert [path.name for path in folder.iterdir()] == ["bench.json"]


def test_ctrl_c_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    real = measure.measure

    def interrupted(group, *args):
        if group.mode == "inference":
            signal.raise_signal(signal.SIGINT)
        return real(group, *args)

    monkeypatch.setattr(measure, "measure", interrupted)
    monkeypatch.setitem(PEERS, "haiku", Peer("no_such_module", "dm-haiku", None))
    flags = ("--mode", "forward+backward", "inference", "chain", "--peers", "haiku")
    assert bench(tmp_path, *SHORT, *flags) == 130
    assert "interrupted" in capsys.readouterr().out
    content = figures(tmp_path)
    assert content["interrupted"] is True
    assert [row["contender"] for row in content["rows"]] == ["copy", "jaxbn"]
