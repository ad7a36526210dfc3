"""PyTorch's batch norm, by the names in its state dict, and whole PyTorch models."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey

from jaxbn._checks import (
    check_instance,
    check_iterable,
    check_mapping,
    check_path,
    check_variables,
)
from jaxbn._core.normalize import Params
from jaxbn._core.running import State
from jaxbn.convert.arrays import from_layer, refuse, to_count, to_layer, to_numbers

WORDS = ("weight", "bias", "running_mean", "running_var")
COUNT = "num_batches_tracked"

# PyTorch's name for an array, by Flax's.
TORCH_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "num_updates": COUNT,
}
COLLECTIONS = ("params", "batch_stats")

# Where an array is in Flax's variables: its collection, its modules, its own name.
Keys = tuple[str, ...]

Variables = TypeVar("Variables", bound=Mapping[str, object])


def from_torch(
    state_dict: Mapping[str, object], *, name: str = ""
) -> tuple[Params, State]:
    """Return the parameters and statistics of a `torch.nn.BatchNorm*`.

    To train on as PyTorch's defaults would, call
    `batch_norm(..., axis=1, momentum=0.9, running_variance="unbiased")`: PyTorch has
    its features on axis 1, its `momentum` is the share of the new value (1 minus
    jaxbn's), and its running variance is divided by n - 1. `momentum=None` means the
    average over all updates in both.

    Args:
        state_dict: The layer's `state_dict()`: `weight` and `bias` (absent with
            `affine=False`), `running_mean`, `running_var`, and `num_batches_tracked`
            (0 where absent). Each is an array, or a tensor on any device, with or
            without a gradient.
        name: The layer's name in `state_dict`, if that is the whole model's, as
            "layer1.0.bn1". Errors name the layer by it.

    Returns:
        Copies of the parameters, each `(features,)` or None, in their own dtype, and of
        the statistics, float32 at least.

    Raises:
        ValueError: It is not the state dict of one batch norm with statistics
            (`track_running_stats=False` has none). The message names all that is
            missing, extra or of a different shape.
        TypeError: It is not a mapping from strings, or holds something other than
            floats and an integer count.

    Examples:
        >>> import numpy as np, jaxbn
        >>> params, state = jaxbn.convert.from_torch(
        ...     {"running_mean": np.zeros(2), "running_var": np.array([1.0, 4.0])}
        ... )
        >>> print(params, state.var)
        Params(scale=None, bias=None) [1. 4.]
    """
    check_mapping("state_dict", state_dict)
    check_instance("name", name, str, "a string")
    prefix = _join(name, "")
    source = f"`state_dict` under {name!r}" if name else "`state_dict`"
    arrays = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    count = arrays.pop(COUNT, None)
    num_updates = 0 if count is None else to_count(source, COUNT, count)
    return to_layer(arrays, WORDS, num_updates, source)


def to_torch(params: Params, state: State) -> dict[str, np.ndarray]:
    """Return NumPy arrays under the names that a `torch.nn.BatchNorm*` loads.

    The running variance is not changed. PyTorch infers by a biased one as jaxbn does,
    and its later updates are unbiased.

    Args:
        params: Scale and bias, None where the layer has `affine=False`.
        state: Running statistics.

    Returns:
        Copies under PyTorch's five names, or three without scale and bias. Before
        `load_state_dict`, turn each into a tensor with `torch.from_numpy`. bfloat16,
        which PyTorch does not take from NumPy, becomes float32; the layer casts it
        back.

    Raises:
        ValueError: The shapes of `params` and `state` differ.
        TypeError: `params` or `state` has another class.

    Examples:
        >>> import jaxbn
        >>> sorted(jaxbn.convert.to_torch(*jaxbn.init(3)))
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    arrays = from_layer(params, state, WORDS)
    widened = {
        name: array.astype(np.float32) if array.dtype == jnp.bfloat16 else array
        for name, array in arrays.items()
    }
    return widened | {COUNT: np.array(state.num_updates, np.int64)}


def load_torch(
    state_dict: Mapping[str, object],
    variables: Variables,
    names: Mapping[str, str | tuple[str, ...]],
    *,
    conv_transpose: Collection[str] = (),
) -> Variables:
    """Return Flax variables with the weights and statistics of a PyTorch model.

    Batch norms, layer norms and group norms are converted, Linear to Dense, Embedding
    to Embed, and Conv of any rank, groups and dilation: kernels go from
    (out, in, *space) to (*space, in, out). Other arrays are copied if both libraries
    give them the same name.

    Limits:
        * Before a Dense that follows a flattening, flatten in PyTorch's order, channels
          first: `x.transpose(0, 3, 1, 2).reshape(len(x), -1)`.
        * A grouped ConvTranspose is not converted.
        * Epsilon and paddings are not in a state dict: set them in the Flax model, and
          for batch norms `momentum=1 - torch's` and `running_variance="unbiased"`.

    Args:
        state_dict: `model.state_dict()`, or arrays under its names (from a file).
        variables: The result of `model.init`, or of `jax.eval_shape` of it, with the
            collections "params" and "batch_stats". It gives the shapes and dtypes.
            Other collections are returned as they are.
        names: The path of the Flax module for each PyTorch module that has arrays:
            `{"layer1.0.bn1": "Block_0/BatchNorm_0"}`, or a tuple, as in Flax's
            `module.path`. The model itself is "".
        conv_transpose: The PyTorch names of the ConvTranspose modules whose Flax layer
            has `transpose_kernel=False`, Flax's default.

    Returns:
        A tree like `variables`, which is not changed, with copies of the weights.

    Raises:
        ValueError: Something is missing, extra, named twice or of the wrong shape. The
            message names all of it.
        TypeError: `state_dict`, `variables` or `names` is not a mapping, or holds
            something other than arrays, or paths.

    Examples:
        >>> import flax.linen as nn, jax, numpy as np, jaxbn
        >>> variables = nn.Dense(3).init(jax.random.key(0), np.ones((1, 2)))
        >>> torch_linear = {"weight": np.ones((3, 2)), "bias": np.arange(3.0)}
        >>> new = jaxbn.convert.load_torch(torch_linear, variables, {"": ""})
        >>> print(new["params"]["kernel"].shape, new["params"]["bias"])
        (2, 3) [0. 1. 2.]
    """
    check_mapping("state_dict", state_dict)
    check_variables(variables, *COLLECTIONS)
    check_mapping("names", names)
    paths = {k: "/".join(check_path("names", path)) for k, path in names.items()}
    check_iterable("conv_transpose", conv_transpose, "names")
    conv_transpose = tuple(conv_transpose)
    flat, _ = jax.tree_util.tree_flatten_with_path(variables)
    leaves = {_keys(path): leaf for path, leaf in flat}
    leaves = {keys: leaf for keys, leaf in leaves.items() if keys[0] in COLLECTIONS}
    modules = {path: module for module, path in paths.items()}
    sources = {
        keys: _join(modules[path], TORCH_NAMES.get(keys[-1], keys[-1]))
        for keys in leaves
        if (path := "/".join(keys[1:-1])) in modules
    }
    transposed = {_join(module, "weight") for module in conv_transpose}
    values = {
        keys: _in_flax_layout(
            to_numbers("`state_dict`", source, state_dict[source], np.number),
            keys[-1],
            source in transposed,
        )
        for keys, source in sources.items()
        if source in state_dict
    }
    named, there = list(paths.values()), {"/".join(keys[1:-1]) for keys in leaves}
    lacking = {
        source: f"{source} (for {'/'.join(keys)})"
        for keys, source in sources.items()
        if keys not in values
    }
    statistics = {s for s in lacking if s.endswith(("running_mean", "running_var"))}
    used = set(sources.values())
    refuse(
        "`names` must lead from every array in `state_dict` to one in `variables`",
        {
            "named twice": sorted({path for path in named if named.count(path) > 1}),
            "named, but not in `variables`": [
                path for path in named if path not in there
            ],
            "in `conv_transpose`, but not named": [
                module for module in conv_transpose if module not in paths
            ],
            "in `variables`, but not named": [
                "/".join(keys) for keys in leaves if keys not in sources
            ],
            "missing in `state_dict`": [
                words for source, words in lacking.items() if source not in statistics
            ],
            "missing in `state_dict` (no statistics with track_running_stats=False)": [
                words for source, words in lacking.items() if source in statistics
            ],
            "extra in `state_dict`": [
                key
                for key in state_dict
                if key not in used and key.split(".")[-1] != COUNT
            ],
            "wrong shape": [
                f"{sources[keys]} {value.shape}, in Flax's layout, for "
                f"{'/'.join(keys)} {leaves[keys].shape}"
                for keys, value in values.items()
                if value.shape != leaves[keys].shape
            ],
        },
    )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.array(values[keys].astype(leaf.dtype))
            if (keys := _keys(path)) in values
            else leaf
        ),
        variables,
    )


def _keys(path: tuple[Any, ...]) -> Keys:
    """Return the dictionary keys in a path; a box with metadata adds others to it."""
    return tuple(str(key.key) for key in path if isinstance(key, DictKey))


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _in_flax_layout(array: np.ndarray, name: str, transposed: bool) -> np.ndarray:
    """Return an array of PyTorch with the axes of Flax's array called `name`."""
    if name != "kernel" or array.ndim < 2:
        return array
    if not transposed:  # (out, in, *space); with `transpose_kernel=True` (in, out, ...)
        return np.moveaxis(array, (1, 0), (-2, -1))
    return np.moveaxis(np.flip(array, tuple(range(2, array.ndim))), (0, 1), (-2, -1))
