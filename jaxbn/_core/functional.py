"""The public `batch_norm`, `ghost_batch_norm` and `batch_renorm`: their arguments.

What they do is in `jaxbn._core.batch_norm`.
"""

import jax
from jax.typing import ArrayLike

from jaxbn import _axes, _checks
from jaxbn._axes import Axis
from jaxbn._checks import Derivative, RunningVariance
from jaxbn._core.batch_norm import Options, normalize_and_update
from jaxbn._core.devices import AxisIndexGroups, AxisName
from jaxbn._core.ghost import check_size
from jaxbn._core.normalize import Params
from jaxbn._core.renorm import Limit, ramp_d_max, ramp_r_max
from jaxbn._core.running import Averaging, Momentum, State


def batch_norm(
    x: ArrayLike,
    params: Params,
    state: State,
    *,
    train: bool,
    momentum: Momentum = 0.9,
    epsilon: float = 1e-5,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName = None,
    axis_index_groups: AxisIndexGroups = None,
    running_variance: RunningVariance = "biased",
    debias: bool = False,
    derivative: Derivative = "vjp",
) -> tuple[jax.Array, State]:
    r"""Normalize a batch, in training and in inference.

    $$y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta$$

    In training x is normalized by its own moments, and the running statistics move
    towards them; in inference x is normalized by the running statistics. Equivalent to
    `torch.nn.functional.batch_norm`, except that `momentum` is the share of the old
    value that is kept (one minus PyTorch's), and that the running variance is biased by
    default.

    Args:
        x: Floating point or complex, of any rank >= 1.
        params: Scale and bias with the shape of the feature axes, or None.
        state: Running statistics, complex mean for complex x. In training on a TPU the
            mean is the shift of the sums over x: it shows in the last digits of y.
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
        derivative: "vjp" is the analytic rule; "jvp" is JAX's own differentiation, with
            forward mode (jvp, jacfwd, linearize) too. In half precision its dx is less
            exact.

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

    Source: Ioffe & Szegedy, "Batch Normalization", 2015, algorithms 1 and 2.
    """
    averaging = Averaging(momentum, running_variance, debias)
    options = Options(epsilon, averaging, axis_name, axis_index_groups, derivative)
    return _apply(x, params, state, mask, axis, train, options)


def ghost_batch_norm(
    x: ArrayLike,
    params: Params,
    state: State,
    *,
    train: bool,
    ghost_batch_size: int,
    momentum: Momentum = 0.9,
    epsilon: float = 1e-5,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName = None,
    axis_index_groups: AxisIndexGroups = None,
    running_variance: RunningVariance = "biased",
    debias: bool = False,
    derivative: Derivative = "vjp",
) -> tuple[jax.Array, State]:
    """Normalize ghost batches: `ghost_batch_size` rows share statistics, not all rows.

    Large batches then keep the noise that small batches have, which generalizes better
    (Hoffer, Hubara & Soudry 2017); "virtual batch size" elsewhere. Equivalent to
    `batch_norm` of the ghost batches one after the other, with the running statistics
    handed on, and to `batch_norm` where one ghost batch holds all rows.

    Under plain jit over a sharded batch nothing is communicated for y and dx, if the
    ghost batches lie within the shards.

    Args:
        x: As for `batch_norm`; axis 0 is the batch, and no feature axis.
        params, state: As for `batch_norm`.
        train: True normalizes by the ghost batches, False by `state`.
        ghost_batch_size: Rows, along axis 0, of one ghost batch; divides the batch. (A
            batch that it does not divide can be padded, with a mask for the padding.)
        momentum: As for `batch_norm`, for each ghost batch.
        epsilon, axis, mask: As for `batch_norm`.
        axis_name: Named axes whose devices merge their running statistics: as if their
            ghost batches had come in turn, device after device. The ghost batches stay
            on their devices.
        axis_index_groups: As for `batch_norm`, of the running statistics.
        running_variance, debias, derivative: As for `batch_norm`.

    Returns:
        y, with x's shape and dtype, and the new state; its count rises by the number
        of ghost batches that counted anything.

    Raises:
        ValueError: `ghost_batch_size` does not divide the batch, axis 0 is a feature
            axis, or as for `batch_norm`.
        TypeError: `ghost_batch_size` is not an int, or as for `batch_norm`.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.init(1)
        >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
        >>> y, state = jaxbn.ghost_batch_norm(
        ...     x, params, state, train=True, ghost_batch_size=2
        ... )
        >>> print(y.round(3).T, state.num_updates)
        [[-1.  1. -1.  1.]] 2

    Source: Hoffer, Hubara & Soudry, "Train longer, generalize better", 2017,
    algorithm 1.
    """
    size = check_size(ghost_batch_size)
    averaging = Averaging(momentum, running_variance, debias)
    options = Options(
        epsilon, averaging, axis_name, axis_index_groups, derivative, size
    )
    return _apply(x, params, state, mask, axis, train, options)


def batch_renorm(
    x: ArrayLike,
    params: Params,
    state: State,
    *,
    train: bool,
    r_max: Limit = ramp_r_max,
    d_max: Limit = ramp_d_max,
    momentum: Momentum = 0.9,
    epsilon: float = 1e-5,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName = None,
    axis_index_groups: AxisIndexGroups = None,
    running_variance: RunningVariance = "biased",
    debias: bool = False,
    derivative: Derivative = "vjp",
) -> tuple[jax.Array, State]:
    r"""Normalize as inference would: y = (x_hat r + d) scale + bias in training.

    $$y = \gamma \left(r \, \frac{x - \mu}{\sigma} + d\right) + \beta \qquad
    r = \frac{\sigma}{\sigma_\text{run}} \qquad
    d = \frac{\mu - \mu_\text{run}}{\sigma_\text{run}}$$

    r, the ratio of the batch's std and the running one, clipped to [1 / r_max, r_max],
    and d, the way between their means, clipped to [-d_max, d_max], are constants to the
    gradient. Where nothing is clipped, training computes what inference computes, so
    that small batches and batches of a few classes train as large mixed ones. Equals
    `batch_norm` for r_max=1, d_max=0, and always in inference.

    Args:
        x, params, state: As for `batch_norm`.
        train: True normalizes by the batch, corrected towards `state`.
        r_max: At least 1: a number, an array, or a schedule (any function, such as
            optax's, of `state.num_updates`). By default the paper's ramp.
        d_max: At least 0; a number, an array or a schedule, as `r_max`.
        epsilon: As for `batch_norm`; std is sqrt(var + epsilon) here too.
        momentum, axis, mask, axis_name, axis_index_groups: As for `batch_norm`.
        running_variance, debias, derivative: As for `batch_norm`.

    Returns:
        y, with x's shape and dtype, and the new state, updated as by `batch_norm`.

    Raises:
        ValueError: `r_max` is a number below 1, `d_max` one below 0, one of them does
            not broadcast to the features, or as for `batch_norm`.
        TypeError: `r_max` or `d_max` is not made of real numbers, or as for
            `batch_norm`.

    Examples:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.init(1)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, _ = jaxbn.batch_renorm(x, params, state, train=True, r_max=3, d_max=5)
        >>> print(y.round(2).T)  # as with the running mean 0 and variance 1
        [[1. 3.]]

    Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models", 2017, algorithm 1.
    """
    averaging = Averaging(momentum, running_variance, debias)
    options = Options(
        epsilon,
        averaging,
        axis_name,
        axis_index_groups,
        derivative,
        None,
        (r_max, d_max),
    )
    return _apply(x, params, state, mask, axis, train, options)


def _apply(
    x: ArrayLike,
    params: Params,
    state: State,
    mask: ArrayLike | None,
    axis: Axis,
    train: bool,
    options: Options,
) -> tuple[jax.Array, State]:
    train = _checks.check_static_bool("train", train)
    x = _checks.check_x(x)
    features = _axes.feature_axes(axis, x.ndim)
    mask = _checks.check_mask(mask, x)
    y, _, state = normalize_and_update(
        x, params, state, mask, features, options, train=train
    )
    return y, state
