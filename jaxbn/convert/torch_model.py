"""A whole PyTorch model, by an explicit map from its names to Flax's."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey

from jaxbn._checks import (
    check_iterable,
    check_mapping,
    check_path,
    check_variables,
)
from jaxbn.convert.arrays import refuse, to_numbers
from jaxbn.convert.torch import COUNT

# From the last name of an array in Flax to that in PyTorch.
SOURCES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "num_updates": COUNT,
}
COLLECTIONS = ("params", "batch_stats")

# Of an array in Flax: its collection, its modules and its own name.
Keys = tuple[str, ...]


def load_torch(
    state_dict: Mapping[str, Any],
    variables: Mapping[str, Any],
    names: Mapping[str, str | tuple[str, ...]],
    *,
    conv_transpose: Collection[str] = (),
) -> Any:
    """Flax variables with the weights and statistics of a PyTorch model.

    Batch norms (of any kind, with `num_updates` where the Flax module keeps a count),
    layer and group norms, Linear to Dense, Embedding to Embed, and Conv of any rank,
    grouped or dilated: kernels go from (out, in, *space) to (*space, in, out). An array
    that has the same name in both libraries is taken as it is.

    Three things that no shape tells. A Dense after a flattening of (channels, height,
    width): flatten as PyTorch does, `x.transpose(0, 3, 1, 2).reshape(len(x), -1)`.
    A ConvTranspose: with `transpose_kernel=True` in Flax there is nothing to do, else
    name it in `conv_transpose`; PyTorch's may not be grouped. And what is no array:
    epsilon, paddings, and for the batch norms `momentum=1 - torch's` and
    `running_variance="unbiased"`.

    Args:
        state_dict: `model.state_dict()`, or arrays under its names (from a file).
        variables: From `model.init`, or its `jax.eval_shape`: "params" and
            "batch_stats". Shapes and dtypes are its own, and other collections stay.
        names: For each PyTorch module that has arrays, its Flax module's path:
            `{"layer1.0.bn1": "Block_0/BatchNorm_0"}`, or a tuple, as in Flax's
            `module.path`. The model itself is "".
        conv_transpose: PyTorch names of the ConvTranspose modules whose Flax layer has
            `transpose_kernel=False`, which is Flax's default.

    Returns:
        A tree like `variables`, which stay as they are, with copies of the weights.

    Raises:
        ValueError: All that is missing, extra, named twice or of the wrong shape, in
            one message.
        TypeError: `state_dict`, `variables` or `names` is not a mapping, or holds
            something else than arrays, or paths.

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
    prefixes = {path: prefix for prefix, path in paths.items()}
    transposed = {_join(prefix, "weight") for prefix in conv_transpose}
    sources = {
        keys: _join(prefixes[module], SOURCES.get(keys[-1], keys[-1]))
        for keys in leaves
        if (module := "/".join(keys[1:-1])) in prefixes
    }
    values = {
        keys: _converted(
            to_numbers("`state_dict`", source, state_dict[source], np.number),
            keys[-1],
            source in transposed,
        )
        for keys, source in sources.items()
        if source in state_dict
    }
    _check(state_dict, paths, conv_transpose, leaves, sources, values)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.array(values[keys].astype(leaf.dtype))
            if (keys := _keys(path)) in values
            else leaf
        ),
        variables,
    )


def _keys(path: tuple[Any, ...]) -> Keys:
    """A path of names; within a box with metadata the names of the dictionaries."""
    return tuple(str(key.key) for key in path if isinstance(key, DictKey))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _converted(array: np.ndarray, name: str, transposed: bool) -> np.ndarray:
    """An array in Flax's layout; only kernels have another there."""
    if name != "kernel" or array.ndim < 2:
        return array
    if not transposed:  # (out, in, *space), and a ConvTranspose that flips for itself
        return np.moveaxis(array, (1, 0), (-2, -1))
    return np.moveaxis(np.flip(array, tuple(range(2, array.ndim))), (0, 1), (-2, -1))


def _check(
    state_dict: Mapping[str, Any],
    names: Mapping[str, str],
    conv_transpose: Collection[str],
    leaves: Mapping[Keys, Any],
    sources: Mapping[Keys, str],
    values: Mapping[Keys, np.ndarray],
) -> None:
    """Refuses what does not fit, all at once."""
    modules = {"/".join(keys[1:-1]) for keys in leaves}
    paths = list(names.values())
    lacking = {
        source: "/".join(keys) for keys, source in sources.items() if keys not in values
    }
    statistics = [s for s in lacking if s.endswith(("running_mean", "running_var"))]
    unused = set(state_dict) - set(sources.values())
    refuse(
        "`names` must lead from every array in `state_dict` to one in `variables`",
        {
            "named twice": sorted({path for path in paths if paths.count(path) > 1}),
            "named, but not in `variables`": [p for p in paths if p not in modules],
            "in `conv_transpose`, but not named": [
                prefix for prefix in conv_transpose if prefix not in names
            ],
            "in `variables`, but not named": [
                "/".join(keys) for keys in leaves if keys not in sources
            ],
            "missing in `state_dict`": [
                f"{source} (for {path})"
                for source, path in lacking.items()
                if source not in statistics
            ],
            "missing in `state_dict` (no statistics with track_running_stats=False)": [
                f"{source} (for {lacking[source]})" for source in statistics
            ],
            "extra in `state_dict`": [
                key
                for key in state_dict
                if key in unused and key.split(".")[-1] != COUNT
            ],
            "wrong shape": [
                f"{sources[keys]} {value.shape}, in Flax's layout, for "
                f"{'/'.join(keys)} {leaves[keys].shape}"
                for keys, value in values.items()
                if value.shape != leaves[keys].shape
            ],
        },
    )
