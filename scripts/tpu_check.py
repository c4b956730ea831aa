"""Compile PPO's whole update for TPUs ahead of time, with libtpu and without a TPU, and print its memory by seed count.

    bash scripts/tpu_check                      v5e, v6e and v5p, 16 to 1024 seeds
    bash scripts/tpu_check --chips v5e --seeds 64

It says that the program compiles and what it needs, not that it ran. Needs the package libtpu (Linux, x86-64).
"""

import os
from dataclasses import dataclass, replace

# The compiler holds no TPU, so several processes may load it at once.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import tyro
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jrl import envs
from jrl.algorithm import over_seeds
from jrl.algos import ppo
from jrl.algos.presets import ppo_preset

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
MEMORY_GIB = {"v5e": 16, "v6e": 32, "v5p": 95}


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


def memory_gib(chip: str, num_seeds: int, env: str, precision: str) -> float:
    """Memory that one update of ``num_seeds`` seeds needs on one chip, by the TPU compiler.

    Raises ``ValueError`` for an unknown chip, and XLA's error if the program does not fit.
    """
    if chip not in TOPOLOGIES:
        raise ValueError(f"chips must be of {', '.join(TOPOLOGIES)}; got {chip!r}")
    preset = ppo_preset("auto", env)
    algo = over_seeds(ppo.make(envs.make(env), replace(preset.config, precision=precision), preset.hyper))
    state = jax.eval_shape(algo.init, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_seeds)))
    device = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices[0]
    place = SingleDeviceSharding(device)
    compiled = jax.jit(algo.update, donate_argnums=0, in_shardings=place, out_shardings=place).lower(state).compile()
    used = compiled.memory_analysis()
    total = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes
    return total / 2**30


def main(args: Args) -> None:
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise SystemExit("error: this needs the package libtpu (pip install libtpu; Linux on x86-64)") from None
    print(f"PPO on {args.env}, {args.precision}: memory of one update, GiB on one chip")
    print("| chip | " + " | ".join(f"{n} seeds" for n in args.seeds) + " | of |")
    print("| --- |" + " --- |" * (len(args.seeds) + 1))
    for chip in args.chips:
        try:
            row = [f"{memory_gib(chip, n, args.env, args.precision):.3f}" for n in args.seeds]
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
        print(f"| {chip} | " + " | ".join(row) + f" | {MEMORY_GIB[chip]} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
