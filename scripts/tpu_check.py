"""Compile PPO's whole update for TPUs ahead of time, with libtpu and without a TPU, and print its memory by seed count.

    bash scripts/tpu_check                      v5e, v6e and v5p, 16 to 1024 seeds
    bash scripts/tpu_check --chips v5e --seeds 64

It says that the program compiles and what it needs, not that it ran. Needs the package libtpu (Linux, x86-64).
"""

import os
from dataclasses import dataclass, replace

os.environ["JAX_PLATFORMS"] = "cpu"

import tyro

from jrl import envs
from jrl.algos import ppo
from jrl.algos.presets import ppo_preset
from jrl.run.memory import TPUS, tpu_gib


@dataclass(frozen=True)
class Args:
    """Compile PPO's update for TPUs.

    Attributes:
        chips: which TPUs, of v5e, v6e, v5p.
        seeds: how many seeds in one program.
        env: environment, with its preset.
        precision: precision policy.
    """

    chips: tuple[str, ...] = ("v5e", "v6e", "v5p")
    seeds: tuple[int, ...] = (16, 128, 1024)
    env: str = "CartPole-v1"
    precision: str = "float32"


def main(args: Args) -> None:
    preset = ppo_preset("auto", args.env)
    try:
        algo = ppo.make(envs.make(args.env), replace(preset.config, precision=args.precision), preset.hyper)
        print(f"PPO on {args.env}, {args.precision}: memory of one update, GiB on one chip")
        print("| chip | " + " | ".join(f"{n} seeds" for n in args.seeds) + " | of |")
        print("| --- |" + " --- |" * (len(args.seeds) + 1))
        for chip in args.chips:
            row = [f"{tpu_gib(chip, algo, n):.3f}" for n in args.seeds]
            print(f"| {chip} | " + " | ".join(row) + f" | {TPUS[chip].gib} |", flush=True)
    except ImportError:
        raise SystemExit("error: this needs the package libtpu (pip install libtpu; Linux on x86-64)") from None
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
