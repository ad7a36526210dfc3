"""The table of notebooks/coming-from.md: the code of each row beside the peer's."""

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


# Each of these trains what `code` says on the batches, from new statistics, and returns
# all outputs, that of inference at the end among them, and the running statistics.


def with_linen(code, batches):
    norm = eval(code, {"nn": nn, "jaxbn": jaxbn})
    variables = norm.init(jax.random.key(0), batches[0], use_running_average=True)
    train = jax.jit(
        lambda variables, x: norm.apply(
            variables, x, use_running_average=False, mutable=["batch_stats"]
        )
    )
    ys = []
    for x in batches:
        y, updates = train(variables, x)
        variables = variables | updates
        ys.append(y)
    ys.append(norm.apply(variables, batches[0], use_running_average=True))
    return ys, variables["batch_stats"]["mean"], variables["batch_stats"]["var"]


def with_nnx(code, batches):
    from flax import nnx

    names = {"nnx": nnx, "C": C, "rngs": nnx.Rngs(0)}
    if code.startswith("jaxbn.nnx"):
        import jaxbn.nnx

        names["jaxbn"] = jaxbn
    norm = eval(code, names)
    ys = [norm(x, use_running_average=False) for x in map(jnp.asarray, batches)]
    ys.append(norm(jnp.asarray(batches[0]), use_running_average=True))
    return ys, norm.mean[...], norm.var[...]


def with_torch(code, batches):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    norm = eval(code, {"torch": torch, "C": C})
    ys = [norm(torch.from_numpy(x)).detach().numpy() for x in batches]
    ys.append(norm.eval()(torch.from_numpy(batches[0])).detach().numpy())
    return ys, norm.running_mean.numpy(), norm.running_var.numpy()


def with_keras(code, batches):
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip(f"Keras was imported with {keras.backend.backend()}")
    norm = eval(code, {"keras": keras})
    ys = [norm(x, training=True) for x in batches]
    ys.append(norm(batches[0], training=False))
    return ys, norm.moving_mean.value, norm.moving_variance.value


def with_haiku(code, batches):
    hk = pytest.importorskip("haiku")
    names = {"hk": hk, "d": D}
    init, apply = hk.without_apply_rng(
        hk.transform_with_state(
            lambda x, is_training: eval(code, names)(x, is_training)
        )
    )
    params, state = init(None, batches[0], True)
    ys = []
    for x in batches:
        y, state = apply(params, state, x, True)
        ys.append(y)
    ys.append(apply(params, state, batches[0], False)[0])
    mean, var = (
        state[f"batch_norm/~/{name}_ema"]["average"].ravel() for name in ("mean", "var")
    )
    return ys, mean, var


def equinox_after_training(code, batches):
    """The layer, its state, outputs in training, and how to call it."""
    eqx = pytest.importorskip("equinox")
    norm, state = eqx.nn.make_with_state(lambda: eval(code, {"eqx": eqx, "C": C}))()

    def call(state, x, inference=False):
        return jax.vmap(
            lambda x, state: norm(x, state, inference=inference),
            axis_name="batch",
            in_axes=(0, None),
            out_axes=(0, None),
        )(x, state)

    ys = []
    for x in batches:
        y, state = call(state, x)
        ys.append(y)
    return norm, state, ys, call


def with_equinox(code, batches):
    norm, state, ys, call = equinox_after_training(code, batches)
    mean, var = state.get(norm.batch_state_index)
    # After so many steps 1 - 0.99**t is 1, and inference uses what there is.
    count = state.get(norm.batch_counter)
    state = state.set(norm.batch_counter, jnp.full_like(count, 10_000))
    return [*ys, call(state, batches[0], inference=True)[0]], mean, var


def with_functions(code, batches):
    """The row's call, with the names that a Haiku or Equinox module has around it."""

    def call(x, state, train):
        names = {"x": x, "params": params, "state": state, "jaxbn": jaxbn, "d": D}
        names |= {"t": state.num_updates, "is_training": train, "inference": not train}
        return eval(code, names)

    def call_all(x, state, train):
        if "axis_name" not in code:
            return call(x, state, train)
        return jax.vmap(
            lambda x, state: call(x, state, train),
            axis_name="batch",
            in_axes=(0, None),
            out_axes=(0, None),
        )(x, state)

    params, state = jaxbn.init(C)
    ys = []
    for x in batches:
        y, state = call_all(x, state, True)
        ys.append(y)
    ys.append(call_all(batches[0], state, False)[0])
    return ys, state.mean, state.var


ROWS = {
    "Flax Linen": (with_linen, with_linen, -1),
    "Flax NNX": (with_nnx, with_nnx, -1),
    "PyTorch": (with_torch, with_linen, 1),
    "Keras": (with_keras, with_linen, -1),
    "Haiku": (with_haiku, with_functions, -1),
    "Equinox": (with_equinox, with_functions, 1),
}


def test_table_has_these_rows():
    assert list(TABLE) == list(ROWS)


@pytest.mark.parametrize(
    "name",
    [
        name if "Flax" in name else pytest.param(name, marks=pytest.mark.peers)
        for name in ROWS
    ],
)
def test_row(name, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # read when it is imported
    there, here = TABLE[name]
    run_there, run_here, axis = ROWS[name]
    batches = images(axis)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        desired = run_there(there, batches)
    actual = run_here(here, batches)
    assert len(actual[0]) == STEPS + 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        actual,
        desired,
    )
    # Outputs of inference differ from those of training, and statistics have moved.
    assert np.abs(np.subtract(actual[0][0], actual[0][-1])).max() > 0.1
    assert np.min(actual[1]) > 0.1
    if name == "Equinox":  # "Without a `vmap`, use `axis=1` and no `axis_name`."
        whole = here.replace('axis=0, axis_name="batch"', "axis=1")
        assert whole != here
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            with_functions(whole, batches),
            desired,
        )


@pytest.mark.peers
def test_what_the_equinox_row_says_of_inference():
    """Both statistics are divided by 1 - 0.99**t, and the variance is too large."""
    batches = images(1)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        there = TABLE["Equinox"][0]
        _, state, _, call = equinox_after_training(there, batches)
        theirs, _ = call(state, batches[0], inference=True)
    _, mean, var = with_functions(TABLE["Equinox"][1], batches)
    share = 1 - 0.99**STEPS
    stored = jaxbn.State(mean / share, var / share, jnp.int32(0))
    params, _ = jaxbn.init(C)
    ours, _ = jaxbn.batch_norm(batches[0], params, stored, train=False, axis=1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    true_var = batches.astype(np.float64).var((1, 3, 4)).mean(0)
    assert np.all(var / share > true_var + 0.9 * (1 - share) / share)
    debiased = jaxbn.init(C)[1]
    for x in batches:
        moments = jaxbn.batch_moments(x, axis=1)
        debiased = jaxbn.update_state(debiased, moments, momentum=0.99, debias=True)
    np.testing.assert_allclose(debiased.var, true_var, rtol=1e-5)
