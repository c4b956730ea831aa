"""The option-critic in four rooms, beside Q-learning: the goal is moved half-way, and the options are drawn.

python experiments/options.py
python experiments/options.py --num-options 8 --num-seeds 16

It leaves options.png, the options of the first seed with the lengths of episodes, and options.csv.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl import envs
from jrl.algorithm import Algorithm
from jrl.algos import option_critic, td
from jrl.envs import Environment
from jrl.envs.tabular import FOUR_ROOMS, MOVES
from jrl.numerics import checks
from jrl.run import cli, plot, report, stats

Array = jax.Array
GOALS = ((7, 9), (10, 8))  # the eastern door, then a cell of the lower right room
POINTS = 50  # of the curves, in each half
NUM_STEPS = 500  # of an update


@dataclass(frozen=True)
class Args:
    """Learn options in four rooms, and move the goal."""

    num_options: int = 4  # Options.
    num_seeds: int = 16  # Seeds.
    env_steps: int = 200_000  # Environment steps of each seed for each of the two goals.
    seed: int = 0  # Seed from whose key every seed's key is split.
    run_dir: cli.RunDir = None  # Folder of the result; default: a new one in runs/.


def q_learning(env: Environment) -> Algorithm:
    return td.make(env, td.Config(num_steps=NUM_STEPS), td.Hyper(learning_rate=0.5, epsilon=0.05))


def train(algos: list[Algorithm], num_updates: int, key: Array) -> tuple[Any, Array, Array]:
    """One seed, which meets one goal after the other: its state, and the length and number of episodes of each update ``[2, updates]``."""
    state, halves = algos[0].init(key), []
    for algo in algos:

        def update(state: Any, _: None, algo: Algorithm = algo) -> tuple[Any, Any]:
            return algo.update(state)

        state, metrics = jax.lax.scan(update, state, length=num_updates)
        halves.append(metrics)
    return state, *(jnp.stack([m[name] for m in halves]) for name in ("episode_length", "episodes"))


def draw_options(path: Path, state: Any, curves: list[Any]) -> None:
    """The likeliest action of each option in each cell, where it terminates (dark), and the lengths of episodes."""
    plt = plot.pyplot()
    num_options = state.nu.shape[0]
    figure, axes = plt.subplots(1, num_options + 1, figsize=(3.2 * (num_options + 1), 3.4), layout="constrained")
    free = np.array([[letter != "#" for letter in row] for row in FOUR_ROOMS])
    for i, ax in enumerate(axes[:-1]):
        beta = 1 / (1 + np.exp(-np.asarray(state.nu[i]).reshape(free.shape)))
        ax.imshow(np.where(free, beta, np.nan), vmin=0, vmax=1, cmap="Blues")
        best = np.asarray(state.theta[i]).argmax(0).reshape(free.shape)
        rows, columns = np.nonzero(free)
        down, right = np.array(MOVES)[best[rows, columns]].T
        ax.quiver(columns, rows, right, down, angles="xy", pivot="mid", scale=18, width=0.008)
        ax.set(title=f"option {i + 1}", xticks=[], yticks=[], facecolor="0.3")
    for label, env_steps, lengths in curves:
        axes[-1].plot(env_steps, stats.iqm(lengths), label=label)
    axes[-1].set(xlabel="environment steps", ylabel="episode length", yscale="log", title="the goal is moved half-way")
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    axes[-1].tick_params(axis="x", rotation=30)
    axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    checks.positive_int("num_options", args.num_options)
    checks.positive_int("num_seeds", args.num_seeds)
    checks.positive_int("env_steps", args.env_steps, at_least=POINTS * NUM_STEPS)
    folder = cli.folder_of_runs(args.run_dir, False, "options")
    folder.mkdir(parents=True, exist_ok=True)

    def with_options(env: Environment) -> Algorithm:
        return option_critic.make(env, option_critic.Config(num_options=args.num_options, num_steps=NUM_STEPS))

    makers = {"option-critic": with_options, "Q-learning": q_learning}
    num_updates = args.env_steps // NUM_STEPS
    rows, curves, states = [], [], {}
    for name, make in makers.items():
        print(name, flush=True)
        algos = [make(envs.make("FourRooms", goal_row=row, goal_column=column)) for row, column in GOALS]
        keys = jax.random.split(jax.random.key(args.seed), args.num_seeds)
        trained = jax.jit(jax.vmap(functools.partial(train, algos, num_updates)))(keys)
        states[name] = jax.tree.map(lambda x: x[0], trained[0])
        lengths, episodes = (np.asarray(x).reshape(args.num_seeds, -1) for x in trained[1:])
        env_steps, smooth = plot.curve(lengths, episodes, NUM_STEPS * (1 + np.arange(2 * num_updates)))
        curves.append((name, env_steps, smooth))
        half = smooth.shape[1] // 2
        rows.append(
            {
                "method": name,
                "first goal, at its end": words(smooth[:, half - 1]),
                "second goal, first tenth": words(smooth[:, half : half + max(1, half // 10)].mean(1)),
                "second goal, at its end": words(smooth[:, -1]),
            }
        )
    draw_options(folder / "options.png", states["option-critic"], curves)
    report.print_table(folder / "options.csv", rows)
    print(f"{folder}/options.png")


def words(lengths: np.ndarray) -> str:
    """Steps of an episode: IQM and 95% interval over seeds."""
    return stats.text(stats.summarize(lengths))


if __name__ == "__main__":
    cli.main(main)
