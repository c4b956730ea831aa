"""Compile an algorithm's whole update for TPUs ahead of time, with libtpu and without a TPU, and print its memory by seed count.

    bash scripts/tpu_check                      PPO, DQN, R2D2 and PQN for v5e, v6e and v5p, 16 to 1024 seeds
    bash scripts/tpu_check --algos grpo         a language model on modular addition
    bash scripts/tpu_check --algos dqn --env Breakout-MinAtar --chips v5e --seeds 64

It says that the program compiles and what it needs, not that it ran. Needs the package libtpu (Linux, x86-64).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import tyro

from jrl import envs
from jrl.algorithm import Algorithm
from jrl.algos import dqn, grpo, ppo, pqn, presets, r2d2
from jrl.lm import tasks
from jrl.numerics import checks
from jrl.run import stats
from jrl.run.memory import TPUS, tpu_gib


@dataclass(frozen=True)
class Args:
    """Compile the update of algorithms for TPUs.

    Attributes:
        algos: of ppo, dqn, r2d2, pqn, grpo.
        chips: which TPUs, of v5e, v6e, v5p.
        seeds: how many seeds in one program.
        env: environment, with its preset; grpo has a task instead, modular addition.
        precision: precision policy.
    """

    algos: tuple[str, ...] = ("ppo", "dqn", "r2d2", "pqn")
    chips: tuple[str, ...] = ("v5e", "v6e", "v5p")
    seeds: tuple[int, ...] = (16, 128, 1024)
    env: str = "CartPole-v1"
    precision: str = "float32"


def in_env(module: Any, preset_of: Callable[[str, str], Any]) -> Callable[[Args], Algorithm]:
    """Makes an algorithm for the environment."""

    def make(args: Args) -> Algorithm:
        preset = preset_of("auto", args.env)
        return module.make(envs.make(args.env), replace(preset.config, precision=args.precision), preset.hyper)

    return make


def language_model(args: Args) -> Algorithm:
    preset = presets.grpo_preset("modular_addition")
    return grpo.make(tasks.make("modular_addition"), replace(preset.config, precision=args.precision), preset.hyper)


ALGOS = {
    "ppo": in_env(ppo, presets.ppo_preset),
    "dqn": in_env(dqn, presets.dqn_preset),
    "r2d2": in_env(r2d2, presets.r2d2_preset),
    "pqn": in_env(pqn, presets.pqn_preset),
    "grpo": language_model,
}


def table(name: str, args: Args) -> None:
    """One algorithm's memory, by chip and number of seeds."""
    algo = ALGOS[name](args)
    print(f"\n{name.upper()} on {algo.env.name}, {args.precision}: memory of one update, GiB on one chip\n")
    print("| chip | " + " | ".join(stats.seeds(n) for n in args.seeds) + " | of |")
    print("| --- |" + " --- |" * (len(args.seeds) + 1))
    for chip in args.chips:
        row = [f"{tpu_gib(chip, algo, n):.3f}" for n in args.seeds]
        print(f"| {chip} | " + " | ".join(row) + f" | {TPUS[chip].gib} |", flush=True)


def main(args: Args) -> None:
    try:
        for name in args.algos:
            checks.one_of("algos", name, tuple(ALGOS))
        for name in args.algos:
            table(name, args)
    except ImportError:
        raise SystemExit("error: this needs the package libtpu (pip install libtpu; Linux on x86-64)") from None
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
