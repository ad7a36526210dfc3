"""Batch norm as one function: parameters, running statistics and the kernel."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.export
import jax.numpy as jnp

from jaxbn import _affine, _checks, _devices, _normalize, _running, _shapes
from jaxbn._affine import Config
from jaxbn._moments import Moments
from jaxbn._running import State


class Params(NamedTuple):
    """Learned parameters.

    Attributes:
        scale: `(features,)` or None.
        bias: `(features,)` or None.
    """

    scale: jax.Array | None
    bias: jax.Array | None


# So that a function of them can be exported (jax.export) and read back.
jax.export.register_namedtuple_serialization(Params, serialized_name="jaxbn.Params")
jax.export.register_namedtuple_serialization(State, serialized_name="jaxbn.State")


def init(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    param_dtype: Any = jnp.float32,
) -> tuple[Params, State]:
    """Scale 1, bias 0, running mean 0 and variance 1.

    Args:
        num_features: The features' shape, an int or, for several feature axes, a tuple
            in ascending order of the axes.
        use_scale: Whether there is a scale.
        use_bias: Whether there is a bias.
        param_dtype: Of scale and bias. Running statistics are float32, or float64 for
            float64. For a complex dtype bias and running mean are complex, while scale
            and variance stay real.

    Returns:
        The parameters and the state.

    Raises:
        ValueError: A number of features is negative.
        TypeError: `num_features` is not made of ints, `use_scale` or `use_bias` is no
            Python bool, or `param_dtype` is not inexact.

    Examples:
        >>> import jaxbn
        >>> params, state = jaxbn.init(3)
        >>> print(params.scale, state.mean, state.var, state.num_updates)
        [1. 1. 1.] [0. 0. 0.] [1. 1. 1.] 0
    """
    shape = _shapes.check_num_features(num_features)
    dtype = _checks.check_inexact("param_dtype", param_dtype)
    scaled = _checks.check_static_bool("use_scale", use_scale)
    shifted = _checks.check_static_bool("use_bias", use_bias)
    params = Params(
        jnp.ones(shape, _shapes.real_dtype(dtype)) if scaled else None,
        jnp.zeros(shape, dtype) if shifted else None,
    )
    return params, _running.new_state(shape, _shapes.accumulation_dtype(dtype))


def normalize_whole(
    config: Config,
    derivative: str,
    x: jax.Array,
    scale: Any,
    bias: Any,
    mask: Any,
    state: State,
) -> tuple[jax.Array, Moments]:
    """Plain batch norm of a training batch: y, and its moments."""
    del state
    return _normalize.normalize_batch(config, derivative, x, scale, bias, mask)


# Arguments and result of `normalize_whole`; moments are (batches, features).
Normalize = Callable[..., tuple[jax.Array, Moments]]


def batch_norm(
    x: Any,
    params: Params,
    state: State,
    *,
    train: bool,
    momentum: Any = 0.9,
    epsilon: float = 1e-5,
    axis: _shapes.Axis = -1,
    mask: Any = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    running_variance: _shapes.RunningVariance = "biased",
    debias: bool = False,
    derivative: _shapes.Derivative = "vjp",
) -> tuple[jax.Array, State]:
    r"""Batch normalization, in training and in inference.

    $$y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta$$

    In training x is normalized by its own moments, and the running statistics move
    towards them; in inference x is normalized by the running statistics. The document's
    `batchnorm_forward`, pure, and differentiated by its `batchnorm_backward`. Beside
    `torch.nn.functional.batch_norm`: `momentum` is the share of the old value that is
    kept (one minus PyTorch's), and the running variance is biased unless said.

    Args:
        x: Floating point or complex, of any rank >= 1.
        params: Scale and bias with the shape of the feature axes, or None.
        state: Running statistics, complex mean for complex x.
        train: True normalizes by the batch, False by `state`. A Python bool.
        momentum: The share of the old statistics that is kept, in [0, 1], possibly
            traced. None is the average over all updates so far.
        epsilon: Added to the variance; in the squared unit of x.
        axis: The feature axis or axes; params and state follow ascending order.
        mask: Boolean, of x's rank, broadcasting to x: True where an element counts.
            Elsewhere y and dx are 0, and nothing there matters, not even NaN.
        axis_name: Named axes whose devices share one batch; ignored in inference. Under
            plain jit over sharded arrays none is needed: x is one array there.
        axis_index_groups: Groups of indices on `axis_name`, each a batch of its own.
        running_variance: "biased", or "unbiased" with n - 1 (PyTorch).
        debias: The first updates average, until `momentum` keeps less: the statistics
            are never drawn towards their initial values.
        derivative: "vjp" is the analytic rule; "jvp" gives the same numbers by JAX's
            own differentiation, and forward mode (jvp, jacfwd, linearize) too.

    Returns:
        y, with x's shape and dtype, and the new state (`state` itself in inference). y
        is differentiated with respect to x and params (in inference to state too); the
        new state is a constant.

    Raises:
        ValueError: A shape does not fit x, a number or word is not among the allowed,
            or a training batch has one element per feature.
        TypeError: A dtype does not fit, or `train` is not a Python bool.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.init(2)
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> y, state = jaxbn.batch_norm(x, params, state, train=True, momentum=0.5)
        >>> print(y.round(3), state.mean, state.var)
        [[-1. -1.]
         [ 1.  1.]] [ 1. 10.] [ 1.  50.5]

    Source: Ioffe & Szegedy, "Batch Normalization", 2015; batch-norm-formulas.
    """
    return apply_batch_norm(
        x,
        params,
        state,
        train=train,
        momentum=momentum,
        epsilon=epsilon,
        axis=axis,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        running_variance=running_variance,
        debias=debias,
        derivative=derivative,
    )


def apply_batch_norm(
    x: Any,
    params: Params,
    state: State,
    *,
    train: bool,
    momentum: Any,
    epsilon: float,
    axis: _shapes.Axis,
    mask: Any,
    axis_name: Any,
    axis_index_groups: Any,
    running_variance: str,
    debias: bool,
    derivative: str,
    dtype: Any = None,
    initializing: bool = False,
    normalize: Normalize = normalize_whole,
    update: Callable[..., State] = _running.update,
    ghost_batch_size: int | None = None,
) -> tuple[jax.Array, State]:
    """`batch_norm`, with what its variants and the Flax modules need beside it.

    `dtype` is that of y. While `initializing`, a batch of one is fine, `axis_name` need
    not be bound, and the state stays as it is. `normalize` is what a variant does to a
    training batch; with `ghost_batch_size`, to as many of its rows at a time.
    """
    train = _checks.check_static_bool("train", train)
    _checks.check_instance("params", params, Params, "a jaxbn.Params")
    x, scale, bias, mask, config = _affine.check_arguments(
        x, params.scale, params.bias, mask, epsilon, axis
    )
    state = _running.check_state(state, x, config.features)
    momentum = _checks.check_momentum(momentum)
    debias = _checks.check_static_bool("debias", debias)
    _running.check_running_variance(running_variance)
    _checks.check_choice("derivative", derivative, get_args(_shapes.Derivative))
    config = dataclasses.replace(config, dtype=dtype)
    if not train:
        rstd = _affine.rstd_of(
            state.var, config.epsilon, _shapes.accumulation_dtype(x.dtype)
        )
        y = _affine.affine(config, x, state.mean, rstd, scale, bias, mask)
        return y, state
    if not initializing:
        names, groups = _devices.check_axis_name(axis_name, axis_index_groups)
        config = dataclasses.replace(config, axis_name=names, groups=groups)
        together = None if ghost_batch_size else names
        devices = _devices.group_size(together, groups)
        shape, said = x.shape, ("training",)
        if ghost_batch_size:
            shape = (ghost_batch_size, *shape[1:])
            said = ("each ghost batch", "take a larger `ghost_batch_size`")
        _shapes.check_count(shape, config.features, devices, *said)
    y, batches = normalize(config, derivative, x, scale, bias, mask, state)
    if initializing:
        return y, state
    new = update(
        state,
        batches,
        momentum=momentum,
        running_variance=running_variance,
        debias=debias,
    )
    return y, new
