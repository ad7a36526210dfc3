"""The numerics table: a small part against bounds from the float formats, and peers."""

import jax.numpy as jnp
import numerics
import numpy as np
import oracle
import pytest

RATIOS = [1, 1000, 1_000_000]

EPS = float(jnp.finfo("float32").eps)

# By how many of its spacings a mean may be off: a tree of sums, and a division.
SPACINGS = 4


def allowed(cell):
    """By measure, the largest error: two floors, and what the mean's rounding leaves.

    The mean is head + tail, and the tail is rounded: it is off by SPACINGS * EPS of a
    number that is EPS of the mean. In the first order all x move with the mean.
    """
    x, scale, dy = cell.draw()
    desired = numerics.truth(x, scale, dy)
    off = SPACINGS * EPS**2 * abs(desired["mean"][0])
    bounds = {}
    for name, (_, unit, slope) in desired.items():
        cost = 0 if name == "mean" else np.max(off * slope / unit)
        bounds[name] = 2 * numerics.floor(cell.dtype, name, unit, slope) + cost
    return bounds


def over(library, cells):
    """Rows in which the error is over the bound, of those that are judged."""
    for cell in cells:
        bounds = None
        for row in numerics.measure(cell, [library]):
            bounds = bounds or allowed(cell)
            if row["judged"] and row["errors"].get(library, 0) > bounds[row["measure"]]:
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
    """So that the bounds can fail: Flax's default."""
    rows = [*over("flax-fast", numerics.cells([100], ["float32"], ["normal"], RATIOS))]
    assert {row["measure"] for row in rows} == {"y", "dx", "dscale"}
    assert {row["ratio"] for row in rows} >= {1000, 1_000_000}


@pytest.mark.parametrize("kind", ["normal", "outlier", "first row"])
def test_truth_is_the_oracle_where_that_is_exact_enough(kind):
    x, scale, dy = numerics.Cell("float32", kind, 10, 100).draw()
    _, mean, var = oracle.moments(x)
    dx, dscale, _ = oracle.backward(dy, x, scale)
    wanted = mean, var, oracle.forward(x, scale), dx, dscale
    truth = numerics.truth(x, scale, dy).values()
    for (value, *_), desired in zip(truth, wanted, strict=True):
        np.testing.assert_allclose(value, desired, rtol=1e-9, atol=1e-11)


def test_an_error_is_that_of_the_worst_feature_and_a_nan_is_one():
    unit, inf = np.array([1.0, 10.0]), np.inf
    assert numerics.error([[1, 2], [3, 4]], np.array([[1, 2], [3, 9]]), unit) == 0.5
    assert numerics.error([inf, 1], np.array([inf, 1]), unit) == 0
    for value in (np.nan, inf):
        assert numerics.error([value, 1], np.array([1, 1]), unit) == inf


def test_which_rows_are_over_the_limit():
    row = {"measure": "y", "floor": 1e-7, "judged": True, "errors": {"jaxbn": 3e-6}}
    assert numerics.is_over(row)
    assert numerics.is_over(row | {"errors": {"jaxbn": np.inf}})
    half_a_spacing_of_bfloat16 = {"floor": 4e-3}
    for change in (half_a_spacing_of_bfloat16, {"judged": False}, {"measure": "var"}):
        assert not numerics.is_over(row | change)


def test_tables_of_a_command(capsys, tmp_path):
    arguments = (
        "--counts 2 --dtypes float32 --kinds constant --libraries jaxbn flax-fast"
    )
    file = tmp_path / "table.json"
    numerics.main([*arguments.split(), "--json", str(file)])
    out = capsys.readouterr().out
    assert all(f"error of {name}" in out for name in numerics.MEASURES)
    assert "35 rows" in out
    assert file.read_text().count('"jaxbn"') == 35


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_y_in_the_whole_table():
    for cell in numerics.cells():
        assert not [*filter(numerics.is_over, numerics.measure(cell, ["jaxbn"]))]
