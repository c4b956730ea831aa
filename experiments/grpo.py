"""GRPO and its kin: a small language model learns from verified rewards, many seeds in one compiled program.

python experiments/grpo.py                                    8 seeds of modular addition, from scratch
python experiments/grpo.py --task reverse                     after a short supervised start; also sort, addition, countdown, parity
python experiments/grpo.py --methods grpo dr_grpo dapo gspo cispo rloo reinforce++
python experiments/grpo.py --sweep hyper.learning_rate=3e-4,1e-3
python experiments/grpo.py --task my_task.py                  a task of your own

Each method's run is in its folder; grpo.png and grpo.csv compare them: right answers before the first update and after the last.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import jax
import tyro

from jrl import run
from jrl.algos import grpo
from jrl.algos.presets import grpo_preset
from jrl.lm import tasks
from jrl.numerics import checks
from jrl.run import cli, loggers, plot, report, stats


@dataclass(frozen=True)
class Args:
    """Train a language model on a task with a verifier."""

    # Task: modular_addition, addition, reverse, sort, parity, countdown, or a Python file.
    task: str = "modular_addition"
    task_params: tuple[str, ...] = ()  # Parameters of the task, as NAME=NUMBER ...
    # Methods: grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce++, or custom for config and hyper as they are.
    methods: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--method"])] = ("grpo",)
    updates: int = 500  # Updates of each seed; default: the preset's.
    num_seeds: int = 8  # Seeds trained together.
    seed: int = 0  # Seed from whose key every seed's key is split.
    run_dir: cli.RunDir = None  # Folder of the runs; default: a new one in runs/.
    resume: bool = False  # Continue the runs in run_dir, bit for bit; those that are finished are not repeated.
    sweep: tuple[str, ...] = ()  # Train a grid of hyperparameters in one program, as hyper.NAME=NUMBER,NUMBER ...
    eval_episodes: int = 256  # Problems in the evaluation of each seed.
    eval_every: int | None = None  # Tokens between evaluations of each seed; default: evaluate only at the end.
    checkpoint_every: float = 60.0  # Seconds between checkpoints.
    log_every: int | None = None  # Updates averaged into a row of metrics; default: at most about 1,000 rows.
    seeds_at_once: int | None = None  # Seeds computed at once; default: as many as are fast and fit the memory.
    devices: int | None = None  # Number of devices to use; default: all.
    log: tuple[Literal["wandb"], ...] = ()  # Loggers besides the folder's table and TensorBoard events.
    config: grpo.Config = field(default_factory=grpo.Config)  # Static settings.
    hyper: grpo.Hyper = grpo.Hyper()  # Hyperparameters.


def defaults(argv: list[str]) -> Args:
    """The preset of the task that the command line names."""
    preset = grpo_preset(cli.read_ahead(argv, task=Args.task)["task"])
    return Args(updates=preset.updates, config=preset.config, hyper=preset.hyper)


def settings_of(name: str, args: Args, preset: Args) -> tuple[grpo.Config, grpo.Hyper]:
    """Of a method. Raises ``ValueError`` if the command line wants another value for what the method is made of."""
    if name == "custom":
        return args.config, args.hyper
    config, hyper = grpo.method(name, args.config, args.hyper)
    for part, fields in zip(("config", "hyper"), grpo.METHODS[name], strict=True):
        for field_name, value in fields.items():
            given = getattr(getattr(args, part), field_name)
            if given not in (value, getattr(getattr(preset, part), field_name)):
                raise ValueError(
                    f"{part}.{field_name} of method {name} is {value}, got {given}; set it with --methods custom"
                )
    return config, hyper


def percent(per_seed: Iterable[float | None]) -> str:
    """Share of right answers, IQM and interval over seeds."""
    return stats.text(stats.summarize([100 * (float("nan") if x is None else float(x)) for x in per_seed]))


def main(argv: list[str]) -> None:
    preset = defaults(argv)
    args = cli.parse(Args, argv, preset, __doc__)
    checks.not_empty(methods=args.methods)
    checks.positive_int("updates", args.updates)
    for name in args.methods:
        checks.one_of("methods", name, (*grpo.METHODS, "custom"))
    task = tasks.make(args.task, **cli.parse_params(args.task_params))
    # All of them before the first is trained: one may be refused.
    algos = {name: grpo.make(task, *settings_of(name, args, preset)) for name in args.methods}
    folder = cli.folder_of_runs(args.run_dir, args.resume, f"grpo-{task.name}")
    rows: list[dict[str, Any]] = []
    curves = []
    for name in args.methods:
        algo, home = algos[name], folder / name
        if algo.config.supervised:
            print(f"{name}: {algo.config.supervised} supervised updates first", flush=True)
        hypers = run.sweep.cells(algo.hyper, args.sweep)
        result = run.train(
            algo,
            jax.random.key(args.seed),
            args.updates * algo.env_steps_per_update,
            num_seeds=args.num_seeds,
            hypers=hypers,
            run_dir=home,
            resume=True,
            eval_every=args.eval_every,
            eval_episodes=args.eval_episodes,
            checkpoint_every=args.checkpoint_every,
            log_every=args.log_every,
            seeds_at_once=args.seeds_at_once,
            devices=args.devices,
            loggers=[loggers.NAMED[name]() for name in args.log],
        )
        if not result.finished:
            raise KeyboardInterrupt
        m, reached = result.metrics, result.summary["eval"]
        starts = m["episode_return"][..., 0].reshape(-1, args.num_seeds)
        for (cell, scores), start in zip(result.summary.get("cells", {"": reached}).items(), starts, strict=True):
            rows.append(
                {
                    "method": f"{name} {cell}".strip(),
                    "at the start, %": percent(start),
                    "sampled, %": percent(scores["sampled"]["per_seed"]),
                    "greedy, %": percent(scores["per_seed"]),
                }
            )
        if hypers is None:
            answers = m["env_steps"] // task.answer_length
            curves.append((name, *plot.curve(m["episode_return"], m["episodes"], answers)))
    report.print_table(folder / "grpo.csv", rows)
    if curves:
        panel = plot.Panel(task.name, "answers per seed", "share of right answers, sampled", curves)
        plot.draw(folder / "grpo.png", [panel])
        print(f"{folder}/grpo.png")


if __name__ == "__main__":
    cli.main(main)
