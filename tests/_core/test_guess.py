"""The rule of TPUs, forced on the CPU: the running mean as the shift, and a branch.

The whole suite runs under it with JAXBN_GUESS=1 (`tests/guess.py`).
"""

import functools
import itertools

import compilations
import guess
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from devices import check_vma_or_not, mesh
from jax.sharding import PartitionSpec as P
from kernels import collectives
from steps import assert_exact, desired, step

import jaxbn
from jaxbn._core.moments import _part

ROWS, FEATURES = 4096, 64
PART = np.isin(np.arange(ROWS), _part(jnp.arange(ROWS)[:, None], (0,))[0])[:, None]
DATA = {
    "normal": lambda noise: noise,
    "constant": lambda noise: 0 * noise,
    "outliers": lambda noise: np.where(noise > 3, 1e6, noise),
    "apart": lambda noise: np.where(PART, 0, 1e4) + noise,
    "part far away": lambda noise: np.where(PART, 1e6, 0) + noise,
}


@pytest.fixture
def forced():
    with guess.forced():
        yield


def both_ways(f, *args):
    """F compiled as for a CPU, and as for a TPU."""
    lowered = [jax.jit(f).lower(*args)]
    with guess.forced():
        lowered.append(jax.jit(f).lower(*args))
    return [program.compile() for program in lowered]


def draw(data="normal", ratio=0.0, rows=ROWS):
    rng = np.random.default_rng(0)
    noise, dy = rng.normal(size=(2, rows, FEATURES))
    x = DATA[data](noise) + ratio
    scale = rng.uniform(0.5, 2, FEATURES)
    return tuple(a.astype(np.float32) for a in (x, dy, scale))


def running_mean(x, stds):
    """A running mean that is so many std below that of x."""
    _, mean, var = oracle.moments(np.float64(x))
    return np.asarray(mean - stds * np.sqrt(var), np.float32)


def close(got, *args, bound=4e-6, where=""):
    assert_exact(got, desired(*args), [bound] * 5, where, least_var=1e-5)


def same(a, b):
    return all(np.array_equal(*pair) for pair in zip(a, b, strict=True))


ZEROS = np.zeros(FEATURES, np.float32)

# Which way is taken, which shows in the last bits


def test_the_guess_counts_up_to_one_and_a_half_std():
    args = draw(ratio=3)
    usual, guessed = both_ways(step, *args, ZEROS)
    for stds in (-1.6, -1.4, 0, 0.1, 1.4, 1.6, 100, 1e6):
        mean = running_mean(args[0], stds)
        far = abs(stds) > 1.5
        assert same(guessed(*args, mean), usual(*args, mean)) == far, stds
    for size in (1, 1e-21):  # its square is 0
        x, mean = args[0] * np.float32(size), running_mean(args[0] * size, 0)
        mean[7] += 2 * size  # one far feature takes all the usual way
        tried = x, *args[1:], mean
        assert same(guessed(*tried), usual(*tried)), size


def test_a_guess_that_is_not_finite_is_0(forced):
    args, f = draw(), jax.jit(step)
    wanted = f(*args, ZEROS)[1:4]
    for bad in (np.nan, np.inf, -np.inf):
        assert same(f(*args, ZEROS + np.float32(bad))[1:4], wanted)


def test_no_overflow_about_a_guess_that_is_none_about_the_part(forced):
    """Squares about 0 are inf - inf for both sums; the usual way has none."""
    args = draw(rows=256)
    x = (args[0] * 1e15 + 1e21).astype(np.float32)
    var, *_ = jax.jit(step)(x, *args[1:], ZEROS)
    np.testing.assert_allclose(var, oracle.moments(np.float64(x))[2], rtol=2e-5)


def test_the_branch_is_for_tpus_and_reverse_mode():
    args = *draw(rows=32), ZEROS
    for platform, derivative, branches in (
        *(("cpu", "vjp", 0), ("cuda", "vjp", 0)),
        *(("tpu", "vjp", 1), ("tpu", "jvp", 0)),
    ):
        f = jax.jit(functools.partial(step, derivative=derivative))
        exported = jax.export.export(f, platforms=[platform])(*args)
        assert exported.mlir_module().count("stablehlo.case") == branches


# Digits


@pytest.mark.parametrize("data", DATA)
def test_digits(forced, data):
    f = jax.jit(step)
    for ratio, stds in itertools.product((0, 1e2, 1e6), (0, 0.5, 1.49, 1.51, 30)):
        args = draw(data, ratio)
        bound = 4e-6 if stds < 1.5 or data == "normal" else 2e-5
        got = f(*args, running_mean(args[0], stds))
        close(got, *args, bound=bound, where=(ratio, stds))


def test_digits_under_a_mask(forced):
    args = draw(ratio=3)
    mask = np.arange(ROWS)[:, None] % 7 != 2
    x = np.where(mask, args[0], np.nan)
    f = jax.jit(step)
    for stds in (0, 1.4, 10):
        got = f(x, *args[1:], running_mean(args[0], stds), mask)
        close(got, *args, mask)
    var, y, *_ = f(*args, running_mean(args[0], 0), np.zeros_like(mask))
    assert not y.any()
    np.testing.assert_array_equal(var, np.ones(FEATURES))  # nothing was counted


def test_half_precision(forced):
    args, f = draw(ratio=3), jax.jit(step)
    x, dy = (jnp.asarray(a, jnp.bfloat16) for a in args[:2])
    for stds in (0.5, 10):
        var, y, dx, *_ = f(x, dy, args[2], running_mean(args[0], stds))
        assert y.dtype == dx.dtype == jnp.bfloat16
        wanted = oracle.moments(np.float64(x))[2]
        np.testing.assert_allclose(var, wanted, rtol=4e-6)


def test_renorm_by_the_same_moments(forced):
    """As with the running mean 0, wherever that lies in stds."""
    x, dy, scale = draw(rows=64)
    limits = {"norm": jaxbn.batch_renorm, "r_max": 1e9, "d_max": 1e9}
    f = jax.jit(lambda *a: step(*a, **limits)[1])
    for ratio in (0, 5):
        y = f(x + ratio, dy, scale, ZEROS)
        wanted = (x + ratio) * scale / np.sqrt(1 + 1e-5)
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


# Derivatives


@pytest.mark.parametrize(
    ("mapped", "masked", "stds"),
    [(False, False, 0.5), (True, False, 1e7), (False, True, 1e7), (True, True, 0.5)],
)
def test_second_derivatives(mapped, masked, stds):
    """They are those of the usual way, whichever the shift."""
    x, dy, scale = (np.float64(a)[..., :2] for a in draw(rows=12))
    mask = np.arange(12)[:, None] % 5 > 0 if masked else None
    params = jaxbn.Params(scale, None)

    def loss(x, mean):
        state = jaxbn.State(mean, np.ones(2), jnp.int32(0))

        def train(x):
            return jaxbn.batch_norm(x, params, state, train=True, mask=mask)[0]

        y = jax.vmap(train, 2, 1)(x[..., None])[:, 0] if mapped else train(x)
        return (y**3 * dy).sum()

    with jax.enable_x64(True):
        means = [np.float64(running_mean(x, far)) for far in (0, stds)]
        usual, guessed = both_ways(jax.hessian(loss), x, means[0])
        want, got = usual(x, means[0]), guessed(x, means[1])
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * abs(want).max())


# vmap


def branches(f, *args):
    return jax.jit(f).lower(*args).as_text().count("stablehlo.case")


@pytest.mark.parametrize(
    "axes",
    [
        *((None,) * i + (0,) + (None,) * (4 - i) for i in range(5)),
        (0, 0, 0, 0, None),
        (2, 1, 1, 1, None),
    ],
    ids=str,
)
def test_vmap_is_one_branch_for_all_rows(forced, axes):
    """Many means or masks for one x need no guess."""
    one = *draw(ratio=2, rows=256), np.full(FEATURES, 2, np.float32)
    other = *draw(ratio=1e5, rows=256), np.full(FEATURES, 1.5, np.float32)
    mask = np.arange(256)[:, None] % 3 > 0
    args = [
        a if axis is None else np.stack([a, b], axis)
        for a, b, axis in zip((*one, mask), (*other, mask), axes, strict=True)
    ]
    f = jax.vmap(step, axes)
    assert branches(f, *args) == any(axis is not None for axis in axes[:3])
    got = jax.jit(f)(*args)
    for i in range(2):
        *row, _, kept = (
            a if axis is None else a.take(i, axis)
            for a, axis in zip(args, axes, strict=True)
        )
        close([a[i] for a in got], *row, kept)


# Devices


def over(axes, names=None, check_vma=True, f=step):
    """f, with `axis_name`, in a shard_map over "data", of `axes` as {name: size}."""
    rows = P("data")
    return jax.shard_map(
        functools.partial(f, axis_name="data"),
        mesh=mesh(**axes),
        in_specs=(rows, rows, P(), P()),
        out_specs=(P(), rows, rows, P() if check_vma else rows, P()),
        axis_names=names or set(axes),
        check_vma=check_vma,
    )


@check_vma_or_not
def test_devices_may_take_different_ways(forced, check_vma):
    """Nothing is sent in the branch: each device takes its own."""
    f = over({"data": 8}, check_vma=check_vma)
    assert branches(f, *draw(rows=512), ZEROS) == 1
    f = jax.jit(f)
    for far in (0, 1, 8):
        x, dy, scale = draw(rows=512)
        x[: 64 * far] += 100
        *got, dscale, mean = f(x, dy, scale, ZEROS)
        dscale = dscale if check_vma else dscale.reshape(8, FEATURES).sum(0)
        close((*got, dscale, mean), x, dy, scale)


def test_no_branch_where_devices_could_disagree_on_collectives(forced):
    """The axis "model" is not manual: XLA sends over it, in a branch too."""
    args = *draw(rows=512), ZEROS
    f = over({"data": 4, "model": 2}, {"data"})
    assert branches(f, *args) == 0
    close(jax.jit(f)(*args), *args[:3])


def test_no_branch_by_a_mean_that_varies_where_x_does_not(forced):
    """Y may leave the shard_map as equal over "model"."""
    args = *draw(rows=512), ZEROS

    def varying(x, dy, scale, mean, **kwargs):
        mean = jax.lax.pcast(mean, "model", to="varying")
        results = step(x, dy, scale, mean, **kwargs)[1:4]
        return jax.lax.psum(mean, "model"), *results, ZEROS

    sharded = over({"data": 4, "model": 2}, f=varying)
    assert branches(sharded, *args) == 0
    _, *got, _ = jax.jit(sharded)(*args)
    _, *wanted, _ = desired(*args[:3])
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=4e-6 * abs(other).max())


def test_one_all_reduce_outside_of_the_branch(forced):
    args = draw(rows=512)
    on = mesh(data=8)
    rows = jax.NamedSharding(on, P("data"))
    x, dy = (jax.device_put(a, rows) for a in args[:2])

    def moments_and_y(*args):
        return step(*args)[:2]

    for f, number in ((moments_and_y, 1), (step, 2)):
        program = jax.jit(f).lower(x, dy, args[2], ZEROS).compile()
        assert " conditional(" in program.as_text()
        assert collectives(program) == {"all-reduce": number}


# Eager


def test_eager_calls_compile_once(forced):
    args = *draw(rows=32), ZEROS
    stacked = [a[None] for a in args]

    def calls():
        return step(*args), jax.vmap(step)(*stacked)

    calls()
    with compilations.counted() as later:
        calls()
    assert not later
