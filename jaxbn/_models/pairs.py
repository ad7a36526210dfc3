"""Which batch norms can be folded, read off the program of a model's call.

Each layer and each batch norm marks what it is given and what it returns. A walk over
the traced program then finds where each output goes, and which arrays have a use beside
the module that holds them. Dead code counts as a use.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey
from jax.typing import ArrayLike

from jaxbn._axes import feature_axes, is_int
from jaxbn._checks import as_array
from jaxbn._core.platforms import MARK, Jaxpr, JaxprEqn, Var, mark
from jaxbn._fold_tree import fold_tree
from jaxbn._models.measure import PyTree

# Equations that hold one program, with its inputs and its results.
CALLS = {"checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit"}
CALLS |= {"pjit", "remat2", "shard_map"}
# Equations whose results are their operands.
COPIES = {"copy", "mesh_cast", "name", "optimization_barrier", "pvary", "reshard"}
COPIES |= {"sharding_constraint"}

BY_BATCH = "it normalizes by the batch in this call, not as in inference"

# What is traced of the arguments of a call.
Arrays = list[jax.Array]
# The output of a module, by its path; a variable, by collection, path and name; or
# anything else.
Source = str | tuple[str, ...] | None
Options = dict[str, Any]
Pair = tuple[str, str, Options]


class Pairs(list[Pair]):
    """Pairs for `fold_tree`: the paths of both modules in call order, and options.

    Attributes:
        unfoldable: The path of each batch norm that is in no pair, with the reason.
    """

    def __init__(self, pairs: Sequence[Pair] = ()):
        super().__init__(pairs)
        self.unfoldable: dict[str, str] = {}


class Call(NamedTuple):
    """A call of a layer or of a batch norm, as a mark carries it."""

    path: str
    # Of its kernel or mean, without the axes of a stack of modules.
    shape: tuple[int, ...]
    is_norm: bool
    # Of x, from the end: a norm's features, or what a layer sums over.
    axes: tuple[int, ...]
    # The kernel's axis for each of the last axes of a layer's output.
    outputs: Mapping[int, int]
    # A norm's epsilon, or a layer's padding.
    options: Options
    # Why the norm, or one before the layer, cannot be folded.
    refusal: str


def marked(
    call: Callable[..., jax.Array],
    module: Any,
    path: str,
    is_norm: bool,
    array: jax.Array,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> jax.Array:
    """Return `call(*args, **kwargs)`, with a mark on x and on what comes out.

    `array` is the kernel of the layer `module`, or the mean of the batch norm.
    """
    x, args, kwargs = input_apart(is_norm, args, kwargs)
    x, shape = as_array("x", x), jnp.shape(array)
    described = (
        _norm(module, x.ndim, *args, **kwargs)
        if is_norm
        else _layer(module, x.ndim, len(shape))
    )
    note = Call(path, shape, is_norm, *described)
    x = mark(x, array, (note, False))
    # A training batch may be too small, or `axis_name` not bound.
    y = x if note.refusal == BY_BATCH else call(x, *args, **kwargs)
    return mark(y, array, (note, True))


def input_apart(
    is_norm: bool, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, Sequence[Any], dict[str, Any]]:
    """Return x, and the other arguments of the call of a batch norm or a layer."""
    name = "x" if is_norm else "inputs"
    x, *others = args or [kwargs[name]]
    return x, others, {k: v for k, v in kwargs.items() if k != name}


def _norm(
    norm: Any,
    ndim: int,
    use_running_average: bool | None = None,
    *,
    mask: ArrayLike | None = None,
):
    if use_running_average is None:
        use_running_average = norm.use_running_average
    refusal = "" if mask is None else "it is called with a mask"
    if not use_running_average:
        refusal = BY_BATCH
    axes = tuple(i - ndim for i in feature_axes(norm.axis, ndim))
    return axes, {}, {"epsilon": norm.epsilon}, refusal


def _layer(layer: Any, ndim: int, kernel_ndim: int):
    axes: Any = getattr(layer, "axis", -1)
    axes = (axes,) if is_int(axes) else tuple(axes)
    axes = tuple(i - ndim if i >= 0 else i for i in axes)
    batch = getattr(layer, "batch_dims", ()) or getattr(layer, "batch_axis", ())
    is_general = hasattr(layer, "axis")  # DenseGeneral, LinearGeneral
    num_outputs = kernel_ndim - len(batch) - len(axes) if is_general else 1
    outputs = {i: i for i in range(-num_outputs, 0)}
    if getattr(layer, "transpose_kernel", False):
        outputs = {-1: -2}
    dilation = jax.tree.leaves(getattr(layer, "input_dilation", None))
    refusal = ""
    if batch or getattr(layer, "mask", None) is not None:
        refusal = "has batch axes or a mask"
    if hasattr(layer, "transpose_kernel") or any(d != 1 for d in dilation):
        refusal = "puts zeros between the elements of its input"
    options = {"padding": layer.padding} if hasattr(layer, "padding") else {}
    return axes, outputs, options, refusal


def arrays_apart(
    args: PyTree, kwargs: PyTree
) -> tuple[Arrays, Callable[[Arrays], PyTree]]:
    """Return the arrays in the arguments of a call, and what puts others there."""
    leaves, structure = jax.tree.flatten((args, dict(kwargs)))
    arrays = jax.Array | np.ndarray | jax.ShapeDtypeStruct
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, arrays)]

    def put(given: Arrays) -> PyTree:
        new = dict(zip(places, given, strict=True))
        return structure.unflatten([new.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in places], put


def found_pairs(call: Callable[..., PyTree], variables: PyTree, given: Arrays) -> Pairs:
    """Return the pairs of a model, whose modules call `marked`.

    `call(variables, given)` returns all that a folding must not change.
    """

    def run(variables: PyTree, given: Arrays) -> list[jax.Array]:
        results = jax.tree.leaves(call(variables, given))
        return [leaf for leaf in results if isinstance(leaf, jax.Array)]

    jaxpr = jax.make_jaxpr(run)(variables, given).jaxpr
    program = _Program(variables)
    for source in program.walk(jaxpr, list(program.shapes)):
        if isinstance(source, str):  # variables come out as they went in
            program.add(source, "the results")
    return program.pairs()


class _Program:
    """Who uses what in a program.

    Attributes:
        variables: Its first inputs.
        shapes: Those of the variables, by collection, path and name.
        calls: The modules, by path.
        given: What each module is given, by path, in all its calls.
        users: Of each source, the modules, and the primitives outside of modules.
        inside: The path of the module that is running.
    """

    def __init__(self, variables: PyTree):
        flat, _ = jax.tree_util.tree_flatten_with_path(variables)
        self.variables = variables
        self.shapes: dict[tuple[str, ...], tuple[int, ...]] = {
            tuple(key.key for key in path if isinstance(key, DictKey)): leaf.shape
            for path, leaf in flat
        }
        self.calls: dict[str, Call] = {}
        self.given: dict[str, set[Source]] = defaultdict(set)
        self.users: dict[Source, dict[str, None]] = defaultdict(dict)
        self.inside: str | None = None

    def add(self, source: Source, user: str) -> None:
        """Note that the running module, or else `user`, takes `source`."""
        if source is not None:
            self.users[source][self.inside or user] = None

    def walk(self, jaxpr: Jaxpr, sources: Sequence[Source]) -> list[Source]:
        """Note all uses in a program whose first inputs are `sources`.

        Return what its results are.
        """
        known = dict(zip(jaxpr.invars, sources, strict=False))

        def read(variables: Sequence[object]) -> list[Source]:
            return [known.get(v) if isinstance(v, Var) else None for v in variables]

        for equation in jaxpr.eqns:
            results = self._equation(equation, read(equation.invars))
            known.update(zip(equation.outvars, results, strict=False))
        return read(jaxpr.outvars)

    def _equation(self, equation: JaxprEqn, operands: list[Source]) -> list[Source]:
        name, params = equation.primitive.name, equation.params
        if equation.primitive is MARK:
            call, is_end = params["note"]
            return [self._mark(call, is_end, *operands)]
        if name in COPIES or (name == "convert_element_type" and _keeps_kind(equation)):
            return operands
        values = jax.tree.leaves(list(params.values()))
        bodies = [getattr(v, "jaxpr", v) for v in values if hasattr(v, "eqns")]
        if name in CALLS and len(bodies) == 1:
            return self.walk(bodies[0], operands)
        # A loop, or branches: what goes in or comes out is not followed further.
        for source in sum((self.walk(body, []) for body in bodies), operands):
            self.add(source, f"`{name}`")  # a module may have that name
        return []

    def _mark(self, call: Call, is_end: bool, source: Source, array: Source) -> Source:
        if is_end:
            path, self.inside = self.inside, None
            return path
        # nn.jit uses the trace of one module, and so its path, for another as well.
        if isinstance(array, tuple):
            call = call._replace(path="/".join(array[1:-1]))
        self.inside = call.path
        if self.calls.setdefault(call.path, call) != call:
            refusal = "it is called in different ways"
            self.calls[call.path] = call._replace(refusal=refusal)
        self.given[call.path].add(source)
        self.add(source, call.path)
        return source

    def pairs(self) -> Pairs:
        """Return the pairs in call order, and why other batch norms have none."""
        found = Pairs()
        for norm in [call for call in self.calls.values() if call.is_norm]:
            reasons = [norm.refusal] if norm.refusal else []
            for fold in () if reasons else (self._after_layer, self._before_layers):
                try:
                    found += self._checked(fold(norm))
                    break
                except (TypeError, ValueError) as error:
                    reasons.append(str(error))
            else:
                found.unfoldable[norm.path] = ", and ".join(reasons)
        stats = [key[1:] for key in self.shapes if key[0] == "batch_stats"]
        uncalled = {"/".join(path) for *path, name in stats if name == "mean"}
        for path in sorted(uncalled - self.calls.keys()):
            found.unfoldable[path] = "it is not called, or has a call of its own"
        if not (found or found.unfoldable):
            raise ValueError("`model` must have a BatchNorm; got none")
        if not found and set(found.unfoldable.values()) == {BY_BATCH}:
            raise ValueError(
                "the arguments must be those of inference; got a call in which each "
                "BatchNorm normalizes by the batch (is there a `train=False`?)"
            )
        return found

    def _after_layer(self, norm: Call) -> list[Pair]:
        sources = list(self.given[norm.path])
        layer = self._layer(sources[0])
        if len(sources) > 1 or layer is None:
            raise ValueError("its input is not the output of one layer")
        others = [user for user in self.users[layer.path] if user != norm.path]
        _refuse(others, f"the output of {layer.path} also goes to")
        if not set(norm.axes) <= set(layer.outputs):
            raise ValueError(f"its features are not those of {layer.path}")
        axes = tuple(layer.outputs[i] for i in norm.axes)
        options = norm.options | ({} if axes == (-1,) else {"features_axis": axes})
        return [(layer.path, norm.path, options)]

    def _before_layers(self, norm: Call) -> list[Pair]:
        layers = {user: self._layer(user) for user in self.users[norm.path]}
        others = [user for user, layer in layers.items() if layer is None]
        _refuse(others if layers else ["nothing"], "its output goes to")
        pairs: list[Pair] = []
        for layer in filter(None, layers.values()):
            if self.given[layer.path] != {norm.path}:
                raise ValueError(f"{layer.path} has another input too")
            if norm.axes != layer.axes or layer.refusal:
                reason = layer.refusal or "sums over other axes"
                raise ValueError(f"{layer.path} {reason}")
            end = -len(layer.outputs)
            axes = tuple(range(end - len(layer.axes), end))
            options = norm.options | layer.options
            options |= {} if axes == (-2,) else {"features_axis": axes}
            pairs.append((norm.path, layer.path, options))
        return pairs

    def _layer(self, source: Source) -> Call | None:
        """Return the layer whose output or whose path `source` is."""
        call = self.calls.get(source) if isinstance(source, str) else None
        return None if call is None or call.is_norm else call

    def _checked(self, pairs: list[Pair]) -> list[Pair]:
        """Return `pairs`, whose modules have arrays of their own, and fit."""
        for path in {path for pair in pairs for path in pair[:2]}:
            own = [key for key in self.shapes if "/".join(key[1:-1]) == path]
            for key in own:
                others = [user for user in self.users[key] if user != path]
                _refuse(others, f"{key[-1]} of {path} also goes to")
            name = "mean" if self.calls[path].is_norm else "kernel"
            shapes = [self.shapes[key] for key in own if key[-1] == name]
            if shapes != [self.calls[path].shape]:
                raise ValueError(f"{path} is a stack, or shares its {name}")
        jax.eval_shape(lambda tree: fold_tree(tree, pairs), self.variables)
        return pairs


def _refuse(others: Sequence[str], words: str) -> None:
    if others:
        raise ValueError(f"{words} {', '.join(others)}")


def _keeps_kind(cast: Any) -> bool:
    types = [v.aval.dtype for v in (*cast.invars, *cast.outvars)]
    return all(jnp.issubdtype(t, jnp.floating) for t in types)
