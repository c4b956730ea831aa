"""What learns sooner where rewards are rare or late? Each method on the same tasks, at the same budget.

python experiments/faster.py
python experiments/faster.py --tasks DeepSea KeyAndDoor --methods ppo ppo+rnd --num-seeds 16
python experiments/faster.py --resume --run-dir runs/faster      goes on; what is finished is not repeated

A method is measured by its greedy policy, in the task's own reward, at 30 moments of its training or more: how many steps it took until that reached
the task's threshold (in two evaluations in a row), and the area under the curve as a share of the best. It leaves faster.csv and faster.png.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import algorithm, envs, intrinsic, nets, run
from jrl.algorithm import Algorithm
from jrl.algos import dqn, ebu, ppo, rudder, self_imitation
from jrl.envs import Environment, tabular, wrappers
from jrl.equations import mdp
from jrl.numerics import checks
from jrl.run import cli, folders, plot, report, stats

Array = jax.Array
POINTS = 30  # evaluations of a run, or up to twice as many
EPISODES = 16  # of each evaluation
PREDICTOR_UPDATES = 5  # of RUDDER, whose steps count


class Task(NamedTuple):
    """A task: its environment, its budget, the return that solves it, the agent's discount, whether observations are one-hot, and the process
    whose exact values shape the reward."""

    env: Environment
    env_steps: int
    threshold: float
    gamma: float
    one_hot: bool = True
    process: mdp.MDP | None = None


def deep_sea() -> Task:
    return Task(envs.make("DeepSea-bsuite", size=12), 60_000, 0.95, 0.99)


def mountain_car() -> Task:
    return Task(wrappers.goal_reward(envs.make("MountainCar-v0")), 150_000, 0.95, 0.99, one_hot=False)


def key_and_door() -> Task:
    return Task(envs.make("KeyAndDoor"), 60_000, 0.95, 0.99, process=tabular.key_and_door())


def delayed_choice() -> Task:
    return Task(envs.make("DelayedChoice", noise=0.5), 45_000, 0.6, 1.0)


TASKS = {
    "DeepSea": deep_sea,
    "MountainCar": mountain_car,
    "KeyAndDoor": key_and_door,
    "DelayedChoice": delayed_choice,
}


DQN = dqn.Config(num_envs=8, capacity=20_000, network=nets.ValueConfig(norm="none"))
NUMBERS: dict[str, Any] = {"learning_rate": 1e-3, "epsilon_fraction": 0.3, "epsilon_end": 0.02}


def ppo_on(task: Task, bonus: str = "none", imitation: int = 0) -> Algorithm:
    """PPO, with a bonus and so many gradient steps of self-imitation per update."""
    return ppo.make(task.env, *ppo_settings(task, bonus, imitation))


def shaped_ppo_on(task: Task) -> Algorithm:
    """PPO whose reward is shaped by the exact values, measured without the shaping."""
    assert task.process is not None
    env, v = task.env, mdp.value_iteration(task.process, task.gamma)
    shaped = wrappers.shaped(env, lambda obs: obs @ v, task.gamma)
    return ppo.make(shaped, *ppo_settings(task))._replace(env=env)


def ppo_settings(task: Task, bonus: str = "none", imitation: int = 0) -> tuple[ppo.Config, ppo.Hyper]:
    config = ppo.Config(
        num_envs=8,
        num_steps=128,
        bonus=bonus_on(task, bonus),
        imitation=self_imitation.Config(num_gradient_steps=imitation, horizon=256),
        normalize_observations=not task.one_hot,
    )
    return config, ppo.Hyper(learning_rate=5e-4, gamma=task.gamma, imitation=self_imitation.Hyper(weight=1.0))


def bonus_on(task: Task, kind: Any) -> intrinsic.Config:
    """Counts are of cells where observations are not one-hot."""
    return intrinsic.Config(kind="hash" if kind == "counts" and not task.one_hot else kind)


def dqn_on(task: Task, bonus: str = "none", env: Environment | None = None, **changed: Any) -> Algorithm:
    """DQN, with a bonus and with parts changed."""
    config = replace(DQN, bonus=bonus_on(task, bonus), normalize_observations=not task.one_hot, **changed)
    return dqn.make(env or task.env, config, dqn.Hyper(gamma=task.gamma, **NUMBERS))


def ebu_on(task: Task, diffusion: float) -> Algorithm:
    """Targets made backwards."""
    shared = {"num_envs": DQN.num_envs, "capacity": DQN.capacity, "network": DQN.network}
    config = ebu.Config(normalize_observations=not task.one_hot, **shared)  # type: ignore[arg-type]
    return ebu.make(task.env, config, ebu.Hyper(gamma=task.gamma, diffusion=diffusion, **NUMBERS))


def redistributed_on(task: Task, key: Array) -> tuple[Algorithm, int]:
    """DQN that does not look ahead, on rewards that were redistributed by a predictor of returns, and the steps that the predictor took."""
    predictor = rudder.make(task.env)
    spent = PREDICTOR_UPDATES * predictor.env_steps_per_update
    state, _ = run.train_fn(predictor, spent)(key)
    algo = dqn_on(task._replace(gamma=0.0), env=rudder.redistributed(predictor, state))
    return algo._replace(env=predictor.env), spent


PLAIN: dict[str, Callable[[Task], Algorithm]] = {
    "ppo": ppo_on,
    "ppo+rnd": lambda task: ppo_on(task, "rnd"),
    "ppo+icm": lambda task: ppo_on(task, "icm"),
    "ppo+counts": lambda task: ppo_on(task, "counts"),
    "ppo+sil": lambda task: ppo_on(task, imitation=40),
    "ppo+rnd+sil": lambda task: ppo_on(task, "rnd", imitation=40),
    "ppo+shaping": shaped_ppo_on,
    "dqn": dqn_on,
    "dqn+noisy": lambda task: dqn_on(task, network=replace(DQN.network, noisy=True)),
    "dqn+dueling": lambda task: dqn_on(task, network=replace(DQN.network, dueling=True)),
    "dqn+n-step": lambda task: dqn_on(task, n_step=5),
    "dqn+per": lambda task: dqn_on(task, prioritized=True),
    "dqn+rnd": lambda task: dqn_on(task, "rnd"),
    "dqn+counts": lambda task: dqn_on(task, "counts"),
    "ebu 0.5": lambda task: ebu_on(task, 0.5),
    "ebu 1": lambda task: ebu_on(task, 1.0),
}
# Each makes its algorithm of a task and a key, and says how many steps were spent already.
METHODS: dict[str, Callable[[Task, Array], tuple[Algorithm, int]]] = {
    **{name: functools.partial(lambda make, task, key: (make(task), 0), make) for name, make in PLAIN.items()},
    "dqn+rudder": redistributed_on,
}
ONLY = {"ppo+shaping": ("KeyAndDoor",), "dqn+rudder": ("DelayedChoice",)}  # tasks of those that do not fit all


@dataclass(frozen=True)
class Args:
    """Compare methods on tasks."""

    tasks: tuple[str, ...] = tuple(TASKS)  # Tasks: DeepSea, MountainCar, KeyAndDoor, DelayedChoice.
    methods: tuple[str, ...] = tuple(METHODS)  # Methods, as the first column of the table names them.
    num_seeds: int = 8  # Seeds of each method on each task.
    share: float = 1.0  # Share of each task's budget.
    seed: int = 0  # Seed from whose key every seed's key is split.
    run_dir: cli.RunDir = None  # Folder of the runs; default: a new one in runs/.
    resume: bool = False  # Continue the runs in run_dir; those that are finished are not repeated.


def learning_curve(task: Task, method: str, env_steps: int, key: Array) -> tuple[Array, Array]:
    """Environment steps and greedy return of one seed at POINTS moments or more of its training. Pure: vmap it over keys."""
    key_make, key_train = jax.random.split(key)
    algo, spent = METHODS[method](task, key_make)

    def score(state: Any, key: Array) -> dict[str, Array]:
        return {"return": run.evaluate(algo, state, key, EPISODES).returns.mean()}

    every = max(1, (env_steps - spent) // (POINTS * algo.env_steps_per_update))
    measured = algorithm.with_evaluation(algo, score, every, jax.random.key(1))
    _, metrics = run.train_fn(measured, env_steps - spent)(key_train)
    returns = metrics["eval_return"]
    return spent + measured.env_steps_per_update * (1 + jnp.arange(len(returns))), returns


def curves(args: Args, name: str, task: Task, method: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Environment steps ``[points]`` and returns ``[seeds, points]`` of a method on a task, trained unless the folder has them."""
    settings = {"num_seeds": args.num_seeds, "share": args.share, "seed": args.seed}
    file = folder / f"{name}-{method.replace(' ', '-')}.json"
    found = folders.read_json(file, {})
    if found.get("settings") != settings:
        keys = jax.random.split(jax.random.key(args.seed), args.num_seeds)
        budget = int(task.env_steps * args.share)
        steps, returns = jax.jit(jax.vmap(lambda key: learning_curve(task, method, budget, key)))(keys)
        found = {
            "settings": settings,
            "env_steps": np.asarray(steps)[0].tolist(),
            "returns": np.asarray(returns).tolist(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        folders.write_json(file, found)
    return np.array(found["env_steps"]), np.array(found["returns"], float)


def row_of(name: str, method: str, env_steps: np.ndarray, returns: np.ndarray, threshold: float) -> dict[str, Any]:
    """A line of the table."""
    solved = solved_at(env_steps, returns, threshold)
    return {
        "task": name,
        "method": method,
        "seeds that got there": f"{np.isfinite(solved).sum()} of {len(solved)}",
        "steps until then": words(np.minimum(solved, env_steps[-1])),
        "area, %": words(100 * np.clip(returns / threshold, 0, 1).mean(1)),
    }


def solved_at(env_steps: np.ndarray, returns: np.ndarray, threshold: float) -> np.ndarray:
    """Steps after which each seed's returns ``[seeds, points]`` reached the threshold, twice in a row; infinite where they did not."""
    there = returns >= threshold
    there[:, :-1] &= there[:, 1:]
    return np.where(there.any(1), env_steps[there.argmax(1)], np.inf)


def words(x: np.ndarray) -> str:
    """IQM and 95% interval of one number a seed."""
    low, high = stats.interval(x)
    return f"{stats.iqm(x):,.0f} ({low:,.0f} to {high:,.0f})"


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    for field, allowed in (("tasks", TASKS), ("methods", METHODS)):
        for name in getattr(args, field):
            checks.one_of(field, name, allowed)
    checks.not_empty(tasks=args.tasks, methods=args.methods)
    checks.positive_int("num_seeds", args.num_seeds)
    checks.above_zero("share", args.share)
    folder = cli.folder_of_runs(args.run_dir, args.resume, "faster")
    planned = [(t, m) for t in args.tasks for m in args.methods if t in ONLY.get(m, TASKS)]
    tasks = {name: TASKS[name]() for name in args.tasks}  # tables are made outside of compiled programs
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[Any]] = {name: [] for name in args.tasks}
    for i, (name, method) in enumerate(planned, start=1):
        print(f"{i} of {len(planned)}: {method} on {name}", file=sys.stderr, flush=True)
        env_steps, returns = curves(args, name, tasks[name], method, folder)
        rows.append(row_of(name, method, env_steps, returns, tasks[name].threshold))
        lines[name].append((method, env_steps, returns))
        panels = [plot.Panel(name, "environment steps", "greedy return", each) for name, each in lines.items() if each]
        plot.draw(folder / "faster.png", panels)
    report.print_table(folder / "faster.csv", rows)
    print(f"{folder}/faster.png")


if __name__ == "__main__":
    cli.main(main)
