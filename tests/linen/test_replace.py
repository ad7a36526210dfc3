"""Models with Flax's class under replace_batch_norm: the bits of models with ours."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import assert_identical

import jaxbn.linen
from jaxbn.linen import BatchNorm, BatchRenorm, replace_batch_norm

pytestmark = pytest.mark.usefixtures("lenient")


class Block(nn.Module):
    """A residual block; `norm` makes a batch norm."""

    norm: object

    @nn.compact
    def __call__(self, x, _):
        y = nn.relu(self.norm()(nn.Dense(x.shape[-1], dtype=x.dtype)(x)))
        return nn.relu(x + self.norm(scale_init=nn.initializers.constant(0.5))(y)), None


class Net(nn.Module):
    """A stem, a block that may be transformed, and a head."""

    norm: object
    transform: object = staticmethod(lambda block: block)
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, train=True):
        options = {"use_running_average": not train, "momentum": 0.9}
        norm = functools.partial(self.norm, dtype=self.dtype, **options)
        x = nn.Conv(4, (3, 3), dtype=self.dtype)(x.astype(self.dtype))
        x, _ = self.transform(Block)(norm)(nn.relu(norm(name="bn_init")(x)), None)
        return nn.Dense(3, dtype=self.dtype)(x.mean((1, 2)))


class Setup(nn.Module):
    """With submodules made in setup, and called in a method with a name."""

    norm: object

    def setup(self):
        self.layers = [nn.Conv(4, (3, 3)), self.norm(axis=(1, 3), use_bias=False)]

    def __call__(self, x, train=True):
        return self.normed(x, train)

    def normed(self, x, train):
        return self.layers[1](self.layers[0](x), use_running_average=not train)


def stacked(block):
    axes, split = {"params": 0, "batch_stats": 0}, {"params": True}
    return nn.scan(block, axes, split_rngs=split, length=3)


def ensemble(block):
    """Two, each with statistics of its own, and their mean."""
    axes, split = {"params": 0, "batch_stats": 0}, {"params": True}
    options = {"variable_axes": axes, "split_rngs": split, "axis_size": 2}
    wide = nn.vmap(block, in_axes=None, **options)
    return lambda norm: lambda x, _: (wide(norm)(x, None)[0].mean(0), None)


NETS = {
    "bfloat16": functools.partial(Net, dtype=jnp.bfloat16),
    "jit": functools.partial(Net, transform=nn.jit),
    "remat": functools.partial(Net, transform=nn.remat),
    "scan": functools.partial(Net, transform=stacked),
    "vmap": functools.partial(Net, transform=ensemble),
    "setup": Setup,
    "jitted norm": lambda norm: Net(nn.jit(norm)),
    "remat norm": lambda norm: Net(nn.remat(norm)),
}


def draw(seed, shape=(4, 6, 6, 3)):
    """A mean at which Flax's variance has lost some digits."""
    return np.random.default_rng(seed).normal(30, 1, shape).astype(np.float32)


def init(model):
    return jax.jit(model.init)(jax.random.key(0), draw(0))


def forward(model, variables, x):
    return model.apply(variables, x, mutable=["batch_stats"])


def train(model, variables, x):
    """Gradients, y and the new statistics."""

    def loss(params, x):
        y, updates = forward(model, variables | {"params": params}, x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, updates)

    return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)


def steps(model):
    """All that a training step gives, and what inference gives then."""

    @jax.jit
    def step_and_inference(variables, x):
        results = train(model, variables, x)
        variables = variables | results[1][1]
        return results, variables, model.apply(variables, x, False)

    return step_and_inference(init(model), draw(1))


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.abs(x - y).max() for x, y in pairs)


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_swapped_and_edited_models_agree_to_the_bit(net):
    desired = steps(net(BatchNorm))
    with replace_batch_norm():
        actual = steps(net(nn.BatchNorm))
    assert_identical(actual, desired)


@pytest.mark.parametrize("net", ["scan", "vmap", "remat"])
def test_under_flax_s_transforms_the_numbers_are_flax_s(net):
    ours, flax_s = (steps(NETS[net](norm)) for norm in (BatchNorm, nn.BatchNorm))
    assert distance(ours, flax_s) < 1e-3


@pytest.mark.parametrize(
    ("net", "changes", "function"),
    [
        ("setup", {"ghost_batch_size": 2}, jax.jit(forward, static_argnums=0)),
        ("jit", {}, forward),
        ("jitted norm", {}, forward),
    ],
)
def test_old_traces_are_not_used(net, changes, function):
    """Of jitted functions and of nn.jit: called outside, inside, outside, inside."""
    # Two eager calls of one nn.jit may differ in the last digit, with Flax's class too.
    model, x = NETS[net](nn.BatchNorm), draw(1)
    norm = functools.partial(BatchNorm, **changes) if changes else BatchNorm
    edited = NETS[net](norm)
    variables = init(model)
    outside = function(model, variables, x)
    for _ in range(2):
        with replace_batch_norm(**changes):
            inside = function(model, variables, x)
        far = distance(inside, outside)
        assert far > 0
        again = function(model, variables, x)
        for a, b in ((inside, function(edited, variables, x)), (again, outside)):
            if function is forward:
                assert distance(a, b) < far / 4
            else:
                assert_identical(a, b)


def test_it_acts_inside_a_jitted_function():
    model, traces = Setup(nn.BatchNorm), []
    variables = init(model)

    @jax.jit
    def swapped(variables, x):
        traces.append(1)
        with replace_batch_norm():
            return train(model, variables, x)

    args = variables, draw(1)
    desired = jax.jit(train, static_argnums=0)(Setup(BatchNorm), *args)
    for _ in range(2):
        assert_identical(swapped(*args), desired)
    with replace_batch_norm(momentum=0.5):  # another key of jit, and another momentum
        assert distance(swapped(*args), desired) > 0
    assert len(traces) == 2


def test_an_error_inside_is_the_one_that_is_seen():
    x = draw(1, (4, 3))
    model, edited = nn.BatchNorm(False), BatchNorm(False)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ZeroDivisionError), replace_batch_norm():
        raise ZeroDivisionError
    assert distance(*(forward(each, variables, x) for each in (model, edited))) > 0


def test_changes_are_those_fields_of_the_edited_model():
    changes = {"momentum": 0.5, "ghost_batch_size": 2, "running_variance": "unbiased"}
    model = Setup(nn.BatchNorm)
    desired = steps(Setup(functools.partial(BatchNorm, **changes)))
    with replace_batch_norm(momentum=0.5, ghost_batch_size=4):
        with replace_batch_norm(running_variance="unbiased", ghost_batch_size=2):
            assert_identical(steps(model), desired)
        assert distance(steps(model), desired) > 0


def test_statistics_over_devices():
    """A list of lists, as Flax has it, is made hashable."""
    x, model = draw(1, (4, 2, 3)), nn.BatchNorm(use_running_average=False)
    variables = model.init(jax.random.key(0), x[0])

    def step(model):
        function = functools.partial(forward, model, variables)
        return jax.jit(jax.vmap(function, axis_name="devices"))(x)

    groups = {"axis_name": "devices", "axis_index_groups": [[0, 1], [2, 3]]}
    desired = step(BatchNorm(use_running_average=False, **groups))
    with replace_batch_norm(**groups):
        assert_identical(step(model), desired)
    for other in (model, BatchNorm(False, axis_name="devices")):
        assert distance(step(other), desired) > 0


def test_a_change_that_counts_updates():
    model = NETS["scan"](nn.BatchNorm)
    edited = NETS["scan"](functools.partial(BatchNorm, debias=True))
    old = init(model)
    with replace_batch_norm(debias=True):
        norms = init(model)["batch_stats"]["ScanBlock_0"]
        assert {norm["num_updates"].shape for norm in norms.values()} == {(3,)}
        assert_identical(steps(model), steps(edited))
        with pytest.raises(ValueError, match=r"`num_updates` .* at bn_init"):
            forward(model, old, draw(0))
        model.apply(old, draw(0), False)  # inference counts nothing


@pytest.mark.parametrize("order", ["outer", "inner"])
def test_interceptors_and_intermediates_see_each_call_once(order):
    model, seen = Setup(nn.BatchNorm), []
    variables, x = init(model), draw(1)

    def look(method, args, kwargs, context):
        seen.append((type(context.module), context.method_name))
        y = method(*args, **kwargs)
        return None if y is None else y + 1

    def apply(model):
        capture = {"mutable": True, "capture_intermediates": True}
        return model.apply(variables, x, **capture)

    with nn.intercept_methods(look):
        desired = apply(Setup(BatchNorm))
    contexts = [nn.intercept_methods(look), replace_batch_norm()]
    first, second = contexts if order == "outer" else reversed(contexts)
    before = seen.copy()
    seen.clear()
    with first, second:
        assert_identical(apply(model), desired)
    assert [(nn.BatchNorm if c is BatchNorm else c, m) for c, m in before] == seen


def test_tabulate_shows_the_same_table():
    def table(norm):
        options = {"console_kwargs": {"width": 300}, "compute_flops": True}
        return nn.tabulate(Setup(norm), jax.random.key(0), **options)(draw(0))

    with replace_batch_norm():
        assert table(nn.BatchNorm) == table(BatchNorm)
    assert table(nn.BatchNorm) != table(BatchNorm)  # in operations


class Heir(nn.BatchNorm):
    epsilon: float = 1e-3
    more: int = 3


class OwnCall(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x, use_running_average=False)


def test_a_subclass_without_a_call_computes_as_ours():
    desired = steps(Setup(functools.partial(BatchNorm, epsilon=1e-3)))
    with replace_batch_norm():
        assert_identical(steps(Setup(Heir)), desired)


@pytest.mark.parametrize("transform", [lambda cls: cls, nn.jit])
def test_a_subclass_with_a_call_of_its_own_is_left_alone(transform):
    model, x = nn.Sequential([transform(OwnCall)()]), draw(1)
    variables = model.init(jax.random.key(0), x)
    desired = forward(model, variables, x)
    warned = pytest.warns(UserWarning, match="OwnCall stays as it is")
    with replace_batch_norm(), warned:
        assert_identical(forward(model, variables, x), desired)


def tools(model, variables, **options):
    batches = [draw(1), draw(2)]
    new = jaxbn.linen.recalibrate(model, variables, batches, **options)
    layers = jaxbn.linen.inspect_statistics(variables, model, batches)
    rows = [(layer.name, layer.mean_kl) for layer in layers]
    return new, rows, jaxbn.linen.weight_decay_mask(model, draw(0))


@pytest.mark.parametrize(
    ("net", "changes"), [("scan", {"epsilon": 9.0}), ("jitted norm", {})]
)
def test_tools_take_flax_s_class_and_heed_the_context(net, changes):
    flax_s = NETS[net](nn.BatchNorm)
    edited = NETS[net](
        functools.partial(BatchNorm, **changes) if changes else BatchNorm
    )
    variables, in_turn = init(flax_s), {"sequential": net == "scan"}
    with replace_batch_norm(**changes) if changes else contextlib.nullcontext():
        new, rows, mask = tools(flax_s, variables, **in_turn)
    desired = tools(edited, variables, **in_turn)
    assert_identical(new, desired[0])
    assert (rows, mask) == desired[1:]
    assert distance(new, variables) > 0


def test_a_model_without_batch_norm():
    warning = pytest.warns(UserWarning, match=r"linen.BatchNorm; got a model without")
    variables = nn.Dense(3).init(jax.random.key(0), draw(0))
    with warning, replace_batch_norm():
        nn.Dense(3).apply(variables, draw(0))


def test_a_model_with_ours_is_fine():
    with replace_batch_norm():  # without a warning
        init(Setup(BatchRenorm))


def test_a_model_that_nn_jit_has_traced_before_is_fine():
    model = nn.Sequential([nn.jit(nn.BatchNorm)(False)])
    variables = init(model)
    for _ in range(2):
        with replace_batch_norm(momentum=0.25):
            forward(model, variables, draw(0))
