"""Recipes: small, whole programs over the public API; the documentation names them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxbn
from jaxbn.linen import BatchNorm, BatchRenorm, recalibrate

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def batch(seed=0, shape=(32, 3)):
    return jax.random.normal(jax.random.key(seed), shape) * 2 + 1


class TestGradientAccumulation:
    """A scan over microbatches, and one update with the statistics of all of them."""

    def test_functional(self):
        params, state = jaxbn.init(3)
        microbatches = batch().reshape(4, 8, 3)

        def body(moments, x):
            y, _ = jaxbn.batch_norm(x, params, state, train=True)
            return jaxbn.merge_moments(moments, jaxbn.batch_moments(x)), y

        nothing = jaxbn.Moments(*jnp.zeros((3, 3)))
        moments, _ = jax.lax.scan(body, nothing, microbatches)
        merged = jaxbn.update_state(state, moments, momentum=0.9)
        _, want = jaxbn.batch_norm(batch(), params, state, train=True)
        jax.tree.map(close, merged, want)

    def test_plain_behaviour_is_one_update_per_microbatch(self):
        params, state = jaxbn.init(3)

        def body(state, x):
            return jaxbn.batch_norm(x, params, state, train=True)[1], None

        after, _ = jax.lax.scan(body, state, batch().reshape(4, 8, 3))
        assert after.num_updates == 4
        assert abs(after.mean - 0.1 * batch().mean(0)).max() > 0.1

    def test_linen(self):
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


class TestTwoSwitches:
    """Normalizing and updating are independent."""

    def test_normalize_by_the_batch_without_updating(self):
        norm = BatchNorm(False)
        variables = norm.init(jax.random.key(0), batch())
        y, _ = norm.apply(variables, batch(), mutable=["batch_stats"])  # and drop it
        close(y, oracle.forward(batch()))

    def test_frozen_statistics_train_scale_and_bias(self):
        rng = np.random.default_rng(0)
        mean, var, scale, bias = rng.uniform(0.5, 2, (4, 3)).astype(np.float32)
        weight = rng.normal(size=(32, 3)).astype(np.float32)
        state = jaxbn.State(jnp.array(mean), jnp.array(var), jnp.int32(0))

        def loss(x, params):
            y, _ = jaxbn.batch_norm(x, params, state, train=False)
            return (y * weight).sum()

        params = jaxbn.Params(jnp.array(scale), jnp.array(bias))
        dx, dparams = jax.grad(loss, (0, 1))(batch(), params)
        x_hat = (np.asarray(batch()) - mean) / np.sqrt(var + 1e-5)
        close(dx, weight * scale / np.sqrt(var + 1e-5))
        close(dparams.scale, (weight * x_hat).sum(0), rtol=1e-4)
        close(dparams.bias, weight.sum(0), rtol=1e-4)

    def test_adapt_at_test_time(self):
        """A blend of running and batch statistics, as if the former were n elements."""
        params, state = jaxbn.init(3)
        prior = jaxbn.Moments(jnp.float32(16), state.mean, state.var)
        prior = prior._replace(num_elements=jnp.full(3, 16.0))
        blend = jaxbn.merge_moments(prior, jaxbn.batch_moments(batch()))
        y = jaxbn.normalize(batch(), blend.mean, blend.var, *params)
        x = np.asarray(batch(), np.float64)
        mean = 32 / 48 * x.mean(0)
        var = (16 * (1 + mean**2) + 32 * (x.var(0) + (x.mean(0) - mean) ** 2)) / 48
        close(y, (x - mean) / np.sqrt(var + 1e-5))


class TestSeveralStatistics:
    def test_domains_are_a_stacked_state(self):
        """One state for each domain, chosen by a traced index."""
        params, one = jaxbn.init(3)
        states = jax.tree.map(lambda a: jnp.stack([a] * 4), one)

        @jax.jit
        def step(x, states, domain):
            state = jax.tree.map(lambda a: a[domain], states)
            y, state = jaxbn.batch_norm(x, params, state, train=True)
            return y, jax.tree.map(lambda a, s: a.at[domain].set(s), states, state)

        for seed, domain in enumerate([2, 0, 2]):
            _, states = step(batch(seed), states, domain)
        np.testing.assert_array_equal(states.num_updates, [1, 0, 2, 0])
        _, want = jaxbn.batch_norm(batch(1), params, one, train=True)
        jax.tree.map(lambda got, want: close(got[0], want), states, want)

    def test_adversarial_examples_have_statistics_of_their_own(self):
        """AdvProp: two modules in the model, shared everything else."""

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x, adversarial):
                h = nn.Dense(4, name="shared")(x)
                name = "adversarial" if adversarial else "clean"
                return BatchNorm(False, name=name)(h)

        with jax.numpy_rank_promotion("allow"):
            net = Net()
            both = [net.init(jax.random.key(0), batch(), adversarial=a) for a in (0, 1)]
            variables = jax.tree.map(lambda a: a, both[0])
            for collection in both[1]:
                variables[collection] = both[1][collection] | variables[collection]
            _, updates = net.apply(variables, batch(), 1, mutable=["batch_stats"])
        moved = updates["batch_stats"]
        assert abs(moved["adversarial"]["mean"]).max() > 0
        np.testing.assert_array_equal(moved["clean"]["mean"], 0)

    def test_conditional_scale_and_bias_per_sample(self):
        """Normalize without parameters; then each sample has its class's."""
        _, state = jaxbn.init(3)
        scales, biases = jax.random.normal(jax.random.key(3), (2, 10, 3))
        classes = jax.random.randint(jax.random.key(4), (32,), 0, 10)
        x_hat, _ = jaxbn.batch_norm(
            batch(), jaxbn.Params(None, None), state, train=True
        )
        y = x_hat * scales[classes] + biases[classes]
        want = oracle.forward(batch()) * np.asarray(scales)[classes]
        close(y, want + np.asarray(biases)[classes])


class TestModules:
    def test_renorm_module_is_the_function(self):
        norm = BatchRenorm(False, momentum=0.9, r_max=2.0, d_max=0.5)
        variables = norm.init(jax.random.key(0), batch())
        y, updates = norm.apply(variables, batch(), mutable=["batch_stats"])
        want, state = jaxbn.batch_renorm(
            batch(), *jaxbn.init(3), train=True, r_max=2.0, d_max=0.5
        )
        close(y, want)
        assert updates["batch_stats"]["num_updates"] == 1
        close(updates["batch_stats"]["var"], state.var)

    def test_renorm_module_takes_its_schedule_from_its_count(self):
        norm = BatchRenorm(False, r_max=lambda t: 1 + t, d_max=lambda t: 2 * t)
        variables = norm.init(jax.random.key(0), batch())
        first, updates = norm.apply(variables, batch(), mutable=["batch_stats"])
        close(first, oracle.forward(batch()))
        second, _ = norm.apply(variables | updates, batch(), mutable=["batch_stats"])
        assert abs(second - first).max() > 0.1

    def test_ghost_field(self):
        norm = BatchNorm(False, momentum=0.9, ghost_batch_size=8)
        variables = norm.init(jax.random.key(0), batch()[:1])
        y, updates = norm.apply(variables, batch(), mutable=["batch_stats"])
        want, state = jaxbn.ghost_batch_norm(
            batch(), *jaxbn.init(3), train=True, ghost_batch_size=8
        )
        close(y, want)
        close(updates["batch_stats"]["mean"], state.mean)
        evaluate = BatchNorm(True, ghost_batch_size=8)
        assert evaluate.apply(variables, batch()[:5]).shape == (5, 3)

    def test_renorm_has_no_ghosts(self):
        norm = BatchRenorm(False, ghost_batch_size=8)
        variables = norm.init(jax.random.key(0), batch())
        with pytest.raises(ValueError, match="`ghost_batch_size` must be None"):
            norm.apply(variables, batch(), mutable=["batch_stats"])
