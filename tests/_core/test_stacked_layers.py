"""Three blocks tanh(batch_norm(h @ w)), by loop and scan, with and without remat.

Each is held against NumPy: the oracle's forward and backward, block after block.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

import jaxbn
from jaxbn.linen import BatchNorm

DEPTH, ROWS, WIDTH = 3, 12, 4
EPSILON, MOMENTUM = 1e-3, 0.75
ARRAYS = ("y", "mean", "var", "dx", "dw", "dscale", "dbias")


def draw():
    """Float32 (x, mask, dy) and (w, scale, bias), these stacked by layer."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    mask = rng.random((ROWS, 1)) < 0.8
    w = rng.normal(size=(DEPTH, WIDTH, WIDTH)).astype(np.float32)
    scale, bias = rng.uniform(0.5, 1.5, (2, DEPTH, WIDTH)).astype(np.float32)
    return (x, mask, dy), (w, scale, bias)


@functools.cache
def desired():
    """What `ARRAYS` should be; the state of each layer was mean 0, variance 1."""
    (x, mask, dy), layers = draw()
    options = {"epsilon": EPSILON, "mask": mask}
    h, tape, states = np.float64(x), [], []
    for w, scale, bias in zip(*layers, strict=True):
        z = h @ w
        tape.append((h, z, np.tanh(oracle.forward(z, scale, bias, **options))))
        _, mean, var = oracle.moments(z, mask=mask)
        states.append(((1 - MOMENTUM) * mean, MOMENTUM + (1 - MOMENTUM) * var))
        h = tape[-1][-1]
    g, grads = np.float64(dy), []
    for (h_in, z, h_out), w, scale in zip(
        tape[::-1], layers[0][::-1], layers[1][::-1], strict=True
    ):
        g, dscale, dbias = oracle.backward(g * (1 - h_out**2), z, scale, **options)
        grads.insert(0, (h_in.T @ g, dscale, dbias))
        g = g @ w.T
    stacked = [np.stack(a) for a in zip(*states, strict=True)]
    return h, *stacked, g, *(np.stack(a) for a in zip(*grads, strict=True))


def assert_desired(y, mean, var, dx, dw, dscale, dbias):
    got = (y, mean, var, dx, dw, dscale, dbias)
    for name, a, d in zip(ARRAYS, got, desired(), strict=True):
        np.testing.assert_allclose(a, d, atol=2e-5 * np.abs(d).max(), err_msg=name)


def run(net, mask, dy, x, layers):
    """A net and its gradients; `net` maps (x, layers, mask) to y and stacked states."""

    def loss(x, layers):
        y, states = net(x, layers, mask)
        return (y * dy).sum() + states.mean.sum() + states.var.sum(), (y, states)

    (dx, dlayers), (y, states) = jax.grad(loss, (0, 1), has_aux=True)(x, layers)
    return y, states.mean, states.var, dx, *dlayers


def block_with(derivative):
    def block(h, layer, mask):
        w, scale, bias = layer
        y, state = jaxbn.batch_norm(
            h @ w,
            jaxbn.Params(scale, bias),
            jaxbn.init(WIDTH)[1],
            train=True,
            momentum=MOMENTUM,
            epsilon=EPSILON,
            mask=mask,
            derivative=derivative,
        )
        return jnp.tanh(checkpoint_name(y, "y")), state

    return block


def loop(block):
    def net(x, layers, mask):
        states = []
        for i in range(DEPTH):
            x, state = block(x, [a[i] for a in layers], mask)
            states.append(state)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    return net


def scan(block):
    def net(x, layers, mask):
        return jax.lax.scan(lambda h, layer: block(h, layer, mask), x, layers)

    return net


policies = jax.checkpoint_policies
REMAT = {
    "plain": lambda block: block,
    "checkpoint": jax.checkpoint,
    **{
        name: functools.partial(jax.checkpoint, policy=policy)
        for name, policy in {
            "nothing": policies.nothing_saveable,
            "everything": policies.everything_saveable,
            "dots": policies.dots_saveable,
            "names": policies.save_only_these_names("y"),
        }.items()
    },
}


@pytest.mark.parametrize("net", [loop, scan], ids=["loop", "scan"])
@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
def test_blocks(net, remat, derivative):
    (x, mask, dy), layers = draw()
    f = functools.partial(run, net(REMAT[remat](block_with(derivative))))
    assert_desired(*jax.jit(f)(mask, dy, x, layers))


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, mask):
        h = nn.Dense(WIDTH, use_bias=False, name="dense")(h)
        norm = BatchNorm(False, momentum=MOMENTUM, epsilon=EPSILON, name="norm")
        return nn.tanh(norm(h, mask=mask)), None


def lifted_scan(block):
    return nn.scan(
        block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=DEPTH,
    )


@pytest.mark.parametrize("lift", [lambda b: b, nn.remat], ids=["scan", "scan of remat"])
def test_linen_scan(lift):
    (x, mask, dy), layers = draw()
    model = lifted_scan(lift(Block))()
    batch_stats = model.init(jax.random.key(0), x, mask)["batch_stats"]

    def net(x, layers, mask):
        w, scale, bias = layers
        params = {"dense": {"kernel": w}, "norm": {"scale": scale, "bias": bias}}
        variables = {"params": params, "batch_stats": batch_stats}
        (y, _), updated = model.apply(variables, x, mask, mutable=["batch_stats"])
        state = updated["batch_stats"]["norm"]
        return y, jaxbn.State(state["mean"], state["var"], jnp.array(0))

    assert_desired(*jax.jit(functools.partial(run, net))(mask, dy, x, layers))


def test_linen_remat():
    """One block after the other, each in nn.remat."""
    (x, mask, dy), layers = draw()
    block = nn.remat(Block)()
    variables = block.init(jax.random.key(0), x, mask)

    def apply(h, layer, mask):
        w, scale, bias = layer
        params = {"dense": {"kernel": w}, "norm": {"scale": scale, "bias": bias}}
        (h, _), updated = block.apply(
            variables | {"params": params}, h, mask, mutable=["batch_stats"]
        )
        state = updated["batch_stats"]["norm"]
        return h, jaxbn.State(state["mean"], state["var"], jnp.array(0))

    assert_desired(*jax.jit(functools.partial(run, loop(apply)))(mask, dy, x, layers))
