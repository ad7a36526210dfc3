"""Properties of batch norm on inputs drawn at random, by hypothesis.

A few examples of each property, always the same ones; `pytest -m long` draws `LONG`,
always others. What makes another program (shapes, axes, dtypes, epsilon) comes from a
table, itself drawn; values, masks and momenta come from anywhere.

The tolerances are those of an error analysis, feature by feature. Let u be the rounding
of the arithmetic (float32 or float64), n the counted elements, and A, H and G the
largest |x|, |x_hat| and |dy|. A sum of n numbers is off by a random walk of n
roundings, relative to their size, which with the factor of `cases.tolerance` is
s = 4 u sqrt(n). To first order, product by product,

    mean     s A = m
    head + tail   o = s min(A, D)      for passes over x; D is the largest |x - head|
    var      v = s (var + d^2) + o^2   d is the distance from head to mean
    x_hat    e = o rstd + H (s + v rstd^2 / 2)
    y        |scale| e + u |y|
    dbias    n G s
    dscale   n G (e + s H)
    dx       |scale| rstd G ((2 + H) s + e + H (e + s H))

The head is the mean of a share f of the data, off by m at most: D is twice the largest
|x - mean| and m, and d^2 at most var (1 - f) / f + m^2. (In float64 the oracle has no
more bits than we: o is m there.) Where moments with one float mean are merged
(`merge_moments`), the errors of the parts' means enter times their distances, at most
std, from that of the whole: v is 2 m std more. And on top comes what rounding to the
result's own dtype adds. Two results that should agree may each be off by as much.
"""

import dataclasses
import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st

import jaxbn
from jaxbn import Params, State
from jaxbn._core.moments import _part

QUICK, LONG = 4, 800

LAYOUTS = [  # of x, and the feature axes
    ((8, 3), (-1,)),
    ((2, 4), (-1,)),
    ((5, 8), (0,)),
    ((3, 4, 5), (1,)),
    ((2, 3, 2, 4), (1, -1)),
    ((4, 3, 3, 2), (-1,)),
    ((400, 2), (-1,)),
]
ROWS_FIRST = [layout for layout in LAYOUTS if layout[1] == (-1,)]

# Powers of ten. How far from 0 x may lie, in standard deviations, so that its dtype
# still tells its values apart; and how wide it may be, as float16 ends at 65504.
FURTHEST = {"float16": 1.5, "bfloat16": 1.0, "float32": 3.0, "float64": 6.0}
WIDEST = dict(zip(FURTHEST, [(-1, 1), (-3, 4), (-3, 4), (-6, 6)], strict=True))

EPSILONS, DERIVATIVES = (1e-6, 1e-5, 1e-3, 1.0), ("vjp", "vjp", "jvp")
KINDS_OF_DATA = ["normal", "normal", "two values", "one outlier", "constant"]


@dataclasses.dataclass(frozen=True)
class Example:
    """What is drawn; the values follow from the seed."""

    shape: tuple[int, ...]
    axis: tuple[int, ...]
    dtype: str
    mask: str
    has: tuple[bool, bool]
    epsilon: float
    derivative: str
    momentum: float
    furthest: float
    widest: float
    density: float
    seed: int

    @property
    def static(self):
        """What makes a program of its own."""
        return (*self.kernel.items(), ("derivative", self.derivative))

    @property
    def kernel(self):
        return {"axis": self.axis, "epsilon": self.epsilon}

    @property
    def reduced(self):
        features = [i % len(self.shape) for i in self.axis]
        return tuple(i for i in range(len(self.shape)) if i not in features)

    def draw(self):
        """(x, scale, bias, mask, dy, state), exact in `dtype`; on the host."""
        rng = np.random.default_rng(self.seed)
        features = [i % len(self.shape) for i in self.axis]
        per_feature = tuple(self.shape[i] for i in features)
        rows = tuple(self.shape[i] for i in self.reduced)
        n = int(np.prod(rows))
        columns = np.stack([self._column(rng, n) for _ in np.ndindex(per_feature)], -1)
        last = range(len(rows), len(self.shape))
        x = np.moveaxis(columns.reshape(rows + per_feature), last, features)
        scale = rng.uniform(0.5, 2, per_feature) * rng.choice([-1, 1], per_feature)
        bias, mean = rng.normal(size=(2, *per_feature)) * 2
        var = rng.uniform(0.1, 4, per_feature)
        dy = rng.normal(size=self.shape) + 0.5
        wide = np.float64 if self.dtype == "float64" else np.float32
        return (
            self._exact(x),
            self._exact(scale) if self.has[0] else None,
            self._exact(bias) if self.has[1] else None,
            self._mask(rng),
            self._exact(dy),
            State(mean.astype(wide), var.astype(wide), np.int32(5)),
        )

    def _exact(self, a):
        return np.asarray(a).astype(jnp.dtype(self.dtype))

    def _column(self, rng, n):
        """One feature, with a place, a width and a kind of its own."""
        kind, column = rng.choice(KINDS_OF_DATA), rng.normal(size=n)
        if kind == "two values":
            column = np.where(column > 0, 1.0, -1.0)
        if kind == "one outlier":
            column[rng.integers(n)] = 30
        if kind == "constant":
            column[:] = 0
        place = rng.choice([-1, 1]) * 10 ** rng.uniform(-1, self.furthest)
        return (column + place) * 10 ** rng.uniform(WIDEST[self.dtype][0], self.widest)

    def _mask(self, rng):
        if self.mask == "none":
            return None
        kept = {"rows": [0], "all but rows": range(1, len(self.shape))}
        kept = kept.get(self.mask, range(len(self.shape)))
        shape = [n if i in kept else 1 for i, n in enumerate(self.shape)]
        return rng.random(shape) < self.density


def examples(
    *,
    layouts=LAYOUTS,
    dtypes=("float16", "bfloat16", "float32", "float64"),
    masks=("none", "rows", "all but rows", "full"),
    num_programs=40,
):
    """Examples of `num_programs` programs, out of all combinations of these choices."""
    has = itertools.product((True, False), repeat=2)
    choices = layouts, dtypes, masks, has, EPSILONS, DERIVATIVES
    combinations = list(itertools.product(*choices))
    rng = np.random.default_rng(0)
    table = [combinations[i] for i in rng.permutation(len(combinations))[:num_programs]]

    @st.composite
    def example(draw):
        layout, dtype, *rest = draw(st.sampled_from(table))
        return Example(
            *layout,
            dtype,
            *rest,
            draw(st.floats(0, 1, width=32)),
            draw(st.floats(-1, FURTHEST[dtype])),
            draw(st.floats(*WIDEST[dtype])),
            draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
            draw(st.integers(0, 2**32 - 1)),
        )

    return example()


@functools.cache
def compiled(static):
    """(x, scale, bias, mask, dy, state, momentum) -> (y, state, dx, dscale, dbias)."""

    @jax.jit
    def step(x, scale, bias, mask, dy, state, momentum):
        def normalize(x, scale, bias):
            kwargs = {"train": True, "momentum": momentum, "mask": mask, **dict(static)}
            return jaxbn.batch_norm(x, Params(scale, bias), state, **kwargs)

        y, vjp, new = jax.vjp(normalize, x, scale, bias, has_aux=True)
        return y, new, *vjp(dy)

    return step


def run(example, drawn):
    """The results that there are, in float64 under their names."""
    momentum = np.float32(example.momentum)
    y, state, dx, dscale, dbias = compiled(example.static)(*drawn, momentum)
    assert y.dtype == dx.dtype == example.dtype
    assert state.mean.dtype == drawn[-1].mean.dtype
    results = {"y": y, "dx": dx, "dscale": dscale, "dbias": dbias}
    results |= {"mean": state.mean, "var": state.var}
    return {k: np.asarray(v, np.float64) for k, v in results.items() if v is not None}


@functools.cache
def share(shape, reduced):
    """Of the elements, that of the part whose mean is the head."""
    return _part(jnp.zeros(shape), reduced)[0].size / np.prod(shape)


class Allowed:
    """The tolerances that stand above, each of the features' shape."""

    def __init__(self, example, x, scale, bias, mask, dy, state, merged=False):
        self.example, self.dtype = example, example.dtype
        wide = jnp.float64 if example.dtype == "float64" else jnp.float32
        u, rounding = (float(jnp.finfo(dtype).eps) for dtype in (wide, self.dtype))
        f = share(example.shape, example.reduced) if mask is None else 1
        mask = np.broadcast_to(True if mask is None else mask, x.shape)
        x, dy = (np.where(mask, a, 0).astype(np.float64) for a in (x, dy))
        n, mean, var = oracle.moments(x, axis=example.axis, mask=mask)
        n = np.maximum(n, 1)
        s = 4 * u * np.sqrt(np.maximum(n, 4))
        rstd = (var + example.epsilon) ** -0.5
        x_hat = np.where(mask, (x - self.expand(mean)) * self.expand(rstd), 0)
        a, h, g = (
            np.abs(values).max(example.reduced, initial=0) for values in (x, x_hat, dy)
        )
        gamma = 1 if scale is None else np.abs(np.asarray(scale, np.float64))
        beta = 0 if bias is None else np.abs(np.asarray(bias, np.float64))
        self.batch_mean = m = s * a
        off = s * np.minimum(a, 2 * h / rstd + m) if wide == jnp.float32 else m
        self.batch_var = v = s * (var / f + m**2) + off**2
        v += merged * 2 * m * np.sqrt(var)
        e = off * rstd + h * (s + v * rstd**2 / 2)
        dx = (2 + h) * (s + rounding) + e + h * (e + s * h)
        self.bounds = {
            "y": gamma * e + (4 * u + rounding) * (gamma * h + beta),
            "dbias": n * g * (s + rounding),
            "dscale": n * g * (e + s * h + rounding * h),
            "dx": gamma * rstd * g * dx,
            "mean": self.batch_mean + 4 * u * (a + np.abs(state.mean)),
            "var": self.batch_var + 4 * u * (var + state.var),
        }

    def expand(self, per_feature):
        return np.expand_dims(per_feature, self.example.reduced)

    def check(self, actual, desired, times=1):
        """Every result of `desired`, within `times` its bound."""
        for name, want in desired.items():
            bound = times * self.bounds[name] + float(jnp.finfo(self.dtype).tiny)
            if name in ("y", "dx"):
                bound = self.expand(bound)
            off = np.abs(actual[name] - want)
            share = (off / bound).max(initial=0)
            assert (off <= bound).all(), f"{name}: {share:.2f} times what is allowed"


def by_oracle(example, x, scale, bias, mask, dy, state):
    """What `run` should give."""
    kernel = {**example.kernel, "mask": mask}
    n, mean, var = oracle.moments(x, axis=example.axis, mask=mask)
    dx, dscale, dbias = oracle.backward(dy, x, scale, **kernel)
    m = float(np.float32(example.momentum))
    results = {
        "y": oracle.forward(x, scale, bias, **kernel),
        "dx": dx,
        "mean": np.where(n > 0, m * state.mean + (1 - m) * mean, state.mean),
        "var": np.where(n > 0, m * state.var + (1 - m) * var, state.var),
    }
    results |= {} if scale is None else {"dscale": dscale}
    return results | ({} if bias is None else {"dbias": dbias})


def equals_the_oracle(example):
    drawn = example.draw()
    Allowed(example, *drawn).check(run(example, drawn), by_oracle(example, *drawn))


def powers_of_two_change_no_bit(example, power):
    """X 2^k with epsilon 4^k: the same y and dscale, and dx 2^-k, to the last bit."""
    x, *rest = example.draw()
    wider = dataclasses.replace(example, epsilon=example.epsilon * 4.0**power)
    one = run(example, (x, *rest))
    two = run(wider, (np.ldexp(x.astype(np.float64), power).astype(x.dtype), *rest))
    for name in ("y", "dscale", "dbias"):
        if name in one:
            np.testing.assert_array_equal(one[name], two[name])
    np.testing.assert_array_equal(one["dx"], np.ldexp(two["dx"], power))


def masked_equals_filtered(example, num_kept):
    """Rows under the mask could as well not be there; here they hold NaN."""
    x, scale, bias, _, dy, state = example.draw()
    rows = np.random.default_rng(example.seed).permutation(len(x))
    kept = np.sort(rows[: min(num_kept, len(x))])
    mask = np.zeros((len(x),) + (1,) * (x.ndim - 1), bool)
    mask[kept] = True
    poisoned = np.where(mask, x, np.nan).astype(x.dtype)
    masked = run(example, (poisoned, scale, bias, mask, dy, state))
    filtered = run(example, (x[kept], scale, bias, None, dy[kept], state))
    for name in ("y", "dx"):
        np.testing.assert_array_equal(np.delete(masked[name], kept, 0), 0)
        masked[name] = masked[name][kept]
    Allowed(example, x, scale, bias, mask, dy, state).check(masked, filtered, times=2)


@functools.cache
def compiled_moments(axis, cuts):
    @jax.jit
    def moments(x, mask):
        def part(rows):
            has_rows = mask is not None and mask.shape[0] == x.shape[0]
            some = mask[rows] if has_rows else mask
            return jaxbn.batch_moments(x[rows], axis=axis, mask=some)

        parts = [part(slice(*ends)) for ends in itertools.pairwise(cuts)]
        left = functools.reduce(jaxbn.merge_moments, parts)
        right = functools.reduce(lambda b, a: jaxbn.merge_moments(a, b), parts[::-1])
        return part(slice(None)), left, right

    return moments


def parts_merge_into_the_whole(example, cuts):
    """Three parts of the rows, some with nothing in them, merged from either end."""
    x, _, _, mask, *_ = drawn = example.draw()
    cuts = (0, *sorted(round(cut * len(x)) for cut in cuts), len(x))
    whole, *merged = compiled_moments(example.axis, cuts)(x, mask)
    n, mean, var = oracle.moments(x, axis=example.axis, mask=mask)
    allowed = Allowed(example, *drawn, merged=True)
    for some in (whole, *merged):
        np.testing.assert_array_equal(np.broadcast_to(some.num_elements, n.shape), n)
        # Two more roundings for each merge.
        assert (np.abs(some.mean - mean) <= 2 * allowed.batch_mean).all()
        assert (np.abs(some.var - var) <= 2 * allowed.batch_var + 1e-37).all()


UPDATES = [
    {"momentum": "drawn"},
    {"momentum": "drawn", "debias": True},
    {"momentum": None},
    {"momentum": None, "debias": True},
]


@functools.cache
def compiled_updates(mode, running_variance):
    static = dict(mode) | {"running_variance": running_variance}

    @jax.jit
    def updates(state, x, mask, momentum):
        if static["momentum"] is not None:
            static["momentum"] = momentum
        params = Params(None, None)
        states = []
        for rows, kept in zip(x, mask, strict=True):
            kwargs = static | {"mask": kept, "train": True}
            state = jaxbn.batch_norm(rows, params, state, **kwargs)[1]
            states.append(state)
        return states

    return updates


def state_follows_its_rule(example, mode, running_variance, broken):
    """Four updates in turn, of which some may count nothing or hold a NaN."""
    rng = np.random.default_rng(example.seed)
    x = (rng.normal(size=(4, 6, 3)) + 3).astype(np.float32)
    mask = rng.random(x.shape) < 0.8
    step, what = broken
    if what == "nan":
        x[step, 2, 1], mask[step, 2, 1] = np.nan, True
    elif what is not None:
        mask[step] = False
        mask[step, :, 0] = what == "one feature counts"
    unbiased = running_variance == "unbiased"
    mean, var, count = np.zeros(3), np.ones(3), 0
    got = compiled_updates(tuple(UPDATES[mode].items()), running_variance)(
        State(np.zeros(3, np.float32), np.ones(3, np.float32), np.int32(0)),
        x,
        mask,
        np.float32(example.momentum),
    )
    for rows, kept, state in zip(x, mask, got, strict=True):
        n, new_mean, new_var = oracle.moments(rows, mask=kept)
        if unbiased:
            new_var = new_var * n / np.maximum(n - 1, 1)
        took = (n > unbiased) & np.isfinite(new_mean)
        keep = float(np.float32(example.momentum))
        if UPDATES[mode]["momentum"] is None:
            keep = count / (count + 1)
        elif UPDATES[mode].get("debias"):
            keep = min(keep, count / (count + 1))
        if UPDATES[mode] != {"momentum": "drawn"}:
            took = np.broadcast_to(took.all(), took.shape)
        mean = np.where(took, keep * mean + (1 - keep) * new_mean, mean)
        var = np.where(took, keep * var + (1 - keep) * new_var, var)
        count += bool(took.any())
        assert state.num_updates == count
        # Values of size 5 (the mean) and 25 (what var is the difference of), each
        # update with its few roundings.
        np.testing.assert_allclose(state.mean, mean, atol=5 * 4 * 8 * 2**-23)
        np.testing.assert_allclose(state.var, var, atol=25 * 4 * 8 * 2**-23)


PROPERTIES = {
    equals_the_oracle: [examples()],
    powers_of_two_change_no_bit: [
        examples(dtypes=("bfloat16", "float32", "float64"), num_programs=24),
        st.sampled_from([-3, 2]),
    ],
    masked_equals_filtered: [
        examples(layouts=ROWS_FIRST, masks=("none",), num_programs=24),
        st.sampled_from([2, 3, 5]),
    ],
    parts_merge_into_the_whole: [
        examples(layouts=[*ROWS_FIRST, ((3, 4, 5), (1,))], num_programs=24),
        st.sampled_from([(0.0, 0.5), (0.25, 0.25), (0.3, 0.8), (0.5, 1.0)]),
    ],
    state_follows_its_rule: [
        examples(dtypes=("float32",), num_programs=1),
        st.sampled_from(range(len(UPDATES))),
        st.sampled_from(["biased", "unbiased"]),
        st.tuples(
            st.integers(0, 3),
            st.sampled_from([None, "nan", "nothing counts", "one feature counts"]),
        ),
    ],
}


def hold(check, number, **settings):
    """Draws `number` examples, each with 64 bits where its dtype has them."""

    @functools.wraps(check)
    def run(example, **drawn):
        with jax.enable_x64(example.dtype == "float64"):
            check(example, **drawn)

    hypothesis.settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        **settings,
    )(hypothesis.given(*PROPERTIES[check])(run))()


by_name = pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)


@by_name
def test_property(check):
    # The update of a state has eight programs, soon compiled, of which none may miss.
    number = {state_follows_its_rule: 24, equals_the_oracle: 2 * QUICK}
    hold(check, number.get(check, QUICK), derandomize=True)


@pytest.mark.long
@by_name
def test_property_at_length(check):
    hold(check, LONG, print_blob=True)
