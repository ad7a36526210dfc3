"""Batch renormalization as a Flax NNX module; its arithmetic is in `jaxbn._renorm`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxbn import _flax_rules, _shapes
from jaxbn._batch_norm_nnx import NO_METADATA, BatchNorm
from jaxbn._renorm_limits import ramp_d_max, ramp_r_max


class BatchRenorm(_flax_rules.RenormRules, BatchNorm):
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
        r_max: Any = ramp_r_max,
        d_max: Any = ramp_d_max,
        use_running_average: bool | None = False,
        axis: Any = -1,
        momentum: Any = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Any = initializers.zeros,
        scale_init: Any = initializers.ones,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = _flax_rules.keep_dtypes,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
        running_variance: _shapes.RunningVariance = "biased",
        debias: bool = False,
        derivative: _shapes.Derivative = "vjp",
    ):
        """Scale 1, bias 0, running mean 0, variance 1, and no updates.

        Args:
            num_features: As for `BatchNorm`.
            r_max: At least 1: a number, an array, or a schedule (a function, such as
                optax's) of the number of updates.
            d_max: At least 0; likewise.
            use_running_average: As for `BatchNorm`.
            axis: As for `BatchNorm`.
            momentum: As for `BatchNorm`.
            epsilon: As for `BatchNorm`.
            dtype: As for `BatchNorm`.
            param_dtype: As for `BatchNorm`.
            use_bias: As for `BatchNorm`.
            use_scale: As for `BatchNorm`.
            bias_init: As for `BatchNorm`.
            scale_init: As for `BatchNorm`.
            axis_name: As for `BatchNorm`.
            axis_index_groups: As for `BatchNorm`.
            use_fast_variance: As for `BatchNorm`.
            promote_dtype: As for `BatchNorm`.
            rngs: As for `BatchNorm`.
            bias_metadata: As for `BatchNorm`.
            scale_metadata: As for `BatchNorm`.
            running_variance: As for `BatchNorm`.
            debias: As for `BatchNorm`.
            derivative: As for `BatchNorm`.

        Raises:
            ValueError: As for `BatchNorm`.
            TypeError: As for `BatchNorm`.
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
        self.r_max = r_max
        self.d_max = d_max
