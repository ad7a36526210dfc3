"""One training step, and how far each of its results may be from float64."""

import jax
import numpy as np
import oracle
from cases import FUSES_SUMS

import jaxbn


def step(x, dy, scale, mean=None, mask=None, norm=jaxbn.batch_norm, **kwargs):
    """(var, y, dx, dscale, mean), with a running mean before the step."""
    state = jaxbn.init(scale.shape)[1]
    state = state if mean is None else state._replace(mean=mean)

    def train(x, scale):
        params, static = jaxbn.Params(scale, None), {"train": True, "momentum": 0.0}
        return norm(x, params, state, mask=mask, **static, **kwargs)

    y, vjp, new = jax.vjp(train, x, scale, has_aux=True)
    return new.var, y, *vjp(dy), new.mean


def desired(x, dy, scale, mask=None, axis=-1):
    x, dy, scale = (np.float64(a) for a in (x, dy, scale))
    _, mean, var = oracle.moments(x, axis=axis, mask=mask)
    y = oracle.forward(x, scale, axis=axis, mask=mask)
    dx, dscale, _ = oracle.backward(dy, x, scale, axis=axis, mask=mask)
    return var, y, dx, dscale, mean


# XLA:CPU adds up in another order before jaxlib 0.10.2.
SLACK = 1 if FUSES_SUMS else 10
EXACT = [SLACK * bound for bound in (2e-6, 1.5e-6, 1.5e-6, 1.5e-6, 4e-7)]


def assert_exact(got, wanted, bounds=EXACT, where="", least_var=0.0):
    """Each over its largest; but var over itself, and the mean over itself or std."""
    var, mean = np.maximum(wanted[0], least_var), abs(wanted[-1])
    largest = (max(abs(a).max(), 1e-30) for a in wanted[1:4])
    sizes = var, *largest, np.maximum(mean, np.sqrt(var))
    names = "var", "y", "dx", "dscale", "mean"
    for name, a, b, size, bound in zip(names, got, wanted, sizes, bounds, strict=True):
        error = (abs(np.float64(a) - b) / size).max()
        assert error <= bound, f"{name} {where}: {error:.1e}"
