"""The numerics table: a small part against bounds from the float formats, and peers."""

import jax.numpy as jnp
import numerics
import numpy as np
import oracle
import pytest

from jaxbn import _rounding
from jaxbn.cli import _bench_peers

RATIOS = [1, 1000, 1_000_000]

EPS = float(jnp.finfo("float32").eps)

# By how many of its spacings a mean may be off: a tree of sums, and a division.
SPACINGS = 4


def allowed(cell):
    """By measure, the largest error: two floors, and what the mean's rounding leaves.

    A mean that is near (`_rounding.FAR`) may be one sum, as over devices; of one that
    is far, the low part is rounded. In the first order all x move with the mean; in the
    second var is off by the square, and x_hat with it.
    """
    x, scale, dy = cell.draw()
    desired = numerics.truth(x, scale, dy)
    mean, var = (desired[name][0] for name in ("mean", "var"))
    low = SPACINGS * EPS * abs(mean)
    near = abs(mean) <= _rounding.FAR * np.sqrt(var)
    off = np.where(near, low, EPS * low)
    bounds = {}
    for name, (_, unit, slope) in desired.items():
        cost = off * slope / unit + np.minimum(off**2 / (var + numerics.EPSILON), 1)
        cost = {"mean": 0, "var": off**2 / unit}.get(name, cost)
        floor = numerics.floor(cell.dtype, name, unit, slope)
        bounds[name] = 2 * floor + np.max(cost)
    return bounds


def over(library, cells):
    """Rows in which the error is over the bound, of those that are judged."""
    for cell in cells:
        bounds = None
        for row in numerics.measure(cell, [library]):
            bounds = bounds or allowed(cell)
            if row["judged"] and row["errors"][library] > bounds[row["measure"]]:
                yield row | {"bound": bounds[row["measure"]]}


@pytest.mark.parametrize("n", [1, 2, 100])
@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_within_the_bounds(dtype, n):
    """1e20 aside: there the sums of the variance overflow, in all libraries."""
    kinds = [kind for kind in numerics.KINDS if kind != "1e20"]
    assert not [*over("jaxbn", numerics.cells([n], [dtype], kinds, RATIOS))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_too_big_a_variance_is_inf_and_the_mean_is_right(dtype):
    for cell in numerics.cells([100], [dtype], ["1e20"], RATIOS):
        mean, var, *_ = numerics.measure(cell, ["jaxbn"])
        assert mean["errors"]["jaxbn"] <= 2 * mean["floor"]
        if not mean["judged"] or cell.ratio == 1:
            assert var["errors"]["jaxbn"] == 0  # inf is what is asked for


def test_a_variance_in_one_pass_is_over_the_bounds():
    """So that the bounds can fail: Flax's default, in every measure but the mean."""
    rows = [*over("flax-fast", numerics.cells([100], ["float32"], ["normal"], RATIOS))]
    assert {row["measure"] for row in rows} == {"var", "y", "dx", "dscale"}
    assert {row["ratio"] for row in rows} >= {1000, 1_000_000}


@pytest.mark.parametrize("kind", ["normal", "outlier", "first row"])
def test_truth_is_the_oracle_where_that_is_exact_enough(kind):
    x, scale, dy = numerics.Cell("float32", kind, 10, 100).draw()
    desired = {
        name: value for name, (value, *_) in numerics.truth(x, scale, dy).items()
    }
    _, mean, var = oracle.moments(x)
    dx, dscale, _ = oracle.backward(dy, x, scale)
    results = mean, var, oracle.forward(x, scale), dx, dscale
    for name, value in zip(numerics.MEASURES, results, strict=True):
        np.testing.assert_allclose(desired[name], value, rtol=1e-9, atol=1e-11)


def test_truth_of_a_constant_is_nothing_at_all():
    x, scale, dy = numerics.Cell("float32", "constant", 1_000_000, 100).draw()
    desired = numerics.truth(x, scale, dy)
    np.testing.assert_array_equal(desired["mean"][0], x[0])
    for name in ("var", "y", "dscale"):
        np.testing.assert_array_equal(desired[name][0], 0)


def test_an_error_is_that_of_the_worst_feature_and_a_nan_is_one():
    unit = np.array([1.0, 10.0])
    assert numerics.error([[1, 2], [3, 4]], np.array([[1, 2], [3, 9]]), unit) == 0.5
    assert numerics.error([np.inf, 1], np.array([np.inf, 1]), unit) == 0
    assert numerics.error([np.nan, 1], np.array([1, 1]), unit) == np.inf
    assert numerics.error([np.inf, 1], np.array([1, 1]), unit) == np.inf


def test_ratio_to_the_best_stable_peer():
    row = {"floor": 0.1, "errors": {"jaxbn": 0.5, "keras": 0.25, "haiku": 0.2}}
    assert numerics.ratio_to_best(row) == 2
    row["errors"]["keras"] = 0.01  # below the floor
    assert numerics.ratio_to_best(row) == 5
    row["errors"]["jaxbn"] = 0.05
    assert numerics.ratio_to_best(row) == 1
    row["errors"] = {"jaxbn": np.inf, "keras": np.inf}
    assert numerics.ratio_to_best(row) == 1
    row["errors"]["keras"] = 1.0
    assert numerics.ratio_to_best(row) == np.inf


def test_tables_of_a_command(capsys, tmp_path):
    arguments = (
        "--counts 2 --dtypes float32 --kinds constant --libraries jaxbn flax-fast"
    )
    file = tmp_path / "table.json"
    numerics.main([*arguments.split(), "--json", str(file)])
    out = capsys.readouterr().out
    assert all(f"error of {name}" in out for name in numerics.MEASURES)
    assert "35 rows" in out
    assert file.read_text().count('"flax-fast"') == 35


@pytest.mark.peers
@pytest.mark.parametrize("n", [2, 100])
@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_never_over_twice_the_best_stable_peer(dtype, n):
    assert not [*worse(numerics.cells([n], [dtype], ratios=RATIOS))]


@pytest.mark.peers
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_never_over_twice_in_the_whole_table():
    assert not [*worse(numerics.cells())]


def worse(cells):
    """Rows in which a stable peer is twice as good."""
    found, missing = _bench_peers.find(["jaxbn", *numerics.STABLE])
    if missing:
        pytest.skip("; ".join(missing.values()))
    for cell in cells:
        for row in numerics.measure(cell, found):
            if row["judged"] and numerics.ratio_to_best(row) > 2:
                yield row
