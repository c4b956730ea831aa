"""Command lines of experiments: typed dataclasses in, one clear line on an error."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import jax
import tyro

from jrl import envs
from jrl.algorithm import Algorithm
from jrl.run import sweep as sweeps
from jrl.run.checkpoint import RunError
from jrl.run.loop import Result, train


@dataclass(frozen=True)
class Options:
    """What every experiment can be told.

    Attributes:
        env: environment id, or a Python file that defines reset, step and action_space.
        env_params: the environment's own parameters, as NAME=NUMBER ...
        preset: auto (the environment's, else the default), none, or the name of a preset.
        env_steps: budget of each seed; default from the preset.
        num_seeds: seeds trained side by side.
        seed: the key that every seed's key is split from.
        run_dir: folder of the run; default runs/ALGORITHM-ENV-TIME.
        resume: go on with the run in run_dir, bit for bit.
        sweep: train a grid in one program, as hyper.NAME=NUMBER,NUMBER ...
        precision: float32, bfloat16, float16, pure_bfloat16, or like params=float32,compute=bfloat16,output=float32; short
            for config.precision.
        eval_every: evaluate each time so many steps are done, besides at the end.
        eval_episodes: whole episodes in each evaluation of each seed; 0 for none.
        checkpoint_every: seconds between checkpoints.
        log_every: updates averaged into a row of metrics; default: at most about 1,000 rows.
        seeds_at_once: seeds computed at once; default: what is fast and fits the memory.
        devices: devices to use; default: all.
        gif: draw the best seed's final policy.
    """

    env: str = "CartPole-v1"
    env_params: tuple[str, ...] = ()
    preset: str = "auto"
    env_steps: int = 500_000
    num_seeds: int = 16
    seed: int = 0
    run_dir: Path | None = None
    resume: bool = False
    sweep: tuple[str, ...] = ()
    precision: str | None = None
    eval_every: int | None = None
    eval_episodes: int = 32
    checkpoint_every: float = 60.0
    log_every: int | None = None
    seeds_at_once: int | None = None
    devices: int | None = None
    gif: bool = False


def preset_of(argv: list[str], options: type[Options] = Options) -> tuple[str, str]:
    """``--preset`` and ``--env`` of a command line, read ahead since they decide the other defaults."""
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ahead.add_argument("--preset", default=options.preset)
    ahead.add_argument("--env", default=options.env)
    known, _ = ahead.parse_known_args(argv)
    return known.preset, known.env


def paragraphs(doc: str | None) -> str:
    """A docstring whose examples, one a line, stay apart in ``--help``."""
    return "\n\n".join(line.strip() for line in (doc or "").splitlines() if line.strip())


def parse_params(texts: tuple[str, ...]) -> dict[str, float | int]:
    """``("memory_length=10",)`` as ``{"memory_length": 10}``. Raises ``ValueError`` with the form that is wanted."""
    params: dict[str, float | int] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"env_params are written NAME=NUMBER; got {text!r}") from None
        params[name] = int(value) if value.is_integer() and "." not in number else value
    return params


def experiment(
    argv: list[str],
    options: type[Options],
    preset: Callable[[str, str], Any],
    make: Callable[..., Algorithm],
    doc: str | None,
) -> Result:
    """Train as a command line says: ``options`` has the fields ``config`` and ``hyper`` besides, whose defaults are the preset's."""
    chosen = preset(*preset_of(argv, options))
    defaults: Any = options(env_steps=chosen.env_steps, config=chosen.config, hyper=chosen.hyper)  # type: ignore[call-arg]
    args = tyro.cli(options, args=argv, default=defaults, description=paragraphs(doc))
    config = args.config if args.precision is None else replace(args.config, precision=args.precision)  # type: ignore[attr-defined]
    return run(args, make(environment(args), config, args.hyper))  # type: ignore[attr-defined]


def run(options: Options, algo: Algorithm) -> Result:
    """Train as the options say, and print the result."""
    folder = options.run_dir
    if folder is None:
        if options.resume:
            raise ValueError("--resume needs --run-dir")
        name = options.env.removesuffix(".py").replace("/", "-")
        folder = Path("runs") / f"{algo.name}-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    grid = sweeps.parse(options.sweep)
    result = train(
        algo,
        jax.random.key(options.seed),
        options.env_steps,
        num_seeds=options.num_seeds,
        hypers=sweeps.grid(algo.hyper, grid) if grid else None,
        run_dir=folder,
        resume=options.resume,
        eval_every=options.eval_every,
        eval_episodes=options.eval_episodes,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        seeds_at_once=options.seeds_at_once,
        devices=options.devices,
        gif=options.gif,
    )
    report(result)
    return result


def report(result: Result) -> None:
    """Print what a run reached, and where it lies."""
    s = result.summary
    speed = f", {s['env_steps_per_second']:,} steps/s" if s["env_steps_per_second"] else ""
    print(f"{s['algorithm']} on {s['env']}: {s['num_seeds']} seeds x {s['env_steps']:,} steps{speed}")
    for nan in s["nan_seeds"]:
        print(f"  left out: seed {nan['seed']} turned NaN at update {nan['update']}")
    if s["eval"] is not None:
        for cell, summary in s.get("cells", {"": s["eval"]}).items():
            for mode, scores in (("greedy", summary), ("sampled", summary["sampled"])):
                print(f"  {cell}{': ' if cell else ''}return, {mode}: {_score(scores)}")
    if result.run_dir is not None:
        if not result.finished:
            print(f"  interrupted and saved; go on with --resume --run-dir {result.run_dir}")
        metrics = (
            "metrics" if (result.run_dir / "metrics").is_dir() else "metrics.csv"
        )  # of thousands of seeds a folder
        print(f"  {result.run_dir}/curve.png  summary.json  {metrics}")


def _score(scores: dict[str, Any]) -> str:
    if scores["iqm"] is None:
        return "no seed with finite numbers"
    return f"IQM {scores['iqm']:.1f}, 95% interval {scores['ci_low']:.1f} to {scores['ci_high']:.1f}"


def main(experiment: Callable[[list[str]], Result | None]) -> NoReturn:
    """Run an experiment on the command line's words; an error a user can mend is one line and exit code 1.

    An interrupted run exits with 130.
    """
    try:
        result = experiment(sys.argv[1:])
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os._exit(0)
    except OverflowError as error:
        sys.exit(f"error: a number, such as --seed, is too large: {error}")
    except (ValueError, RunError, OSError) as error:
        sys.exit(f"error: {str(error).strip()}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if result is None or result.finished else 130)


def environment(options: Options) -> envs.Environment:
    """The environment that the options name."""
    return envs.make(options.env, **parse_params(options.env_params))
