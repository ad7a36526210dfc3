"""`fold_before`: W (a x + c) + b = (W a) x + (W c + b); see `jaxbn._fold`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _checks, _shapes
from jaxbn._affine import normalize
from jaxbn._batch_norm import Params
from jaxbn._fold import check_kernel, check_norm, complex_where, scaled
from jaxbn._running import State


def fold_before(
    params: Params,
    state: State,
    kernel: Any,
    bias: Any,
    *,
    epsilon: float = 1e-5,
    features_axis: _shapes.Axis = -2,
    padding: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of one layer that does what a batch norm and a layer after it do.

    Exact for Dense, DenseGeneral (without `batch_dims`) and Conv, unless the layer puts
    zeros beside what the batch norm returns: c would have to be added at these as well.
    So a kernel of more than one tap needs `padding`, and zero padding is refused. What
    no array tells is yours to know: a ConvTranspose or an `input_dilation` puts zeros
    between the elements, and a Conv's `mask` is to be multiplied into the kernel first.
    Stacked layers: `jax.vmap(fold_before)`.

    Args:
        params: Scale and bias of the batch norm, each `(features,)` or None.
        state: Running statistics.
        kernel: Of the layer, `(*taps, features, *outputs)`. That of a grouped Conv has
            the features of one group; the groups are counted from those of `state`.
        bias: Of the layer, `outputs`, or None.
        epsilon: That of the batch norm.
        features_axis: The kernel's axis or axes that hold the batch norm's features;
            those after them are the outputs. -2, but 0 for `nn.DenseGeneral((4, 5))`.
        padding: Of the layer, as in Flax: "VALID", "CIRCULAR", "REFLECT" or zeros. A
            kernel of one tap may do without, or have "SAME" or "CAUSAL".

    Returns:
        The new kernel and bias, in dtypes as for `fold`.

    Raises:
        ValueError: A shape does not fit the kernel, `features_axis` is no axis of it or
            has no outputs after it, `padding` is missing or puts zeros beside the input
            of the layer, or `epsilon` is not positive.
        TypeError: `params` or `state` is of another class, or a dtype does not fit.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> x, kernel = jnp.array([3.0, 4.0]), jnp.array([[1.0, -1.0], [2.0, 0.5]])
        >>> params, state = jaxbn.init(2)
        >>> state = state._replace(mean=jnp.array([3.0, 3.0]))
        >>> y, _ = jaxbn.batch_norm(x, params, state, train=False)
        >>> folded, bias = jaxbn.fold_before(params, state, kernel, None)
        >>> print((y @ kernel).round(3), (x @ folded + bias).round(3))
        [2.  0.5] [2.  0.5]
    """
    kernel, features = check_kernel(kernel, features_axis)
    inputs, outputs = kernel.shape[: features[-1] + 1], kernel.shape[features[-1] + 1 :]
    if not outputs:
        raise ValueError(
            "`features_axis` must have the outputs of `kernel` after it; got "
            f"{features_axis!r} for shape {kernel.shape}"
        )
    groups = _num_groups(state, kernel, features)
    norm = check_norm(params, state, kernel, features, groups)
    _check_padding(padding, kernel, features)
    bias = jnp.zeros(outputs, kernel.dtype) if bias is None else bias
    bias = complex_where(_shapes.check_array("bias", bias), kernel, norm[0], norm[3])
    if bias.shape != outputs:
        raise ValueError(
            f"`bias` must have shape {outputs}, the outputs of `kernel` with shape "
            f"{kernel.shape}; got {bias.shape}"
        )

    # Each group of outputs has features of its own: with the groups as one more axis,
    # the kernel has all the features of the batch norm.
    split = kernel.reshape(*inputs, groups, math.prod(outputs) // groups)
    shape = (groups, *(kernel.shape[i] for i in features))
    norm = jax.tree.map(lambda v: jnp.moveaxis(v.reshape(shape), 0, -1), norm)
    features = (*features, len(inputs))

    zeros = jnp.zeros_like(norm[0], _shapes.accumulation_dtype(bias.dtype))
    c = normalize(zeros, *norm, epsilon=epsilon, axis=range(zeros.ndim))
    w_c = split.astype(c.dtype) * _shapes.expand(c, features, split.ndim)
    w_c = w_c.sum(range(len(inputs))).reshape(outputs)
    return (
        scaled(split, norm, epsilon, features).reshape(kernel.shape),
        (w_c + bias.astype(c.dtype)).astype(bias.dtype),
    )


def _num_groups(state: State, kernel: jax.Array, features: tuple[int, ...]) -> int:
    """How many times the batch norm has the features of a Conv's kernel."""
    shape = np.shape(getattr(state, "mean", ()))
    in_group, out = kernel.shape[-2:]
    is_conv = kernel.ndim > 2 and features == (kernel.ndim - 2,)
    if not (is_conv and len(shape) == 1 and shape[0] and in_group):
        return 1
    groups = shape[0] // in_group
    return groups if groups * in_group == shape[0] and out % groups == 0 else 1


def _check_padding(padding: Any, kernel: jax.Array, features: tuple[int, ...]) -> None:
    """Refuses a layer that may see zeros where the batch norm would have put c."""
    taps = [n for i, n in enumerate(kernel.shape[: features[-1]]) if i not in features]
    one_tap = math.prod(taps) == 1
    if padding is None or isinstance(padding, str):
        word = padding.upper() if padding else padding
        exact = word in ("VALID", "CIRCULAR", "REFLECT")
        exact = exact or (one_tap and word in (None, "SAME", "CAUSAL"))
    else:
        numbers = jax.tree.leaves(padding)
        if not all(map(_checks.is_int, numbers)):
            raise TypeError(
                f"`padding` must be a word, an int or pairs of ints; got {padding!r}"
            )
        exact = not any(numbers)
    if not exact:
        raise ValueError(
            '`padding` must be "VALID", "CIRCULAR", "REFLECT" or 0 for `kernel` with '
            f"shape {kernel.shape}, of {math.prod(taps)} taps, since zeros beside the "
            "layer's input would have to be shifted as the batch norm shifts; got "
            f"{padding!r}"
        )
