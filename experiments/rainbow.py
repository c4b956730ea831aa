"""What does each part of Rainbow do to DQN? Every part switched on alone, and all together, over many seeds.

python experiments/rainbow.py                                     all parts, 8 seeds of CartPole-v1, 100,000 steps
python experiments/rainbow.py --env Acrobot-v1 --v-min -100 --v-max 0
python experiments/rainbow.py --parts plain n-step rainbow --num-seeds 16

With --resume, what is finished in --run-dir is not trained again. It leaves rainbow.png and rainbow.csv there.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax

from jrl import envs, run
from jrl.algorithm import Algorithm
from jrl.algos import dqn
from jrl.algos.presets import Preset, dqn_preset
from jrl.numerics import checks
from jrl.run import cli, plot, report, stats

# Fields of the configuration, and of its network, that make up a part.
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "double": ({"double": True}, {}),
    "dueling": ({}, {"dueling": True}),
    "n-step": ({"n_step": 3}, {}),
    "prioritized": ({"prioritized": True}, {}),
    "noisy": ({}, {"noisy": True}),
    "munchausen": ({"munchausen": True}, {}),
    "C51": ({"distribution": "categorical"}, {}),
    "quantile": ({"distribution": "quantile"}, {}),
    "rainbow": (
        {"double": True, "n_step": 3, "prioritized": True, "distribution": "categorical"},
        {"dueling": True, "noisy": True},
    ),
}


@dataclass(frozen=True)
class Args:
    """Compare the parts of Rainbow."""

    env: str = "CartPole-v1"  # Environment, with its preset.
    parts: tuple[str, ...] = tuple(PARTS)  # Parts of Rainbow to compare.
    env_steps: int = 100_000  # Environment steps of each seed.
    num_seeds: int = 8  # Seeds of each part.
    seed: int = 0  # Seed from whose key every seed's key is split.
    v_min: float = 0.0  # Smallest return that C51 can represent.
    v_max: float = 100.0  # Largest return that C51 can represent.
    run_dir: cli.RunDir = None  # Folder of the runs; default: a new one in runs/.
    resume: bool = False  # Continue the runs in run_dir, bit for bit; those that are finished are not repeated.


def with_part(preset: Preset, env: envs.Environment, name: str, v_min: float, v_max: float) -> Algorithm:
    """The preset, without any part but this one."""
    fields, shape = PARTS[name]
    config = replace(preset.config, double=False, n_step=1, network=replace(preset.config.network, **shape))
    return dqn.make(env, replace(config, **fields), preset.hyper._replace(v_min=v_min, v_max=v_max))


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    checks.positive_int("num_seeds", args.num_seeds)
    checks.not_empty(parts=args.parts)
    for name in args.parts:
        checks.one_of("parts", name, PARTS)
    preset, env = dqn_preset("auto", args.env), envs.make(args.env)
    folder = cli.folder_of_runs(args.run_dir, args.resume, f"rainbow-{args.env}")
    rows, curves = [], []
    for name in args.parts:
        print(name, flush=True)
        algo, home = with_part(preset, env, name, args.v_min, args.v_max), folder / name
        key = jax.random.key(args.seed)
        result = run.train(algo, key, args.env_steps, num_seeds=args.num_seeds, run_dir=home, resume=True)
        if not result.finished:
            raise KeyboardInterrupt
        m, scores = result.metrics, result.summary["eval"]
        curves.append((name, *plot.curve(m["episode_return"], m["episodes"], m["env_steps"])))
        rows.append({"part": name, "greedy": stats.text(scores), "sampled": stats.text(scores["sampled"])})
        plot.learning_curves(folder / "rainbow.png", f"DQN on {env.name}, one part at a time", curves)
    report.print_table(folder / "rainbow.csv", rows)
    print(f"{folder}/rainbow.png")


if __name__ == "__main__":
    cli.main(main)
