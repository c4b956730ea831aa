"""What learns sooner where rewards are rare or late? Each method on the same tasks, at the same budget.

python experiments/faster.py
python experiments/faster.py --tasks DeepSea KeyAndDoor --methods ppo ppo+rnd --num-seeds 16
python experiments/faster.py --resume --run-dir runs/faster      goes on; what is finished is not repeated

A method is measured by its greedy policy, in the task's own reward, at 30 moments of its training or more: how many steps it took until that reached
the task's threshold (in two evaluations in a row), and the area under the curve as a share of the best. It leaves faster.csv and faster.png.

Methods that are shown how (dqfd, ppo+cloning) see 1,000 steps of a policy that was trained before and saved in the run folder; its steps do
not count. Those of a predictor of returns and of a curriculum do.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from faster_methods import ARE_SHOWN, METHODS, ONLY, SHOWN, TASKS, Task, ppo_on

from jrl import algorithm, run
from jrl.algos import bc
from jrl.experience import replay
from jrl.numerics import checks
from jrl.run import cli, folders, plot, report, stats

Array = jax.Array
POINTS = 30  # evaluations of a run, or up to twice as many


@dataclass(frozen=True)
class Args:
    """Compare methods on tasks."""

    tasks: tuple[str, ...] = tuple(TASKS)  # Tasks to learn.
    methods: tuple[str, ...] = tuple(METHODS)  # Methods, as the first column of the table names them.
    num_seeds: int = 8  # Seeds of each method on each task.
    share: float = 1.0  # Share of each task's budget.
    seed: int = 0  # Seed from whose key every seed's key is split.
    run_dir: cli.RunDir = None  # Folder of the runs; default: a new one in runs/.
    resume: bool = False  # Continue the runs in run_dir; those that are finished are not repeated.


def demonstrations(name: str, task: Task, folder: Path) -> replay.Step:
    """Steps of a policy that PPO with a bonus and self-imitation learned in the task's budget, by one seed; trained unless the folder has it."""
    teacher, saved = ppo_on(task, "rnd", imitation=40), folder / f"teacher-{name}"
    run.train(teacher, jax.random.key(1), task.env_steps, run_dir=saved, resume=saved.exists(), eval_episodes=0)
    state = run.load(saved, algo=teacher).member(0)
    return jax.jit(lambda key: bc.play(teacher, state, key, SHOWN, num_envs=4))(jax.random.key(2))


def learning_curve(task: Task, method: str, env_steps: int, key: Array) -> tuple[Array, Array]:
    """Environment steps and greedy return of one seed at POINTS moments or more of its training. Pure: vmap it over keys."""
    key_make, key_train = jax.random.split(key)
    algo, spent = METHODS[method](task, key_make)

    def score(state: Any, key: Array) -> dict[str, Array]:
        return {"return": run.evaluate(algo, state, key, task.episodes).returns.mean()}

    every = max(1, (env_steps - spent) // (POINTS * algo.env_steps_per_update))
    measured = algorithm.with_evaluation(algo, score, every, jax.random.key(1))
    _, metrics = run.train_fn(measured, env_steps - spent)(key_train)
    returns = metrics["eval_return"]
    return spent + measured.env_steps_per_update * (1 + jnp.arange(len(returns))), returns


def curves(args: Args, name: str, task: Task, method: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Environment steps ``[points]`` and returns ``[seeds, points]`` of a method on a task, trained unless the folder has them."""
    settings = {"num_seeds": args.num_seeds, "share": args.share, "seed": args.seed}

    def train() -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(args.seed), args.num_seeds)
        budget = int(task.env_steps * args.share)
        steps, returns = jax.jit(jax.vmap(lambda key: learning_curve(task, method, budget, key)))(keys)
        return {"env_steps": np.asarray(steps)[0].tolist(), "returns": np.asarray(returns).tolist()}

    found = folders.remembered(folder / f"{name}-{method.replace(' ', '-')}.json", settings, train)
    return np.array(found["env_steps"]), np.array(found["returns"], float)


def row_of(name: str, method: str, env_steps: np.ndarray, returns: np.ndarray, threshold: float) -> dict[str, Any]:
    """A line of the table."""
    solved = solved_at(env_steps, returns, threshold)
    return {
        "task": name,
        "method": method,
        "seeds that got there": f"{np.isfinite(solved).sum()} of {len(solved)}",
        "steps until then": stats.brief(np.minimum(solved, env_steps[-1]), ",.0f"),
        "area, %": stats.brief(100 * np.clip(returns / threshold, 0, 1).mean(1), ",.0f"),
    }


def solved_at(env_steps: np.ndarray, returns: np.ndarray, threshold: float) -> np.ndarray:
    """Steps after which each seed's returns ``[seeds, points]`` reached the threshold, twice in a row; infinite where they did not."""
    there = returns >= threshold
    there[:, :-1] &= there[:, 1:]
    return np.where(there.any(1), env_steps[there.argmax(1)], np.inf)


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
    for name in {t for t, m in planned if m in ARE_SHOWN}:
        tasks[name] = tasks[name]._replace(shown=demonstrations(name, tasks[name], folder))
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[Any]] = {f"{name}: {kind}": [] for name in args.tasks for kind in ("PPO", "from replay")}
    for i, (name, method) in enumerate(planned, start=1):
        print(f"{i} of {len(planned)}: {method} on {name}", file=sys.stderr, flush=True)
        env_steps, returns = curves(args, name, tasks[name], method, folder)
        rows.append(row_of(name, method, env_steps, returns, tasks[name].threshold))
        lines[f"{name}: {'PPO' if method.startswith('ppo') else 'from replay'}"].append((method, env_steps, returns))
        if i == len(planned) or planned[i][0] != name:  # the last method of a task
            panels = [plot.Panel(x, "environment steps", "greedy return", each) for x, each in lines.items() if each]
            plot.draw(folder / "faster.png", panels)
    report.print_table(folder / "faster.csv", rows)
    print(f"{folder}/faster.png")


if __name__ == "__main__":
    cli.main(main)
