"""A batch norm of inference folded into the linear layer before or after it.

In inference a batch norm is x -> a x + c with a = scale rstd and c = bias - a mean.
Beside a linear layer with kernel W and bias b it gives another linear layer:

    after the layer    a (W x + b) + c = (a W) x + (a b + c)
    before the layer   W (a x + c) + b = (W a) x + (W c + b)

`normalize` computes all of these: a b + c from b, c from 0, and a W from W, with mean 0
and no bias.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxbn._axes import Axis, Features, accumulation_dtype, expand, feature_axes, is_int
from jaxbn._checks import check_array, check_instance
from jaxbn._core.normalize import Params, normalize
from jaxbn._core.running import State

Padding = str | int | Sequence[int | Sequence[int]] | None

# The batch norm's mean, var, scale and bias, in the order of `normalize`.
Norm = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


def fold(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    params: Params,
    state: State,
    *,
    epsilon: float = 1e-5,
    features_axis: Axis = -1,
) -> tuple[jax.Array, jax.Array]:
    """Return kernel and bias of one layer equal to a layer and a batch norm after it.

    Equivalent to `torch.nn.utils.fuse_conv_bn_weights`, but for the layout of Flax's
    Dense, DenseGeneral, Conv and ConvTranspose, with any rank, stride, padding,
    dilation and groups. Nothing may stand between layer and batch norm, and nothing
    else may use the layer's output. For stacked layers, use `jax.vmap(fold)`.

    Args:
        kernel: The layer's kernel, `(..., features)`.
        bias: The layer's bias, `(features,)`, or None. If it has more axes than the
            batch norm (DenseGeneral), `features_axis` counts from its end too.
        params: Scale and bias of the batch norm, each `(features,)` or None.
        state: Running statistics.
        epsilon: The batch norm's epsilon.
        features_axis: The kernel's axis or axes that hold the batch norm's features:
            -1, but -2 for a ConvTranspose with `transpose_kernel=True`. If both axes
            have the same size, a mistake here cannot be detected.

    Returns:
        The new kernel and bias in the dtypes of the old ones. A new bias has the
        kernel's dtype if the layer had none, and is complex if the batch norm is. The
        arithmetic is in float32 at least, and each result is rounded once.

    Raises:
        ValueError: A shape does not fit the kernel, `features_axis` is no axis of it,
            or `epsilon` is not positive.
        TypeError: `params` or `state` has another class, or a dtype does not fit.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> x, kernel = jnp.array([3.0, 4.0]), jnp.array([[1.0, -1.0], [2.0, 0.5]])
        >>> params, state = jaxbn.init(2)
        >>> state = state._replace(mean=jnp.array([9.0, -2.0]))
        >>> y, _ = jaxbn.batch_norm(x @ kernel, params, state, train=False)
        >>> kernel, bias = jaxbn.fold(kernel, None, params, state)
        >>> print(y.round(3), (x @ kernel + bias).round(3))
        [2. 1.] [2. 1.]
    """
    kernel = check_array("kernel", kernel)
    features = feature_axes(features_axis, kernel.ndim, "features_axis", "`kernel`")
    norm = _check_norm(params, state, kernel, features)
    mean, var, scale, c = norm
    bias = jnp.zeros_like(mean, kernel.dtype) if bias is None else bias
    bias = _check_bias(bias, mean, c)
    axes = tuple(i - kernel.ndim for i in features)
    if bias.ndim == len(axes):
        axes = tuple(range(-bias.ndim, 0))
    if tuple(bias.shape[i] for i in axes if -i <= bias.ndim) != mean.shape:
        raise ValueError(
            f"`bias` must have shape {mean.shape}, or more axes and these on {axes}, "
            f"for `kernel` with shape {kernel.shape}; got {bias.shape}"
        )
    bias = normalize(bias, *norm, epsilon=epsilon, axis=axes)
    zeros = jnp.zeros_like(var)
    return normalize(kernel, zeros, var, scale, epsilon=epsilon, axis=features), bias


def fold_before(
    params: Params,
    state: State,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    *,
    epsilon: float = 1e-5,
    features_axis: Axis = -2,
    padding: Padding = None,
) -> tuple[jax.Array, jax.Array]:
    """Return kernel and bias of one layer equal to a batch norm and a layer after it.

    This is exact for Dense, DenseGeneral and Conv. For stacked layers, use
    `jax.vmap(fold_before)`.

    Limits:
        * Zero padding is refused, since the folded batch norm would shift the zeros
          too. A kernel of several taps therefore needs `padding`.
        * Three cases give wrong results unnoticed: ConvTranspose and `input_dilation`,
          which put zeros between the elements, and DenseGeneral with `batch_dims`.
        * Multiply a Conv's `mask` into the kernel first.

    Args:
        params: Scale and bias of the batch norm, each `(features,)` or None.
        state: Running statistics.
        kernel: The layer's kernel, `(*taps, features, *outputs)`. A grouped Conv's has
            the features of one group: groups are counted from the size of `state`.
        bias: The layer's bias, `outputs`, or None.
        epsilon: The batch norm's epsilon.
        features_axis: The kernel's axis or axes that hold the batch norm's features;
            the outputs follow them. -2, but 0 for `nn.DenseGeneral((4, 5))`.
        padding: The layer's padding, as in Flax: "VALID", "CIRCULAR", "REFLECT" or
            zeros. For a kernel of one tap None, "SAME" and "CAUSAL" are allowed too.

    Returns:
        The new kernel and bias, in dtypes as for `fold`.

    Raises:
        ValueError: A shape does not fit the kernel, `features_axis` is no axis of it or
            has no outputs after it, `padding` is missing or pads with zeros, or
            `epsilon` is not positive.
        TypeError: `params` or `state` has another class, or a dtype does not fit.

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
    kernel = check_array("kernel", kernel)
    features = feature_axes(features_axis, kernel.ndim, "features_axis", "`kernel`")
    inputs, outputs = kernel.shape[: features[-1] + 1], kernel.shape[features[-1] + 1 :]
    if not outputs:
        raise ValueError(
            "`features_axis` must have the outputs of `kernel` after it; got "
            f"{features_axis!r} for shape {kernel.shape}"
        )
    groups = _num_groups(state, kernel, features)
    norm = _check_norm(params, state, kernel, features, groups)
    _check_padding(padding, kernel, features)
    bias = jnp.zeros(outputs, kernel.dtype) if bias is None else bias
    bias = _check_bias(bias, kernel, norm[0], norm[3])
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

    mean, var, scale, _ = norm
    zeros = jnp.zeros_like(mean, accumulation_dtype(bias.dtype))
    c = normalize(zeros, *norm, epsilon=epsilon, axis=range(zeros.ndim))
    w_c = split.astype(c.dtype) * expand(c, features, split.ndim)
    w_c = w_c.sum(range(len(inputs))).reshape(outputs)
    zeros = jnp.zeros_like(var)
    w_a = normalize(split, zeros, var, scale, epsilon=epsilon, axis=features)
    return w_a.reshape(kernel.shape), (w_c + bias.astype(c.dtype)).astype(bias.dtype)


def _check_bias(bias: ArrayLike, *terms: jax.Array | None) -> jax.Array:
    """Return the bias as an array, complex if one of the `terms` added to it is."""
    bias = check_array("bias", bias)
    is_complex = any(jnp.iscomplexobj(term) for term in terms if term is not None)
    if jnp.iscomplexobj(bias) or not is_complex:
        return bias
    bias = bias.astype(accumulation_dtype(bias.dtype))
    return lax.complex(bias, jnp.zeros_like(bias))


def _check_norm(
    params: Params, state: State, kernel: jax.Array, features: Features, groups: int = 1
) -> Norm:
    """Return the batch norm's four vectors as arrays that fit the kernel."""
    check_instance("params", params, Params, "a jaxbn.Params")
    check_instance("state", state, State, "a jaxbn.State")
    first, *others = (kernel.shape[i] for i in features)
    needed = (groups * first, *others)
    axes = tuple(i - kernel.ndim for i in features)
    on = f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"

    def fitting(name: str, vector: jax.Array | None) -> jax.Array:
        array = check_array(name, vector)
        if array.shape != needed:
            raise ValueError(
                f"`{name}` must have shape {needed}, one entry per feature on {on} of "
                f"`kernel` with shape {kernel.shape}; got {array.shape}"
            )
        return array

    return (
        fitting("state.mean", state.mean),
        fitting("state.var", state.var),
        None if params.scale is None else fitting("params.scale", params.scale),
        None if params.bias is None else fitting("params.bias", params.bias),
    )


def _num_groups(state: State, kernel: jax.Array, features: Features) -> int:
    """Return the groups of a Conv: the batch norm's features over the kernel's."""
    shape = np.shape(getattr(state, "mean", ()))
    in_group, out = kernel.shape[-2:]
    is_conv = kernel.ndim > 2 and features == (kernel.ndim - 2,)
    if not (is_conv and len(shape) == 1 and shape[0] and in_group):
        return 1
    groups = shape[0] // in_group
    return groups if groups * in_group == shape[0] and out % groups == 0 else 1


def _check_padding(padding: Padding, kernel: jax.Array, features: Features) -> None:
    """Refuse padding with zeros, which the folded batch norm would shift too."""
    taps = [n for i, n in enumerate(kernel.shape[: features[-1]]) if i not in features]
    one_tap = math.prod(taps) == 1
    if padding is None or isinstance(padding, str):
        word = padding.upper() if padding else padding
        exact = word in ("VALID", "CIRCULAR", "REFLECT")
        exact = exact or (one_tap and word in (None, "SAME", "CAUSAL"))
    else:
        numbers = jax.tree.leaves(padding)
        if not all(map(is_int, numbers)):
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
