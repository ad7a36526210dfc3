"""Forward mode and second derivatives: which calls work with which `derivative`.

In float64, against the slope of the oracle along a direction: of its y for first
derivatives, of its gradient for second ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, case_ids
from jax.flatten_util import ravel_pytree

import jaxbn

EPSILON = 1e-3
each_small = pytest.mark.parametrize(
    "case",
    [
        Case("mask", (7, 2), mask="elements"),
        Case("no parameters", (5, 2), use_scale=False, use_bias=False),
        Case("channel first, mask", (3, 2, 2), axis=1, mask="rows"),
    ],
    **case_ids,
)


class Problem:
    """A case in float64, its oracle, and all inputs and derivatives as vectors."""

    def __init__(self, case, derivative):
        *at, mask, self.dy = case.draw()
        self.at, self.unravel = ravel_pytree(at)
        self.along = np.random.default_rng(1).normal(size=self.at.shape)
        self.options = {"epsilon": EPSILON, "axis": case.axis, "mask": mask}
        self.static = self.options | {"train": True, "derivative": derivative}
        self.state = jaxbn.init(case.features)[1]

    def y(self, v):
        x, *params = self.unravel(v)
        params = jaxbn.Params(*params)
        return jaxbn.batch_norm(x, params, self.state, **self.static)[0].ravel()

    def loss(self, v):
        return jnp.vdot(self.y(v), self.dy.ravel())

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


@each_small
def test_forward_mode(x64, case):
    p = Problem(case, "jvp")

    @jax.jit
    def program(at, along):
        def tangent(at):
            return jax.jvp(p.y, (at,), (along,))[1]

        y, linear = jax.linearize(p.y, at)
        gauss_newton = jax.vjp(p.y, at)[1](tangent(at))[0]
        gradient = jax.grad(lambda at: jnp.vdot(tangent(at), p.dy.ravel()))(at)
        jacobian = jax.jacfwd(p.y)(at)
        return y, tangent(at), linear(along), jacobian, gauss_newton, gradient

    jacobian = slopes(p.oracle_y, p.at)
    tangent = slope(p.oracle_y, p.at, p.along)
    # The gradient of dy' J v is the slope of J' dy along v.
    gradient = slope(p.oracle_gradient, p.at, p.along)
    products = jacobian, jacobian.T @ jacobian @ p.along, gradient
    wanted = p.oracle_y(p.at), tangent, tangent, *products
    for got, want in zip(program(p.at, p.along), wanted, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
@each_small
def test_hessian(x64, case, derivative):
    """Forward over reverse, reverse over reverse, and product by product."""
    p = Problem(case, derivative)

    @jax.jit
    def hessians(at):
        def product(v):
            return jax.jvp(jax.grad(p.loss), (at,), (v,))[1]

        products = jax.vmap(product)(jnp.eye(at.size))
        return jax.hessian(p.loss)(at), jax.jacrev(jax.jacrev(p.loss))(at), products

    want = slopes(p.oracle_gradient, p.at)
    for got in hessians(p.at):
        assert_same(got, want)


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


def test_default_has_no_forward_mode(x64):
    p = Problem(Case("matrix", (3, 2)), "vjp")

    def tangent(at):
        return jax.jvp(p.y, (at,), (at,))[1]

    with pytest.raises(TypeError, match="can't apply forward-mode autodiff"):
        jax.jit(tangent).lower(p.at)
    with pytest.raises(NotImplementedError, match="Differentiation rule"):
        jax.grad(lambda at: tangent(at).sum())(p.at)


@each_small
def test_inference_has_both_modes(x64, case):
    """In x, the parameters and the state, by the default `derivative`."""
    x, scale, bias, mask, _ = case.draw()
    mean, var = np.random.default_rng(2).uniform(0.5, 2, (2, *case.features))
    at, unravel = ravel_pytree((x, scale, bias, mean, var))
    options = {"epsilon": EPSILON, "axis": case.axis, "mask": mask}

    def y(v):
        x, scale, bias, *statistics = unravel(v)
        params, state = jaxbn.Params(scale, bias), jaxbn.State(*statistics, 0)
        return jaxbn.batch_norm(x, params, state, train=False, **options)[0].ravel()

    def oracle_y(v):
        x, scale, bias, *statistics = map(as_array, unravel(v))
        return oracle.normalize(x, *statistics, scale, bias, **options).ravel()

    want = slopes(oracle_y, at)
    for got in jax.jit(lambda at: (jax.jacfwd(y)(at), jax.jacrev(y)(at)))(at):
        assert_same(got, want)
