"""Batch norms of a Flax model folded into the layers beside them."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from inspect import getfullargspec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import _checks
from jaxbn._core.normalize import Params
from jaxbn._core.running import State
from jaxbn._fold import fold, fold_before

Path = tuple[str, ...]
ModulePath = str | Sequence[str]
Options = Mapping[str, object]
Pair = tuple[ModulePath, ModulePath] | tuple[ModulePath, ModulePath, Options]
Tree = dict[str, Any]
LAYER, NORM = "layer", "batch norm"


class _Pair(NamedTuple):
    """The paths of a layer and of the batch norm after it, or before it.

    `options` are those of `fold` or `fold_before`; `words` names the pair in messages.
    """

    layer: Path
    norm: Path
    norm_is_after: bool
    options: Options
    words: str


def fold_tree(
    variables: Mapping[str, object], pairs: Iterable[Pair], *, epsilon: float = 1e-5
) -> Tree:
    """Return variables of a Flax model without the batch norms that `pairs` name.

    Apply them with the same model, but leave these batch norms out and set
    `use_bias=True` in the layers that they are folded into: let a field of the model
    choose, as in the example. Other modules keep their names, since Flax numbers each
    class separately. Batch norms may be Linen's or those of `jaxbn.linen`. For stacked
    layers, use `jax.vmap` of this function.

    Args:
        variables: "params", "batch_stats", and other collections, which are kept.
        pairs: Pairs of a layer and a batch norm next to it, in the order in which the
            model applies them: `("Conv_0", "BatchNorm_0")` is a batch norm after its
            layer. Paths are strings ("Block_0/Conv_0") or tuples. A third entry may
            hold options of `fold` or `fold_before` for this pair: `{"padding":
            "VALID"}`, `{"features_axis": -2}`, `{"epsilon": 1e-3}`. A layer may have
            one batch norm before it and one after it. A batch norm may be before
            several layers; then name all that use its output.
        epsilon: The epsilon of the batch norms.

    Returns:
        A tree of new dictionaries, without collections that the folding leaves empty.
        `variables` is not changed. Kernel and bias keep their boxes with metadata; a
        new bias has none.

    Raises:
        ValueError: A pair does not lead to a layer with a kernel and a batch norm with
            statistics, or uses one twice, or `fold` or `fold_before` raises.
        TypeError: `variables` is not a mapping, or a pair is not made of paths, or
            `fold` or `fold_before` raises.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
        >>> from jaxbn.linen import BatchNorm
        >>> class Net(nn.Module):
        ...     folded: bool = False
        ...
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         x = nn.Conv(4, (3, 3), use_bias=self.folded)(x)
        ...         if not self.folded:
        ...             x = BatchNorm(use_running_average=True)(x)
        ...         return nn.Dense(2)(nn.relu(x).mean((1, 2)))
        >>> x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
        >>> variables = Net().init(jax.random.key(1), x)
        >>> folded = jaxbn.fold_tree(variables, [("Conv_0", "BatchNorm_0")])
        >>> y, same = Net().apply(variables, x), Net(folded=True).apply(folded, x)
        >>> print(sorted(folded), sorted(folded["params"]), jnp.allclose(y, same))
        ['params'] ['Conv_0', 'Dense_0'] True
    """
    _checks.check_mapping("variables", variables)
    _checks.check_iterable("pairs", pairs, "pairs")
    tree = _copied(variables)
    read = [_read(tree, pair) for pair in pairs]
    _check_uses(read)
    for pair in read:
        layer = _at(tree, "params", pair.layer)
        kernel, bias = _unboxed(layer["kernel"]), _unboxed(layer.get("bias"))
        learned = _at(tree, "params", pair.norm)
        running = _at(tree, "batch_stats", pair.norm)
        norm = (
            Params(_unboxed(learned.get("scale")), _unboxed(learned.get("bias"))),
            State(_unboxed(running["mean"]), _unboxed(running["var"]), jnp.int32(0)),
        )
        options = {"epsilon": epsilon, **pair.options}
        try:
            kernel, bias = (
                fold(kernel, bias, *norm, **options)
                if pair.norm_is_after
                else fold_before(*norm, kernel, bias, **options)
            )
        except (TypeError, ValueError) as error:
            error.add_note(f"This was in the pair {pair.words} of `pairs`.")
            raise
        layer["kernel"] = _boxed_as(layer["kernel"], kernel)
        layer["bias"] = _boxed_as(layer.get("bias"), bias)
    for pair in read:
        _drop(tree, ("params", *pair.norm), ("scale", "bias"))
        _drop(tree, ("batch_stats", *pair.norm), ("mean", "var", "num_updates"))
    return tree


def _copied(tree: Mapping[str, object]) -> Tree:
    """Return the tree with new dictionaries and the same arrays."""
    return {
        name: _copied(value) if isinstance(value, Mapping) else value
        for name, value in tree.items()
    }


def _at(tree: Tree, collection: str, path: Path) -> Tree:
    """Return what is at `path`, arrays and modules; nothing there is an empty dict."""
    here: Any = tree.get(collection, {})
    for name in path:
        here = here.get(name, {}) if isinstance(here, Mapping) else {}
    return here if isinstance(here, dict) else {}


def paths_in(pairs: Iterable[Pair]) -> list[tuple[Path, ...]]:
    """Return the two paths of modules that each of `pairs` names."""
    _checks.check_iterable("pairs", pairs, "pairs")
    return [tuple(_paths(pair)) for pair in pairs]


def _paths(pair: Sequence[Any]) -> list[Path]:
    """Return the two paths that a pair names."""
    many = isinstance(pair, Sequence) and not isinstance(pair, str)
    if not (many and len(pair) in (2, 3)):
        raise TypeError(
            "`pairs` must hold (first, second) or (first, second, options), in the "
            f"order in which the model applies them; got {pair!r}"
        )
    return [_checks.check_path("pairs", module) for module in pair[:2]]


def _read(tree: Tree, pair: Sequence[Any]) -> _Pair:
    """Return the pair after its checks, with layer and batch norm told apart."""
    paths = _paths(pair)
    words = " and ".join(f"{'/'.join(path)!r}" for path in paths)
    kinds = [_kind(tree, path) for path in paths]
    if kinds[0] == kinds[1]:
        raise ValueError(
            f"`pairs` must name a layer and a batch norm in each; got {words}, both a "
            f"{kinds[0]}"
        )
    after = kinds[0] == LAYER
    options = pair[2] if len(pair) == 3 else {}
    known = getfullargspec(fold if after else fold_before).kwonlyargs
    if not (isinstance(options, Mapping) and set(options) <= set(known)):
        raise TypeError(
            f"`pairs` must hold options for {words} out of {', '.join(known)}; got "
            f"{options!r}"
        )
    layer, norm = paths if after else reversed(paths)
    return _Pair(layer, norm, after, options, words)


def _kind(tree: Tree, path: Path) -> str:
    """Return NORM or LAYER, by the arrays that the module holds."""
    if {"mean", "var"} <= set(_at(tree, "batch_stats", path)):
        return NORM
    if "kernel" in _at(tree, "params", path):
        return LAYER
    raise ValueError(
        "`pairs` must name modules with `mean` and `var` in `batch_stats` or with a "
        f"`kernel` in `params`; got {'/'.join(path)!r}, which has "
        f"{sorted(_at(tree, 'batch_stats', path))} and "
        f"{sorted(_at(tree, 'params', path))}"
    )


def _check_uses(pairs: Sequence[_Pair]) -> None:
    """Refuse pairs that would fold a module twice which the model applies once."""
    for one, two in itertools.combinations(pairs, 2):
        layer_twice = one.layer == two.layer and one.norm_is_after == two.norm_is_after
        norm_twice = one.norm == two.norm and (one.norm_is_after or two.norm_is_after)
        if layer_twice or norm_twice:
            twice = "/".join(one.layer if layer_twice else one.norm)
            raise ValueError(
                "`pairs` must name a layer once with a batch norm after it and once "
                "with one before it, and a batch norm once, or before layers alone; "
                f"got {twice!r} twice, in {one.words} and {two.words}"
            )


def _unboxed(box: object) -> Any:
    """Return the array in a box with metadata, of any class, or the array itself."""
    return next(iter(jax.tree.leaves(box)), None)


def _boxed_as(old: object, array: jax.Array) -> object:
    """Return the array in a box like `old`, if that is one."""
    return array if old is None else jax.tree.structure(old).unflatten([array])


def _drop(tree: Tree, path: Path, names: Sequence[str]) -> None:
    """Remove the arrays, and every dictionary that is empty without them."""
    if not path:
        for name in names:
            tree.pop(name, None)
    elif path[0] in tree:
        _drop(tree[path[0]], path[1:], names)
        if not tree[path[0]]:
            del tree[path[0]]
