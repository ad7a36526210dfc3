"""Batch norm: plain, of ghost batches, and renormalized, over one set of options."""

import dataclasses
import warnings
from collections.abc import Sequence

import jax
import jax.export
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbn import _axes, _checks
from jaxbn._axes import Features
from jaxbn._checks import Derivative
from jaxbn._core import ghost, renorm
from jaxbn._core.devices import AxisIndexGroups, AxisName, check_devices
from jaxbn._core.kernel import Config, normalize_batch
from jaxbn._core.moments import Moments, moments
from jaxbn._core.normalize import Params, affine, rstd_of
from jaxbn._core.renorm import Limit
from jaxbn._core.running import (
    DEFAULT_AVERAGING,
    Averaging,
    State,
    check_state,
    new_state,
    update,
)

# So that a function of them can be exported (jax.export) and read back.
jax.export.register_namedtuple_serialization(Params, serialized_name="jaxbn.Params")
jax.export.register_namedtuple_serialization(State, serialized_name="jaxbn.State")


def init(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    param_dtype: DTypeLike = jnp.float32,
) -> tuple[Params, State]:
    """Return scale 1, bias 0, running mean 0 and variance 1.

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
    shape = _checks.check_num_features(num_features)
    dtype = _checks.check_inexact("param_dtype", param_dtype)
    scaled = _checks.check_static_bool("use_scale", use_scale)
    shifted = _checks.check_static_bool("use_bias", use_bias)
    params = Params(
        jnp.ones(shape, _axes.real_dtype(dtype)) if scaled else None,
        jnp.zeros(shape, dtype) if shifted else None,
    )
    return params, new_state(shape, _axes.accumulation_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Options:
    """How to normalize, as the user said it; `normalize_and_update` checks it.

    Without `ghost_batch_size` and `limits`, r_max and d_max of batch renorm, it is
    plain batch norm. `dtype` is that of y, that of x if None.
    """

    epsilon: float = 1e-5
    averaging: Averaging = DEFAULT_AVERAGING
    axis_name: AxisName = None
    axis_index_groups: AxisIndexGroups = None
    derivative: Derivative = "vjp"
    ghost_batch_size: int | None = None
    limits: tuple[Limit, Limit] | None = None
    dtype: DTypeLike | None = None


def normalize_and_update(
    x: jax.Array,
    params: Params,
    state: State,
    mask: jax.Array | None,
    features: Features,
    options: Options,
    *,
    train: bool,
    updating: bool = True,
    warn_of_one_element: bool = False,
) -> tuple[jax.Array, Moments | None, State]:
    """Return y, the moments of a training batch, and the new state.

    Args:
        x: Checked, like `mask` and `features`.
        params: Scale and bias.
        state: Running statistics.
        mask: Boolean, of x's rank, or None.
        features: The feature axes, ascending.
        options: All others; they are checked here.
        train: Whether to normalize by the batch.
        updating: Whether to update the state. If not, as while a module initializes,
            plain batch norm is done, a batch may have one element per feature, and
            `axis_name` need not be bound.
        warn_of_one_element: Whether a batch of one element per feature gives a warning
            and leaves the state as it is. It is an error otherwise.
    """
    _checks.check_instance("params", params, Params, "a jaxbn.Params")
    ghost_size = options.ghost_batch_size
    if ghost_size is not None and train and updating:
        if options.limits is not None:
            raise ValueError(
                "`ghost_batch_size` must be None for BatchRenorm, whose statistics are "
                f"those of the whole batch; got {ghost_size}"
            )
        ghost.check_axes(features)
    scale = _checks.check_per_feature("scale", params.scale, x, features)
    bias = _checks.check_per_feature("bias", params.bias, x, features)
    state = check_state(state, x, features)
    config = Config(
        features,
        _checks.check_epsilon(options.epsilon, _axes.statistics_dtype(x.dtype)),
        dtype=options.dtype,
        derivative=_checks.check_choice("derivative", options.derivative, Derivative),
    )
    averaging = options.averaging.checked()
    if options.limits is not None:
        renorm.check_limits(*options.limits)

    if not train:
        rstd = rstd_of(state.var, config.epsilon, x.dtype)
        args = x, state.mean, rstd, scale, bias, mask, features
        return affine(*args, dtype=options.dtype), None, state
    if updating:
        devices = check_devices(options.axis_name, options.axis_index_groups)
        together = devices.number if ghost_size is None else 1
        try:
            _checks.check_count(x.shape, features, together, "training")
        except ValueError as error:
            if not warn_of_one_element:
                raise
            message = f"{error}; y is the bias, and the running statistics stay"
            warnings.warn(message, stacklevel=3)
            updating = False
        else:
            config = dataclasses.replace(config, devices=devices)
    if not updating:
        return *normalize_batch(config, x, scale, bias, mask), state

    if ghost_size is not None:
        ghost.check_rows(x, features, ghost_size)
        y, batches = ghost.normalize_ghosts(config, ghost_size, x, scale, bias, mask)
        return y, None, ghost.update_in_turn(state, batches, averaging)
    if options.limits is not None:
        batch = moments(x, mask, features, config.devices, state.mean).rounded
        scale, bias = renorm.corrected_parameters(
            config, batch, state, scale, bias, *options.limits
        )
    y, batch = normalize_batch(config, x, scale, bias, mask, state.mean)
    return y, batch, update(state, batch, averaging)
