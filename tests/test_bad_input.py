"""Bad input: one sentence on the argument that is wrong, and nothing is lost.

The table is by argument, since an argument means the same wherever it stands; it is
crossed with every public function that has the argument. `test_every_argument_is_here`
holds the table against the signatures: a new argument needs rows, or a reason.
"""

import dataclasses
import functools
import inspect
import itertools
import re
import types
from typing import Any

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
from jaxbn import Moments, Params, State, convert


@dataclasses.dataclass(frozen=True)
class Traced:
    """Stands in a row for this value as a tracer."""

    value: Any


NAN, INF = float("nan"), float("inf")
WORD = "word"


def f32(*shape):
    """An array that a function could change in place."""
    return np.ones(shape, np.float32)


class Linen(nn.Module):
    """A model with one batch norm."""

    @nn.compact
    def __call__(self, x):
        return jaxbn.linen.BatchNorm(use_running_average=True, name="norm")(x)


class Nnx(nnx.Module):
    """A model with one batch norm."""

    def __init__(self):
        self.norm = jaxbn.nnx.BatchNorm(5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x)


def flax_s():
    return nnx.Sequential(nnx.BatchNorm(5, rngs=nnx.Rngs(0)))


def replaced_linen(model, changes):
    with jaxbn.linen.replace_batch_norm(*model, **changes):
        pass


def nnx_layers():
    """An NNX model with a layer and a batch norm, in inference."""
    model = Nnx()
    model.layer = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    model.eval()
    return model


def enter(pairs):
    with jaxbn.linen.folded(pairs):
        pass


# A good call of everything that is public, with fresh arguments.


def x():
    return np.arange(20, dtype=np.float32).reshape(4, 5)


def norm():
    params, state = Params(f32(5), f32(5)), State(f32(5), f32(5), np.int32(3))
    return {"params": params, "state": state}


def training():
    return {"x": x(), **norm(), "train": True}


def variables():
    return {
        "params": {
            "layer": {"kernel": f32(3, 5), "bias": f32(5)},
            "norm": {"scale": f32(5), "bias": f32(5)},
        },
        "batch_stats": {"norm": {"mean": f32(5), "var": f32(5)}},
    }


def moments():
    return Moments(np.float32(4), f32(5), f32(5))


def torch_norm():
    return {"weight": f32(5), "bias": f32(5), "running_mean": f32(5)} | {
        "running_var": f32(5),
        "num_batches_tracked": np.array(3),
    }


def haiku_trees():
    average = {"hidden": f32(1, 5), "average": f32(1, 5), "counter": 3}
    return {
        "haiku_params": {"norm": {"scale": f32(1, 5), "offset": f32(1, 5)}},
        "haiku_state": {"norm/~/mean_ema": average, "norm/~/var_ema": average},
        "name": "norm",
    }


class EquinoxState:
    """As `equinox.nn.State`, with the indices of a layer for keys."""

    def __init__(self, values):
        self.values = values

    def get(self, index):
        return self.values[index]

    def set(self, index, value):
        return EquinoxState(self.values | {index: value})


def equinox_layer():
    """As `equinox.nn.BatchNorm`."""
    layer = types.SimpleNamespace(
        mode="batch", momentum=0.9, weight=f32(5), bias=f32(5)
    )
    layer.batch_state_index, layer.batch_counter = "averages", "counter"
    values = {"averages": (f32(5), f32(5)), "counter": np.int32(3)}
    return {"layer": layer, "layer_state": EquinoxState(values)}


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


CALLS = {
    "batch_norm": (jaxbn.batch_norm, training),
    "ghost_batch_norm": (
        jaxbn.ghost_batch_norm,
        lambda: {**training(), "ghost_batch_size": 2},
    ),
    "batch_renorm": (jaxbn.batch_renorm, training),
    "batch_moments": (jaxbn.batch_moments, lambda: {"x": x()}),
    "merge_moments": (jaxbn.merge_moments, lambda: {"a": moments(), "b": moments()}),
    "update_state": (
        jaxbn.update_state,
        lambda: {"state": norm()["state"], "moments": moments()},
    ),
    "normalize": (
        jaxbn.normalize,
        lambda: {"x": x(), "mean": f32(5), "var": f32(5), "scale": f32(5)},
    ),
    "forward": (
        jaxbn.forward,
        lambda: {"x": x(), "scale": f32(5), "bias": f32(5)},
    ),
    "backward": (
        jaxbn.backward,
        lambda: {"dy": x(), "cache": jaxbn.forward(x(), f32(5), f32(5))[1]},
    ),
    "init": (jaxbn.init, lambda: {"num_features": 5}),
    "ramp_r_max": (jaxbn.ramp_r_max, lambda: {"num_updates": 3}),
    "ramp_d_max": (jaxbn.ramp_d_max, lambda: {"num_updates": 3}),
    "step_limits": (jaxbn.step_limits, lambda: {"warmup": 3}),
    "fold": (jaxbn.fold, lambda: {"kernel": f32(3, 5), "bias": f32(5), **norm()}),
    "fold_before": (
        jaxbn.fold_before,
        lambda: {"kernel": f32(5, 3), "bias": f32(3), **norm()},
    ),
    "fold_tree": (
        jaxbn.fold_tree,
        lambda: {"variables": variables(), "pairs": [("layer", "norm")]},
    ),
    "convert.from_torch": (convert.from_torch, lambda: {"state_dict": torch_norm()}),
    "convert.to_torch": (convert.to_torch, norm),
    "convert.from_keras": (
        convert.from_keras,
        lambda: {
            "layer": types.SimpleNamespace(
                gamma=f32(5), beta=None, moving_mean=f32(5), moving_variance=f32(5)
            )
        },
    ),
    "convert.to_keras": (convert.to_keras, norm),
    "convert.from_equinox": (convert.from_equinox, equinox_layer),
    "convert.to_equinox": (convert.to_equinox, lambda: {**norm(), **equinox_layer()}),
    "convert.from_haiku": (convert.from_haiku, haiku_trees),
    "convert.to_haiku": (
        convert.to_haiku,
        lambda: {**norm(), **haiku_trees(), "decay_rate": 0.9},
    ),
    "convert.load_torch": (
        convert.load_torch,
        lambda: {
            "state_dict": {f"bn.{name}": a for name, a in torch_norm().items()},
            "variables": {
                "params": {"norm": {"scale": f32(5), "bias": f32(5)}},
                "batch_stats": {"norm": {"mean": f32(5), "var": f32(5)}},
            },
            "names": {"bn": "norm"},
        },
    ),
    "linen.BatchNorm": (
        linen_call(jaxbn.linen.BatchNorm),
        lambda: {"x": x(), "use_running_average": False},
    ),
    "linen.BatchRenorm": (
        linen_call(jaxbn.linen.BatchRenorm),
        lambda: {"x": x(), "use_running_average": False},
    ),
    "linen.recalibrate": (
        jaxbn.linen.recalibrate,
        lambda: {"model": Linen(), "variables": variables(), "batches": [x()]},
    ),
    "linen.inspect_statistics": (
        jaxbn.linen.inspect_statistics,
        lambda: {"variables": variables(), "model": Linen(), "batches": [x()]},
    ),
    "linen.weight_decay_mask": (
        lambda model, x: jaxbn.linen.weight_decay_mask(model, x),
        lambda: {"model": Linen(), "x": x()},
    ),
    "linen.replace_batch_norm": (
        replaced_linen,
        lambda: {"model": (), "changes": {"momentum": 0.5}},
    ),
    "linen.find_pairs": (
        lambda model, x: jaxbn.linen.find_pairs(model, x),
        lambda: {"model": Linen(), "x": x()},
    ),
    "linen.folded": (enter, lambda: {"pairs": [("layer", "norm")]}),
    "nnx.find_pairs": (
        lambda model, x: jaxbn.nnx.find_pairs(model, x),
        lambda: {"model": nnx_layers(), "x": x()},
    ),
    "nnx.fold": (
        jaxbn.nnx.fold,
        lambda: {"model": nnx_layers(), "pairs": [("layer", "norm")]},
    ),
    "nnx.load_torch": (
        jaxbn.nnx.load_torch,
        lambda: {
            "model": Nnx(),
            "state_dict": {f"bn.{name}": a for name, a in torch_norm().items()},
            "names": {"bn": "norm"},
        },
    ),
    "nnx.BatchNorm": (
        nnx_call(jaxbn.nnx.BatchNorm),
        lambda: {"x": x(), "num_features": 5, "rngs": nnx.Rngs(0)},
    ),
    "nnx.BatchRenorm": (
        nnx_call(jaxbn.nnx.BatchRenorm),
        lambda: {"x": x(), "num_features": 5, "rngs": nnx.Rngs(0)},
    ),
    "nnx.recalibrate": (
        jaxbn.nnx.recalibrate,
        lambda: {"model": Nnx(), "batches": [x()]},
    ),
    "nnx.inspect_statistics": (
        jaxbn.nnx.inspect_statistics,
        lambda: {"model": Nnx(), "batches": [x()]},
    ),
    "nnx.weight_decay_mask": (
        jaxbn.nnx.weight_decay_mask,
        lambda: {"model": Nnx()},
    ),
    "nnx.replace_batch_norm": (
        lambda model, make, changes: jaxbn.nnx.replace_batch_norm(
            model, make=make, **changes
        ),
        lambda: {"model": flax_s(), "make": None, "changes": {}},
    ),
}

# The rows: (bad value, error, what the message says).

NO_ARRAY = [
    (WORD, TypeError, "must be an array of numbers; got str"),
    (object(), TypeError, "must be an array of numbers; got object"),
    ({"a": 1}, TypeError, "must be an array of numbers; got (Frozen)?[dD]ict"),
]
NONE = [(None, TypeError, "must be an array of numbers; got NoneType")]


def per_feature(argument):
    """Rows for a vector that fits the features; None is for others to say."""
    return [
        *((bad, error, f"`{argument}` {words}") for bad, error, words in NO_ARRAY),
        (f32(3), ValueError, rf"`{argument}` must have shape \(5,\), .*got \(3,\)"),
        (f32(1, 5), ValueError, rf"`{argument}` must have shape \(5,\), .*\(1, 5\)"),
        (1.0, ValueError, rf"`{argument}` must have shape \(5,\), .*got \(\)"),
        (np.ones(5, int), TypeError, f"`{argument}` must be floating .*got dtype int"),
        (f32(5) > 0, TypeError, f"`{argument}` must be floating .*got dtype bool"),
        (np.ones(5, np.complex64), TypeError, f"`{argument}` must be real .*complex64"),
    ]


def within(rows, container, field):
    """The rows of a field, as rows of the tuple around it."""
    return [(container._replace(**{field: bad}), *rest) for bad, *rest in rows]


def named(argument, rows):
    return [(bad, error, f"`{argument}` {words}") for bad, error, words in rows]


def static_bool(argument):
    words = f"`{argument}` must be a Python bool, True or False; got"
    bad = (None, 1, 0.0, WORD, f32(5), np.array(True), Traced(True))
    return [(value, TypeError, words) for value in bad]


def choice(argument, first, second):
    words = f'`{argument}` must be "{first}" or "{second}"; got'
    bad = (None, 1, True, WORD, first.upper(), (first,), Traced(1))
    return [(value, ValueError, words) for value in bad]


def mapping(argument):
    words = f"`{argument}` must be a mapping; got"
    return [(bad, TypeError, words) for bad in (None, WORD, 1, [], object())]


PARAMS, STATE = norm().values()
PAIRS = [
    *(
        (bad, TypeError, "`pairs` must be an iterable of pairs; got")
        for bad in (None, 1, object(), "ab")
    ),
    *((bad, TypeError, "`pairs` must hold") for bad in ([1], [(1, 2)], [("a",)])),
]
NNX_TOOLS = ["recalibrate", "inspect_statistics", "weight_decay_mask"]
NNX_TOOLS += ["find_pairs", "fold", "load_torch"]
INTS = "must be an int or a tuple of ints; got"

AXIS = [
    *((bad, TypeError, INTS) for bad in (None, WORD, b"\0", 1.0, NAN, 1j)),
    *((bad, TypeError, INTS) for bad in (True, (True,), np.array(1), jnp.array(1))),
    *((bad, TypeError, INTS) for bad in (((0, 1),), f32(1), Traced(1), Traced(f32(1)))),
    (2, ValueError, r"must lie in \[-2, 2\) for x of rank 2; got 2"),
    (-3, ValueError, r"must lie in \[-2, 2\) for x of rank 2; got -3"),
    ((1, -1), ValueError, r"must name each axis of x once; got \(1, -1\)"),
]
NUMBER = [
    *((b, TypeError, "must be a Python number, known") for b in (WORD, b"1", True)),
    *((b, TypeError, "must be a Python number, known") for b in (np.True_, Traced(1))),
    *((b, TypeError, "must be a number; got") for b in (None, 1j, [1e-5], 10**400)),
    *((b, TypeError, "must be a number; got") for b in (f32(5), object())),
]
EPSILON = [
    *NUMBER,
    *((b, ValueError, "must be positive and finite") for b in (0, -1e-5, NAN, INF)),
]
MOMENTUM = [
    *((b, TypeError, "`momentum` must be a Python number") for b in (WORD, b"1", True)),
    *((b, TypeError, "`momentum` must be a number") for b in (1j, [0.5], f32(5))),
    *((b, ValueError, r"`momentum`, the .* in \[0, 1\]; got") for b in (-0.1, 1.1)),
    *((b, ValueError, r"`momentum`, the .* in \[0, 1\]; got") for b in (NAN, INF)),
    (Traced(1), TypeError, "`momentum` must be a floating-point scalar; got int32"),
    (Traced(True), TypeError, "`momentum` must be a floating-point scalar; got bool"),
    (Traced(f32(5)), TypeError, r"`momentum` must be .* scalar; .* of shape \(5,\)"),
]
NUM_UPDATES = [
    *NO_ARRAY,
    *NONE,
    (1.0, TypeError, "must be an int32 scalar; got float32"),
    (True, TypeError, "must be an int32 scalar; got bool"),
    (np.int8(3), TypeError, "must be an int32 scalar; got int8"),
    (np.ones(5, np.int32), TypeError, r"must be an int32 scalar; .* of shape \(5,\)"),
]
NUM_FEATURES = [
    *((bad, TypeError, INTS) for bad in (None, WORD, b"x", 5.0, NAN, True, (True,))),
    *((bad, TypeError, INTS) for bad in ("", np.array(5), Traced(5), (Traced, 5))),
    *((bad, ValueError, "must not be negative; got") for bad in (-1, (3, -1))),
]
INEXACT = "must be floating point or complex; got"
DTYPE = [
    *(
        (bad, TypeError, INEXACT)
        for bad in (int, bool, "int8", WORD, 3, object, f32(5))
    ),
    *((bad, TypeError, INEXACT) for bad in ((), [1], Traced(1))),
]
LIMIT = [
    *NO_ARRAY,
    *NONE,
    (lambda n: f32(3), ValueError, r"must broadcast to the features \(5,\)"),
    (lambda n: None, TypeError, "must be an array of numbers; got NoneType"),
    (1j, TypeError, "must be real numbers; got dtype complex"),
    (True, TypeError, "must be real numbers; got dtype bool"),
]
LIMIT_OF_FUNCTION = [
    *LIMIT,
    (f32(3), ValueError, r"must broadcast to the features \(5,\); got \(3,\)"),
    (Traced(True), TypeError, "must be real numbers; got dtype bool"),
    (Traced(f32(3)), ValueError, r"must broadcast to the features \(5,\)"),
]
LIMIT_OF_MODULE = [
    *LIMIT,
    *(
        (bad, TypeError, "must be a Python number or a schedule in a module; got an")
        for bad in (f32(5), jnp.ones(5), f32(), Traced(2.0))
    ),
]
LARGE_ENOUGH = {
    "r_max": [
        (bad, ValueError, "`r_max` must be at least 1") for bad in (0.5, -1, NAN)
    ],
    "d_max": [(bad, ValueError, "`d_max` must be at least 0") for bad in (-0.1, NAN)],
}
GHOSTS = [
    *((bad, TypeError, "must be an int; got") for bad in (WORD, 2.0, True, [2], NAN)),
    *((bad, TypeError, "must be an int; got") for bad in (Traced(2), f32(5))),
    *((bad, ValueError, r"must divide the 4 rows of x; got") for bad in (0, -2, 3, 8)),
]
MASK_SHAPE = [
    *NO_ARRAY,
    (np.ones(4, bool), ValueError, r"must .*\(4, 5\).*got \(4,\).*mask\[:, None\]"),
    (np.ones((2, 5), bool), ValueError, r"must .*broadcast to .*\(4, 5\).*\(2, 5\)"),
    (np.ones((1, 4, 5), bool), ValueError, r"must .*broadcast to .*\(1, 4, 5\)"),
]
MASK = [
    *MASK_SHAPE,
    (f32(4, 5), TypeError, r"must be boolean.*float32 \(write mask.astype\(bool\)\)"),
    (np.ones((4, 5), int), TypeError, "must be boolean.*int32"),
    (f32(4, 5) * NAN, TypeError, "must be boolean.*float32"),
    (True, ValueError, r"must have the rank of x .*got \(\)"),
]
AXIS_NAME = [
    ("nowhere", ValueError, "'nowhere' is not bound here"),
    (("nowhere", "no"), ValueError, "'nowhere' is not bound here"),
    (NAN, ValueError, "nan is not bound here"),
    (0, ValueError, "0 is not bound here"),
    (np.array(["d"]), TypeError, "must be a name or several; got array"),
    (("d", "d"), ValueError, r"must name each axis once; got \('d', 'd'\)"),
]
X = [
    *NO_ARRAY,
    *NONE,
    (np.array(["a", "b"]), TypeError, "must be an array of numbers"),
    ([[1.0], [1.0, 2.0]], TypeError, "must be an array of numbers"),
    (x().astype(int), TypeError, "must be floating point or complex; got dtype int32"),
    (x() > 0, TypeError, "must be floating point or complex; got dtype bool"),
    (np.float32(1), ValueError, "must have at least one axis, the features"),
]
STATE_TYPE = "`state` must be a jaxbn.State; got"
PARAMS_TYPE = "`params` must be a jaxbn.Params; got"
BATCHES = "`batches` must be an iterable of batches; got"
NO_STATISTIC = "`state.mean` and `state.var` must be arrays; got None"
WRONG_STATE = [
    *((bad, TypeError, STATE_TYPE) for bad in (None, WORD, tuple(STATE), PARAMS, 1)),
    (STATE._replace(mean=None), TypeError, NO_STATISTIC),
    (STATE._replace(var=None), TypeError, NO_STATISTIC),
    *within(per_feature("state.mean"), STATE, "mean"),
    *within(per_feature("state.var"), STATE, "var"),
    *within(named("state.num_updates", NUM_UPDATES), STATE, "num_updates"),
]
MOMENTS = moments()


def wrong_moments(argument):
    words = f"`{argument}` must be a jaxbn.Moments; got"
    real = f"`{argument}` must have real num_elements and var; got dtypes"
    shapes = f"`{argument}` must have a mean and a var of one shape"
    return [
        *((bad, TypeError, words) for bad in (None, WORD, 1, tuple(MOMENTS), STATE)),
        *within(named(f"{argument}.mean", NO_ARRAY + NONE), MOMENTS, "mean"),
        (MOMENTS._replace(var=f32(3)), ValueError, shapes),
        (MOMENTS._replace(num_elements=f32(3)), ValueError, shapes),
        (MOMENTS._replace(mean=np.ones(5, int)), TypeError, rf"`{argument}.mean` must"),
        *(
            (MOMENTS._replace(**{name: np.ones(5, np.complex64)}), TypeError, real)
            for name in ("num_elements", "var")
        ),
    ]


def fold_tuple(argument, container, field):
    """Rows for the params or the state that is folded."""
    name = f"{argument}.{field}"
    words = f"`{argument}` must be a jaxbn.{type(container).__name__}; got"
    shape = rf"`{name}` must have shape \(5,\), .*got \(3,\)"
    ints = f"`{name}` must be floating point or complex; got dtype int"
    return [
        *((bad, TypeError, words) for bad in (None, WORD, tuple(container))),
        *within(named(name, NO_ARRAY), container, field),
        (container._replace(**{field: f32(3)}), ValueError, shape),
        (container._replace(**{field: np.ones(5, int)}), TypeError, ints),
    ]


# By the argument's name or, where it means something else, by the function's too.
ROWS = {
    "x": named("x", X),
    "axis": named("axis", AXIS),
    "mask": named("mask", MASK),
    "axis_name": named("axis_name", AXIS_NAME),
    "axis_index_groups": [
        (bad, ValueError, "`axis_index_groups` needs `axis_name`; got None")
        for bad in ([[0]], WORD, 1, Traced(1))
    ],
    "train": static_bool("train"),
    "params": [
        *((bad, TypeError, PARAMS_TYPE) for bad in (None, WORD, tuple(PARAMS), STATE)),
        *within(per_feature("scale"), PARAMS, "scale"),
        *within(per_feature("bias"), PARAMS, "bias"),
    ],
    "state": WRONG_STATE,
    "momentum": MOMENTUM,
    "epsilon": named("epsilon", EPSILON),
    "running_variance": choice("running_variance", "biased", "unbiased"),
    "debias": static_bool("debias"),
    "derivative": choice("derivative", "vjp", "jvp"),
    "ghost_batch_size": named("ghost_batch_size", GHOSTS),
    "r_max": named("r_max", LIMIT_OF_FUNCTION) + LARGE_ENOUGH["r_max"],
    "d_max": named("d_max", LIMIT_OF_FUNCTION) + LARGE_ENOUGH["d_max"],
    **{
        f"{flax}.BatchRenorm.{name}": named(name, LIMIT_OF_MODULE) + more
        for flax in ("linen", "nnx")
        for name, more in LARGE_ENOUGH.items()
    },
    "update_state.moments": [
        *wrong_moments("moments"),
        (Moments(4, f32(1), f32(1)), ValueError, r"`state.mean` .*\(1,\); got \(5,\)"),
    ],
    "normalize.mean": per_feature("mean"),
    "normalize.var": per_feature("var"),
    "scale": per_feature("scale"),
    "bias": per_feature("bias"),
    "num_updates": [
        *named("num_updates", NO_ARRAY + NONE),
        (1j, TypeError, "`num_updates` must be real numbers"),
        (True, TypeError, "`num_updates` must be real numbers"),
    ],
    "num_features": named("num_features", NUM_FEATURES),
    "use_scale": static_bool("use_scale"),
    "use_bias": static_bool("use_bias"),
    "init.param_dtype": [
        *named("param_dtype", DTYPE),
        (None, TypeError, "`param_dtype` must be floating point or complex; got None"),
    ],
    # dy and cache, a and b
    "backward.dy": [
        *named("dy", NO_ARRAY + NONE),
        (f32(5), ValueError, r"`dy` must have the shape of y, \(4, 5\); got \(5,\)"),
        (x().T, ValueError, r"`dy` must have the shape of y, \(4, 5\); got \(5, 4\)"),
        (x() + 1j, TypeError, "`dy` must be real for x of dtype float32; got complex"),
    ],
    "backward.cache": [
        (bad, TypeError, "`cache` must be what `forward` returned; got")
        for bad in (None, WORD, 1, (x(), f32(5)), {"x": x()}, Traced(f32(5)))
    ],
    "merge_moments.a": [
        *wrong_moments("a"),
        (Moments(4, f32(3), f32(3)), ValueError, r"`a` and `b` must .*\(3,\).*\(5,\)"),
    ],
    "merge_moments.b": [
        *wrong_moments("b"),
        (Moments(4, f32(3), f32(3)), ValueError, r"`a` and `b` must .*\(5,\).*\(3,\)"),
        (
            MOMENTS._replace(mean=np.ones(5, np.complex64)),
            TypeError,
            "`a` and `b` must have moments of one dtype; got float32 and complex64",
        ),
    ],
    # Folding
    "kernel": [
        *named("kernel", NO_ARRAY + NONE),
        (np.ones((3, 5), int), TypeError, "`kernel` must be floating point .*int32"),
        (np.float32(1), ValueError, "`kernel`"),
    ],
    "fold.bias": [
        *named("bias", NO_ARRAY),
        (np.ones(5, int), TypeError, "`bias` must be floating point .*int32"),
        (f32(4), ValueError, r"`bias` must have shape \(5,\).*got \(4,\)"),
        (f32(5, 1), ValueError, r"`bias` must have shape \(5,\).*got \(5, 1\)"),
    ],
    "fold_before.bias": [
        *named("bias", NO_ARRAY),
        (np.ones(3, int), TypeError, "`bias` must be floating point .*int32"),
        (f32(4), ValueError, r"`bias` must have shape \(3,\), the outputs.*got \(4,\)"),
    ],
    "fold.params": fold_tuple("params", PARAMS, "scale"),
    "fold.state": fold_tuple("state", STATE, "mean"),
    "fold_before.params": fold_tuple("params", PARAMS, "scale"),
    "fold_before.state": fold_tuple("state", STATE, "var"),
    "step_limits.warmup": [
        *named("warmup", NUMBER),
        *((bad, ValueError, "`warmup` must not be negative") for bad in (-1, NAN)),
    ],
    "step_limits.r_max": named("r_max", NUMBER) + LARGE_ENOUGH["r_max"],
    "step_limits.d_max": named("d_max", NUMBER) + LARGE_ENOUGH["d_max"],
    "features_axis": [
        (bad, TypeError, f"`features_axis` .*{INTS}") for bad in (None, WORD, 1.5, True)
    ]
    + [(bad, ValueError, "`features_axis` .*must") for bad in (2, -3, (1, -1))],
    "padding": [
        (bad, error, "`padding` must be .*; got")
        for bad, error in (
            (WORD, ValueError),
            (1, ValueError),
            ([(0, 1)], ValueError),
            (f32(2), TypeError),
            (object(), TypeError),
            (Traced(0), TypeError),
        )
    ],
    "fold_tree.variables": [
        *mapping("variables"),
        ({}, ValueError, "`pairs` must name modules"),
        ({"params": None}, ValueError, "`pairs` must name modules"),
    ],
    "linen.folded.pairs": PAIRS,
    "pairs": [
        *PAIRS,
        ([("layer", "norm", 1)], TypeError, "`pairs` must hold"),
        ([("layer", "norm", {"no": 1})], TypeError, "`pairs` must hold options .*'no'"),
        ([("layer", "nowhere")], ValueError, "`pairs` must name modules .*nowhere"),
        (
            [("layer", "layer")],
            ValueError,
            "`pairs` must name a layer and a batch norm",
        ),
        ([("layer", "norm")] * 2, ValueError, "`pairs` must name a layer once"),
    ],
    # Conversion
    "convert.from_torch.state_dict": [
        *mapping("state_dict"),
        ({}, ValueError, "`state_dict` must be a batch norm .*missing: running_mean"),
        *(
            ({**torch_norm(), "weight": bad}, ValueError, "`state_dict` .*shape other")
            for bad in (f32(3), 1.0)
        ),
        *(
            (
                {**torch_norm(), "weight": bad},
                TypeError,
                "`state_dict` must hold weight as .* of floats",
            )
            for bad in (WORD, object())
        ),
        *(
            (
                {**torch_norm(), "running_var": bad},
                TypeError,
                "`state_dict` must hold running_var as .* of floats",
            )
            for bad in (np.ones(5, int),)
        ),
        *(
            (
                {**torch_norm(), "num_batches_tracked": bad},
                error,
                "`state_dict` must hold num_batches_tracked as",
            )
            for bad, error in (
                *((WORD, TypeError), (f32(3), TypeError), (-1.5, TypeError)),
                (np.array([3]), ValueError),
            )
        ),
    ],
    **{
        f"convert.to_{library}.params": [
            (bad, TypeError, PARAMS_TYPE) for bad in (None, WORD, tuple(PARAMS), STATE)
        ]
        for library in ("torch", "keras", "haiku", "equinox")
    },
    **{
        f"convert.to_{library}.state": [
            *((bad, TypeError, STATE_TYPE) for bad in (None, WORD, PARAMS)),
            *(
                (STATE._replace(**{field: None}), TypeError, f"`state.{field}` must")
                for field in STATE._fields
            ),
        ]
        for library in ("torch", "keras", "haiku", "equinox")
    },
    "convert.from_keras.layer": [
        (bad, ValueError, "`layer`, built, must be a batch norm .*missing")
        for bad in (None, WORD, object())
    ],
    "layer": [
        (bad, TypeError, "`layer` must be an equinox.nn.BatchNorm; got")
        for bad in (None, WORD, object())
    ],
    "layer_state": [
        (bad, TypeError, "`layer_state` must be an equinox.nn.State that knows `layer`")
        for bad in (None, WORD, object(), {}, EquinoxState({}))
    ],
    "haiku_params": [
        *mapping("haiku_params"),
        (
            {"norm": 1},
            TypeError,
            r"`haiku_params\['norm'\]` must be a mapping; got int",
        ),
        (
            {"norm": {"scale": WORD}},
            TypeError,
            "'norm' must hold scale as .* of floats",
        ),
    ],
    "haiku_state": [
        *mapping("haiku_state"),
        ({}, ValueError, "'norm' must be a batch norm.*missing: mean_ema"),
        ({"norm/~/mean_ema": {}}, ValueError, "'norm' must be a batch norm.*missing"),
        (
            {"norm/~/mean_ema": 1},
            TypeError,
            r"`haiku_state\['norm/.*` must be a mapping",
        ),
    ],
    "convert.name": [
        (WORD, ValueError, "'word' must be a batch norm.*missing"),
        *((bad, TypeError, "`name` must be a string; got") for bad in (None, 1, [])),
    ],
    "decay_rate": [
        *((bad, TypeError, "`decay_rate` must be a .*number") for bad in (None, WORD)),
        *((bad, ValueError, "`decay_rate`.* must lie in") for bad in (NAN, -1, 2)),
    ],
    "state_dict": [
        *mapping("state_dict"),
        ({}, ValueError, "`names` must lead .*missing in `state_dict`"),
        ({1: 2}, TypeError, "`state_dict` must be a mapping with strings .*got 1"),
        (
            {"bn.weight": WORD},
            TypeError,
            "`state_dict` must hold bn.weight as .*numbers",
        ),
    ],
    "convert.load_torch.variables": [
        *mapping("variables"),
        ({}, ValueError, '`variables` must hold "params" or "batch_stats"'),
    ],
    "names": [
        *mapping("names"),
        ({}, ValueError, "`names` must lead .*but not named"),
        ({"bn": 1}, TypeError, "`names` must hold paths, .*; got 1"),
        ({1: "norm"}, TypeError, "`names` must be a mapping with strings .*got 1"),
    ],
    "conv_transpose": [
        *(
            (bad, TypeError, "`conv_transpose` must be an iterable of names; got")
            for bad in (None, 1, object(), WORD)
        ),
        (["nowhere"], ValueError, "in `conv_transpose`, but not named: nowhere"),
    ],
    # Flax's modules
    **{
        f"{flax}.{cls}.{argument}": rows
        for flax in ("linen", "nnx")
        for cls in ("BatchNorm", "BatchRenorm")
        for argument, rows in {
            "x": [
                *named("x", NO_ARRAY + NONE),
                (np.float32(1), ValueError, "`x` must have at least one axis"),
            ],
            "mask": named("mask", MASK_SHAPE),
            "dtype": named("dtype", DTYPE),
            "param_dtype": named("param_dtype", DTYPE),
            "use_running_average": static_bool("use_running_average")[1:],
            "call_use_running_average": static_bool("use_running_average")[1:],
            "bias_init": [
                (lambda *args: f32(3), ValueError, r"`bias` must have shape \(5,\)")
            ],
            "scale_init": [
                (lambda *args: f32(3), ValueError, r"`scale` must have shape \(5,\)")
            ],
            **dict.fromkeys(("use_bias", "use_scale"), ()),  # as Flax reads them
        }.items()
    },
    "linen.BatchRenorm.ghost_batch_size": [
        (2, ValueError, "`ghost_batch_size` must be None for BatchRenorm"),
    ],
    # Recalibration, inspection, weight decay
    "linen.recalibrate.model": [
        (bad, TypeError, "`model` must be a flax.linen.Module; got")
        for bad in (None, WORD, Linen)
    ],
    "linen.recalibrate.variables": [
        *mapping("variables"),
        ({"params": {}}, ValueError, '`variables` must hold "batch_stats"'),
    ],
    "linen.inspect_statistics.variables": [
        *mapping("variables"),
        ({"params": {}}, ValueError, "`variables` must hold `batch_stats`"),
    ],
    "linen.inspect_statistics.model": [
        (bad, TypeError, "`model` must be a flax.linen.Module; got")
        for bad in (WORD, Linen)
    ],
    "linen.inspect_statistics.batches": [
        (None, ValueError, "`batches` must be given with `model`; got None"),
        *((bad, TypeError, BATCHES) for bad in (1, object(), WORD, {"x": x()})),
        ([], ValueError, "`batches` must hold at least one batch; got none"),
    ],
    "batches": [
        *((bad, TypeError, BATCHES) for bad in (None, 1, object(), WORD, {"x": x()})),
        ([], ValueError, "`batches` must hold at least one batch; got none"),
    ],
    "sequential": static_bool("sequential"),
    "update_statistics": static_bool("update_statistics")[1:],  # None is the default
    **{
        f"linen.{function}.model": [
            (bad, TypeError, "`model` must be a flax.linen.Module; got")
            for bad in (None, WORD, Linen)
        ]
        for function in ("weight_decay_mask", "find_pairs")
    },
    **{
        f"{function}.x": named("x", NO_ARRAY + NONE)
        for function in (
            "linen.weight_decay_mask",
            "linen.find_pairs",
            "nnx.find_pairs",
        )
    },
    **{
        f"nnx.{function}.model": [
            (bad, TypeError, "`model` must be a flax.nnx.Module; got")
            for bad in (None, WORD, Nnx)
        ]
        for function in NNX_TOOLS
    },
    "nnx.replace_batch_norm.model": [
        (None, TypeError, "`model` must be a flax.nnx.Module; got NoneType"),
        (Linen(), TypeError, "`model` must be a flax.nnx.Module; got Linen .*linen"),
        (Nnx(), ValueError, "`model` must hold a flax.nnx.BatchNorm .*; got none"),
        (flax_s().layers[0], ValueError, "`model` must hold .*; got one itself"),
    ],
    "nnx.replace_batch_norm.make": [
        (lambda norm: None, TypeError, "`make` must be a function that .*; got None"),
    ],
    "nnx.replace_batch_norm.changes": [
        ({"momentun": 1}, TypeError, "`changes` must be arguments .*; got momentun"),
        ({"use_bias": True}, TypeError, "that make no variable; got use_bias"),
    ],
    "linen.replace_batch_norm.model": [
        ((Linen(),), TypeError, "must get no model: .*; got Linen"),
        ((Nnx(),), TypeError, r"must get no model: .*; got Nnx \(.*jaxbn.nnx\)"),
    ],
    "linen.replace_batch_norm.changes": [
        ({"momentun": 1}, TypeError, "`changes` must be fields .*; got momentun"),
        ({"name": "a"}, TypeError, "`changes` must be fields .*; got name"),
        ({"momentum": f32(1)}, TypeError, "`momentum` must be hashable, .*; got ndarr"),
    ],
    "nnx.inspect_statistics.batches": [
        *((bad, TypeError, BATCHES) for bad in (1, object(), WORD, {"x": x()})),
        ([], ValueError, "`batches` must hold at least one batch; got none"),
    ],
}

# What takes anything, and why.
NOT_HERE = {
    "use_fast_variance": "accepted for Flax's sake; there is nothing to choose",
    "force_float32_reductions": "any truth value, as in Flax",
    "promote_dtype": "a function, which Python calls",
    "rngs": "read by nnx",
    "bias_metadata": "read by nnx",
    "scale_metadata": "read by nnx",
    "progress": "any truth value",
    "wrt": "a filter of nnx, which nnx reads",
    "kwargs": "on to the model",
    "args": "on to the model",
    "apply_kwargs": "on to the model",
    "call_kwargs": "on to the model",
    "parent": "Linen's own field",
    "name": "Linen's own field",
}


def rows_of(function, argument):
    module = function.rpartition(".")[0]
    for name in (f"{function}.{argument}", f"{module}.{argument}", argument):
        if name in ROWS:
            return ROWS[name]
    return None


def arguments_of(function):
    """By the signature; those of a module are its constructor's and its call's."""
    public = PUBLIC[f"jaxbn.{function}"]
    if not isinstance(public, type):
        return {*inspect.signature(public).parameters, *IN_ARGS.get(function, ())}
    methods = public.__init__, public.__call__
    signatures = [inspect.signature(method).parameters for method in methods]
    return {*itertools.chain(*signatures), "call_use_running_average"} - {"self"}


# What the call's *args are here.
IN_ARGS = {f"{flax}.find_pairs": ["x"] for flax in ("linen", "nnx")}
IN_ARGS["linen.weight_decay_mask"] = ["x"]


def table():
    for function in CALLS:
        for argument in sorted(arguments_of(function)):
            for number, row in enumerate(rows_of(function, argument) or ()):
                name = f"{function}-{argument}-{number}"
                yield pytest.param(function, argument, *row, id=name)


def snapshot(arguments):
    """What a call could have changed in its arguments."""
    kept = {}
    for name, value in arguments.items():
        if name == "rngs":
            continue
        is_module = isinstance(value, nnx.Module)
        tree = nnx.state(value) if is_module else value
        kept[name] = [
            np.array(leaf) for leaf in jax.tree.leaves(tree) if is_array(leaf)
        ]
    return kept


def is_array(leaf):
    is_array = isinstance(leaf, np.ndarray | np.generic | jax.Array | int | float)
    return is_array and not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def call_with(call, good, argument, bad):
    """The call, under jit where `bad` is traced."""
    if not isinstance(bad, Traced):
        return call(**good | {argument: bad})

    def traced(value):
        # Flax moves random streams only where they were made.
        rngs = {"rngs": nnx.Rngs(0)} if "rngs" in good else {}
        return arrays(call(**good | rngs | {argument: value}))

    return jax.eval_shape(traced, bad.value)


def arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


@pytest.mark.parametrize(
    ("function", "argument", "bad", "error", "words"), list(table())
)
def test_bad_argument(function, argument, bad, error, words):
    call, make = CALLS[function]
    good = make()
    with pytest.raises(error) as caught:
        call_with(call, good, argument, bad)
    assert type(caught.value) is error, "an error of JAX's own"
    message = str(caught.value)
    assert re.search(words, message, re.DOTALL), message
    sentence = message.split("\n")
    is_list = function.startswith("convert.") or function.endswith("load_torch")
    assert is_list or len(sentence) == 1, message
    fresh = make()
    jax.tree.map(np.testing.assert_array_equal, snapshot(good), snapshot(fresh))


@pytest.mark.parametrize("function", CALLS)
def test_good_call(function):
    """Without which no row would show anything."""
    call, make = CALLS[function]
    call(**make())


def short(name):
    return name.removeprefix("jaxbn.")


CALLED = {
    short(name): thing
    for name, thing in PUBLIC.items()
    if not (isinstance(thing, type) and issubclass(thing, tuple))
    and not name.endswith(("LayerStatistics", "Cache"))  # come out, like the tuples
}


@pytest.mark.parametrize("function", CALLED)
def test_every_argument_is_here(function):
    """So that a new argument cannot come without its errors."""
    assert function in CALLS
    missing = [
        argument
        for argument in arguments_of(function)
        if rows_of(function, argument) is None and argument not in NOT_HERE
    ]
    assert missing == []


def test_every_row_is_used():
    used = {
        name
        for function in CALLED
        for argument in arguments_of(function)
        for name in (f"{function}.{argument}", argument)
    } | {"convert.name"}
    assert [name for name in ROWS if name not in used] == []


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_epsilon_that_is_read_as_zero(dtype):
    """XLA flushes subnormal numbers to 0, and a constant feature would be 0 / 0."""
    param_dtype = jnp.float32 if dtype == jnp.bfloat16 else dtype
    x, (params, state) = jnp.ones((4, 3), dtype), jaxbn.init(3, param_dtype=param_dtype)
    least = float(np.finfo(np.float32).tiny)
    for call in (
        functools.partial(jaxbn.batch_norm, x, params, state, train=True),
        functools.partial(jaxbn.batch_norm, x, params, state, train=False),
        functools.partial(jaxbn.forward, x, *params),
        functools.partial(jaxbn.fold, x, None, params, state),
    ):
        y = call(epsilon=least)[0]
        assert jnp.isfinite(y).all()
        message = "`epsilon` must be at least 1.18e-38, the smallest normal .* float32"
        with pytest.raises(ValueError, match=message):
            call(epsilon=least / 2)


def test_epsilon_is_small_for_float64_alone():
    with jax.enable_x64(True):
        y, _ = jaxbn.forward(jnp.ones((4, 3)), None, None, epsilon=1e-300)
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("argument", ["x", "mask", "use_running_average"])
@pytest.mark.parametrize("cls", [jaxbn.nnx.BatchNorm, jaxbn.nnx.BatchRenorm])
def test_nnx_module_is_as_it_was(cls, argument):
    """The one thing here that a call changes in place."""
    norm = cls(5, momentum=None, rngs=nnx.Rngs(0))
    norm(x())
    graphdef, before = nnx.split(norm)
    for bad, *_ in rows_of(f"nnx.{cls.__name__}", argument):
        if not isinstance(bad, Traced):
            with pytest.raises((TypeError, ValueError)):
                norm(**{"x": x(), argument: bad})
    assert nnx.graphdef(norm) == graphdef
    after = nnx.state(norm)
    jax.tree.map(np.testing.assert_array_equal, before, after)
