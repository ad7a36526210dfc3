"""Bad input: one sentence on the argument that is wrong, and nothing is lost.

Each check has a table of bad values, and the arguments that go through it. The first of
these gets all the values, each other one the first alone: it shows that the check is
there, and names the argument. A new argument needs a check, or a reason.
"""

import functools
import inspect
import itertools
import re
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from test_types import PUBLIC

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import Moments, Params, State


class Traced(NamedTuple):
    """Stands in a row for this value as a tracer."""

    value: Any


NAN, INF = float("nan"), float("inf")
WORD = "word"


def f32(*shape):
    """An array that a function could change in place."""
    return np.ones(shape, np.float32)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jaxbn.linen.BatchNorm(use_running_average=True, name="norm")(x)


class Nnx(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(3, 5, rngs=nnx.Rngs(0))  # which it does not call
        self.norm = jaxbn.nnx.BatchNorm(5, rngs=nnx.Rngs(0), use_running_average=True)

    def __call__(self, x):
        return self.norm(x)


def flax_s():
    return nnx.Sequential(nnx.BatchNorm(5, rngs=nnx.Rngs(0)))


# The good arguments of everything that is public, made anew for each call.


def x():
    return np.arange(20, dtype=np.float32).reshape(4, 5)


def norm():
    params, state = Params(f32(5), f32(5)), State(f32(5), f32(5), np.int32(3))
    return {"params": params, "state": state}


def training():
    return {"x": x(), **norm(), "train": True}


def moments():
    return Moments(np.float32(4), f32(5), f32(5))


def variables():
    layer = {"kernel": f32(3, 5), "bias": f32(5)}
    params = {"layer": layer, "norm": {"scale": f32(5), "bias": f32(5)}}
    return {
        "params": params,
        "batch_stats": {"norm": {"mean": f32(5), "var": f32(5)}},
    }


def linen_model():
    return {"model": Linen(), "variables": variables(), "batches": [x()]}


def torch_norm(**changes):
    names = ["weight", "bias", "running_mean", "running_var"]
    arrays = {name: f32(5) for name in names}
    return {**arrays, "num_batches_tracked": np.array(3), **changes}


def torch_model():
    layer = {"fc.weight": f32(5, 3), "fc.bias": f32(5)}
    norm = {f"bn.{name}": array for name, array in torch_norm().items()}
    return {"state_dict": layer | norm, "names": {"fc": "layer", "bn": "norm"}}


def keras_layer():
    arrays = {"gamma": f32(5), "moving_mean": f32(5), "moving_variance": f32(5)}
    return {"layer": types.SimpleNamespace(beta=None, **arrays)}


def haiku_trees():
    average = {"hidden": f32(1, 5), "average": f32(1, 5), "counter": 3}
    return {
        "haiku_params": {"norm": {"scale": f32(1, 5), "offset": f32(1, 5)}},
        "haiku_state": {"norm/~/mean_ema": average, "norm/~/var_ema": average},
        "name": "norm",
    }


def equinox_layer():
    """As `equinox.nn.BatchNorm`, and its state."""
    layer = types.SimpleNamespace(mode="batch", momentum=0.9)
    layer.weight, layer.bias = f32(5), f32(5)
    layer.batch_state_index, layer.batch_counter = "averages", "counter"
    values = {"averages": (f32(5), f32(5)), "counter": np.int32(3)}
    layer_state = types.SimpleNamespace(get=values.__getitem__)
    layer_state.set = lambda index, value: layer_state
    return {"layer": layer, "layer_state": layer_state}


PAIR = ("layer", "norm")
GOOD = {
    "batch_norm": training,
    "ghost_batch_norm": lambda: {**training(), "ghost_batch_size": 2},
    "batch_renorm": training,
    "batch_moments": lambda: {"x": x()},
    "merge_moments": lambda: {"a": moments(), "b": moments()},
    "update_state": lambda: {"state": norm()["state"], "moments": moments()},
    "normalize": lambda: {"x": x(), "mean": f32(5), "var": f32(5), "scale": f32(5)},
    "forward": lambda: {"x": x(), "scale": f32(5), "bias": f32(5)},
    "backward": lambda: {"dy": x(), "cache": jaxbn.forward(x(), f32(5), f32(5))[1]},
    "init": lambda: {"num_features": 5},
    "ramp_r_max": lambda: {"num_updates": 3},
    "ramp_d_max": lambda: {"num_updates": 3},
    "step_limits": lambda: {"warmup": 3},
    "fold": lambda: {"kernel": f32(3, 5), "bias": f32(5), **norm()},
    "fold_before": lambda: {"kernel": f32(5, 3), "bias": f32(3), **norm()},
    "fold_tree": lambda: {"variables": variables(), "pairs": [PAIR]},
    "convert.from_torch": lambda: {"state_dict": torch_norm()},
    "convert.to_torch": norm,
    "convert.from_keras": keras_layer,
    "convert.to_keras": norm,
    "convert.from_equinox": equinox_layer,
    "convert.to_equinox": lambda: {**norm(), **equinox_layer()},
    "convert.from_haiku": haiku_trees,
    "convert.to_haiku": lambda: {**norm(), **haiku_trees(), "decay_rate": 0.9},
    "convert.load_torch": lambda: {**torch_model(), "variables": variables()},
    "linen.BatchNorm": lambda: {"x": x(), "use_running_average": False},
    "linen.BatchRenorm": lambda: {"x": x(), "use_running_average": False},
    "linen.recalibrate": linen_model,
    "linen.inspect_statistics": linen_model,
    "linen.weight_decay_mask": lambda: {"model": Linen(), "x": x()},
    "linen.replace_batch_norm": lambda: {"model": (), "changes": {"momentum": 0.5}},
    "linen.find_pairs": lambda: {"model": Linen(), "x": x()},
    "linen.folded": lambda: {"pairs": [PAIR]},
    "nnx.BatchNorm": lambda: {"x": x(), "num_features": 5, "rngs": nnx.Rngs(0)},
    "nnx.BatchRenorm": lambda: {"x": x(), "num_features": 5, "rngs": nnx.Rngs(0)},
    "nnx.recalibrate": lambda: {"model": Nnx(), "batches": [x()]},
    "nnx.inspect_statistics": lambda: {"model": Nnx(), "batches": [x()]},
    "nnx.weight_decay_mask": lambda: {"model": Nnx()},
    "nnx.replace_batch_norm": lambda: {"model": flax_s(), "make": None, "changes": {}},
    "nnx.find_pairs": lambda: {"model": Nnx(), "x": x()},
    "nnx.fold": lambda: {"model": Nnx(), "pairs": [PAIR]},
    "nnx.load_torch": lambda: {**torch_model(), "model": Nnx()},
}


def linen_call(cls):
    """A call of the Linen module; its fields and its arguments together."""

    def call(x, mask=None, call_use_running_average=None, **fields):
        if call_use_running_average is not None:  # to be given once
            del fields["use_running_average"]
        module = cls(**fields)
        args = (x, call_use_running_average)
        _, variables = module.init_with_output(jax.random.key(0), *args, mask=mask)
        return module.apply(variables, *args, mask=mask, mutable=["batch_stats"])

    return call


def nnx_call(cls):
    """A call of the NNX module; its arguments, and those of the constructor."""

    def call(x, mask=None, call_use_running_average=None, **fields):
        quiet = {"update_statistics": fields.pop("update_statistics", None)}
        return cls(**fields)(x, call_use_running_average, mask=mask, **quiet)

    return call


def entered(context):
    def call(model=(), changes=None, **arguments):
        with context(*model, **arguments, **(changes or {})):
            pass

    return call


def replaced_nnx(model, make, changes):
    return jaxbn.nnx.replace_batch_norm(model, make=make, **changes)


# What is not called with its arguments by name.
CALLS = {
    "linen.BatchNorm": linen_call(jaxbn.linen.BatchNorm),
    "linen.BatchRenorm": linen_call(jaxbn.linen.BatchRenorm),
    "linen.replace_batch_norm": entered(jaxbn.linen.replace_batch_norm),
    "linen.folded": entered(jaxbn.linen.folded),
    "nnx.BatchNorm": nnx_call(jaxbn.nnx.BatchNorm),
    "nnx.BatchRenorm": nnx_call(jaxbn.nnx.BatchRenorm),
    "nnx.replace_batch_norm": replaced_nnx,
}
# The x in their *args.
TAKE_X = ["linen.weight_decay_mask", "linen.find_pairs", "nnx.find_pairs"]


def call(function, arguments):
    public = CALLS.get(function, PUBLIC[f"jaxbn.{function}"])
    if function in TAKE_X:
        return public(arguments["model"], arguments["x"])
    return public(**arguments)


# The checks, each with the arguments that go through it. An argument has its name, or
# "function.name" or "module.name" where it means something else; "state>state.mean" is
# its field `mean`, which messages call `state.mean`.
CHECKS = {}  # by argument, then by field: a list of tables


def check(arguments, *parts):
    rows = list(itertools.chain(*parts))
    for name in arguments.split():
        argument, _, field = name.partition(">")
        CHECKS.setdefault(argument, {}).setdefault(field, []).append(rows)


def wrong_type(words, *values):
    """Rows; `words` follow the argument's name, or begin with another one or ".*"."""
    return [(bad, TypeError, words) for bad in values]


def wrong_value(words, *values):
    return [(bad, ValueError, words) for bad in values]


PARAMS, STATE, MOMENTS = *norm().values(), moments()
OTHER_SIZE = Moments(4, f32(3), f32(3))
INTS = "must be an int or a tuple of ints; got"
INT, COMPLEX = np.ones(5, int), np.ones(5, np.complex64)
MASKS = np.ones((2, 5), bool), np.ones((1, 4, 5), bool)

# Arrays
check(
    "x dy kernel fold.bias fold_before.bias params>scale convert.params>params.scale "
    "moments>moments.mean moments>moments.var fold.params>params.scale",
    wrong_type(
        "must be floating point or complex; got dtype (int32|bool)", INT, INT > 0
    ),
)
check(
    "x linen.x nnx.x mask linen.mask nnx.mask num_updates d_max linen.d_max nnx.d_max "
    "kernel fold.bias fold_before.bias dy state>state.num_updates moments>moments.mean "
    "moments>moments.num_elements convert.state>state.mean params>bias "
    "linen.find_pairs.x nnx.find_pairs.x linen.weight_decay_mask.x",
    wrong_type("must be an array of numbers; got (str|object|NoneType)", WORD, None),
    wrong_type("must be an array of .* ndarray of dtype <U1", np.array(["a"])),
    wrong_type("must be an array of numbers; got list", [[1.0], [1.0, 2.0]]),
)
check("x linen.x nnx.x", wrong_value("must have at least one axis", np.float32(1)))
check(
    "axis features_axis",
    wrong_value(r"must lie in \[-2, 2\) for .* of rank 2; got (2|-3)", 2, -3),
    wrong_value(r"must name each axis of x once; got \(1, -1\)", (1, -1)),
    wrong_type(INTS, None, WORD, b"\0", 1.0, True, ((0, 1),), np.array(1), Traced(1)),
)
check(
    "scale bias params>scale params>bias normalize.mean normalize.var state>state.mean "
    "state>state.var fold.params>params.scale fold.params>params.bias "
    "fold.state>state.mean fold.state>state.var convert.params>params.scale",
    wrong_value(r"must have shape \(5,\), one entry per .*got \(3,\)", f32(3)),
    wrong_value(r"must .*on axis -1 of x.*got (\(1, 5\)|\(\))", f32(1, 5), 1.0),
    wrong_type("must be floating point or complex; got dtype int32", INT),
    wrong_type("must be real for x of dtype float32; got complex64", COMPLEX),
)
check("mask", wrong_type(r"must be boolean.*float32 \(write mask.ast", f32(4, 5)))
check("mask", wrong_value(r"must have the rank of x .*got \(\)", True))
check(
    "mask linen.mask nnx.mask",
    wrong_value(r"must .*\(4, 5\).*got \(4,\).*mask\[:, None\]", np.ones(4, bool)),
    wrong_value(r"must .*\(4, 5\).*got \((1, 4|2), 5\)", *MASKS),
)
check("dy", wrong_value(r"must have the shape of y, \(4, 5\); got", f32(5)))
check("dy", wrong_type("must be real for x of .*float32; got complex", x() + 1j))
check("kernel", wrong_value("`features_axis` must .* of rank 0", np.float32(1)))
check("fold.bias", wrong_value(r"must have shape \(5,\).*got", f32(4), f32(5, 1)))
check("fold_before.bias", wrong_value(r"must have shape \(3,\).*got \(4,\)", f32(4)))

# The named tuples
check(
    "params convert.params fold.params fold_before.params",
    wrong_type("must be a jaxbn.Params; got", tuple(PARAMS), None, STATE),
)
check(
    "state convert.state fold.state fold_before.state",
    wrong_type("must be a jaxbn.State; got", tuple(STATE)),
)
check("moments a b", wrong_type("must be a jaxbn.Moments; got", tuple(MOMENTS)))
check("cache", wrong_type("must be what `forward` returned; got", (x(), f32(5))))
check(
    "state>state.mean state>state.var convert.state>state.var",
    wrong_type("`state.mean` and `state.var` must be arrays; got None", None),
)
check(
    "state>state.num_updates",
    wrong_type("must be an int32 scalar; got (fl|bool|int8)", 1.0, True, np.int8(3)),
    wrong_type(r"must be an int32 scalar; .* \(5,\)", np.ones(5, np.int32)),
)
check(
    "moments a b",
    wrong_value("must have a mean and a var of one", MOMENTS._replace(var=f32(3))),
    wrong_value("must have .* of one shape", MOMENTS._replace(num_elements=f32(3))),
    wrong_type("must have real num_el.* and var", MOMENTS._replace(num_elements=1j)),
    wrong_type("must have real num_el.* and var", MOMENTS._replace(var=COMPLEX)),
)
check("moments", wrong_value(r"`state.mean` .*\(3,\); got \(5,\)", OTHER_SIZE))
check("a", wrong_value(r"`a` and `b` must .*\(3,\) and \(5,\)", OTHER_SIZE))
check("b", wrong_type("`a` and `b` .* one dtype; .*64", MOMENTS._replace(mean=COMPLEX)))

# Numbers
check(
    "step_limits.warmup step_limits.r_max step_limits.d_max decay_rate",
    wrong_type("must be a Python number, known", WORD, b"1", True, np.True_, Traced(1)),
    wrong_type("must be a number; got", None, 1j, [1e-5], 10**400, f32(5)),
)
check("step_limits.warmup", wrong_value("must not be negative; got", -1, NAN))
check(
    "epsilon",
    wrong_value("must be positive and finite; got", 0, -1e-5, NAN, INF),
    wrong_type("must be a Python number", WORD),
)
check("momentum decay_rate", wrong_value(r"the .* must lie in \[0, 1", -0.1, 1.1, NAN))
check(
    "momentum",
    wrong_type("must be a Python number", WORD),
    wrong_type("must be a .* scalar; got (int32|bool)", Traced(1), Traced(True)),
    wrong_type(r"must be a .* scalar; got float32 of shape \(5,\)", Traced(f32(5))),
)
LIMITS = "linen.r_max linen.d_max nnx.r_max nnx.d_max"
check(f"r_max d_max num_updates {LIMITS}", wrong_type("must be real num", True, 1j))
check(LIMITS, wrong_type("must be a .*schedule in a mod", f32(5), jnp.ones(5)))
check("r_max step_limits.r_max", wrong_value("must be at least 1; got", 0.5, -1, NAN))
check("d_max step_limits.d_max", wrong_value("must be at least 0; got", -0.1, NAN))
check(
    "r_max d_max",
    wrong_value(r"must broadcast to the features \(5,\); got \(3,\)", f32(3)),
    wrong_value("must broadcast to the features", lambda n: f32(3), Traced(f32(3))),
    wrong_type("must be an array of numbers", lambda n: None),
)
GHOSTS = "ghost_batch_size linen.BatchNorm.ghost_batch_size"
check(GHOSTS, wrong_value("must divide the 4 rows of x; got", 3, 0, -2, 8))
check(GHOSTS, wrong_type("must be an int; got", WORD, 2.0, True, Traced(2)))
check("linen.BatchRenorm.ghost_batch_size", wrong_value("must be None for Batch", 2))
check(
    "num_features",
    wrong_value("must not be negative; got", -1, (3, -1)),
    wrong_type(INTS, None, WORD, "", b"x", 5.0, True, np.array(5), Traced(5)),
)

# Words, names, dtypes and other choices
check(
    "train debias init.use_scale init.use_bias sequential update_statistics "
    "use_running_average call_use_running_average",
    wrong_type("must be a Python bool, .*static", f32(5), 1, None, WORD, Traced(True)),
)
check(
    "running_variance",
    wrong_value('must be "biased" or "unbiased"; got', WORD, None, ["biased"]),
)
check("derivative", wrong_value('must be "vjp" or "jvp"; got', WORD))
check(
    "dtype param_dtype init.param_dtype",
    wrong_type("must be floating point or complex; got", int, WORD, 3, [1], Traced(1)),
)
check("init.param_dtype", wrong_type("must be floating .*; got None", None))
check("scale_init", wrong_value(r"`scale` must have shape \(5,\)", lambda *_: f32(3)))
check("bias_init", wrong_value(r"`bias` must have shape \(5,\)", lambda *_: f32(3)))
check(
    "axis_name",
    wrong_value("'nowhere' is not bound here", "nowhere", ("nowhere", "no")),
    wrong_value("(nan|0) is not bound here", NAN, 0),
    wrong_value(r"must name each axis once; got \('d', 'd'\)", ("d", "d")),
    wrong_type("must be a name or several; got array", np.array(["d"])),
)
check("axis_index_groups", wrong_value("needs `axis_name`; got None", [[0]], WORD))
check(
    "padding",
    wrong_value('must be "VALID".*; got', WORD, 1, [(0, 1)]),
    wrong_type("must be a word, .*; got", f32(2), Traced(0)),
)

# Trees and pairs
check(
    "fold_tree.variables linen.recalibrate.variables convert.from_torch.state_dict "
    "linen.inspect_statistics.variables convert.load_torch.variables state_dict names "
    "haiku_params haiku_state",
    wrong_type("must be a mapping; got", WORD, None, [], object()),
    wrong_type("must be a mapping with strings for keys; got 1", {1: 2}),
)
check("fold_tree.variables", wrong_value("`pairs` must name", {}, {"params": None}))
check("convert.load_torch.variables", wrong_value('must hold "params" or', {}))
check("linen.recalibrate.variables", wrong_value('must hold "batch_', {"params": {}}))
check("linen.inspect_statistics.variables", wrong_value("must hold `batch_", {}))
check("pairs linen.folded.pairs", wrong_type("must be an iterable of", WORD, None, 1))
check("pairs linen.folded.pairs", wrong_type("must hold", [1], [(1, 2)], [("a",)]))
check(
    "pairs",
    wrong_value("must name modules .*nowhere", [("layer", "nowhere")]),
    wrong_value("must name a layer and a batch norm", [("layer", "layer")]),
    wrong_value("must name a layer once", [PAIR, PAIR]),
    wrong_type("must hold options .*; got 1", [(*PAIR, 1)]),
    wrong_type("must hold options .*'no'", [(*PAIR, {"no": 1})]),
)

# Conversion
check(
    "convert.from_torch.state_dict",
    wrong_value("must be a batch norm .*missing: running_mean", {}),
    wrong_value("must .*shape other", torch_norm(weight=f32(3))),
    wrong_type("must hold weight as .*floats", torch_norm(weight=WORD)),
    wrong_type("must hold running_var as .*floats", torch_norm(running_var=1)),
    wrong_type("must hold num_b.* as .*ints", torch_norm(num_batches_tracked=-1.5)),
    wrong_value("must hold num_b.* as a scalar", torch_norm(num_batches_tracked=[3])),
)
check("state_dict", wrong_value("`names` must lead .*missing in `state_dict`", {}))
check("state_dict", wrong_type("must hold bn.weight as .*num", {"bn.weight": WORD}))
check("names", wrong_value("must lead .*but not named", {}))
check("names", wrong_type("must hold paths, .*; got 1", {"bn": 1}))
check("conv_transpose", wrong_type("must be an iterable of names; got", WORD, None))
check("conv_transpose", wrong_value("`names` .*but not named: nowhere", ["nowhere"]))
check("convert.from_keras.layer", wrong_value("`layer`, built, .*missing", None, 1))
check("layer", wrong_type("must be an equinox.nn.BatchNorm; got", None, object()))
EMPTY = types.SimpleNamespace(get={}.__getitem__)
check("layer_state", wrong_type("must be .* that knows `layer`; got", EMPTY, None, {}))
check("haiku_params", wrong_type(r".*\['norm'\]` must be a mapping", {"norm": 1}))
check("haiku_params", wrong_type(".*scale as .*floats", {"norm": {"scale": WORD}}))
check("haiku_state", wrong_value(".*'norm' must be .*missing: mean_ema", {}))
check("haiku_state", wrong_type(r".*\['norm/.*must be a", {"norm/~/mean_ema": 1}))
check("convert.name", wrong_type("must be a string; got", 1, None))
check("convert.name", wrong_value(".* 'word' must be a batch norm .*missing", WORD))

# Models
check(
    "linen.model linen.inspect_statistics.model",
    wrong_type("must be a flax.linen.Module; got the class Linen", Linen),
    wrong_type("must be a flax.linen.Module; got Nnx .*jaxbn.nnx", Nnx()),
)
check(
    "nnx.model nnx.replace_batch_norm.model",
    wrong_type("must be a flax.nnx.Module; got Linen .*jaxbn.linen", Linen()),
    wrong_type("must be a flax.nnx.Module; got", Nnx, None),
)
check(
    "batches linen.inspect_statistics.batches",
    wrong_type("must be an iterable of batches; got", {"x": x()}, 1, WORD),
    wrong_value("must hold at least one batch; got none", []),
)
check("linen.inspect_statistics.batches", wrong_value("must be given .*None", None))
check("linen.inspect_statistics.model", wrong_value("must be given .*None", None))
MODEL = "nnx.replace_batch_norm.model"
check(MODEL, wrong_value("must hold a flax.nnx.BatchNorm .*; got none", Nnx()))
check(MODEL, wrong_value("must hold .*; got one itself", flax_s().layers[0]))
check("make", wrong_type("must be a function that .*; got None", lambda norm: None))
CHANGES = "nnx.replace_batch_norm.changes"
check(CHANGES, wrong_type("must be arguments .*; got momentun", {"momentun": 1}))
check(CHANGES, wrong_type("must be .* no variable; got use_bias", {"use_bias": True}))
MODEL = "linen.replace_batch_norm.model"
check(MODEL, wrong_type(r".* must get no model.*; got Nnx \(.*jaxbn.nnx", (Nnx(),)))
CHANGES = "linen.replace_batch_norm.changes"
check(CHANGES, wrong_type("must be fields .*; got momentun", {"momentun": 1}))
check(CHANGES, wrong_type("must be fields .*; got name", {"name": "a"}))
check(CHANGES, wrong_type("`momentum` must be hashable", {"momentum": f32(1)}))

# What takes anything, and why.
ANYTHING = {
    "use_fast_variance": "accepted for Flax's sake; there is nothing to choose",
    "force_float32_reductions": "any truth value, as in Flax",
    "promote_dtype": "a function, which Python calls",
    "progress": "any truth value",
    "wrt": "a filter of nnx, which nnx reads",
    **dict.fromkeys(("rngs", "bias_metadata", "scale_metadata"), "read by nnx"),
    **dict.fromkeys(("kwargs", "args", "apply_kwargs", "call_kwargs"), "the model's"),
    **dict.fromkeys(("parent", "name"), "Linen's own fields"),
    **dict.fromkeys(("use_scale", "use_bias"), "of a module: any truth value"),
}


def arguments_of(function):
    public = PUBLIC[f"jaxbn.{function}"]
    if not isinstance(public, type):
        return [*inspect.signature(public).parameters, *["x"] * (function in TAKE_X)]
    methods = public.__init__, public.__call__
    names = itertools.chain(*(inspect.signature(m).parameters for m in methods))
    return [*dict.fromkeys(names), "call_use_running_average"][1:]  # without `self`


def key_of(function, argument):
    module = function.rpartition(".")[0]
    keys = f"{function}.{argument}", f"{module}.{argument}", argument
    return next((key for key in keys if key in CHECKS), None)


def cases():
    """Each table once, and one row for every other argument that goes through it."""
    shown = set()
    for function in GOOD:
        for argument in arguments_of(function):
            key = key_of(function, argument)
            fields = CHECKS.get(key, {})
            for field in fields if key not in shown else [""]:
                tables = fields.get(field, ())
                rows = [row for t in tables for row in (t[:1] if id(t) in shown else t)]
                shown.update(map(id, tables))
                for number, row in enumerate(rows[:1] if key in shown else rows):
                    case = f"{function}-{field or argument}-{number}"
                    yield pytest.param(function, argument, field, *row, id=case)
            shown.add(key)


def snapshot(arguments):
    """All arrays in there, which a call could have changed."""
    kept = [
        nnx.state(value) if isinstance(value, nnx.Module) else value
        for name, value in arguments.items()
        if name != "rngs"
    ]
    leaves = jax.tree.leaves(kept)
    return [np.array(a) for a in leaves if isinstance(a, np.ndarray | jax.Array)]


def assert_same(arguments, others):
    jax.tree.map(np.testing.assert_array_equal, snapshot(arguments), snapshot(others))


@pytest.mark.parametrize(
    ("function", "argument", "field", "bad", "error", "words"), list(cases())
)
def test_bad_argument(function, argument, field, bad, error, words):
    def call_with(value):
        good = GOOD[function]()
        if field:
            value = good[argument]._replace(**{field.rpartition(".")[2]: value})
        with pytest.raises(error) as caught:
            call(function, good | {argument: value})
        assert type(caught.value) is error, "an error of JAX's own"
        message = str(caught.value)
        name = field or argument.removeprefix("call_")
        start = "" if words[0] in "`." else f"`{name}`,? "
        assert re.match(start + words, message, re.DOTALL), message
        is_list = function.startswith("convert.") or function.endswith("load_torch")
        assert is_list or "\n" not in message, message
        assert_same(good, GOOD[function]())

    if isinstance(bad, Traced):
        jax.eval_shape(call_with, bad.value)
    else:
        call_with(bad)


@pytest.mark.parametrize("function", GOOD)
def test_good_call(function):
    """Without which no row would show anything. Traced, where nothing is compiled."""

    def good():
        call(function, GOOD[function]())

    on_the_host = function.endswith(("inspect_statistics", "from_equinox"))
    good() if on_the_host else jax.eval_shape(good)


def test_every_argument_is_here():
    """So that a new argument cannot come without its errors."""
    missing, used = [], set()
    for name, thing in PUBLIC.items():
        function = name.removeprefix("jaxbn.")
        comes_out = name.endswith(("LayerStatistics", "Cache"))
        if comes_out or (isinstance(thing, type) and issubclass(thing, tuple)):
            continue
        assert function in GOOD
        keys = {a: key_of(function, a) for a in arguments_of(function)}
        used.update(keys.values())
        missing += [
            f"{function}.{argument}"
            for argument, key in keys.items()
            if key is None and argument not in ANYTHING
        ]
    assert missing == []
    assert CHECKS.keys() - used == set()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_epsilon_that_is_read_as_zero(dtype):
    """XLA flushes subnormal numbers to 0, and a constant feature would be 0 / 0."""
    param_dtype = jnp.float32 if dtype == jnp.bfloat16 else dtype
    x, (params, state) = jnp.ones((4, 3), dtype), jaxbn.init(3, param_dtype=param_dtype)
    least = float(np.finfo(np.float32).tiny)
    train = functools.partial(jaxbn.batch_norm, x, params, state, train=True)
    for call in (
        train,
        functools.partial(jaxbn.batch_norm, x, params, state, train=False),
        functools.partial(jaxbn.forward, x, *params),
        functools.partial(jaxbn.fold, x, None, params, state),
    ):
        jax.eval_shape(functools.partial(call, epsilon=least))
        message = "`epsilon` must be at least 1.18e-38, the smallest normal .* float32"
        with pytest.raises(ValueError, match=message):
            call(epsilon=least / 2)
    y, _ = jax.jit(functools.partial(train, epsilon=least))()
    assert jnp.isfinite(y).all()


def test_epsilon_is_small_for_float64_alone():
    with jax.enable_x64(True):
        x = jnp.ones((4, 3))
        y, _ = jax.jit(lambda x: jaxbn.forward(x, None, None, epsilon=1e-300))(x)
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("cls", [jaxbn.nnx.BatchNorm, jaxbn.nnx.BatchRenorm])
def test_nnx_module_is_as_it_was(cls):
    """The one thing here that a call changes in place."""
    norm = cls(5, momentum=None, rngs=nnx.Rngs(0))
    graphdef, before = nnx.graphdef(norm), {"norm": nnx.clone(norm)}
    for argument in ("x", "mask", "use_running_average", "update_statistics"):
        for [(bad, error, _), *_] in CHECKS[key_of("nnx.BatchNorm", argument)][""]:
            with pytest.raises(error):
                norm(**{"x": x(), argument: bad})
    assert nnx.graphdef(norm) == graphdef
    assert_same({"norm": norm}, before)
