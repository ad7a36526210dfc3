"""Recipes: small, whole programs over the public API; the documentation names them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle

import jaxbn
from jaxbn.linen import BatchNorm, recalibrate

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def batch(seed=0):
    return np.random.default_rng(seed).normal(1, 2, (32, 3)).astype(np.float32)


@jax.jit
def trained(state, x):
    """The state after one batch, without scale and bias."""
    return jaxbn.batch_norm(x, jaxbn.Params(None, None), state, train=True)[1]


def test_gradient_accumulation_updates_once():
    """A scan over microbatches, and one update with the statistics of all of them."""
    params, state = jaxbn.init(3)

    @jax.jit
    def accumulate(microbatches):
        def body(moments, x):
            y, _ = jaxbn.batch_norm(x, params, state, train=True)
            return jaxbn.merge_moments(moments, jaxbn.batch_moments(x)), y

        nothing = jaxbn.Moments(*jnp.zeros((3, 3)))
        moments, _ = jax.lax.scan(body, nothing, microbatches)
        return jaxbn.update_state(state, moments, momentum=0.9)

    merged = accumulate(batch().reshape(4, 8, 3))
    jax.tree.map(close, merged, trained(state, batch()))


def test_gradient_accumulation_in_linen():
    """`recalibrate` gives the moments of all microbatches; blend them in once."""
    norm = BatchNorm(False, momentum=0.9)
    variables = norm.init(jax.random.key(0), batch())
    pooled = recalibrate(norm, variables, list(batch().reshape(4, 8, 3)))
    stats = jax.tree.map(
        lambda old, new: 0.9 * old + 0.1 * new,
        variables["batch_stats"],
        pooled["batch_stats"],
    )
    _, want = norm.apply(variables, batch(), mutable=["batch_stats"])
    jax.tree.map(close, stats, want["batch_stats"])


def test_adapt_at_test_time():
    """A blend of running and batch statistics, as if the former were n elements."""
    _, state = jaxbn.init(3)
    prior = jaxbn.Moments(jnp.full(3, 16.0), state.mean, state.var)
    blend = jaxbn.merge_moments(prior, jaxbn.batch_moments(batch()))
    x = np.float64(batch())
    mean = 32 / 48 * x.mean(0)
    var = (16 * (1 + mean**2) + 32 * (x.var(0) + (x.mean(0) - mean) ** 2)) / 48
    y = jaxbn.normalize(batch(), blend.mean, blend.var)
    close(y, (x - mean) / np.sqrt(var + 1e-5))


def test_domains_are_a_stacked_state():
    """One state for each domain, chosen by a traced index."""
    _, one = jaxbn.init(3)
    states = jax.tree.map(lambda a: jnp.stack([a] * 4), one)

    @jax.jit
    def step(x, states, domain):
        state = trained(jax.tree.map(lambda a: a[domain], states), x)
        return jax.tree.map(lambda a, s: a.at[domain].set(s), states, state)

    for seed, domain in enumerate([2, 0, 2]):
        states = step(batch(seed), states, domain)
    np.testing.assert_array_equal(states.num_updates, [1, 0, 2, 0])
    want = trained(one, batch(1))
    jax.tree.map(lambda got, want: close(got[0], want), states, want)


class AdvProp(nn.Module):
    """Two batch norms, for clean and for adversarial examples; all else is shared."""

    @nn.compact
    def __call__(self, x, adversarial):
        h = nn.Dense(4, name="shared")(x)
        norms = [BatchNorm(False, name=name) for name in ("clean", "adversarial")]
        if self.is_initializing():
            return [norm(h) for norm in norms]
        return norms[adversarial](h)


@jax.numpy_rank_promotion("allow")
def test_adversarial_examples_have_statistics_of_their_own():
    variables = AdvProp().init(jax.random.key(0), batch(), False)
    _, updates = AdvProp().apply(variables, batch(), True, mutable=["batch_stats"])
    assert abs(updates["batch_stats"]["adversarial"]["mean"]).max() > 0
    np.testing.assert_array_equal(updates["batch_stats"]["clean"]["mean"], 0)


def test_conditional_scale_and_bias_per_sample():
    """Normalize without parameters; then each sample has its class's."""
    rng, (_, state) = np.random.default_rng(0), jaxbn.init(3)
    scales, biases = rng.normal(size=(2, 10, 3)).astype(np.float32)
    classes = rng.integers(0, 10, 32)

    @jax.jit
    def conditional(x, classes):
        x_hat, _ = jaxbn.batch_norm(x, jaxbn.Params(None, None), state, train=True)
        return x_hat * jnp.array(scales)[classes] + jnp.array(biases)[classes]

    want = oracle.forward(batch()) * scales[classes] + biases[classes]
    close(conditional(batch(), classes), want)
