"""NNX models with batch norms that are folded, and with weights of PyTorch."""

import functools
import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _checks, convert
from jaxbn._fold_tree import Pair, fold_tree, paths_in
from jaxbn._models.pairs import Pairs, arrays_apart, found_pairs, marked
from jaxbn._models.rules import BatchNormBase, result_dtype
from jaxbn.nnx.models import check_module, put_modules

LAYERS: list[Any] = [
    layer.__call__
    for layer in (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose)
]

Model = TypeVar("Model", bound=nnx.Module)
Tree = dict[str, Any]


def find_pairs(model: nnx.Module, *args: object, **kwargs: object) -> Pairs:
    """Return the batch norms of an NNX model that can be folded, with their layers.

    As `jaxbn.linen.find_pairs`, for `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Conv`,
    `nnx.ConvTranspose`, and the batch norms of Flax and ours. Set the model to
    inference first, by `eval()`. Subclasses with a `__call__` of their own are not
    folded.

    Args:
        model: An NNX module, which stays as it is.
        *args: Arguments of a call of `model`; a `jax.ShapeDtypeStruct` does in place
            of an array.
        **kwargs: Further arguments of the call.

    Returns:
        The pairs, a list for `fold` with the epsilon of each. Its attribute
        `unfoldable` tells for each other batch norm, by its path, why there is none.

    Raises:
        TypeError: `model` is not an NNX module.
        ValueError: `model` has no batch norm.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbn.nnx import BatchNorm, find_pairs
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), BatchNorm(3, rngs=rngs))
        >>> model.eval()
        >>> find_pairs(model, jnp.ones((8, 2)))
        [('layers/0', 'layers/1', {'epsilon': 1e-05})]
    """
    check_module(model)
    definition, state = nnx.split(model)
    given, put = arrays_apart(args, kwargs)

    def call(variables: Tree, given: list[Any]) -> Any:
        args, kwargs = put(given)
        copy: Any = nnx.merge(definition, _with(state, variables))
        for path, module in _modules(copy).items():
            if type(module).__call__ in LAYERS or _is_norm(type(module)):
                object.__setattr__(module, "__class__", _marking(type(module)))
                module.path_in_model = "/".join(path)
        result = copy(*args, **kwargs)
        return result, _tree(nnx.state(copy, nnx.Not(nnx.Intermediate)))

    return found_pairs(call, _tree(state), given)


def fold(model: Model, pairs: Iterable[Pair], *, epsilon: float = 1e-5) -> Model:
    """Return a copy of an NNX model with its batch norms folded into their layers.

    An identity takes the place of each batch norm, and each layer has a bias. All else
    is as for `jaxbn.fold_tree`.

    Args:
        model: An NNX module, which stays as it is.
        pairs: As for `jaxbn.fold_tree`, with the paths of modules in the model, such
            as "blocks/0/norm"; `find_pairs` returns them.
        epsilon: The epsilon of the batch norms whose pair does not hold it.

    Returns:
        The new model, for inference.

    Raises:
        TypeError: `model` is not an NNX module, or as for `jaxbn.fold_tree`.
        ValueError: As for `jaxbn.fold_tree`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbn.nnx import BatchNorm, find_pairs, fold
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), BatchNorm(3, rngs=rngs))
        >>> model.eval()
        >>> x = jnp.ones((8, 2))
        >>> smaller = fold(model, find_pairs(model, x))
        >>> print(type(smaller.layers[1]).__name__, jnp.allclose(smaller(x), model(x)))
        Identity True
    """
    check_module(model)
    _checks.check_iterable("pairs", pairs, "pairs")
    pairs = list(pairs)
    tree = fold_tree(_tree(nnx.state(model)), pairs, epsilon=epsilon)
    model = nnx.clone(model)
    modules = _modules(model)
    arrays = flatten_dict(tree.get("params", {}))
    made: dict[int, nnx.Module] = {}
    for path in itertools.chain(*paths_in(pairs)):
        module = modules[path]
        if (*path, "kernel") not in arrays:
            made[id(module)] = _identity(module)
            continue
        module.kernel.set_value(arrays[*path, "kernel"])
        if module.bias is None:
            module.bias, module.use_bias = nnx.Param(arrays[*path, "bias"]), True
        module.bias.set_value(arrays[*path, "bias"])
    put_modules(model, made)
    return model


def load_torch(
    model: nnx.Module,
    state_dict: Mapping[str, object],
    names: Mapping[str, str | tuple[str, ...]],
    *,
    conv_transpose: Collection[str] = (),
) -> None:
    """Replace the weights and statistics of an NNX model by those of a PyTorch model.

    As `jaxbn.convert.load_torch`, in place. Nothing changes if there is an error.

    Args:
        model: An NNX module; every `nnx.Param` and `nnx.BatchStat` in it is replaced.
        state_dict: As for `jaxbn.convert.load_torch`.
        names: The path in `model` for each PyTorch module that has arrays:
            `{"layer1.0.bn1": "layers/0/norm"}`. The model itself is "".
        conv_transpose: As for `jaxbn.convert.load_torch`.

    Raises:
        ValueError: As for `jaxbn.convert.load_torch`.
        TypeError: `model` is not an NNX module, or as for `jaxbn.convert.load_torch`.

    Examples:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from jaxbn.nnx import load_torch
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> torch_linear = {"weight": np.ones((3, 2)), "bias": np.arange(3.0)}
        >>> load_torch(model, torch_linear, {"": ""})
        >>> print(model.kernel[...].shape, model.bias[...])
        (2, 3) [0. 1. 2.]
    """
    check_module(model)
    state = nnx.state(model)
    options = {"conv_transpose": conv_transpose}
    new = convert.load_torch(state_dict, _tree(state), names, **options)
    nnx.update(model, _with(state, new))


class Identity(nnx.Module):
    """Returns x in the dtype that the batch norm in its place returned."""

    def __init__(self, dtype: DTypeLike | None, param_dtypes: tuple[DTypeLike, ...]):
        self.dtype = dtype
        self.param_dtypes = param_dtypes

    def __call__(self, x: ArrayLike, *args: object, **kwargs: object) -> jax.Array:
        """Return x; further arguments are those of a batch norm."""
        x = jnp.asarray(x)
        return x.astype(result_dtype(self.dtype, x, self.param_dtypes))

    # Flax shows this docstring to users, and reads only arguments indented by two.
    def set_view(self, use_running_average: bool | None = None) -> None:
        """Accept what `nnx.view` may change in a batch norm.

        Args:
          use_running_average: Ignored.
        """


def _is_norm(cls: type) -> bool:
    """Whether a class is called as Flax's batch norm or ours, not as an heir."""
    is_ours = issubclass(cls, BatchNormBase)
    is_ours = is_ours and cls.__call__.__module__.startswith("jaxbn.")
    return is_ours or cls.__call__ is nnx.BatchNorm.__call__


def _modules(model: nnx.Module) -> dict[tuple[str, ...], Any]:
    return {tuple(map(str, path)): module for path, module in nnx.iter_modules(model)}


def _identity(norm: Any) -> Identity:
    learned = (norm.scale, norm.bias)
    return Identity(norm.dtype, tuple(p[...].dtype for p in learned if p is not None))


@functools.cache
def _marking(cls: Any) -> Any:
    """Return a class like `cls` whose call marks what it is given and returns."""
    is_norm = _is_norm(cls)

    class Marking(cls):
        def __call__(self, *args: Any, **kwargs: object) -> jax.Array:
            array = self.mean[...] if is_norm else self.kernel[...]
            # Not itself, which other modules may share: here the path is right.
            array = jnp.zeros_like(array)
            path, call = self.path_in_model, super().__call__
            return marked(call, self, path, is_norm, array, args, kwargs)

    return Marking


def _collection(variable: object) -> str:
    named = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    return next((n for n, kind in named.items() if isinstance(variable, kind)), "")


def _tree(state: Any) -> Tree:
    """Return the arrays of an NNX state as Linen has them."""
    return unflatten_dict(
        {
            (_collection(v), *map(str, path)): (
                v.get_value() if isinstance(v, nnx.Variable) else v
            )
            for path, v in nnx.to_flat_state(state)
        }
    )


def _with(state: Any, tree: Mapping[str, Any]) -> Any:
    """Return a state like `state` with the arrays of `tree`."""
    flat = flatten_dict(tree)

    def new(path: Any, old: Any) -> Any:
        value = flat[_collection(old), *map(str, path)]
        return old.replace(value) if isinstance(old, nnx.Variable) else value

    return nnx.from_flat_state([(p, new(p, v)) for p, v in nnx.to_flat_state(state)])
