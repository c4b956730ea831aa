"""Train every PPO preset over several seeds and print the table of results.

    bash scripts/results                        all presets, 8 seeds: under an hour on 2 cores
    bash scripts/results --only CartPole-v1 Catch-bsuite

A run that is finished in the folder is not made again; one that was interrupted goes on.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import tyro

from jrl import envs, run
from jrl.algos import ppo
from jrl.algos.presets import PPO, Preset
from jrl.run import stats

TARGETS = {
    "CartPole-v1": "490 +- 6 (CleanRL, 500k)",
    "Acrobot-v1": "-86 +- 1 (CleanRL, 500k)",
    "MountainCar-v0": "-110 (SB3 zoo, 1M)",
    "Pendulum-v1": "-172 (SB3 zoo, 100k), -160 (gymnax-blines, 1M)",
    "Breakout-MinAtar": "33 (gymnax-blines, 10M), about 40 (PureJaxRL, 10M)",
    "Catch-bsuite": "1.0 (gymnax-blines)",
    "MemoryChain-bsuite": "0.0 (gymnax-blines, chance)",
    "MemoryChain-bsuite, no memory": "0.0 (chance)",
}


@dataclass(frozen=True)
class Args:
    """Train every PPO preset and print the table.

    Attributes:
        only: these presets alone.
        num_seeds: seeds of each.
        folder: where the runs are kept.
    """

    only: tuple[str, ...] = ()
    num_seeds: int = 8
    folder: Path = Path("runs/results")


def presets() -> dict[str, Preset]:
    """The presets, and the same memory task for a network that cannot remember."""
    memory = PPO["MemoryChain-bsuite"]
    forgetful = replace(memory.config, network=replace(memory.config.network, gru=0))
    return PPO | {"MemoryChain-bsuite, no memory": memory._replace(config=forgetful)}


def result(name: str, preset: Preset, args: Args) -> dict:
    """The summary of a finished run, training what is missing."""
    folder = args.folder / f"ppo-{name.replace(', ', '-').replace(' ', '-')}"
    summary = folder / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["finished"]:
        return json.loads(summary.read_text())
    algo = ppo.make(envs.make(name.partition(",")[0]), preset.config, preset.hyper)
    return run.train(
        algo, jax.random.key(0), preset.env_steps, num_seeds=args.num_seeds, run_dir=folder, resume=folder.exists()
    ).summary


def main(args: Args) -> None:
    chosen = presets()
    for name in args.only:
        if name not in chosen:
            raise SystemExit(f"error: no preset {name!r}; there are: {', '.join(chosen)}")
    print("| environment | steps | seeds | greedy: IQM (95% interval) | sampled: IQM (95% interval) | others |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in args.only or chosen:
        s = result(name, chosen[name], args)
        greedy, sampled = stats.text(s["eval"]), stats.text(s["eval"]["sampled"])
        row = (name, f"{s['env_steps']:,}", s["num_seeds"], greedy, sampled, TARGETS[name])
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
