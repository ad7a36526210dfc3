"""Pairs of a layer and a batch norm in Linen models, and models folded by them."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import unwrap
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import DenyList
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike

from jaxbn._checks import check_instance
from jaxbn._fold_tree import Pair, Path, paths_in
from jaxbn._models.measure import PyTree
from jaxbn._models.pairs import Pairs, arrays_apart, found_pairs, input_apart, marked
from jaxbn._models.rules import result_dtype
from jaxbn.linen.batch_norm import BatchNorm, normalized

# What a module's call is, whatever transforms its class.
LAYERS: list[Any] = [
    unwrap(layer.__call__)
    for layer in (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose)
]
# That of Flax's batch norm, of ours, and of Flax's in `replace_batch_norm`.
NORMS: list[Any] = [
    unwrap(nn.BatchNorm.__call__),
    unwrap(BatchNorm.__call__),
    normalized,
]

# Part of the key of jit's caches, so that traces made inside these contexts are not
# used outside, and the other way round. Each new one would trace everything anew.
_TRACES = jax.make_user_context()


def find_pairs(model: nn.Module, *args: object, **kwargs: object) -> Pairs:
    """Return the batch norms of a Linen model that can be folded, with their layers.

    A batch norm can be folded into the one layer that it follows, if the layer's output
    goes nowhere else; or else into all the layers that follow it, if its output goes to
    them alone. Layers are `nn.Dense`, `nn.DenseGeneral`, `nn.Conv` and
    `nn.ConvTranspose`; batch norms are Flax's and ours. The model is traced, and
    nothing is computed.

    Limits:
        * Modules in stacks, loops and branches (`nn.vmap`, `nn.scan`, `nn.cond`) stay.
        * A use whose result is thrown away counts as a use.

    Args:
        model: A Linen module.
        *args: Arguments of an inference call, as for `model.init` without the key; a
            `jax.ShapeDtypeStruct` does in place of an array.
        **kwargs: As for `model.init`, such as `train=False`.

    Returns:
        The pairs, a list for `jaxbn.fold_tree` with the epsilon of each. Its attribute
        `unfoldable` tells for each other batch norm, by its path, why there is none.

    Raises:
        TypeError: `model` is not a Linen module.
        ValueError: `model` has no batch norm.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
        >>> from jaxbn.linen import BatchNorm, find_pairs, folded
        >>> norm, last = BatchNorm(True, epsilon=1e-3), BatchNorm(True)
        >>> model = nn.Sequential([nn.Dense(3, use_bias=False), norm, nn.relu, last])
        >>> x = jnp.ones((8, 2))
        >>> variables = model.init(jax.random.key(0), x)
        >>> pairs = find_pairs(model, x)
        >>> pairs
        [('layers_0', 'layers_1', {'epsilon': 0.001})]
        >>> print(pairs.unfoldable["layers_3"])
        its input is not the output of one layer, and its output goes to the results
        >>> smaller = jaxbn.fold_tree(variables, pairs)
        >>> with folded(pairs):
        ...     y = model.apply(smaller, x)
        >>> print(jnp.allclose(y, model.apply(variables, x), atol=1e-5))
        True
    """
    hint = "for NNX there is jaxbn.nnx"
    check_instance("model", model, nn.Module, "a flax.linen.Module", hint)
    rngs = {"params": jax.random.key(0)}
    mutable = DenyList(("params", "intermediates"))

    given, put = arrays_apart(args, kwargs)

    def init(given: PyTree) -> PyTree:
        args, kwargs = put(given)
        return model.init(rngs, *args, **kwargs)

    def call(variables: PyTree, given: PyTree) -> PyTree:
        args, kwargs = put(given)
        with nn.intercept_methods(_mark), _TRACES("marked"):
            return model.apply(variables, *args, rngs=rngs, mutable=mutable, **kwargs)

    return found_pairs(call, jax.eval_shape(init, given), given)


@contextlib.contextmanager
def folded(pairs: Iterable[Pair]) -> Iterator[None]:
    """Let models leave out the batch norms of `pairs`, and add the biases of layers.

    For models whose batch norms and `use_bias=False` are written into their code: in
    this context `model.apply` takes the variables that `jaxbn.fold_tree` returns. Each
    batch norm in `pairs` returns its input, and each layer without a bias adds the
    folded one. Enter it around each call, or inside the function that is jitted.

    Args:
        pairs: As for `jaxbn.fold_tree`; `find_pairs` returns them.

    Yields:
        Nothing.

    Raises:
        ValueError: In the context, a model is called whose variables are not folded,
            or lack a layer that `pairs` names.
        TypeError: `pairs` does not hold paths.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
        >>> from jaxbn.linen import BatchNorm, find_pairs, folded
        >>> model = nn.Sequential([nn.Dense(3, use_bias=False), BatchNorm(True)])
        >>> x = jnp.ones((8, 2))
        >>> variables = model.init(jax.random.key(0), x)
        >>> pairs = find_pairs(model, x)
        >>> with folded(pairs):
        ...     y = model.apply(jaxbn.fold_tree(variables, pairs), x)
        >>> print(jnp.allclose(y, model.apply(variables, x), atol=1e-5))
        True
    """
    named = paths_in(pairs)
    skip = functools.partial(_skip, named, frozenset(itertools.chain(*named)))
    with nn.intercept_methods(skip), _TRACES(tuple(named)):
        yield


def _check_layers(
    named: Sequence[Sequence[Path]], params: Mapping[str, PyTree]
) -> None:
    """Refuse a model's parameters that lack the layer of a pair in `named`."""
    there = flatten_dict(params)
    for pair in named:
        if not any((*path, "kernel") in there for path in pair):
            words = " and ".join(repr("/".join(path)) for path in pair)
            raise ValueError(f"`pairs` must name a layer of the model; got {words}")


def _kind(context: nn.module.InterceptorContext) -> bool | None:
    """Return whether the method is the call of a batch norm; None if of no layer."""
    method, module = cast(Any, context.orig_method).func, context.module
    method = getattr(method, "func", method)
    # Weight standardization overrides `param`, and has another kernel than it holds.
    if method in LAYERS and type(module).param is nn.Module.param:
        return False
    return True if method in NORMS else None


def _mark(
    method: Callable[..., jax.Array],
    args: Sequence[ArrayLike],
    kwargs: Mapping[str, object],
    context: nn.module.InterceptorContext,
) -> jax.Array:
    is_norm, module = _kind(context), cast(Any, context.module)
    if is_norm is None:
        return method(*args, **kwargs)
    where = ("batch_stats", "mean") if is_norm else ("params", "kernel")
    array = nn.meta.unbox(module.get_variable(*where))
    path = "/".join(module.path)
    return marked(method, module, path, is_norm, array, args, kwargs)


def _skip(
    named: Sequence[Sequence[Path]],
    paths: frozenset[Path],
    method: Callable[..., jax.Array],
    args: Sequence[ArrayLike],
    kwargs: Mapping[str, object],
    context: nn.module.InterceptorContext,
) -> jax.Array:
    is_norm, module = _kind(context), cast(Any, context.module)
    is_whole = not module.path and context.method_name == "__call__"
    if is_whole and not module.is_initializing():
        _check_layers(named, module.variables.get("params", {}))
    if is_norm is None or module.path not in paths:
        return method(*args, **kwargs)
    # A batch norm that is not folded has a mean; a folded layer has a bias.
    array = ("batch_stats", "mean") if is_norm else ("params", "bias")
    if module.has_variable(*array) == is_norm:
        raise ValueError(
            "`variables` must be those that `fold_tree` returns for `pairs`"
        )
    if is_norm:
        x = jnp.asarray(input_apart(is_norm, args, kwargs)[0])
        learned = [module.param_dtype] * (module.use_scale or module.use_bias)
        return x.astype(result_dtype(module.dtype, x, learned))
    y = method(*args, **kwargs)
    if module.use_bias:
        return y
    bias = nn.meta.unbox(module.get_variable("params", "bias"))
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
