"""Every function of one batch against the float64 oracle, and what only they refuse."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, DTYPES, assert_close, case_ids

import jaxbn

EPSILON = 1e-3
IN_ALL_DTYPES = {"matrix", "many rows", "channel first", "mask elements"}


def row(case, dtype):
    quick = dtype == jnp.float32 or case.name in IN_ALL_DTYPES
    marks = [] if quick else pytest.mark.exhaustive
    return pytest.param(case, dtype, id=f"{case.name}-{dtype.__name__}", marks=marks)


@pytest.mark.parametrize(
    ("case", "dtype"), list(itertools.starmap(row, itertools.product(CASES, DTYPES)))
)
def test_equals_the_oracle(case, dtype):
    """In one program, with leak checking, and NaNs refused."""
    x, scale, bias, mask, dy = case.draw(dtype)
    mean, var = np.random.default_rng(9).uniform(0.5, 2, (2, *case.features))
    layout = {"axis": case.axis, "mask": mask}
    static = layout | {"epsilon": EPSILON}

    def array(a, dtype=jnp.float32):
        return None if a is None else jnp.asarray(a, dtype)

    params = jaxbn.Params(array(scale), array(bias))
    state = jaxbn.State(array(mean), array(var), jnp.int32(7))
    small = [array(a, dtype) for a in (x, scale, bias, dy)]

    @jax.jit
    def program(params, state, x, scale, bias, dy):
        def train(x, params, derivative):
            kwargs = static | {"derivative": derivative}
            return jaxbn.batch_norm(x, params, state, train=True, **kwargs)

        y, cache = jaxbn.forward(x, scale, bias, **static)
        trained = [(y, jaxbn.backward(dy, cache), None)]
        # In half precision "jvp" adds up rounded parts of dx.
        for derivative in ("vjp", "jvp") if dtype == jnp.float32 else ("vjp",):
            f = functools.partial(train, derivative=derivative)
            y, vjp, new = jax.vjp(f, x, params, has_aux=True)
            dx, dparams = vjp(dy)
            trained.append((y, (dx, *dparams), new))
        inferred = (
            jaxbn.batch_norm(x, params, state, train=False, **static),
            (jaxbn.normalize(x, *state[:2], *params, **static), state),
        )
        return jaxbn.batch_moments(x, **layout), trained, inferred

    with jax.checking_leaks(), jax.debug_nans(True):
        moments, trained, inferred = program(params, state, *small)

    n, batch_mean, batch_var = oracle.moments(x, **layout)
    close = functools.partial(assert_close, n=n.max(initial=1))
    np.testing.assert_array_equal(jnp.broadcast_to(moments.num_elements, n.shape), n)
    assert moments.num_elements.shape in {(), n.shape}
    assert {v.dtype for v in moments} == {jnp.dtype(jnp.float32)}
    close(moments.mean, batch_mean, jnp.float32)
    close(moments.var, batch_var, jnp.float32)

    want_y = oracle.forward(x, scale, bias, **static)
    want = oracle.backward(dy, x, scale, **static)
    for y, gradients, new in trained:
        of_params = dtype if new is None else jnp.float32
        assert y.shape == x.shape
        assert y.dtype == dtype
        close(y, want_y, dtype)
        dtypes, given = (dtype, of_params, of_params), (x, scale, bias)
        for got, desired, a, kind in zip(gradients, want, given, dtypes, strict=True):
            assert (got is None) == (a is None)
            if got is not None:
                assert got.dtype == kind
                close(got, desired, kind)
        if new is not None:
            counted = n > 0
            moved = 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * batch_var
            close(new.mean, np.where(counted, moved[0], mean), jnp.float32)
            close(new.var, np.where(counted, moved[1], var), jnp.float32)
            assert new.num_updates == 7 + counted.any()

    want_y = oracle.normalize(x, mean, var, scale, bias, **static)
    for y, after in inferred:
        jax.tree.map(np.testing.assert_array_equal, after, state)
        assert y.dtype == dtype
        close(y, want_y, dtype)


@pytest.mark.parametrize("case", [c for c in CASES if 0 not in c.shape], **case_ids)
def test_the_oracle_s_backward_is_the_slope_of_its_forward(case):
    x, scale, bias, mask, dy = case.draw()
    static = {"axis": case.axis, "mask": mask}
    primals = {"x": x, "scale": scale, "bias": bias}
    gradients = oracle.backward(dy, x, scale, **static)
    rng = np.random.default_rng(1)
    for (name, value), gradient in zip(primals.items(), gradients, strict=True):
        if value is None:
            continue
        along, h = rng.normal(size=value.shape), 1e-5
        ends = [
            oracle.forward(**primals | {name: value + t * along}, **static)
            for t in (h, -h)
        ]
        slope = ((ends[0] - ends[1]) * dy).sum() / (2 * h)
        np.testing.assert_allclose((gradient * along).sum(), slope, 2e-7, 2e-7)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_values_under_the_mask_do_not_matter(poison):
    """As if they were 0, in x and in the cotangent, in values and in gradients."""
    rng = np.random.default_rng(5)
    x, dy = rng.normal(size=(2, 24, 3)).astype(np.float32)
    mean, var, scale, bias = rng.uniform(0.5, 2, (4, 3)).astype(np.float32)
    mask = np.arange(24)[:, None] % 4 > 0

    @jax.jit
    def program(x, dy):
        y, cache = jaxbn.forward(x, scale, bias, mask=mask)
        stored = functools.partial(jaxbn.normalize, mask=mask)
        z, vjp = jax.vjp(stored, x, mean, var, scale, bias)
        batch, back = jax.vjp(functools.partial(jaxbn.batch_moments, mask=mask), x)
        gradients = *jaxbn.backward(dy, cache), *vjp(dy), *back(batch)
        return y, z, batch, gradients

    got = program(np.where(mask, x, poison), np.where(mask, dy, poison))
    want = program(np.where(mask, x, 0), np.where(mask, dy, 0))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for rows in (*got[:2], got[3][0], got[3][3], got[3][-1]):
        assert not np.where(mask, 0, rows).any()


def test_rank_one_needs_a_named_axis():
    params, state = jaxbn.init(3)
    x = jnp.array([[1.0, 2.0, 3.0], [3.0, 2.0, 7.0]])

    def each(x, train=True, **kwargs):
        return jaxbn.batch_norm(x, params, state, train=train, **kwargs)

    named = jax.vmap(
        functools.partial(each, axis_name="batch"),
        axis_name="batch",
        out_axes=(0, None),
    )
    y, new = jax.jit(named)(x)
    whole, state2 = jax.jit(each)(x)
    np.testing.assert_allclose(y, whole, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, new, state2)
    with pytest.raises(ValueError, match="more than one element per feature"):
        jax.vmap(each)(x)
    y, _ = jax.jit(jax.vmap(functools.partial(each, train=False)))(x)
    np.testing.assert_allclose(y, x, rtol=1e-4)


def test_init():
    params, state = jaxbn.init((3, 2), use_scale=False, param_dtype=jnp.bfloat16)
    assert params.scale is None
    assert params.bias.shape == state.mean.shape == state.var.shape == (3, 2)
    assert params.bias.dtype == jnp.bfloat16
    assert state.mean.dtype == state.var.dtype == jnp.float32
    assert state.num_updates.dtype == jnp.int32
    with jax.enable_x64(True):
        params, state = jaxbn.init(3, use_bias=False, param_dtype=jnp.float64)
        assert params.bias is None
        assert params.scale.dtype == state.mean.dtype == jnp.float64


def test_complex_parameters_and_state():
    params, state = jaxbn.init(3, param_dtype=jnp.complex64)
    dtypes = [a.dtype for a in (*params, state.mean, state.var)]
    assert dtypes == [jnp.float32, jnp.complex64, jnp.complex64, jnp.float32]
    x = jnp.array([[1 + 1j] * 3, [3 - 1j] * 3])
    train = functools.partial(jaxbn.batch_norm, train=True, momentum=0.0)
    _, state = jax.jit(train)(x, params, state)
    np.testing.assert_array_equal(state.mean, [2, 2, 2])
    np.testing.assert_array_equal(state.var, [2, 2, 2])


X = jnp.ones((4, 5))


def call(x=X, **kwargs):
    return jaxbn.batch_norm(x, *jaxbn.init(5), **{"train": True} | kwargs)


# Each argument alone is in tests/test_bad_input.py.
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: call(X[:1]), ValueError, r"more than one .*\(1, 5\).*`axis_name`"),
        (
            lambda: jaxbn.forward(X[:1], None, None),
            ValueError,
            "`forward` needs more than one element per feature.* there is `batch_norm`",
        ),
        (
            lambda: call(X.astype(complex)),
            TypeError,
            "`state.mean` must be complex for x of dtype complex64; got float32",
        ),
        (
            lambda: jaxbn.normalize(X, None, jnp.ones(5)),
            TypeError,
            "`mean` and `var` must be arrays; got None",
        ),
        (
            lambda: jaxbn.normalize(X, jnp.ones(5), jnp.ones(5, complex)),
            TypeError,
            "`var` must be real",
        ),
    ],
)
def test_arguments_that_do_not_go_together(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_bad_groups():
    x = jnp.ones((4, 3, 5))
    sizes = [[0, 1], [2]], [[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2, 4]], []
    for groups in (*sizes, [0, 1, 2, 3], 4, "ab", [[0.0, 1.0], [2.0, 3.9]]):
        named = functools.partial(call, axis_name="b", axis_index_groups=groups)
        with pytest.raises(ValueError, match="each of the 4 indices of `axis_name`"):
            jax.vmap(named, axis_name="b")(x)


def test_static_arguments_may_be_numpy_scalars():
    static = {"epsilon": np.float32(1e-5), "momentum": jnp.array(0.5)}
    y, _ = jax.eval_shape(functools.partial(call, train=np.bool_(True), **static))
    assert y.shape == X.shape
