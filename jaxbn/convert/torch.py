"""One batch norm of PyTorch, by the names in its state dict."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._checks import check_mapping
from jaxbn._core.batch_norm import Params
from jaxbn._core.running import State
from jaxbn.convert.arrays import from_layer, to_count, to_layer

WORDS = ("weight", "bias", "running_mean", "running_var")
COUNT = "num_batches_tracked"


def from_torch(state_dict: Mapping[str, Any]) -> tuple[Params, State]:
    """The batch norm whose `state_dict()` this is: any of `torch.nn.BatchNorm*`.

    PyTorch's features are on axis 1, its `momentum` is the share of the new value, and
    its running variance has n - 1. To train on as it would with its defaults:
    `batch_norm(..., axis=1, momentum=0.9, running_variance="unbiased")`. With
    `momentum=None` both are the average over all updates.

    Args:
        state_dict: `weight` and `bias` (absent with `affine=False`), `running_mean`,
            `running_var`, `num_batches_tracked` (0 where absent). Tensors of any device
            and dtype, with or without a gradient, or arrays.

    Returns:
        The parameters in their own dtype, and the state, float32 at least. Copies.

    Raises:
        ValueError: It is not the state dict of one batch norm; all that is missing,
            extra or of a different shape is named. With `track_running_stats=False`
            nothing has been tracked, and the statistics are missing.
        TypeError: It is no mapping from strings, or holds something else than floats
            (for the count, ints).

    Examples:
        >>> import numpy as np, jaxbn
        >>> params, state = jaxbn.convert.from_torch(
        ...     {"running_mean": np.zeros(2), "running_var": np.array([1.0, 4.0])}
        ... )
        >>> print(params, state.var)
        Params(scale=None, bias=None) [1. 4.]
    """
    check_mapping("state_dict", state_dict)
    arrays = dict(state_dict)
    count = arrays.pop(COUNT, None)
    num_updates = 0 if count is None else to_count("`state_dict`", COUNT, count)
    return to_layer(arrays, WORDS, num_updates, "`state_dict`")


def to_torch(params: Params, state: State) -> dict[str, np.ndarray]:
    """What `load_state_dict` of a `torch.nn.BatchNorm*` needs, as NumPy arrays.

    The running variance is handed over as it is. Where it is biased, inference agrees,
    and PyTorch's later updates take it to the unbiased one.

    Args:
        params: Scale and bias, None where the layer has `affine=False`.
        state: Running statistics.

    Returns:
        PyTorch's five keys, or three without scale and bias. PyTorch takes tensors:
        `{name: torch.from_numpy(array) for name, array in to_torch(...).items()}`.
        bfloat16, which NumPy lacks, comes as float32: the layer casts it back.

    Raises:
        TypeError: `params` or `state` is something else.

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
