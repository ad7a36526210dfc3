"""Batch norm as Flax Linen modules; the arithmetic is that of `jaxbn.batch_norm`."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _checks
from jaxbn._axes import Axis
from jaxbn._checks import Derivative, RunningVariance
from jaxbn._core.batch_norm import Options, normalize_and_update
from jaxbn._core.devices import AxisIndexGroups, AxisName
from jaxbn._core.moments import Moments, merge_moments
from jaxbn._core.normalize import Params
from jaxbn._core.renorm import Limit, ramp_d_max, ramp_r_max
from jaxbn._core.running import Momentum, State, new_state
from jaxbn._models.measure import empty_moments
from jaxbn._models.rules import (
    BatchNormBase,
    BatchRenormBase,
    as_input,
    check_limit_fields,
    warn_of_own_call,
)
from jaxbn.linen.recording import RECORDED, active


class BatchNorm(BatchNormBase, nn.Module):
    """Drop-in for `flax.linen.BatchNorm`: same fields, variables, dtypes and names.

    It differs from Flax's in what is right:

    * The variance is always computed stably; `use_fast_variance` is ignored.
    * A mask is right over several devices, zeroes y where it is False, and lets no NaN
      through, also into gradients.
    * A batch that is empty, fully masked or not finite leaves the running statistics
      alone. These keep their dtype and are not differentiated.
    * A training batch with one element per feature is an error.

    `batch_stats` holds `mean` and `var`, and `num_updates` where `momentum` is None or
    `debias` is set. Checkpoints of models with `flax.linen.BatchNorm` load unchanged.

    Attributes:
        use_running_average: Whether to normalize by the running statistics (inference)
            or by the batch (training). Given here or in the call, once; a Python bool.
        axis: The feature axis or axes of x.
        momentum: The share of the old running statistics that is kept, in [0, 1]. None
            is the average over all updates so far.
        epsilon: Added to the variance; in the squared unit of x.
        dtype: Of y; None is that of x, scale and bias together.
        param_dtype: Of scale and bias.
        use_bias: Whether there is a bias.
        use_scale: Whether there is a scale.
        bias_init: Initializer of the bias.
        scale_init: Initializer of the scale.
        axis_name: Named axes whose devices share one batch.
        axis_index_groups: Groups of indices on `axis_name`, each a batch of its own.
        use_fast_variance: Accepted and ignored: the variance is always stable.
        force_float32_reductions: If False, running statistics are kept in
            `param_dtype`. Reductions are in float32 at least in any case.
        running_variance: "biased", or "unbiased" with n - 1 (PyTorch).
        debias: The first updates average, until `momentum` keeps less, so that the
            statistics are never drawn towards their initial values.
        derivative: "vjp" is the analytic rule; "jvp" gives forward mode too.
        ghost_batch_size: Rows that share statistics in training, as for
            `jaxbn.ghost_batch_norm`; None is all of them.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxbn.linen import BatchNorm
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> norm = BatchNorm(momentum=0.9)
        >>> variables = norm.init(jax.random.key(0), x, use_running_average=False)
        >>> y, updates = norm.apply(
        ...     variables, x, use_running_average=False, mutable=["batch_stats"]
        ... )
        >>> print(y.round(3), updates["batch_stats"]["mean"].round(3))
        [[-1. -1.]
         [ 1.  1.]] [0.2 2. ]

    Source: Ioffe & Szegedy, "Batch Normalization", 2015.
    """

    use_running_average: bool | None = None
    axis: Axis = -1
    momentum: Momentum = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: AxisName = None
    axis_index_groups: AxisIndexGroups = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    running_variance: RunningVariance = "biased"
    debias: bool = False
    derivative: Derivative = "vjp"
    ghost_batch_size: int | None = None

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalize x, and in training update the running statistics.

        While the module is initializing, the running statistics stay as they are,
        `axis_name` need not be bound, and a batch of one is fine. To leave them as they
        are in training, drop the `batch_stats` that `apply` returns.

        Args:
            x: Of any rank >= 1; integers are promoted to float32.
            use_running_average: As the field, where that is None.
            mask: True where an element counts; broadcasts to x as in NumPy.

        Returns:
            y, with the shape of x; 0 where the mask is False.

        Raises:
            ValueError: `use_running_average` is given twice or never, or as for
                `jaxbn.batch_norm`.
            TypeError: `use_running_average` is traced, or as for `jaxbn.batch_norm`.
        """
        return normalized(self, self, x, use_running_average, mask=mask)


class BatchRenorm(BatchRenormBase, BatchNorm):
    """Batch renormalization: `BatchNorm` that trains on what inference will use.

    As `BatchNorm`, with the two limits of `jaxbn.batch_renorm`; the paper's ramp begins
    as plain batch norm. `batch_stats` always holds `num_updates`.

    Attributes:
        r_max: At least 1: a number or a schedule (a function, such as optax's) of the
            number of updates. A schedule may return one entry per feature.
        d_max: At least 0; a number or a schedule, as `r_max`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxbn.linen import BatchRenorm
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> norm = BatchRenorm(False, r_max=optax.linear_schedule(1.0, 3.0, 1000))
        >>> variables = norm.init(jax.random.key(0), x)
        >>> sorted(variables["batch_stats"])
        ['mean', 'num_updates', 'var']

    Source: Ioffe, "Batch Renormalization", 2017.
    """

    r_max: Limit = ramp_r_max
    d_max: Limit = ramp_d_max

    def __post_init__(self) -> None:
        check_limit_fields(self.r_max, self.d_max)
        super().__post_init__()


# The changes to Flax's batch norms in what is traced now, pairs of name and value; None
# where nothing is replaced. A part of jit's key, and made once: JAX traces all anew for
# each new context.
CHANGES: Any = jax.make_user_context(None)

_FLAX_CALL = inspect.unwrap(nn.BatchNorm.__call__)
_FLAX_FIELDS = nn.BatchNorm.__dataclass_fields__.keys() - {"parent", "name"}


def compute_as_ours(
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Let a `flax.linen.BatchNorm` compute as ours: for `nn.intercept_methods`.

    Only the function at the end of the chain of interceptors is replaced, so that all
    of them, nn.tabulate and capture_intermediates see one call, that of Flax's module.
    Flax's transforms of its class (nn.jit) call that function inside.
    """
    module: Any = context.module
    if isinstance(module, nn.BatchNorm) and context.method_name == "__call__":
        last: Any = context.orig_method
        if inspect.unwrap(type(module).__call__) is not _FLAX_CALL:
            warn_of_own_call(module, "flax.linen.BatchNorm")
        elif last.func is _FLAX_CALL:
            fields = {name: getattr(module, name) for name in _FLAX_FIELDS}
            norm = BatchNorm(**fields | dict(CHANGES.value or ()), parent=None)
            ours = functools.partial(normalized, module, norm)
            last.__setstate__((ours, (), {}, None))
    return method(*args, **kwargs)


# Not methods: Flax would record each call of them, as of a layer.
def normalized(
    module: nn.Module,
    norm: BatchNorm,
    x: ArrayLike,
    use_running_average: bool | None = None,
    *,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Do what `norm` is set to do, with the variables of `module`."""
    use_running_average = _checks.check_static_bool(
        "use_running_average",
        nn.merge_param(
            "use_running_average", norm.use_running_average, use_running_average
        ),
    )
    recording = active()
    if recording is not None:
        use_running_average = recording.use_running_average
    initializing = module.is_initializing()
    updating = not (use_running_average or initializing or recording)
    x, mask, features, dtype = as_input(
        norm,
        _checks.as_x(x),
        mask,
        [norm.param_dtype] * (norm.use_scale or norm.use_bias),
    )
    shape = tuple(x.shape[i] for i in features)
    state, variables = _running_statistics(
        module, norm, shape, jnp.iscomplexobj(x), with_count=updating or initializing
    )
    params = Params(
        module.param("scale", norm.scale_init, shape, norm.param_dtype)
        if norm.use_scale
        else None,
        module.param("bias", norm.bias_init, shape, norm.param_dtype)
        if norm.use_bias
        else None,
    )
    y, batch, state = normalize_and_update(
        x,
        params,
        state,
        mask,
        features,
        Options(**norm._options(dtype)),
        train=not use_running_average,
        updating=updating,
    )
    if recording is not None:
        _record(module, recording.note(module.path, x, features, mask, batch))
    if updating:
        for name, variable in variables.items():
            variable.value = getattr(state, name)
    return y


def _running_statistics(
    module: nn.Module,
    norm: BatchNorm,
    shape: tuple[int, ...],
    is_complex: bool,
    *,
    with_count: bool,
) -> tuple[State, dict[str, Any]]:
    """Return the state and the variables that hold it; the count only if needed."""
    dtype = jnp.float32 if norm.force_float32_reductions else norm.param_dtype
    if is_complex:
        dtype = jnp.complex64
    initial = new_state(shape, dtype)
    names = ["mean", "var"]
    if with_count and norm._keeps_count():
        names.append("num_updates")
        has_count = module.has_variable("batch_stats", "num_updates")
        if module is not norm and not (has_count or module.is_initializing()):
            raise ValueError(
                "`batch_stats` must hold `num_updates` for `momentum=None` and `debias`"
                f"; got none at {'/'.join(module.path) or 'the top'} (take it from "
                "`model.init` under the same `replace_batch_norm`)"
            )
    variables = {
        name: module.variable("batch_stats", name, getattr, initial, name)
        for name in names
    }
    values = {name: variable.value for name, variable in variables.items()}
    return initial._replace(**values), variables


def _record(module: nn.Module, batch: Moments) -> None:
    """Add the moments to those that this layer has recorded in this call so far."""
    initial = empty_moments(batch.mean)
    variables = [
        module.variable("batch_stats", name, lambda value=value: value)
        for name, value in zip(RECORDED, initial, strict=True)
    ]
    so_far = Moments(*(variable.value for variable in variables))
    for variable, value in zip(variables, merge_moments(so_far, batch), strict=True):
        variable.value = value
