"""batch_norm and init: training, inference, strict JAX, and bad arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, DTYPES, assert_close, case_ids

import jaxbn


def setup(case, dtype):
    x, scale, bias, mask, dy = case.draw(dtype)
    _, state = jaxbn.init(case.features)
    params = jaxbn.Params(
        *(None if p is None else jnp.asarray(p, jnp.float32) for p in (scale, bias))
    )
    return jnp.asarray(x, dtype), params, state, mask, jnp.asarray(dy, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, **case_ids)
def test_training_under_strict_jax(case, dtype):
    """Values, gradients and state; with leak checking, and NaNs refused."""
    x, params, state, mask, dy = setup(case, dtype)

    @jax.jit
    def step(x, params, dy):
        def train(x, params):
            return jaxbn.batch_norm(
                x, params, state, train=True, axis=case.axis, mask=mask
            )

        y, vjp, new = jax.vjp(train, x, params, has_aux=True)
        return y, vjp(dy), new

    with jax.checking_leaks(), jax.debug_nans(True):
        y, (dx, dparams), new = step(x, params, dy)
    x64, scale, bias, mask, dy64 = case.draw(dtype)
    static = {"axis": case.axis, "mask": mask}
    assert_close(y, oracle.forward(x64, scale, bias, **static), dtype, 1000)
    desired = oracle.backward(dy64, x64, scale, **static)
    assert_close(dx, desired[0], dtype, 1000)
    for got, want in zip(dparams, desired[1:], strict=True):
        if got is not None:
            assert got.dtype == jnp.float32
            assert_close(got, want, jnp.float32, 1000)
    n, mean, var = oracle.moments(x64, **static)
    assert_close(new.mean, np.where(n > 0, 0.1 * mean, 0), jnp.float32, 1000)
    assert_close(new.var, np.where(n > 0, 0.9 + 0.1 * var, 1), jnp.float32, 1000)
    assert new.num_updates == int((n > 0).any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, **case_ids)
def test_inference(case, dtype):
    x, params, state, mask, _ = setup(case, dtype)
    rng = np.random.default_rng(9)
    mean, var = rng.normal(size=state.mean.shape), rng.uniform(0.5, 2, state.var.shape)
    state = jaxbn.State(
        jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32), jnp.int32(7)
    )
    static = {"train": False, "axis": case.axis}
    y, after = jax.jit(functools.partial(jaxbn.batch_norm, **static))(
        x, params, state, mask=mask
    )
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert y.dtype == dtype
    x64, scale, bias, mask, _ = case.draw(dtype)
    static = {"axis": case.axis, "mask": mask}
    desired = oracle.normalize(x64, mean, var, scale, bias, **static)
    assert_close(y, desired, dtype)


def test_rank_one_needs_a_named_axis():
    params, state = jaxbn.init(3)
    x = jnp.array([[1.0, 2.0, 3.0], [3.0, 2.0, 7.0]])

    def one(x):
        return jaxbn.batch_norm(x, params, state, train=True, axis_name="batch")

    y, new = jax.vmap(one, axis_name="batch", out_axes=(0, None))(x)
    whole, state2 = jaxbn.batch_norm(x, params, state, train=True)
    np.testing.assert_allclose(y, whole, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, new, state2)
    with pytest.raises(ValueError, match="more than one element per feature"):
        jax.vmap(lambda x: jaxbn.batch_norm(x, params, state, train=True))(x)
    y, _ = jax.vmap(lambda x: jaxbn.batch_norm(x, params, state, train=False))(x)
    assert y.shape == x.shape


def test_numpy_input():
    params, state = jaxbn.init(3)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    params, state = jax.tree.map(np.asarray, (params, state))
    y, _ = jaxbn.batch_norm(x, params, state, train=True)
    assert_close(y, oracle.forward(x), jnp.float32)


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
def test_second_derivatives(derivative):
    """Hessians against JAX's own, of the plain formula, in float64."""
    rng = np.random.default_rng(1)
    x, scale, bias = rng.normal(size=(5, 2)), *rng.normal(size=(2, 2))
    weight = rng.normal(size=x.shape)

    def plain(x, scale, bias):
        x_hat = (x - x.mean(0, keepdims=True)) / jnp.sqrt(
            x.var(0, keepdims=True) + 1e-5
        )
        return ((x_hat * scale[None] + bias[None]) ** 3 * weight).sum()

    def ours(x, scale, bias):
        _, state = jaxbn.init(2)
        params = jaxbn.Params(scale, bias)
        y, _ = jaxbn.batch_norm(x, params, state, train=True, derivative=derivative)
        return (y**3 * weight).sum()

    with jax.enable_x64(True):
        arguments = tuple(map(jnp.asarray, (x, scale, bias)))
        got = jax.jit(jax.hessian(ours, (0, 1, 2)))(*arguments)
        want = jax.jit(jax.hessian(plain, (0, 1, 2)))(*arguments)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
            got,
            want,
        )


class TestInit:
    def test_shapes_and_options(self):
        params, state = jaxbn.init((3, 2), use_scale=False, param_dtype=jnp.bfloat16)
        assert params.scale is None
        assert params.bias.shape == state.mean.shape == state.var.shape == (3, 2)
        assert params.bias.dtype == jnp.bfloat16
        assert state.mean.dtype == state.var.dtype == jnp.float32
        assert state.num_updates.dtype == jnp.int32

    def test_complex(self):
        params, state = jaxbn.init(3, param_dtype=jnp.complex64)
        dtypes = [a.dtype for a in (*params, state.mean, state.var)]
        assert dtypes == [jnp.float32, jnp.complex64, jnp.complex64, jnp.float32]
        x = jnp.array([[1 + 1j] * 3, [3 - 1j] * 3])
        _, state = jaxbn.batch_norm(x, params, state, train=True, momentum=0.0)
        np.testing.assert_array_equal(state.mean, [2, 2, 2])
        np.testing.assert_array_equal(state.var, [2, 2, 2])

    def test_float64(self):
        with jax.enable_x64(True):
            params, state = jaxbn.init(3, param_dtype=jnp.float64)
            assert params.scale.dtype == state.mean.dtype == jnp.float64


X = jnp.ones((4, 5))


def call(x=X, params=None, state=None, **kwargs):
    default = jaxbn.init(5)
    kwargs = {"train": True} | kwargs
    return jaxbn.batch_norm(x, params or default[0], state or default[1], **kwargs)


def params_like(**kwargs):
    return jaxbn.init(5)[0]._replace(**kwargs)


def state_like(**kwargs):
    return jaxbn.init(5)[1]._replace(**kwargs)


BAD = {
    "scale shape": (
        lambda: call(params=params_like(scale=jnp.ones(3))),
        ValueError,
        r"`scale` must have shape \(5,\), one entry per feature on axis -1 of x with "
        r"shape \(4, 5\); got \(3,\)",
    ),
    "bias shape": (
        lambda: call(params=params_like(bias=jnp.ones((1, 5)))),
        ValueError,
        r"`bias` must have shape \(5,\).*got \(1, 5\)",
    ),
    "bias dtype": (
        lambda: call(params=params_like(bias=jnp.ones(5, int))),
        TypeError,
        r"`bias` must be floating point or complex; got dtype int32",
    ),
    "complex bias": (
        lambda: call(params=params_like(bias=jnp.ones(5, complex))),
        TypeError,
        r"`bias` must be real for x of dtype float32; got complex64",
    ),
    "params type": (
        lambda: call(params={"scale": jnp.ones(5)}),
        TypeError,
        "`params` must be a jaxbn.Params; got dict",
    ),
    "state type": (
        lambda: call(state=(jnp.ones(5), jnp.ones(5))),
        TypeError,
        "`state` must be a jaxbn.State; got tuple",
    ),
    "state mean shape": (
        lambda: call(state=state_like(mean=jnp.ones(4))),
        ValueError,
        r"`state.mean` must have shape \(5,\).*got \(4,\)",
    ),
    "state var None": (
        lambda: call(state=state_like(var=None)),
        TypeError,
        "`state.mean` and `state.var` must be arrays; got None",
    ),
    "num_updates": (
        lambda: call(state=state_like(num_updates=jnp.zeros(()))),
        TypeError,
        "`state.num_updates` must be an int32 scalar; got float32",
    ),
    "complex x": (
        lambda: call(X.astype(complex)),
        TypeError,
        "`state.mean` must be complex for x of dtype complex64; got float32",
    ),
    "integer x": (
        lambda: call(X.astype(int)),
        TypeError,
        "`x` must be floating point or complex; got dtype int32",
    ),
    "scalar x": (lambda: call(jnp.ones(())), ValueError, "`x` must have at least one"),
    "one row": (
        lambda: call(X[:1]),
        ValueError,
        r"more than one element per feature.*shape \(1, 5\).*`axis_name`",
    ),
    "mask dtype": (
        lambda: call(mask=jnp.ones((4, 5))),
        TypeError,
        r"`mask` must be boolean.*float32.*mask.astype\(bool\)",
    ),
    "mask rank": (
        lambda: call(mask=jnp.ones(4, bool)),
        ValueError,
        r"`mask` must have the rank of x.*\(4, 5\); got \(4,\).*mask\[:, None\]",
    ),
    "mask shape": (
        lambda: call(mask=jnp.ones((2, 5), bool)),
        ValueError,
        r"`mask` must.*broadcast to its shape \(4, 5\); got \(2, 5\)",
    ),
    "axis range": (
        lambda: call(axis=2),
        ValueError,
        r"`axis` must lie in \[-2, 2\) for x of rank 2; got 2",
    ),
    "axis twice": (
        lambda: call(axis=(1, -1)),
        ValueError,
        r"`axis` must name each axis of x once; got \(1, -1\)",
    ),
    "axis type": (
        lambda: call(axis="1"),
        TypeError,
        "`axis` must be an int or a tuple",
    ),
    "axis float": (lambda: call(axis=1.0), TypeError, "`axis` must be an int or"),
    "epsilon zero": (
        lambda: call(epsilon=0.0),
        ValueError,
        "`epsilon` must be positive and finite; got 0.0",
    ),
    "epsilon nan": (lambda: call(epsilon=np.nan), ValueError, "`epsilon` must be pos"),
    "epsilon word": (
        lambda: call(epsilon="1"),
        TypeError,
        "`epsilon` must be a Python",
    ),
    "epsilon None": (
        lambda: call(epsilon=None),
        TypeError,
        "`epsilon` must be a number",
    ),
    "epsilon traced": (
        lambda: jax.jit(lambda e: call(epsilon=e))(1e-5),
        TypeError,
        "`epsilon` must be a Python number, known when tracing",
    ),
    "momentum": (
        lambda: call(momentum=1.5),
        ValueError,
        r"`momentum`, the share of the old value that is kept, must lie in \[0, 1\]",
    ),
    "momentum nan": (
        lambda: call(momentum=np.nan),
        ValueError,
        "`momentum`, the share",
    ),
    "momentum traced": (
        lambda: jax.jit(lambda m: call(momentum=m))(jnp.ones(5)),
        TypeError,
        r"`momentum` must be a floating-point scalar; got float32 of shape \(5,\)",
    ),
    "running_variance": (
        lambda: call(running_variance="sample"),
        ValueError,
        '`running_variance` must be "biased" or "unbiased"; got \'sample\'',
    ),
    "derivative": (
        lambda: call(derivative="fwd"),
        ValueError,
        '`derivative` must be "vjp" or "jvp"; got \'fwd\'',
    ),
    "debias": (lambda: call(debias=1), TypeError, "`debias` must be a Python bool"),
    "train word": (
        lambda: call(train="train"),
        TypeError,
        "`train` must be a Python bool, True or False; got 'train'.*static_argnames",
    ),
    "train traced": (
        lambda: jax.jit(lambda t: call(train=t))(True),
        TypeError,
        "`train` must be a Python bool.*static_argnames",
    ),
    "axis_name unbound": (
        lambda: call(axis_name="batch"),
        ValueError,
        "`axis_name` 'batch' is not bound here",
    ),
    "axis_name twice": (
        lambda: call(axis_name=("d", "d")),
        ValueError,
        r"`axis_name` must name each axis once; got \('d', 'd'\)",
    ),
    "groups alone": (
        lambda: call(axis_index_groups=[[0]]),
        ValueError,
        "`axis_index_groups` needs `axis_name`; got None",
    ),
    "backward shape": (
        lambda: jaxbn.backward(jnp.ones(5), jaxbn.forward(X, None, None)[1]),
        ValueError,
        r"`dy` must have the shape of y, \(4, 5\); got \(5,\)",
    ),
    "forward one row": (
        lambda: jaxbn.forward(X[:1], None, None),
        ValueError,
        "`forward` needs more than one element per feature.* there is `batch_norm`",
    ),
    "normalize None": (
        lambda: jaxbn.normalize(X, None, jnp.ones(5)),
        TypeError,
        "`mean` and `var` must be arrays; got None",
    ),
    "normalize complex var": (
        lambda: jaxbn.normalize(X, jnp.ones(5), jnp.ones(5, complex)),
        TypeError,
        "`var` must be real",
    ),
    "init negative": (
        lambda: jaxbn.init(-1),
        ValueError,
        "`num_features` must not be negative; got -1",
    ),
    "init type": (lambda: jaxbn.init(2.0), TypeError, "`num_features` must be an int"),
    "init dtype": (
        lambda: jaxbn.init(2, param_dtype=int),
        TypeError,
        "`param_dtype` must be floating point or complex; got int32",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    wrong, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value).split("\nThe error occurred")[0]


def test_bad_groups():
    x = jnp.ones((4, 3, 5))
    sizes = [[0, 1], [2]], [[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2, 4]], []
    for groups in (*sizes, [0, 1, 2, 3], 4, "ab", [[0.0, 1.0], [2.0, 3.9]]):
        with pytest.raises(ValueError, match="each of the 4 indices of `axis_name`"):
            jax.vmap(
                lambda x, groups=groups: call(
                    x, axis_name="b", axis_index_groups=groups
                ),
                axis_name="b",
            )(x)


def test_static_arguments_may_be_numpy_scalars():
    y, _ = call(train=np.bool_(True), epsilon=np.float32(1e-5), momentum=jnp.array(0.5))
    assert y.shape == X.shape
