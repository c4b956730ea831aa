"""The random walk of Sutton & Barto (2nd ed.): figures 6.2, 7.2, 12.3 and 12.6, each one compiled program.

python experiments/td_random_walk.py
python experiments/td_random_walk.py --runs 1000 --run-dir runs/walk

Every curve averages the root-mean-square error of the state values over the states, the first 10 episodes and the runs;
all runs, step sizes and settings of a figure are computed at once. It leaves td_random_walk.png and a CSV.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.algos import td
from jrl.envs import tabular
from jrl.equations import mdp
from jrl.equations.mdp import MDP
from jrl.numerics import checks
from jrl.run import cli, memory, plot, report

Array = jax.Array


@dataclass(frozen=True)
class Args:
    """Reproduce the book's random-walk figures."""

    runs: int = 100  # Runs averaged into each point.
    seed: int = 0  # Seed of all runs.
    run_dir: cli.NamedFolder = Path("runs/td-random-walk")  # Folder for the plot and the table.


# Of NumPy: an array of JAX would look for the platform before a wrong one can be refused.
TD_ALPHAS, MC_ALPHAS = np.array([0.05, 0.1, 0.15], np.float32), np.array([0.01, 0.02, 0.03, 0.04], np.float32)
ALPHAS = np.linspace(0, 1, 21, dtype=np.float32)
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LAMBDAS = np.array([0.0, 0.4, 0.8, 0.9, 0.95, 0.975, 0.99, 1.0], np.float32)
EPISODES = 10
LONGEST = 1000  # of an episode; of 19 states one in a million is longer


def episodes(key: Array, process: MDP, number: int, longest: int) -> td.Stream:
    """Episodes of the walk ``[number, longest]``, each padded with transitions that teach nothing."""
    env = tabular.environment(process, one_hot=False)
    x = jnp.eye(len(process.terminal))

    def episode(key: Array) -> td.Stream:
        key_reset, key_steps = jax.random.split(key)

        def step(carry: Any, key: Array) -> tuple[Any, td.Stream]:
            state, over = carry
            _, later, reward, terminated, _ = env.step(key, state, jnp.int32(0))
            alive = 1.0 - over
            t = td.Stream(
                x[state[0]] * alive, reward * alive, (1.0 - terminated) * alive, x[later[0]], 1.0 - terminated
            )
            return (jax.tree.map(lambda new, old: jnp.where(over, old, new), later, state), over | terminated), t

        start = (env.reset(key_reset)[1], jnp.bool_(False))
        return jax.lax.scan(step, start, jax.random.split(key_steps, longest))[1]

    return jax.vmap(episode)(jax.random.split(key, number))


def rms_errors(process: MDP, learn: Any, w: Array, streams: td.Stream, gamma: float = 1.0) -> Array:
    """Error after each episode ``[episodes]`` of ``learn(w, stream) -> w``, over the states that are not terminal."""
    exact = mdp.evaluate_policy(process, mdp.uniform_policy(process), gamma)
    inside = ~process.terminal

    def episode(w: Array, stream: td.Stream) -> tuple[Array, Array]:
        w = learn(w, stream)
        return w, jnp.sqrt(jnp.sum(jnp.where(inside, w - exact, 0.0) ** 2) / inside.sum())

    return jax.lax.scan(episode, w, streams)[1]


@jax.jit
def figure_6_2(keys: Array) -> tuple[Array, Array, Array]:
    """Five states: values of TD(0) after 0, 1, 10 and 100 episodes ``[4, 7]`` of one run, and errors of TD and Monte Carlo
    over 100 episodes ``[step sizes, runs, 100]``."""
    process = tabular.random_walk(5, 0.0, 1.0)
    middle = jnp.where(process.terminal, 0.0, 0.5)
    streams = jax.vmap(lambda k: episodes(k, process, 100, 150))(keys)

    def errors(method: Any, alphas: np.ndarray) -> Array:
        def one(alpha, s):
            return rms_errors(process, lambda w, e: method(w, e, alpha)[0], middle, s)

        return jax.vmap(lambda alpha: jax.vmap(lambda s: one(alpha, s))(streams))(alphas)

    first = jax.tree.map(lambda x: x[0], streams)
    _, path = jax.lax.scan(lambda w, e: (td.td(w, e, 0.1)[0],) * 2, middle, first)
    values = jnp.concatenate([middle[None], path[jnp.array([0, 9, 99])]])
    return values, errors(td.td, TD_ALPHAS), errors(td.monte_carlo, MC_ALPHAS)


@jax.jit
def figures_of_19(keys: Array) -> dict[str, Array]:
    """Nineteen states, errors over the first 10 episodes ``[settings, alphas, runs]``: n-step TD (7.2), the offline
    lambda-return (12.3), TD(lambda) (12.6), and true online TD(lambda) (12.8)."""
    process = tabular.random_walk(19)
    streams = jax.vmap(lambda k: episodes(k, process, EPISODES, LONGEST))(keys)
    zeros = jnp.zeros(len(process.terminal))

    def grid(learn: Any) -> Array:
        """Mean error ``[alphas, runs]`` of ``learn(w, episode, alpha)``."""

        def one(alpha, s):
            return rms_errors(process, lambda w, e: learn(w, e, alpha), zeros, s).mean()

        return jax.vmap(lambda alpha: jax.vmap(lambda s: one(alpha, s))(streams))(ALPHAS)

    def over_lambdas(learn):
        return jax.lax.map(lambda lam: grid(lambda w, e, a: learn(w, e, a, lam)), LAMBDAS)

    return {
        "n-step TD": jnp.stack([grid(lambda w, e, a, n=n: td.n_step_td(w, e, a, n)[0]) for n in STEPS]),
        "offline lambda-return": over_lambdas(td.lambda_return),
        "TD(lambda)": over_lambdas(lambda w, e, a, lam: td.td_lambda(w, e, a, lam)[0]),
        "true online TD(lambda)": over_lambdas(lambda w, e, a, lam: td.td_lambda(w, e, a, lam, "dutch")[0]),
    }


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    checks.positive_int("runs", args.runs)
    transitions = jax.ShapeDtypeStruct((args.runs, EPISODES, LONGEST, 2 * 21 + 3), jnp.float32)  # two states of 21 each
    memory.refuse_if_too_large(f"runs = {args.runs:,}", transitions)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    keys = jax.random.split(jax.random.key(args.seed), args.runs)
    values, td_errors, mc_errors = jax.tree.map(np.asarray, figure_6_2(keys))
    grids = jax.tree.map(np.asarray, figures_of_19(keys))
    seconds = time.perf_counter() - begin

    panels, rows = [], []
    exact, states = np.arange(1, 6) / 6, np.arange(1, 6)
    lines = [(f"after {n} episodes", states, v[None, 1:6]) for n, v in zip((0, 1, 10, 100), values, strict=True)]
    lines.append(("true values", states, exact[None]))
    panels.append(plot.Panel("6.2: values of TD(0), one run", "state", "value", lines))
    steps = np.arange(1, 101)
    lines = [(f"TD {a:g}", steps, e) for a, e in zip(TD_ALPHAS, td_errors, strict=True)]
    lines += [(f"MC {a:g}", steps, e) for a, e in zip(MC_ALPHAS, mc_errors, strict=True)]
    panels.append(plot.Panel("6.2: TD(0) and Monte Carlo by step size", "episodes", "RMS error", lines))

    figures = {
        "n-step TD": "7.2",
        "offline lambda-return": "12.3",
        "TD(lambda)": "12.6",
        "true online TD(lambda)": "12.8",
    }
    for name, grid in grids.items():
        settings = [f"n = {n}" for n in STEPS] if name == "n-step TD" else [f"lambda = {x:g}" for x in LAMBDAS]
        # As in the book, the plot ends where errors leave it.
        shown = np.where(grid < 0.55, grid, np.inf)
        lines = [(s, ALPHAS, e.T) for s, e in zip(settings, shown, strict=True)]
        panels.append(plot.Panel(f"{figures[name]}: {name}, 19 states", "alpha", "RMS error, first 10 episodes", lines))
        mean = grid.mean(-1)
        for s, e in zip(settings, mean, strict=True):
            best = int(np.nanargmin(e))
            rows.append(
                {"method": name, "setting": s, "best alpha": f"{ALPHAS[best]:.2f}", "RMS error": f"{e[best]:.3f}"}
            )
    plot.draw(args.run_dir / "td_random_walk.png", panels)
    report.print_table(args.run_dir / "td_random_walk.csv", rows)
    print(f"{args.runs} runs of each point in {seconds:.1f} s, compiling included; {args.run_dir}/td_random_walk.png")


if __name__ == "__main__":
    cli.main(main)
