"""The document's formulas in float64 NumPy, one feature at a time; no cleverness.

A mask filters: what it hides is gone before anything is computed.
"""

import numpy as np


def moments(x, *, axis=-1, mask=None):
    """Count, mean and biased variance, each of the features' shape."""
    rows, keep, shape = _columns(x, axis, mask)
    n, mean, var = [], [], []
    for column, kept in zip(rows.T, keep.T, strict=True):
        v = column[kept]
        n.append(len(v))
        mean.append(v.mean() if len(v) else 0.0)
        var.append((np.abs(v - mean[-1]) ** 2).mean() if len(v) else 0.0)
    return tuple(np.reshape(a, shape) for a in (n, mean, var))


def forward(x, scale=None, bias=None, *, epsilon=1e-5, axis=-1, mask=None):
    """Y of the document's forward pass; 0 where masked."""
    _, mean, var = moments(x, axis=axis, mask=mask)
    return normalize(x, mean, var, scale, bias, epsilon=epsilon, axis=axis, mask=mask)


def normalize(x, mean, var, scale=None, bias=None, *, epsilon=1e-5, axis=-1, mask=None):
    """Y for given moments; 0 where masked."""
    rows, keep, _ = _columns(x, axis, mask)
    y = np.zeros_like(rows)
    for f, kept in enumerate(keep.T):
        x_hat = (rows[kept, f] - np.ravel(mean)[f]) / np.sqrt(
            np.ravel(var)[f] + epsilon
        )
        y[kept, f] = _at(scale, f, 1.0) * x_hat + _at(bias, f, 0.0)
    return _uncolumns(y, x, axis)


def backward_steps(dy, x, scale=None, *, epsilon=1e-5, axis=-1, mask=None):
    """The document's six steps by name, in the layout of x or of the features."""
    rows, keep, shape = _columns(x, axis, mask)
    dys, _, _ = _columns(dy, axis, None)
    steps = {k: np.zeros(rows.shape[1]) for k in ("dbias", "dscale", "dvar", "dmean")}
    steps |= {k: np.zeros_like(rows) for k in ("dx_hat", "dx")}
    for f, kept in enumerate(keep.T):
        v, g = rows[kept, f], dys[kept, f]
        n, gamma = len(v), _at(scale, f, 1.0)
        if n == 0:
            continue
        mu = v.mean()
        s = ((v - mu) ** 2).mean() + epsilon
        dx_hat = g * gamma
        dvar = (dx_hat * (v - mu) * -0.5 * s**-1.5).sum()
        dmean = (dx_hat * -1 / np.sqrt(s)).sum() + dvar * (-2 * (v - mu)).mean()
        steps["dbias"][f] = g.sum()
        steps["dscale"][f] = (g * (v - mu) / np.sqrt(s)).sum()
        steps["dx_hat"][kept, f] = dx_hat
        steps["dvar"][f], steps["dmean"][f] = dvar, dmean
        steps["dx"][kept, f] = dx_hat / np.sqrt(s) + dvar * 2 * (v - mu) / n + dmean / n
    for name, value in steps.items():
        per_feature = value.ndim == 1
        steps[name] = (
            value.reshape(shape) if per_feature else _uncolumns(value, x, axis)
        )
    return steps


def backward(dy, x, scale=None, **kwargs):
    """(dx, dscale, dbias) of the document's backward pass."""
    steps = backward_steps(dy, x, scale, **kwargs)
    return steps["dx"], steps["dscale"], steps["dbias"]


def _features(x, axis):
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    return sorted(i % np.ndim(x) for i in axes)


def _columns(x, axis, mask):
    """X and mask as (elements, features), and the features' shape."""
    x = np.asarray(x)
    wide = np.complex128 if np.iscomplexobj(x) else np.float64
    mask = np.broadcast_to(True if mask is None else np.asarray(mask), x.shape)
    features = _features(x, axis)
    to = list(range(-len(features), 0))
    shape = tuple(x.shape[i] for i in features)
    flat = [
        np.moveaxis(a, features, to).reshape(-1, int(np.prod(shape)))
        if x.size
        else np.zeros((0, int(np.prod(shape))), a.dtype)
        for a in (x.astype(wide), mask)
    ]
    return flat[0], flat[1], shape


def _uncolumns(rows, like, axis):
    """The inverse of `_columns`, for an array shaped like x."""
    if np.size(like) == 0:
        return np.zeros(np.shape(like))
    features = _features(like, axis)
    to = list(range(-len(features), 0))
    moved = np.moveaxis(np.empty(np.shape(like)), features, to)
    return np.moveaxis(rows.reshape(moved.shape), to, features)


def _at(per_feature, f, default):
    if per_feature is None:
        return default
    return np.ravel(np.asarray(per_feature)).astype(
        complex if np.iscomplexobj(per_feature) else float
    )[f]
