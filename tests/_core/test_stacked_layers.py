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


def check(net):
    """A net, (x, layers, mask) -> y and stacked states, and its gradients."""
    (x, mask, dy), layers = draw()

    def loss(x, layers):
        y, states = net(x, layers, mask)
        return (y * dy).sum() + states.mean.sum() + states.var.sum(), (y, states)

    gradients = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (dx, dlayers), (y, states) = gradients(x, layers)
    got = (y, states.mean, states.var, dx, *dlayers)
    for name, a, d in zip(ARRAYS, got, desired(), strict=True):
        np.testing.assert_allclose(a, d, atol=2e-5 * np.abs(d).max(), err_msg=name)


def block_with(derivative):
    static = {"train": True, "momentum": MOMENTUM, "epsilon": EPSILON}

    def block(h, layer, mask):
        w, *params = layer
        args = h @ w, jaxbn.Params(*params), jaxbn.init(WIDTH)[1]
        y, state = jaxbn.batch_norm(*args, mask=mask, derivative=derivative, **static)
        return jnp.tanh(checkpoint_name(y, "y")), state

    return block


def loop(block):
    def net(x, layers, mask):
        states = []
        for layer in zip(*layers, strict=True):
            x, state = block(x, layer, mask)
            states.append(state)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    return net


def scan(block):
    def net(x, layers, mask):
        return jax.lax.scan(lambda h, layer: block(h, layer, mask), x, layers)

    return net


policies = jax.checkpoint_policies
POLICIES = {
    "nothing": None,
    "everything": policies.everything_saveable,
    "dots": policies.dots_saveable,
    "names": policies.save_only_these_names("y"),
}


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
@pytest.mark.parametrize("net", [loop, scan], ids=["loop", "scan"])
def test_blocks(net, derivative):
    check(net(block_with(derivative)))


@pytest.mark.parametrize(
    ("net", "derivative"), [(loop, "jvp"), (scan, "vjp")], ids=["loop", "scan"]
)
@pytest.mark.parametrize("policy", POLICIES)
def test_remat_of_blocks(policy, net, derivative):
    remat = functools.partial(jax.checkpoint, policy=POLICIES[policy])
    check(net(remat(block_with(derivative))))


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, mask):
        h = nn.Dense(WIDTH, use_bias=False, name="dense")(h)
        norm = BatchNorm(False, momentum=MOMENTUM, epsilon=EPSILON, name="norm")
        return nn.tanh(norm(h, mask=mask)), None


def test_linen_scan_of_remat():
    (x, mask, _), _ = draw()
    lifted = nn.scan(
        nn.remat(Block),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=DEPTH,
    )
    model = lifted()
    batch_stats = model.init(jax.random.key(0), x, mask)["batch_stats"]

    def net(x, layers, mask):
        w, scale, bias = layers
        params = {"dense": {"kernel": w}, "norm": {"scale": scale, "bias": bias}}
        variables = {"params": params, "batch_stats": batch_stats}
        (y, _), updated = model.apply(variables, x, mask, mutable=["batch_stats"])
        return y, jaxbn.State(**updated["batch_stats"]["norm"], num_updates=0)

    check(net)
