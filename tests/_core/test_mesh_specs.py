"""A 2-D mesh, data x model: what is sharded over what, and what is synchronized."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assert_close
from devices import (
    EPSILON,
    MOMENTUM,
    NUM,
    assert_all_close,
    batch_norm,
    check_vma_or_not,
    draw,
    expected,
    local_loss,
    mesh,
    old_state,
)
from jax.sharding import PartitionSpec as P

import jaxbn

pytestmark = pytest.mark.exhaustive

SHAPE = {"data": 4, "model": 2}
SPECS = [(None, None), ("data", None), (None, "model"), ("data", "model")]
COMBINATIONS = list(itertools.product(SPECS, SPECS))
SYNC = [None, "data", "model", ("model", "data")]  # the latter in no mesh's order


def batches(sync):
    """The devices that share a batch, by their place in the mesh."""
    sync = (sync,) if isinstance(sync, str) else sync or ()
    grid = np.arange(NUM).reshape(*SHAPE.values())
    rest = [i for i, name in enumerate(SHAPE) if name not in sync]
    return np.transpose(grid, rest + [i for i in (0, 1) if i not in rest]).reshape(
        -1, int(np.prod([SHAPE[name] for name in sync]))
    )


def lead(spec):
    """An array's leading axes, one per axis of the mesh: of size 1 where replicated."""
    return tuple(
        1 if s is None else n for s, n in zip(spec, SHAPE.values(), strict=True)
    )


def everywhere(array):
    """One copy for each device, in a row."""
    full = np.broadcast_to(array, (*SHAPE.values(), *array.shape[2:]))
    return full.reshape(NUM, *array.shape[2:])


def summed(array, spec):
    """The gradient of what was copied: the sum over its copies."""
    array = array.reshape(*SHAPE.values(), *array.shape[1:])
    axes = tuple(i for i, s in enumerate(spec) if s is None)
    return array.sum(axes, keepdims=True)


@pytest.mark.parametrize(
    ("sync", "derivative"),
    [*((sync, "vjp") for sync in SYNC), *((sync, "jvp") for sync in SYNC[1:])],
    ids=str,
)
@check_vma_or_not
def test_every_combination_of_specs(sync, check_vma, derivative):
    """All specs of x, with its mask, and of the parameters: 16 maps in one program."""

    def body(x, scale, bias, mask, dy, c):
        mask = None if mask is None else mask[0, 0]
        params = jaxbn.Params(scale[0, 0], bias[0, 0])
        static = {"axis_name": sync, "derivative": derivative}
        loss = local_loss(x[0, 0], params, old_state(), mask, dy[0, 0], c, **static)
        return jax.tree.map(lambda a: a[None, None], loss)

    def gradients(spec_x, spec_p, x, scale, bias, mask, dy, c):
        def total(x, scale, bias):
            losses, aux = jax.shard_map(
                body,
                mesh=mesh(**SHAPE),
                in_specs=(
                    P(*spec_x),
                    P(*spec_p),
                    P(*spec_p),
                    P(*spec_x),
                    P("data", "model"),
                    P(),
                ),
                out_specs=P("data", "model"),
                check_vma=check_vma,
            )(x, scale, bias, mask, dy.reshape(*SHAPE.values(), *dy.shape[1:]), c)
            return losses.sum(), aux

        return jax.grad(total, (0, 1, 2), has_aux=True)(x, scale, bias)

    @jax.jit
    def program(drawn):
        return [
            gradients(*specs, *args)
            for specs, args in zip(COMBINATIONS, drawn, strict=True)
        ]

    drawn = [draw(lead(spec_x), lead(spec_p)) for spec_x, spec_p in COMBINATIONS]
    if sync == "model":  # this one is compiled without masks
        drawn = [(x, scale, bias, None, dy, c) for x, scale, bias, _, dy, c in drawn]
    for (spec_x, spec_p), args, (grads, aux) in zip(
        COMBINATIONS, drawn, program(drawn), strict=True
    ):
        x, scale, bias, mask, dy, _ = args
        full = [None if a is None else everywhere(a) for a in (x, scale, bias, mask)]
        desired = list(expected(*full, dy, batches(sync)))
        desired[3:] = map(summed, desired[3:], (spec_x, spec_p, spec_p))
        aux = [a.reshape(d.shape) for a, d in zip(aux, desired[:3], strict=True)]
        assert_all_close((*aux, *grads), desired, f"(x {spec_x}, params {spec_p})")


@check_vma_or_not
def test_features_sharded_over_model(check_vma):
    """The usual layout: rows over data, features over model, moments over data only."""
    rows, features = P("data", "model"), P("model")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh(data=4, model=2),
        in_specs=(rows, features, features, rows, rows),
        out_specs=((rows, features, features), (rows, features, features)),
        check_vma=check_vma,
    )
    def gradients(x, scale, bias, mask, dy):
        def f(x, scale, bias):
            params, state = jaxbn.Params(scale, bias), jaxbn.init(2)[1]
            y, new = batch_norm(x, params, state, mask=mask, axis_name="data")
            return (y * dy).sum(), (y, new.mean, new.var)

        (dx, *dparams), aux = jax.grad(f, (0, 1, 2), has_aux=True)(x, scale, bias)
        if not check_vma:
            dparams = jax.lax.psum(dparams, "data")
        return aux, (dx, *dparams)

    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 24, 4)).astype(np.float32)
    scale, bias = rng.uniform(0.5, 2, (2, 4)).astype(np.float32)
    mask = rng.random(x.shape) < 0.7
    (y, mean, var), grads = gradients(x, scale, bias, mask, dy)
    options = {"epsilon": EPSILON, "mask": mask}
    _, want_mean, want_var = oracle.moments(x, mask=mask)
    assert_close(y, oracle.forward(x, scale, bias, **options), jnp.float32, 24)
    assert_close(mean, (1 - MOMENTUM) * want_mean, jnp.float32, 24)
    assert_close(var, MOMENTUM + (1 - MOMENTUM) * want_var, jnp.float32, 24)
    for got, want in zip(grads, oracle.backward(dy, x, scale, **options), strict=True):
        assert_close(got, want, jnp.float32, 24)
