"""How far batch norms are from float64, cell by cell: jaxbn, and the libraries here.

    python tests/numerics.py --json table.json
    python tests/numerics.py --counts 2 100 --kinds normal constant

A cell is a dtype, a kind of data, a mean/std and a number of elements. In it five
results are compared with float64. An error is divided by its unit, the size of what the
result is made of, so that no library is blamed for what no arithmetic could keep:

    mean     max(|mean|, std)     the size of what is added up
    var      max(var, epsilon)    it goes nowhere but into var + epsilon
    y        max |y|              of the feature; 1 where y is 0, as x_hat is of size 1
    dx       max |scale rstd dy|  what dx is left of, after two projections (with two
                                  rows nothing is left); or max |dx|, if that is more
    dscale   sum |dy x_hat|       the terms of the sum; sum |dy| where x_hat is 0

The worst feature counts. Errors up to the floor are called exact. The floor is half a
spacing of the result's dtype, to which it is rounded once; four spacings of float32 for
the arithmetic before; and where numbers are tiny, the least number of the dtype, and
what a change of x by the least normal float32 would do: XLA reads what is smaller as 0.

Where the variance is too big for float32, inf is right and only mean and var are
judged: no running variance can hold it. (PyTorch still gets y right, in float64.)
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from jaxbn.cli.bench import layers

EPSILON = 1e-5
DTYPES = ["float32", "bfloat16", "float16"]
KINDS = ["normal", "constant", "outlier", "first row", "1e20", "1e-20", "subnormal"]
RATIOS = [1, 10, 100, 1000, 10_000, 100_000, 1_000_000]
COUNTS = [1, 2, 10, 100, 10_000, 1_000_000]
MEASURES = ["mean", "var", "y", "dx", "dscale"]
LIMIT = 2e-6  # of y, over the largest of its feature
LIBRARIES = [name for name in layers.PEERS if name != "nnx"]  # that is "flax-fast"

FLOAT32 = np.finfo(np.float32)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A dtype, a kind of data, and how much of it; `ratio` is mean/std of the bulk."""

    dtype: str
    kind: str
    ratio: int
    n: int

    def draw(self):
        """(x, scale, dy) in float64, exact in the dtype; None where that is no data."""
        rng = np.random.default_rng([self.n, self.ratio])
        num_features = 64 if self.n <= 10_000 else 4
        x = rng.normal(size=(self.n, num_features))
        if self.kind == "constant":
            x[:] = 0
        if self.kind in ("outlier", "first row"):
            x[0 if self.kind == "first row" else self.n // 2] = 1000
        x += self.ratio * rng.uniform(1, 2, num_features)
        sizes = {"1e20": 1e20, "1e-20": 1e-20, "subnormal": 1e-40}
        if self.dtype == "float16":
            sizes["subnormal"] = 1e-6
        x = self._exact(x * sizes.get(self.kind, 1))
        scale = np.float64(np.float32(rng.uniform(0.5, 2, num_features)))
        dy = self._exact(rng.normal(size=x.shape) + 0.5)
        return (x, scale, dy) if np.isfinite(x).all() and x.any() else None

    def _exact(self, a):
        with np.errstate(over="ignore"):
            return a.astype(jnp.dtype(self.dtype)).astype(np.float64)


def cells(counts=COUNTS, dtypes=DTYPES, kinds=KINDS, ratios=RATIOS):
    """Those that there are: a subnormal with a large mean is none."""
    for n, dtype, kind, ratio in itertools.product(counts, dtypes, kinds, ratios):
        if kind != "subnormal" or ratio == 1:
            yield Cell(dtype, kind, ratio, n)


def truth(x, scale, dy):
    """By measure (result, unit, how far x moves it at most), in float64.

    Differences of numbers of 24 bits are exact in float64 while they are within 2^29 of
    each other: less its first row a constant is 0, and nothing cancels.
    """
    n = len(x)
    shifted = x - x[0]
    offset = shifted.mean(0)
    var = ((shifted - offset) ** 2).mean(0)
    rstd = (var + EPSILON) ** -0.5
    x_hat = (shifted - offset) * rstd
    dscale = (dy * x_hat).sum(0)
    dx = scale * rstd * (dy - dy.mean(0) - x_hat * dscale / n)
    mean, y = x[0] + offset, scale * x_hat
    terms = abs(scale * rstd * dy).max(0), abs(dy * x_hat).sum(0)
    units = {
        "mean": np.maximum(abs(mean), np.sqrt(var)),
        "var": np.maximum(var, EPSILON),
        "y": abs(y).max(0),
        "dx": np.maximum(terms[0], abs(dx).max(0)),
        "dscale": np.where(terms[1] > 0, terms[1], abs(dy).sum(0)),
    }
    slopes = {
        "mean": 1,
        "y": scale * rstd,
        "dx": scale * rstd**2 * abs(dy).max(0) * (1 + abs(x_hat).max(0)),
        "dscale": rstd * abs(dy).sum(0),
    }
    results = mean, np.where(var > FLOAT32.max, np.inf, var), y, dx, dscale
    return {
        name: (result, np.where(units[name] > 0, units[name], 1), slopes.get(name, 0))
        for name, result in zip(MEASURES, results, strict=True)
    }


def floor(dtype, name, unit, slope):
    """Relative to the unit, what is called exact; see the top of the file."""
    info = jnp.finfo(dtype if name in ("y", "dx") else "float32")
    least = float(info.smallest_subnormal) + float(FLOAT32.tiny) * slope
    return float(info.eps) / 2 + 4 * float(FLOAT32.eps) + np.max(least / unit)


def error(result, desired, unit):
    """Of the worst feature, relative to the unit; inf where there is a NaN."""
    result = np.asarray(result).astype(np.float64)
    with np.errstate(invalid="ignore"):
        off = np.where(result == desired, 0, abs(result - desired)) / unit
    return float(np.where(np.isnan(off), np.inf, off).max())


def measure(cell, libraries):
    """Rows of the table: by measure the floor and the error of each library."""
    drawn = cell.draw()
    if drawn is None:
        return []
    arrays = [
        jnp.asarray(a.astype(np.float32), dtype)
        for a, dtype in zip(drawn, [cell.dtype, "float32", cell.dtype], strict=True)
    ]
    with np.errstate(over="ignore", invalid="ignore"):
        desired = truth(*drawn)
    kind = drawn[0].shape[1], cell.n, cell.dtype
    # Not every library is strict.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        results = {
            name: step(*kind, name)(*arrays)
            for name in libraries
            if name == "jaxbn" or cell.n > 1
            if (name, cell.dtype) != ("keras", "float16")  # it is made for bfloat16
        }
    # Beyond float32: the variance, or the squares of what rounding a mean leaves.
    mean, var = (desired[name][0] for name in MEASURES[:2])
    left = cell.n * (float(FLOAT32.eps) * abs(mean)) ** 2
    beyond = bool((np.isinf(var) | (left > FLOAT32.max)).any())
    rows = []
    for name in MEASURES if cell.n > 1 else MEASURES[:2]:
        value, unit, slope = desired[name]
        errors = {
            k: error(r[name], value, unit) for k, r in results.items() if name in r
        }
        row = {"measure": name, "floor": floor(cell.dtype, name, unit, slope)}
        row["judged"] = name in ("mean", "var") or not beyond
        rows.append(dataclasses.asdict(cell) | row | {"errors": errors})
    return rows


def is_over(row):
    """Whether jaxbn's y is off by more than LIMIT, and by more than is called exact."""
    judged = row["measure"] == "y" and row["judged"]
    return judged and not row["errors"]["jaxbn"] <= max(LIMIT, row["floor"])


# The layers of `jaxbn bench`. Running statistics of others are not measured: each
# library keeps them in its own way.


def torch_step(num_features):
    import torch

    torch.set_num_threads(1)

    def run(x, scale, dy):
        n, kind = len(x), getattr(torch, x.dtype.name)
        # Features second, one example: it then adds up in float64; with (n, features)
        # in float32, one after the other.
        x, dy = (
            torch.tensor(np.asarray(a, np.float32).T[None]).to(kind).contiguous()
            for a in (x, dy)
        )
        norm = torch.nn.BatchNorm1d(num_features, eps=EPSILON, momentum=1.0)
        norm.weight.data = torch.tensor(np.asarray(scale))
        y = norm(x.requires_grad_())
        dx, dscale = torch.autograd.grad(y, (x, norm.weight), dy)
        biased = norm.running_var.double() * (n - 1) / n
        results = norm.running_mean, biased, y[0].T, dx[0].T, dscale
        arrays = [a.detach().double().numpy() for a in results]
        return dict(zip(MEASURES, arrays, strict=True))

    return run


@functools.cache
def step(num_features, n, dtype, name):
    """`(x, scale, dy)` -> results by measure, of one training step."""
    if name == "torch":
        return torch_step(num_features)

    def moments(x):
        _, mean, var = jaxbn.batch_moments(x)
        return {"mean": mean, "var": var}

    if n == 1:  # no batch to train on
        return jax.jit(lambda x, *_: moments(x))
    layer = layers.PEERS[name].build(jnp.ones((n, num_features), dtype), -1, None)
    leaves, tree = jax.tree.flatten(layer.params)
    at = next(i for i, leaf in enumerate(leaves) if leaf.all())  # the bias is 0

    @jax.jit
    def run(x, scale, dy):
        def apply(x, scale):
            given = [*leaves]
            given[at] = scale.reshape(leaves[at].shape)
            params = jax.tree.unflatten(tree, given)
            return layer.apply(x, params, layer.state, True)[0]

        y, vjp = jax.vjp(apply, x, scale)
        dx, dscale = vjp(dy.astype(y.dtype))
        results = {"y": y, "dx": dx, "dscale": dscale}
        return results | (moments(x) if name == "jaxbn" else {})

    return run


def print_tables(rows, libraries):
    """A table for each measure; rows in which all are exact are only counted."""
    from rich.console import Console
    from rich.table import Table

    # Everything, also where the output goes into a file.
    console = Console(width=None if sys.stdout.isatty() else 120)
    for name in MEASURES:
        chosen = [row for row in rows if row["measure"] == name]
        told = [
            row
            for row in chosen
            if max(row["errors"].values(), default=0) > row["floor"]
        ]
        head = "dtype", "data", "mean/std", "n", *libraries
        table = Table(*head, title=f"error of {name}", box=None)
        for row in told:
            texts = [text(row, library) for library in libraries]
            ratio = f"1e{len(str(row['ratio'])) - 1}"
            table.add_row(row["dtype"], row["kind"], ratio, f"{row['n']:,}", *texts)
        console.print(table, f"exact in all: {len(chosen) - len(told)} more rows\n")


def text(row, library):
    off = row["errors"].get(library)
    if off is None:
        return ""
    if off <= row["floor"]:
        return "·"
    if library == "jaxbn" and is_over(row):
        return f"[bold red]{off:.0e} ![/]"
    return f"{off:.0e}" if row["judged"] else f"[dim]({off:.0e})[/]"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, choices in [("counts", COUNTS), ("dtypes", DTYPES), ("kinds", KINDS)]:
        parser.add_argument(
            f"--{name}", nargs="+", type=type(choices[0]), default=choices
        )
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES)
    parser.add_argument("--json", metavar="FILE", help="also write all rows there")
    args = parser.parse_args(arguments)
    found, missing = layers.find(args.libraries)
    begun = time.monotonic()
    rows = []
    for cell in cells(args.counts, args.dtypes, args.kinds):
        rows += measure(cell, found)
    print_tables(rows, found)
    for reason in missing.values():
        print(reason)
    over = [*filter(is_over, rows)] if "jaxbn" in found else []
    print(
        f"{len(rows)} rows in {time.monotonic() - begun:.0f} s. `·` is exact. In "
        "parentheses: the variance is too big for float32.\n"
        f"y of jaxbn is off by more than {LIMIT:g} of the largest in {len(over)}"
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
