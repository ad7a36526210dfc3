"""Forward mode and second derivatives: which calls work with which `derivative`.

Except for the first test all are in float64, against the slope of the oracle along a
direction: of its y for first derivatives, of its gradient for second ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, Case, assert_close, case_ids
from jax.flatten_util import ravel_pytree

import jaxbn

EPSILON = 1e-3
SMALL = [
    Case("matrix", (5, 2)),
    Case("mask", (7, 2), mask="elements"),
    Case("no parameters", (5, 2), use_scale=False, use_bias=False),
    Case("channel first, mask", (3, 2, 2), axis=1, mask="rows"),
]


def training(case, mask, derivative):
    """Y as a function of (x, scale, bias)."""

    def f(x, scale, bias):
        return jaxbn.batch_norm(
            x,
            jaxbn.Params(scale, bias),
            jaxbn.init(case.features)[1],
            train=True,
            epsilon=EPSILON,
            axis=case.axis,
            mask=mask,
            derivative=derivative,
        )[0]

    return f


class Problem:
    """A case in float64, its oracle, and all inputs and derivatives as vectors."""

    def __init__(self, case, derivative):
        *at, mask, self.dy = case.draw()
        self.at, self.unravel = ravel_pytree(at)
        self.along = np.random.default_rng(1).normal(size=self.at.shape)
        self.options = {"epsilon": EPSILON, "axis": case.axis, "mask": mask}
        f = training(case, mask, derivative)
        self.y = lambda v: f(*self.unravel(v)).ravel()
        self.loss = lambda v: jnp.vdot(self.y(v), self.dy.ravel())

    def oracle_y(self, v):
        return oracle.forward(*map(as_array, self.unravel(v)), **self.options).ravel()

    def oracle_gradient(self, v):
        x, scale, bias = map(as_array, self.unravel(v))
        dx, *dparams = oracle.backward(self.dy, x, scale, **self.options)
        kept = [d for d, p in zip(dparams, (scale, bias), strict=True) if p is not None]
        return np.concatenate([d.ravel() for d in (dx, *kept)])


def as_array(a):
    return None if a is None else np.asarray(a)


def slope(f, at, along, h=1e-5):
    """The derivative of f at `at`, along a direction; its error is of size h**2."""
    return (f(at + h * along) - f(at - h * along)) / (2 * h)


def slopes(f, at):
    """The whole Jacobian, a column for each entry of `at`."""
    return np.stack([slope(f, at, e) for e in np.eye(at.size)], axis=-1)


def assert_same(got, want):
    np.testing.assert_allclose(got, want, atol=1e-7 * max(1, np.abs(want).max()))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def each_small(test):
    return pytest.mark.parametrize("case", SMALL, **case_ids)(test)


@pytest.mark.parametrize("case", CASES, **case_ids)
def test_jvp_gives_the_numbers_of_the_oracle(case):
    x, scale, bias, mask, dy = case.draw(jnp.float32)
    at = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, scale, bias))

    @jax.jit
    def both(*at):
        y, back = jax.vjp(training(case, mask, "jvp"), *at)
        return y, back(jnp.asarray(dy, jnp.float32))

    y, grads = both(*at)
    options = {"epsilon": EPSILON, "axis": case.axis, "mask": mask}
    n = x.size
    assert_close(y, oracle.forward(x, scale, bias, **options), jnp.float32, n)
    desired = oracle.backward(dy, x, scale, **options)
    for got, want, primal in zip(grads, desired, at, strict=True):
        assert (got is None) == (primal is None)
        if got is not None:
            assert got.dtype == jnp.float32
            assert_close(got, want, jnp.float32, n)


@each_small
def test_forward_mode(x64, case):
    p = Problem(case, "jvp")
    want = slope(p.oracle_y, p.at, p.along)
    jvp = jax.jit(lambda at, along: jax.jvp(p.y, (at,), (along,)))
    assert_same(jvp(p.at, p.along)[1], want)
    y, linear = jax.jit(lambda at: jax.linearize(p.y, at))(p.at)
    assert_same(y, p.oracle_y(p.at))
    assert_same(linear(p.along), want)
    assert_same(jax.jit(jax.jacfwd(p.y))(p.at), slopes(p.oracle_y, p.at))


@each_small
def test_gauss_newton_product(x64, case):
    p = Problem(case, "jvp")

    @jax.jit
    def product(at, along):
        _, tangent = jax.jvp(p.y, (at,), (along,))
        _, back = jax.vjp(p.y, at)
        return back(tangent)[0]

    jacobian = slopes(p.oracle_y, p.at)
    assert_same(product(p.at, p.along), jacobian.T @ jacobian @ p.along)


@each_small
def test_gradient_of_a_jvp(x64, case):
    """The gradient of dy' J v is the slope of J' dy along v."""
    p = Problem(case, "jvp")

    def tangent(at):
        return jnp.vdot(jax.jvp(p.y, (at,), (p.along,))[1], p.dy.ravel())

    want = slope(p.oracle_gradient, p.at, p.along)
    assert_same(jax.jit(jax.grad(tangent))(p.at), want)


HESSIANS = {
    "hessian": jax.hessian,
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f)),
    "jvp of grad": lambda f: (
        lambda at: jax.vmap(lambda v: jax.jvp(jax.grad(f), (at,), (v,))[1])(
            jnp.eye(at.size)
        )
    ),
}


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
@each_small
def test_hessian(x64, case, derivative, hessian):
    p = Problem(case, derivative)
    got = jax.jit(HESSIANS[hessian](p.loss))(p.at)
    assert_same(got, slopes(p.oracle_gradient, p.at))


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
def test_third_derivative(x64, derivative):
    """The slope of the Hessian, which is tested above."""
    p = Problem(Case("column", (4, 1)), derivative)
    hessian = jax.jit(jax.jacrev(jax.grad(p.loss)))
    third = jax.jit(
        jax.grad(lambda at: jnp.vdot(jax.jacrev(jax.grad(p.loss))(at) @ p.along, at))
    )
    want = slope(hessian, p.at, p.along) @ p.at + hessian(p.at) @ p.along
    np.testing.assert_allclose(third(p.at), want, atol=1e-5)


def jvp(f, at):
    return jax.jvp(f, (at,), (at,))[1]


NEEDS_JVP = {
    "jvp": (jvp, TypeError),
    "jacfwd": (lambda f, at: jax.jacfwd(f)(at), TypeError),
    "linearize": (lambda f, at: jax.linearize(f, at)[1](at), TypeError),
    "grad of jvp": (
        lambda f, at: jax.grad(lambda at: jvp(f, at).sum())(at),
        NotImplementedError,
    ),
}
MESSAGE = {
    TypeError: r"can't apply forward-mode autodiff \(jvp\) to a custom_vjp function",
    NotImplementedError: "Differentiation rule for 'custom_lin' not implemented",
}


@pytest.mark.parametrize("of", ["x", "scale", "bias"])
@pytest.mark.parametrize("call", NEEDS_JVP)
def test_default_has_no_forward_mode(call, of):
    """JAX's own messages: a rule for reverse mode cannot be run forwards."""
    arguments = {"x": jnp.ones((3, 2)), "scale": jnp.ones(2), "bias": jnp.ones(2)}
    f = training(SMALL[0], None, "vjp")
    run, error = NEEDS_JVP[call]
    with pytest.raises(error, match=MESSAGE[error]):
        run(lambda value: f(**arguments | {of: value}), arguments[of])


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
@each_small
def test_inference_has_forward_mode(x64, case, derivative):
    """With any `derivative`, in x, the parameters and the state."""
    x, scale, bias, mask, _ = case.draw()
    rng = np.random.default_rng(2)
    mean, var = rng.normal(size=case.features), rng.uniform(0.5, 2, case.features)
    at, unravel = ravel_pytree((x, scale, bias, mean, var))
    options = {"epsilon": EPSILON, "axis": case.axis, "mask": mask}

    def y(v):
        x, scale, bias, mean, var = unravel(v)
        params, state = jaxbn.Params(scale, bias), jaxbn.State(mean, var, 0)
        static = {"train": False, "derivative": derivative, **options}
        return jaxbn.batch_norm(x, params, state, **static)[0].ravel()

    def oracle_y(v):
        x, scale, bias, mean, var = map(as_array, unravel(v))
        return oracle.normalize(x, mean, var, scale, bias, **options).ravel()

    assert_same(jax.jit(jax.jacfwd(y))(at), slopes(oracle_y, at))
