"""CrossQ of sbx on Pendulum-v1, with `jaxbn.linen.BatchRenorm` in place of its own.

    python tests/clients/crossq.py

sbx's layer opens its limits, r_max 3 and d_max 5, at once after a warm-up, of 1,000
updates here so that most of a short run is renormalized. First both layers see the same
batches; sbx puts epsilon elsewhere than the paper, so that they are equal only without.

`replace_batch_norm` leaves sbx's layer, which is no heir of Flax's, alone. So Flax's
batch norm, as which sbx's begins, is put in, and trains for a few updates beside ours
put in and `replace_batch_norm` around Flax's. Those two must be equal to the bit.

Then each renorm trains with each seed. A return is the mean of 20 episodes of the
trained policy, whose starts are the same for all; a random policy has -1200 or so.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import _report
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import linen as nn
from resnet import error
from sbx import CrossQ
from sbx.common import jax_layers
from sbx.crossq import policies
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import jaxbn.linen
from jaxbn.cli.common import Parser, integer_from

EPISODES, FIRST_EPISODE = 20, 1000
SHORT = 120  # steps; the first 100 are not learned from
ROUNDING = 1e-5  # of 20 updates in float32
# How much less ours may have on average, set before the first run: half of what one
# more turn to swing up costs (150 or so), and less than between two starts.
MARGIN = 75.0


def batch_renorm(
    use_running_average: bool,
    momentum: float = 0.99,
    epsilon: float = 0.001,
    warmup_steps: int = 100_000,
) -> nn.Module:
    """Ours, by the arguments of sbx's."""

    def limit(before: float, after: float) -> optax.Schedule:
        schedules = [optax.constant_schedule(value) for value in (before, after)]
        return optax.join_schedules(schedules, [warmup_steps])

    return jaxbn.linen.BatchRenorm(
        use_running_average,
        momentum=momentum,
        epsilon=epsilon,
        r_max=limit(1.0, 3.0),
        d_max=limit(0.0, 5.0),
    )


LAYERS = {"sbx": jax_layers.BatchRenorm, "jaxbn": batch_renorm}


def layer_row(epsilon: float, *, warmup: int = 5, updates: int = 40) -> _report.Row:
    """The largest difference of y, dx, mean and var in float64, over all updates."""
    layers = {
        name: layer(
            use_running_average=False,
            momentum=0.9,
            epsilon=epsilon,
            warmup_steps=warmup,
        )
        for name, layer in LAYERS.items()
    }

    def step(layer, variables, x, dy):
        def train(x):
            return layer.apply(variables, x, mutable=["batch_stats"])

        y, vjp, updates = jax.vjp(train, x, has_aux=True)
        stats = updates["batch_stats"]
        return variables | updates, (y, *vjp(dy), stats["mean"], stats["var"])

    random = np.random.default_rng(0)
    variables, largest = {}, 0.0
    for i in range(updates):
        # Batches that wander, so that both limits are reached and left again.
        mean, std = 20 * np.sin(i / 2), np.exp(2 * np.sin(i / 5))
        x, dy = random.standard_normal((2, 64, 8))
        x, results = x * std + mean, {}
        for name, layer in layers.items():
            if i == 0:
                initial = layer.init(jax.random.key(0), x)
                variables[name] = jax.tree.map(in_float64, initial)
            variables[name], results[name] = step(layer, variables[name], x, dy)
        for theirs, ours in zip(*results.values(), strict=True):
            difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
            largest = max(largest, float(difference))
    row = {"what": f"layer, epsilon {epsilon:g}: difference", "jaxbn": largest}
    # Where the placing of epsilon cannot be seen, nothing else may be.
    return row | ({"holds": largest < 1e-9} if epsilon < 1e-9 else {})


def in_float64(a: Any) -> Any:
    a = jnp.asarray(a)
    return a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a


def batch_norm(norm: Any) -> Callable[..., nn.Module]:
    """A batch norm without renorm, by the arguments of sbx's."""

    def make(use_running_average, momentum=0.99, epsilon=0.001, warmup_steps=0):
        return norm(use_running_average, momentum=momentum, epsilon=epsilon)

    return make


def swaps_row(args: argparse.Namespace) -> _report.Row:
    """The critic's distance from that with Flax's batch norm, after some updates."""
    flax, ours = batch_norm(nn.BatchNorm), batch_norm(jaxbn.linen.BatchNorm)
    critics = {}
    for name, layer, context in (
        ("flax", flax, contextlib.nullcontext()),
        ("put in", ours, contextlib.nullcontext()),
        ("replaced", flax, jaxbn.linen.replace_batch_norm()),
    ):
        with context, mock.patch.object(policies, "BatchRenorm", layer):
            state = learn(0, SHORT, args).policy.qf_state
            critics[name] = {"params": state.params, "stats": state.batch_stats}
    same = jax.tree.map(np.array_equal, critics["put in"], critics["replaced"])
    errors = {name: error(critic, critics["flax"]) for name, critic in critics.items()}
    # None would mean that nothing was replaced.
    holds = jax.tree.all(same) and 0 < errors["replaced"] < ROUNDING
    return {"what": "batch norm: difference", **errors, "holds": holds}


def learn(seed: int, steps: int, args: argparse.Namespace) -> CrossQ:
    model = CrossQ(
        "MlpPolicy",
        make_vec_env("Pendulum-v1", seed=seed),
        seed=seed,
        policy_kwargs={
            "net_arch": {"pi": [64, 64], "qf": [args.width, args.width]},
            "renorm_warmup_steps": args.warmup,
        },
    )
    return model.learn(steps)


def train(layer: Any, seed: int, args: argparse.Namespace) -> float:
    """The mean return of the trained policy."""
    with mock.patch.object(policies, "BatchRenorm", layer):
        model = learn(seed, args.steps, args)
        starts = make_vec_env("Pendulum-v1", seed=FIRST_EPISODE)
        value, _ = evaluate_policy(model, starts, n_eval_episodes=EPISODES)
    return float(np.mean(value))


def rows(args: argparse.Namespace) -> Iterator[_report.Row]:
    with jax.enable_x64(True):
        checks = [layer_row(epsilon) for epsilon in (1e-12, 1e-3)]
    yield from checks
    yield swaps_row(args)
    returns = {name: [] for name in LAYERS}
    for seed in range(args.seeds):
        row: dict[str, Any] = {"what": f"return, seed {seed}"}
        for name, layer in LAYERS.items():
            begun = time.monotonic()
            row[name] = train(layer, seed, args)
            row[f"{name}, s"] = time.monotonic() - begun
            returns[name].append(row[name])
        yield row
    means = {name: statistics.fmean(values) for name, values in returns.items()}
    holds = means["jaxbn"] >= means["sbx"] - MARGIN
    yield {"what": "return, mean", **means, "holds": holds}


def main() -> int:
    parser = Parser(description=__doc__)
    count = integer_from(1)
    parser.add_argument("--steps", type=count, metavar="N", default=4000)
    parser.add_argument("--warmup", type=count, metavar="N", default=1000)
    parser.add_argument("--width", type=count, metavar="N", default=128)
    parser.add_argument("--seeds", type=count, metavar="N", default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    title = f"CrossQ on Pendulum-v1, {args.steps} steps, warm-up {args.warmup}"
    return _report.report(title, ["sbx-rl", "gymnasium"], rows(args))


if __name__ == "__main__":
    sys.exit(main())
