"""The table of notebooks/coming-from.md: the code of each row beside the peer's."""

import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen

PAGE = pathlib.Path(__file__).parents[1].joinpath("notebooks", "coming-from.md")
CELLS = re.compile(r"^\| ([\w ]+) \| `([^`]+)` \| `([^`]+)` \|$", re.MULTILINE)
TABLE = {row[0]: row[1:] for row in CELLS.findall(PAGE.read_text())}

C = 5
D = 0.9  # decay_rate, which Haiku has no default for
STEPS = 6


def images(axis):
    """(steps, batch, ...) far from mean 0 and variance 1; `axis` is that of a batch."""
    rng = np.random.default_rng(0)
    size = np.arange(1.0, C + 1)
    x = rng.normal(size=(STEPS, 8, 4, 4, C)) * size + 3 * size
    return np.moveaxis(x, -1, axis % 4 + 1).astype(np.float32)


# Each of these returns, of what `code` says, `step(state, x, train) -> y, state`, the
# first state, and how to read the running statistics in one.


def linen(code, x):
    norm = eval(code, {"nn": nn, "jaxbn": jaxbn})

    @functools.partial(jax.jit, static_argnums=2)
    def step(variables, x, train):
        kwargs = {"use_running_average": not train, "mutable": ["batch_stats"]}
        y, updates = norm.apply(variables, x, **kwargs)
        return y, variables | updates

    def read(variables):
        return variables["batch_stats"]["mean"], variables["batch_stats"]["var"]

    return step, norm.init(jax.random.key(0), x, use_running_average=True), read


def nnx(code, x):
    from flax import nnx

    import jaxbn.nnx

    scope = jaxbn if code.startswith("jaxbn.nnx") else None
    norm = eval(code, {"nnx": nnx, "C": C, "rngs": nnx.Rngs(0), "jaxbn": scope})

    def step(_, x, train):
        return norm(jnp.asarray(x), use_running_average=not train), None

    return step, None, lambda _: (norm.mean[...], norm.var[...])


def torch(code, x):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    norm = eval(code, {"torch": torch, "C": C})

    def step(_, x, train):
        return norm.train(train)(torch.from_numpy(x)).detach().numpy(), None

    return step, None, lambda _: (norm.running_mean.numpy(), norm.running_var.numpy())


def keras(code, x):
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip(f"Keras was imported with {keras.backend.backend()}")
    norm = eval(code, {"keras": keras})

    def step(_, x, train):
        return norm(x, training=train), None

    return step, None, lambda _: (norm.moving_mean.value, norm.moving_variance.value)


def haiku(code, x):
    hk = pytest.importorskip("haiku")
    names = {"hk": hk, "d": D}
    init, apply = hk.without_apply_rng(
        hk.transform_with_state(lambda x, train: eval(code, names)(x, train))
    )
    params, state = init(None, x, True)

    def read(state):
        names = (f"batch_norm/~/{name}_ema" for name in ("mean", "var"))
        return tuple(state[name]["average"].ravel() for name in names)

    return functools.partial(apply, params), state, read


def equinox(code, x):
    eqx = pytest.importorskip("equinox")
    norm, state = eqx.nn.make_with_state(lambda: eval(code, {"eqx": eqx, "C": C}))()

    def step(state, x, train):
        if not train:  # so late that 1 - 0.99**t is 1, by which it divides
            counter = state.get(norm.batch_counter)
            state = state.set(norm.batch_counter, jnp.full_like(counter, 10_000))
        return over_batch(lambda x, state: norm(x, state, inference=not train))(
            x, state
        )

    return step, state, lambda state: state.get(norm.batch_state_index)


def over_batch(call):
    return jax.vmap(call, axis_name="batch", in_axes=(0, None), out_axes=(0, None))


def functions(code, x):
    """The row's call, with the names that a Haiku or Equinox module has around it."""
    params, state = jaxbn.init(C)

    def step(state, x, train):
        def call(x, state):
            names = {"x": x, "params": params, "state": state, "jaxbn": jaxbn, "d": D}
            names |= {"t": state.num_updates}
            return eval(code, names | {"is_training": train, "inference": not train})

        return (over_batch(call) if "axis_name" in code else call)(x, state)

    return step, state, lambda state: state[:2]


def outputs(run, code, batches):
    """All that training gives, then inference's, and the running statistics."""
    step, state, read = run(code, batches[0])
    ys = []
    for x in batches:
        y, state = step(state, x, True)
        ys.append(y)
    statistics = read(state)  # Equinox takes the state away
    return [*ys, step(state, batches[0], False)[0]], *statistics


ROWS = {
    "Flax Linen": (linen, linen, -1),
    "Flax NNX": (nnx, nnx, -1),
    "PyTorch": (torch, linen, 1),
    "Keras": (keras, linen, -1),
    "Haiku": (haiku, functions, -1),
    "Equinox": (equinox, functions, 1),
}


def test_table_has_these_rows():
    assert list(TABLE) == list(ROWS)


close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if "Flax" in n else pytest.mark.peers) for n in ROWS],
)
def test_row(name, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # read when it is imported
    (there, here), (run_there, run_here, axis) = TABLE[name], ROWS[name]
    batches = images(axis)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        desired = outputs(run_there, there, batches)
    actual = outputs(run_here, here, batches)
    jax.tree.map(close, actual, desired)
    # Outputs of inference differ from those of training, and statistics have moved.
    assert np.abs(np.subtract(actual[0][0], actual[0][-1])).max() > 0.1
    assert np.min(actual[1]) > 0.1
    if name == "Equinox":  # "Without a `vmap`, use `axis=1` and no `axis_name`."
        whole = here.replace('axis=0, axis_name="batch"', "axis=1")
        assert whole != here
        jax.tree.map(close, outputs(functions, whole, batches), desired)
