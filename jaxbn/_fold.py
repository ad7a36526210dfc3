"""A batch norm of inference folded into the linear layer beside it.

In inference a batch norm is x -> a x + c with a = scale rstd and c = bias - a mean, so
that with a linear layer of kernel W and bias b

    after the layer    a (W x + b) + c = (a W) x + (a b + c)
    before the layer   W (a x + c) + b = (W a) x + (W c + b)

All of these are `normalize` on something else than data: a W is that of W with mean 0
and no bias, a b + c that of b, and c that of 0.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn import _axes, _checks
from jaxbn._core.batch_norm import Params
from jaxbn._core.normalize import normalize
from jaxbn._core.running import State


def fold(
    kernel: Any,
    bias: Any,
    params: Params,
    state: State,
    *,
    epsilon: float = 1e-5,
    features_axis: _axes.Axis = -1,
) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of one layer that does what a layer and a batch norm after it do.

    Equivalent to `torch.nn.utils.fuse_conv_bn_weights`, except for the layout: Flax's
    Dense, DenseGeneral, Conv, ConvTranspose, with any rank, stride, padding, dilation
    and groups. Nothing may stand between the two, and nothing but the batch norm may
    use what the layer returns. Stacked layers: `jax.vmap(fold)`.

    Args:
        kernel: Of the layer, `(..., features)`.
        bias: Of the layer, `(features,)`, or None. Where it has more axes than the
            batch norm (DenseGeneral), `features_axis` counts from its end, too.
        params: Scale and bias of the batch norm, each `(features,)` or None.
        state: Running statistics.
        epsilon: That of the batch norm.
        features_axis: The kernel's axis or axes that hold the batch norm's features:
            -1, but -2 for a ConvTranspose with `transpose_kernel=True`. Where both axes
            have the same size, no shape tells a mistake.

    Returns:
        The new kernel and bias, in the dtypes of the old; where there was no bias, in
        that of the kernel; the bias is complex where the batch norm is. The arithmetic
        is in float32 at least, and each result is rounded once.

    Raises:
        ValueError: A shape does not fit the kernel, `features_axis` is no axis of it,
            or `epsilon` is not positive.
        TypeError: `params` or `state` is of another class, or a dtype does not fit.

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
    kernel, features = check_kernel(kernel, features_axis)
    norm = check_norm(params, state, kernel, features)
    mean, _, _, c = norm
    bias = jnp.zeros_like(mean, kernel.dtype) if bias is None else bias
    bias = complex_where(_checks.check_array("bias", bias), mean, c)
    axes = tuple(i - kernel.ndim for i in features)
    if bias.ndim == len(axes):
        axes = tuple(range(-bias.ndim, 0))
    if tuple(bias.shape[i] for i in axes if -i <= bias.ndim) != mean.shape:
        raise ValueError(
            f"`bias` must have shape {mean.shape}, or more axes and these on {axes}, "
            f"for `kernel` with shape {kernel.shape}; got {bias.shape}"
        )
    bias = normalize(bias, *norm, epsilon=epsilon, axis=axes)
    return scaled(kernel, norm, epsilon, features), bias


def fold_before(
    params: Params,
    state: State,
    kernel: Any,
    bias: Any,
    *,
    epsilon: float = 1e-5,
    features_axis: _axes.Axis = -2,
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
    bias = complex_where(_checks.check_array("bias", bias), kernel, norm[0], norm[3])
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

    zeros = jnp.zeros_like(norm[0], _axes.accumulation_dtype(bias.dtype))
    c = normalize(zeros, *norm, epsilon=epsilon, axis=range(zeros.ndim))
    w_c = split.astype(c.dtype) * _axes.expand(c, features, split.ndim)
    w_c = w_c.sum(range(len(inputs))).reshape(outputs)
    return (
        scaled(split, norm, epsilon, features).reshape(kernel.shape),
        (w_c + bias.astype(c.dtype)).astype(bias.dtype),
    )


# The batch norm's mean, var, scale and bias, in the order of `normalize`.
Norm = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


def scaled(
    kernel: jax.Array, norm: Norm, epsilon: float, features: tuple[int, ...]
) -> jax.Array:
    """The kernel times scale rstd."""
    _, var, scale, _ = norm
    zeros = jnp.zeros_like(var)
    return normalize(kernel, zeros, var, scale, epsilon=epsilon, axis=features)


def complex_where(array: jax.Array, *others: jax.Array | None) -> jax.Array:
    """`array`, as complex numbers if any of the others is complex."""
    if jnp.iscomplexobj(array) or not any(
        jnp.iscomplexobj(other) for other in others if other is not None
    ):
        return array
    array = array.astype(_axes.accumulation_dtype(array.dtype))
    return lax.complex(array, jnp.zeros_like(array))


def check_kernel(
    kernel: Any, features_axis: _axes.Axis
) -> tuple[jax.Array, tuple[int, ...]]:
    """The kernel as an array, and its axes with the batch norm's features."""
    kernel = _checks.check_array("kernel", kernel)
    features = _axes.feature_axes(
        features_axis, kernel.ndim, "features_axis", "`kernel`"
    )
    return kernel, features


def check_norm(
    params: Any,
    state: Any,
    kernel: jax.Array,
    features: tuple[int, ...],
    groups: int = 1,
) -> Norm:
    """The four vectors, which fit the kernel."""
    _checks.check_instance("params", params, Params, "a jaxbn.Params")
    _checks.check_instance("state", state, State, "a jaxbn.State")
    needed = tuple(kernel.shape[i] for i in features)
    needed = (groups * needed[0], *needed[1:])
    axes = tuple(i - kernel.ndim for i in features)
    on = f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"
    vectors: dict[str, Any] = {
        "state.mean": state.mean,
        "state.var": state.var,
        "params.scale": params.scale,
        "params.bias": params.bias,
    }
    for name, vector in vectors.items():
        if vector is None and name.startswith("params"):
            continue
        vectors[name] = _checks.check_array(name, vector)
        if vectors[name].shape != needed:
            raise ValueError(
                f"`{name}` must have shape {needed}, one entry per feature on {on} of "
                f"`kernel` with shape {kernel.shape}; got {vectors[name].shape}"
            )
    return tuple(vectors.values())


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
        if not all(map(_axes.is_int, numbers)):
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
