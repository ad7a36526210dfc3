"""Models with Flax's class after replace_batch_norm: the bits of models with ours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import assert_identical
from flax import nnx

import jaxbn.nnx
from jaxbn.nnx import BatchNorm, BatchRenorm, replace_batch_norm

pytestmark = pytest.mark.usefixtures("lenient")


class Block(nnx.Module):
    def __init__(self, norm, features, rngs):
        self.dense = nnx.Linear(features, features, rngs=rngs)
        self.norm = norm(features, momentum=0.9, epsilon=1e-4, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.norm(self.dense(x)))


class Net(nnx.Module):
    """Batch norms in attributes, a list, a dict, a tuple, shared, and in stacks."""

    def __init__(self, norm, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.first = norm(4, use_bias=False, dtype=jnp.float32, rngs=rngs)
        self.again = self.first
        self.list = nnx.List([norm(4, axis=1, rngs=rngs), jnp.tanh])
        self.dict = nnx.Dict(a=Block(norm, 4, rngs), b=nnx.data({"c": self.first}))
        self.plain = nnx.data([{"d": (norm(4, use_scale=False, rngs=rngs), None)}])

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs):
            return Block(norm, 4, rngs)

        self.scanned, self.ensemble = stack(rngs), stack(rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.again(self.first(self.conv(x))))
        x = self.list[1](self.list[0](x)) + self.dict["b"]["c"](x)
        x = self.plain[0]["d"][0](self.dict["a"](x))
        axes = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}
        x = nnx.scan(lambda x, block: block(x), **axes)(x, self.scanned)
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(self.ensemble, x)


PATHS = {
    ("again",),
    ("dict", "a", "norm"),
    ("ensemble", "norm"),
    ("list", 0),
    ("plain", 0, "d", 0),
    ("scanned", "norm"),
}


def draw(seed, shape=(4, 4, 5, 3)):
    """A mean at which Flax's variance has lost some digits."""
    return np.random.default_rng(seed).normal(30, 1, shape).astype(np.float32)


def net(norm=nnx.BatchNorm, cls=Net):
    return cls(norm, rngs=nnx.Rngs(0))


@nnx.jit
def train_step(model, optimizer, x):
    def loss(model):
        y = model(x)
        return jnp.sum(jnp.sin(y)), y

    (_, y), grads = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, grads)
    return y, grads


def adam(model):
    return nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any((x != y).any() for x, y in pairs)


def test_swapped_and_edited_models_agree_to_the_bit():
    """With an optimizer made before; what compiles is equal, too."""
    edited, model = net(BatchNorm), net()
    optimizer = adam(model)
    variables = dict(nnx.iter_graph(model))
    paths = replace_batch_norm(model)
    assert len(paths) == len(PATHS)
    assert set(paths) == PATHS
    assert model.first is model.again is model.dict["b"]["c"]
    for path, value in nnx.iter_graph(model):
        if isinstance(value, nnx.Variable):
            assert variables[path] is value
    assert nnx.graphdef(model) == nnx.graphdef(edited)
    desired, other = train_step(edited, adam(edited), draw(1)), net()
    assert_identical(train_step(model, optimizer, draw(1)), desired)
    assert_identical(nnx.state(model), nnx.state(edited))
    assert differ(train_step(other, adam(other), draw(1)), desired)  # Flax's


def test_changes():
    changes = {"use_running_average": None, "running_variance": "unbiased"}
    options = {"momentum": None, "epsilon": 1e-4, **changes}

    def edited(features, rngs, **kwargs):
        return BatchNorm(features, rngs=rngs, **(kwargs | options))

    model, abstract, desired = net(), nnx.eval_shape(net), net(edited)
    for each in (model, abstract):
        replace_batch_norm(each, **options)
        assert nnx.graphdef(each) == nnx.graphdef(desired)
    assert_identical(nnx.state(model), nnx.state(desired))
    assert model.scanned.norm.num_updates[...].tolist() == [0, 0, 0]


def test_a_stack_on_the_last_axis_has_no_count():
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    for name in ("mean", "var"):
        setattr(norm, name, nnx.BatchStat(jnp.ones((4, 6))))
    with pytest.raises(ValueError, match=r"with 4 features; got shape \(4, 6\)"):
        replace_batch_norm(nnx.Sequential(norm), momentum=None)


def test_make_builds_something_else():
    """It may hold what it was given, or the variables of it."""
    model = net(cls=lambda norm, rngs: Block(norm, 4, rngs))
    old = model.norm
    assert replace_batch_norm(model, make=lambda norm: nnx.Sequential(norm, jnp.tanh))
    assert model.norm.layers[0] is old
    renorm = BatchRenorm(4, rngs=nnx.Rngs(0))

    def make(norm):
        renorm.scale = norm.scale
        return renorm

    assert replace_batch_norm(model, make=make) == [("norm", "layers", 0)]
    assert model.norm.layers[0] is renorm
    assert renorm.scale is old.scale


def test_an_error_of_make_leaves_the_model_alone():
    model, made = net(), []

    def make(norm):
        made.append(nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0)))
        return made[-1] if len(made) < 3 else "nothing"

    before = nnx.graphdef(model)
    with pytest.raises(TypeError, match="`make` must be a function that returns"):
        replace_batch_norm(model, make=make)
    assert nnx.graphdef(model) == before


class Heir(nnx.BatchNorm):
    pass


class OwnCall(nnx.BatchNorm):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_subclasses():
    model = net(Heir)
    assert set(replace_batch_norm(model)) == PATHS
    own = nnx.Sequential(OwnCall(4, rngs=nnx.Rngs(0)), net().first)
    with pytest.warns(UserWarning, match="OwnCall stays as it is"):
        assert replace_batch_norm(own) == [("layers", 1)]
    assert type(own.layers[0]) is OwnCall


def test_either_changes_or_make():
    with pytest.raises(ValueError, match=r"`make` must be None with .*momentum"):
        replace_batch_norm(net(), make=nnx.Sequential, momentum=0.9)


def tools(model):
    batches = [draw(1), draw(2)]
    layers = jaxbn.nnx.inspect_statistics(model, batches)
    rows = [(layer.path, layer.mean_kl) for layer in layers]
    jaxbn.nnx.recalibrate(model, batches)
    return nnx.state(model), rows, jaxbn.nnx.weight_decay_mask(model)


def test_tools_take_flax_s_class_as_it_is():
    model, desired = net(), tools(net(BatchNorm))
    before = nnx.graphdef(model)
    new, rows, mask = tools(model)
    assert nnx.graphdef(model) == before
    assert_identical(new, desired[0])
    assert (rows, mask) == desired[1:]
    assert len(rows) == len(PATHS)


def test_tools_take_a_lone_batch_norm_of_flax():
    norm, edited = (cls(3, rngs=nnx.Rngs(0)) for cls in (nnx.BatchNorm, BatchNorm))
    (state, rows, mask), desired = tools(norm), tools(edited)
    assert_identical(state, desired[0])
    assert (rows, mask) == desired[1:]
    assert type(norm) is nnx.BatchNorm


@pytest.mark.parametrize(
    "option", [{"axis_name": "devices"}, {"ghost_batch_size": 4}], ids=str
)
def test_without_an_update_a_batch_over_devices_or_of_ghosts_is_the_same(option):
    norm = BatchNorm(3, rngs=nnx.Rngs(0), **option)

    def both(x):
        return norm(x, update_statistics=False), nnx.clone(norm)(x)

    x = jnp.asarray(draw(1, (4, 8, 3)))
    quiet, training = jax.jit(jax.vmap(both, axis_name="devices"))(x)
    assert_identical(quiet, training)
    assert not norm.mean[...].any()


@pytest.mark.parametrize("cls", [BatchNorm, BatchRenorm])
def test_statistics_stay_where_they_are_not_to_be_updated(cls):
    norm, x = cls(3, momentum=None, rngs=nnx.Rngs(0)), jnp.asarray(draw(1))
    norm(x + 1)
    before = jax.tree.map(jnp.copy, nnx.state(norm))
    view = nnx.view(norm, update_statistics=False)
    y = norm(x, update_statistics=False)
    assert_identical(view(x), y)
    assert jax.jit(lambda x: view(x))(x).shape == x.shape  # closed over
    assert_identical(nnx.state(norm), before)
    inference = nnx.view(view, use_running_average=True)
    assert_identical(inference(x), norm(x, use_running_average=True))
    assert_identical(view(x, update_statistics=True), y)
    assert differ(nnx.state(norm), before)  # the call wins over the view
    norm = nnx.view(view, update_statistics=True)
    norm(x)
    assert norm.num_updates[...] == 3
    model = nnx.Sequential(norm)
    model.train(update_statistics=False)  # is not heard
    model(x)
    assert norm.num_updates[...] == 4
    assert "update_statistics" in nnx.view_info(model)
