"""A batch norm of inference folded into the linear layer beside it.

In inference a batch norm is x -> a x + c with a = scale rstd and c = bias - a mean, so
that with a linear layer of kernel W and bias b

    after the layer    a (W x + b) + c = (a W) x + (a b + c)
    before the layer   W (a x + c) + b = (W a) x + (W c + b)

All of these are `normalize` on something else than data: a W is that of W with mean 0
and no bias, a b + c that of b, and c that of 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _checks, _shapes
from jaxbn._affine import normalize
from jaxbn._batch_norm import Params
from jaxbn._running import State


def fold(
    kernel: Any,
    bias: Any,
    params: Params,
    state: State,
    *,
    epsilon: float = 1e-5,
    features_axis: _shapes.Axis = -1,
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
    bias = complex_where(_shapes.check_array("bias", bias), mean, c)
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
    array = array.astype(_shapes.accumulation_dtype(array.dtype))
    return lax.complex(array, jnp.zeros_like(array))


def check_kernel(
    kernel: Any, features_axis: _shapes.Axis
) -> tuple[jax.Array, tuple[int, ...]]:
    """The kernel as an array, and its axes with the batch norm's features."""
    kernel = _shapes.check_array("kernel", kernel)
    features = _shapes.feature_axes(
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
    vectors = {
        "state.mean": state.mean,
        "state.var": state.var,
        "params.scale": params.scale,
        "params.bias": params.bias,
    }
    for name, vector in vectors.items():
        if vector is None and name.startswith("params"):
            continue
        vectors[name] = _shapes.check_array(name, vector)
        if vectors[name].shape != needed:
            raise ValueError(
                f"`{name}` must have shape {needed}, one entry per feature on {on} of "
                f"`kernel` with shape {kernel.shape}; got {vectors[name].shape}"
            )
    return tuple(vectors.values())
