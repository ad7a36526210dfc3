"""Batch norm as Flax NNX modules; the arithmetic is that of `jaxbn.batch_norm`."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _checks
from jaxbn._axes import Axis
from jaxbn._checks import Derivative, RunningVariance
from jaxbn._core.batch_norm import Options, normalize_and_update
from jaxbn._core.devices import AxisIndexGroups, AxisName
from jaxbn._core.normalize import Params
from jaxbn._core.platforms import traced_only
from jaxbn._core.renorm import Limit, ramp_d_max, ramp_r_max
from jaxbn._core.running import Momentum, State, new_state
from jaxbn._models.rules import (
    BatchNormBase,
    BatchRenormBase,
    as_input,
    check_limit_fields,
    keep_dtypes,
    result_dtype,
)
from jaxbn.nnx.recording import Recorded

Metadata = Mapping[str, Any]
NO_METADATA: Metadata = MappingProxyType({})

CLOSED_OVER = (
    "Cannot update the running statistics of a BatchNorm that the traced function "
    "closes over: pass the model to it as an argument, or have nnx.merge make it "
    "there, with copy=True"
)


class BatchNorm(BatchNormBase, nnx.Module):
    """Drop-in for `flax.nnx.BatchNorm`: same arguments, variables, dtypes and switches.

    It differs from Flax's in what is right:

    * The variance is always computed stably; `use_fast_variance` is ignored.
    * A mask is right over several devices, zeroes y where it is False, and lets no NaN
      through, also into gradients.
    * A batch that is empty, fully masked or not finite leaves the running statistics
      alone. These keep their dtype and are not differentiated. Neither they nor x are
      rounded to `dtype`.

    The numbers are those of `jaxbn.linen.BatchNorm`. But a training batch with one
    element per feature is not an error here, since NNX cannot tell initializing from
    training: it gives a warning, y is the bias, and the running statistics stay.

    Attributes:
        mean: The running mean, a `nnx.BatchStat` in float32 (complex for complex y).
        var: The running variance, a `nnx.BatchStat` in float32.
        num_updates: A `nnx.BatchStat`, there where `momentum` is None or `debias` set.
        scale: A `nnx.Param`, or None.
        bias: A `nnx.Param`, or None.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbn.nnx import BatchNorm
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> norm = BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
        >>> print(norm(x).round(3), norm.mean[...].round(3))
        [[-1. -1.]
         [ 1.  1.]] [0.2 2. ]
        >>> norm.eval()
        >>> print(norm(jnp.array([[1.2, 12.0]])).round(2))
        [[1.   3.03]]

    Source: Ioffe & Szegedy, "Batch Normalization", 2015.
    """

    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]
    num_updates: nnx.BatchStat[jax.Array]
    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None

    # Only in the copy of a model that `recalibrate` calls.
    recorded: Recorded | None = None
    # Not public: `train(update_statistics=...)` would set it for good.
    _update_statistics: bool = True

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: Axis = -1,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        axis_name: AxisName = None,
        axis_index_groups: AxisIndexGroups = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = keep_dtypes,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
        running_variance: RunningVariance = "biased",
        debias: bool = False,
        derivative: Derivative = "vjp",
        ghost_batch_size: int | None = None,
    ):
        """Make scale 1, bias 0, running mean 0 and variance 1.

        Args:
            num_features: The features' shape, an int or, for several feature axes, a
                tuple in ascending order of the axes.
            use_running_average: Whether to normalize by the running statistics
                (inference) or by the batch (training). `train()`, `eval()`, `nnx.view`
                and the call override it; None leaves it to the call.
            axis: The feature axis or axes of x.
            momentum: The share of the old running statistics that is kept, in [0, 1].
                None is the average over all updates so far.
            epsilon: Added to the variance; in the squared unit of x.
            dtype: Of y; None is that of x, scale and bias together.
            param_dtype: Of scale and bias.
            use_bias, use_scale: Whether there is a bias, a scale.
            bias_init, scale_init: Initializers of the two.
            axis_name: Named axes whose devices share one batch.
            axis_index_groups: Groups of indices on `axis_name`, each a batch of its
                own.
            use_fast_variance: Accepted and ignored: the variance is always stable.
            promote_dtype: Given (x, scale, bias) and `dtype`, returns what to use in
                their place. By default they stay, since the arithmetic is in float32
                at least; `flax.nnx.nn.dtypes.promote_dtype` rounds them to `dtype`.
            rngs: Its `params` are drawn for scale, then bias, where used.
            bias_metadata, scale_metadata: Of the two, such as their sharding.
            running_variance: "biased", or "unbiased" with n - 1 (PyTorch).
            debias: The first updates average, until `momentum` keeps less, so that the
                statistics are never drawn towards their initial values.
            derivative: "vjp" is the analytic rule; "jvp" gives forward mode too.
            ghost_batch_size: Rows that share statistics in training, as for
                `jaxbn.ghost_batch_norm`; None is all of them.

        Raises:
            ValueError: A number of features is negative.
            TypeError: `num_features` is not made of ints, or `dtype` not inexact.
        """
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.running_variance: RunningVariance = running_variance
        self.debias = debias
        self.derivative: Derivative = derivative
        self.ghost_batch_size = ghost_batch_size

        shape = _checks.check_num_features(num_features)
        y_dtype = result_dtype(
            dtype, jnp.zeros(()), [param_dtype] * (use_scale or use_bias)
        )
        is_complex = jnp.issubdtype(y_dtype, jnp.complexfloating)
        state = new_state(shape, jnp.complex64 if is_complex else jnp.float32)
        self.mean = nnx.BatchStat(state.mean)
        self.var = nnx.BatchStat(state.var)
        if self._keeps_count():
            self.num_updates = nnx.BatchStat(state.num_updates)

        def param(used: bool, init: Initializer, metadata: Metadata) -> Any:
            if not used:
                return nnx.data(None)
            return nnx.Param(init(rngs.params(), shape, param_dtype), **metadata)

        self.scale = param(use_scale, scale_init, scale_metadata)
        self.bias = param(use_bias, bias_init, bias_metadata)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        update_statistics: bool | None = None,
    ) -> jax.Array:
        """Normalize x, and in training update the running statistics.

        Args:
            x: Of any rank >= 1; integers are promoted to float32.
            use_running_average: Wins over the constructor's.
            mask: True where an element counts; broadcasts to x as in NumPy.
            update_statistics: False leaves the running statistics as they are. None is
                what `nnx.view` has set, True by default.

        Returns:
            y, with the shape of x; 0 where the mask is False.

        Raises:
            ValueError: `use_running_average` is given nowhere, or as for
                `jaxbn.batch_norm`.
            TypeError: `use_running_average` is traced, or as for `jaxbn.batch_norm`.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "`use_running_average` must be given, to the constructor, to the call "
                "or by nnx.view(model, use_running_average=...); got None"
            )
        use_running_average = _checks.check_static_bool(
            "use_running_average", use_running_average
        )
        if update_statistics is None:
            update_statistics = self._update_statistics
        updating = not use_running_average
        updating &= _checks.check_static_bool("update_statistics", update_statistics)
        arrays = _checks.as_x(x), _value(self.scale), _value(self.bias)
        promoted, *params = self.promote_dtype(arrays, dtype=self.dtype)
        x, mask, features, dtype = as_input(
            self, promoted, mask, [p.dtype for p in params if p is not None]
        )
        recorded = self.recorded
        if recorded is not None:
            use_running_average = recorded.recording.use_running_average
        counts = self._keeps_count()
        count = self.num_updates[...] if counts else jnp.zeros((), jnp.int32)
        old = State(self.mean[...], self.var[...], count)
        y, batch, state = normalize_and_update(
            x,
            Params(*params),
            old,
            mask,
            features,
            Options(**self._options(dtype)),
            train=not use_running_average,
            updating=recorded is None,
            warn_of_one_element=True,
        )
        if recorded is not None:
            recorded.add(
                recorded.recording.note(recorded.path, x, features, mask, batch)
            )
        if not updating or recorded is not None:
            return y
        try:
            self.mean.set_value(state.mean)
            self.var.set_value(state.var)
            if counts:
                self.num_updates.set_value(state.num_updates)
        except TraceContextError:
            return traced_only(y, TraceContextError(CLOSED_OVER))
        return y

    # Flax shows this docstring, and reads only arguments indented by two.
    def set_view(
        self,
        use_running_average: bool | None = None,
        update_statistics: bool | None = None,
    ) -> None:
        """Set what `nnx.view` may change.

        Args:
          use_running_average: Whether to normalize by the running statistics
            (inference) or by the batch (training); None leaves it as it is.
          update_statistics: Whether training updates the running statistics.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_statistics is not None:
            self._update_statistics = update_statistics


class BatchRenorm(BatchRenormBase, BatchNorm):
    """Batch renormalization: `BatchNorm` that trains on what inference will use.

    As `BatchNorm`, with the two limits of `jaxbn.batch_renorm`; the paper's ramp begins
    as plain batch norm. There is always a `num_updates`, and no ghost batches.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from jaxbn.nnx import BatchRenorm
        >>> schedule = optax.linear_schedule(1.0, 3.0, 1000)
        >>> norm = BatchRenorm(2, r_max=schedule, rngs=nnx.Rngs(0))
        >>> y = norm(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
        >>> print(norm.num_updates[...])
        1

    Source: Ioffe, "Batch Renormalization", 2017.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        r_max: Limit = ramp_r_max,
        d_max: Limit = ramp_d_max,
        use_running_average: bool | None = False,
        axis: Axis = -1,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        axis_name: AxisName = None,
        axis_index_groups: AxisIndexGroups = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = keep_dtypes,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
        running_variance: RunningVariance = "biased",
        debias: bool = False,
        derivative: Derivative = "vjp",
    ):
        """Make scale 1, bias 0, running mean 0, variance 1, and no updates.

        Args:
            num_features: As for `BatchNorm`.
            r_max: At least 1: a number or a schedule (a function, such as optax's) of
                the number of updates. A schedule may return one entry per feature.
            d_max: At least 0; a number or a schedule, as `r_max`.
            use_running_average, axis, momentum, epsilon, dtype: As for `BatchNorm`.
            param_dtype, use_bias, use_scale, bias_init, scale_init: As for `BatchNorm`.
            axis_name, axis_index_groups, use_fast_variance: As for `BatchNorm`.
            promote_dtype, rngs, bias_metadata, scale_metadata: As for `BatchNorm`.
            running_variance, debias, derivative: As for `BatchNorm`.

        Raises:
            TypeError: As for `BatchNorm`, or a limit is an array.
        """
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
            running_variance=running_variance,
            debias=debias,
            derivative=derivative,
        )
        check_limit_fields(r_max, d_max)
        self.r_max = r_max
        self.d_max = d_max


def _value(param: nnx.Param[jax.Array] | None) -> jax.Array | None:
    return None if param is None else param[...]
