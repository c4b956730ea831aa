"""Acting by tables, after Sutton & Barto (2nd ed.): the cliff walk (figure 6.4) and maximization bias (figure 6.5).

python experiments/q_learning.py
python experiments/q_learning.py --runs 1000 --methods q_learning sarsa expected_sarsa double_q tree_backup

All runs of a method are one compiled program. It leaves q_learning.png.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import jax
import numpy as np

from jrl import envs, run
from jrl.algos import td
from jrl.envs import tabular
from jrl.equations import mdp
from jrl.numerics import checks
from jrl.run import cli, memory, plot


@dataclass(frozen=True)
class Args:
    """Reproduce the book's figures of control."""

    # Methods on the cliff: sarsa, expected_sarsa, q_learning, double_q, sarsa_lambda, watkins_q, tree_backup.
    methods: tuple[str, ...] = ("sarsa", "expected_sarsa", "q_learning", "sarsa_lambda")
    runs: int = 200  # Runs averaged into each point.
    episodes: int = 300  # Episodes of the cliff walk.
    seed: int = 0  # Seed of all runs.
    run_dir: cli.NamedFolder = Path("runs/q-learning")  # Folder for the plots.


def by_episode(
    env: envs.Environment, method: str, hyper: td.Hyper, env_steps: int, runs: int, seed: int, metric: str
) -> np.ndarray:
    """A metric of each run's episodes in their order, ``[runs, episodes]``; as many as every run finished."""
    history = jax.ShapeDtypeStruct((runs, env_steps), jax.numpy.float32)
    memory.refuse_if_too_large(f"{runs:,} runs of {env_steps:,} steps", history)
    algo = td.make(env, td.Config(method, num_steps=1), hyper)  # type: ignore[arg-type]  # checked in main
    train = jax.jit(lambda keys: jax.vmap(run.train_fn(algo, env_steps))(keys)[1][metric])
    history = np.asarray(train(jax.random.split(jax.random.key(seed), runs)))
    ended = [row[~np.isnan(row)] for row in history]  # NaN where no episode ended at that step
    if not min(map(len, ended)):
        raise ValueError(f"episodes is too small: with {method} a run finished none in {env_steps} steps")
    return np.stack([row[: min(map(len, ended))] for row in ended])


def group_means(x: np.ndarray) -> np.ndarray:
    """Means over 20 groups of runs, for the plot: the book's figures are means, and a fall off the cliff is rare."""
    return np.stack([group.mean(0) for group in np.array_split(x, min(20, len(x)))])


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    for name in ("runs", "episodes"):
        checks.positive_int(name, getattr(args, name))
    checks.not_empty(methods=args.methods)
    for method in args.methods:
        checks.one_of("methods", method, get_args(td.Method))
    args.run_dir.mkdir(parents=True, exist_ok=True)

    cliff = envs.make("CliffWalking")
    hyper = td.Hyper(learning_rate=0.5, gamma=1.0, epsilon=0.1)
    walks, biases = [], []
    print("cliff walk, return an episode in the last tenth of the episodes:")
    for method in args.methods:
        rate = 0.2 if method in ("sarsa_lambda", "watkins_q") else 0.5  # traces repeat each step many times
        faster = hyper._replace(learning_rate=rate)
        returns = by_episode(cliff, method, faster, 60 * args.episodes, args.runs, args.seed, "episode_return")
        returns = returns[:, : args.episodes]
        walks.append((method, np.arange(1, returns.shape[1] + 1), group_means(np.maximum(returns, -150))))
        print(f"  {method}: {returns[:, -max(1, args.episodes // 10) :].mean():.1f}", flush=True)
    best = float(mdp.value_iteration(tabular.cliff(), 1.0)[36])
    print(f"  the best possible: {best:.0f}")

    bias = envs.strict(tabular.environment(tabular.maximization_bias(), "bias"))
    print("maximization bias, episodes that go left, first 10 and last 10 of 300 (the best possible 5%):")
    for method in ("q_learning", "double_q", "expected_sarsa"):
        # An episode that goes left takes two steps, one that goes right a single one.
        lengths = by_episode(bias, method, td.Hyper(0.1, 1.0, 0.1), 600, 5 * args.runs, args.seed, "episode_length")
        left = 100 * (lengths[:, :300] - 1)
        biases.append((method, np.arange(1, 301), group_means(left)))
        print(f"  {method}: {left[:, :10].mean():.0f}% {left[:, -10:].mean():.0f}%", flush=True)

    plot.draw(
        args.run_dir / "q_learning.png",
        [
            plot.Panel("6.4: cliff walk", "episodes", "sum of rewards (cut at -150)", walks),
            plot.Panel("6.5: maximization bias", "episodes", "% left from A", biases),
        ],
    )
    print(f"{args.run_dir}/q_learning.png")


if __name__ == "__main__":
    cli.main(main)
