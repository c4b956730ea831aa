"""Train every preset over several seeds and print the table of results.

    bash scripts/results                        all presets, 8 seeds: hours on 2 cores
    bash scripts/results --only ppo/CartPole-v1 dqn/Acrobot-v1
    bash scripts/results --algos dqn r2d2

A run that is finished in the folder is not made again; one that was interrupted goes on.
"""

import datetime
import json
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from jrl import envs, run
from jrl.algos import dqn, ebu, ppo, ppo_cma, pqn, presets, r2d2, sac, td3
from jrl.algos.presets import Preset
from jrl.numerics import checks, host
from jrl.run import cli, stats

MODULES = {"ppo": ppo, "ppo_cma": ppo_cma, "dqn": dqn, "ebu": ebu, "r2d2": r2d2, "pqn": pqn, "sac": sac, "td3": td3}

# What others published, by preset.
OTHERS = {
    "ppo/CartPole-v1": "490 +- 6 (CleanRL, 500k)",
    "ppo/Acrobot-v1": "-86 +- 1 (CleanRL, 500k)",
    "ppo/MountainCar-v0": "-110 (SB3 zoo, 1M)",
    "ppo/Pendulum-v1": "-172 (SB3 zoo, 100k), -160 (gymnax-blines, 1M)",
    "ppo/Breakout-MinAtar": "33 (gymnax-blines, 10M), about 40 (PureJaxRL, 10M)",
    "ppo/Asterix-MinAtar": "15 (gymnax-blines, 10M)",
    "ppo/Catch-bsuite": "1.0 (gymnax-blines)",
    "ppo/MemoryChain-bsuite": "0.0 (gymnax-blines, chance)",
    "ppo/MemoryChain-bsuite, no memory": "0.0 (chance)",
    "dqn/CartPole-v1": "498 +- 2 (CleanRL, 500k)",
    "dqn/CartPole-v1, 100k": "500 (SB3 zoo, 50k)",
    "dqn/Acrobot-v1": "-77 (SB3 zoo, 100k), -89 +- 2 (CleanRL, 500k)",
    "dqn/MountainCar-v0": "-101 (SB3 zoo, 120k)",
    "r2d2/MemoryChain-bsuite": "0.0 (gymnax-blines, chance)",
    "sac/Pendulum-v1": "-157 +- 89 (SB3 zoo, 20k)",
    "td3/Pendulum-v1": "-152 +- 90 (SB3 zoo, 20k)",
    "pqn/CartPole-v1": "495 +- 7 (CleanRL, 500k)",
    "pqn/Breakout-MinAtar": "about 40 (PPO of PureJaxRL, 10M)",
    "pqn/Asterix-MinAtar": "15 (gymnax-blines, 10M)",
    "pqn/Freeway-MinAtar": "58 (gymnax-blines, 10M)",
    "pqn/SpaceInvaders-MinAtar": "130 to 170 (gymnax-blines, 10M)",
}


@dataclass(frozen=True)
class Args:
    """Train every preset and print the table."""

    algos: tuple[str, ...] = tuple(MODULES)  # Algorithms whose presets are run.
    only: tuple[str, ...] = ()  # Presets to run, like ppo/CartPole-v1; default: all.
    num_seeds: int = 8  # Seeds of each preset.
    folder: Path = Path("runs/results")  # Folder of the runs.


def chosen(args: Args) -> dict[str, Preset]:
    """The presets to train, with variants: the memory task for a network that cannot remember, PPO-Penalty, and a short CartPole."""
    tables = {
        "ppo": presets.PPO,
        "ppo_cma": presets.PPO_CMA,
        "dqn": presets.DQN,
        "ebu": presets.EBU,
        "r2d2": presets.R2D2,
        "pqn": presets.PQN,
        "sac": presets.SAC,
        "td3": presets.TD3,
    }
    found = {f"{algo}/{env}": preset for algo, table in tables.items() for env, preset in table.items()}
    memory = found["ppo/MemoryChain-bsuite"]
    forgetful = replace(memory.config, network=replace(memory.config.network, gru=0))
    found["ppo/MemoryChain-bsuite, no memory"] = memory._replace(config=forgetful)
    found["ppo/CartPole-v1, penalty"] = presets.PPO_PENALTY
    found["dqn/CartPole-v1, 100k"] = found["dqn/CartPole-v1"]._replace(env_steps=100_000)
    for name in args.only:
        checks.one_of("only", name, found)
    for name in args.algos:
        checks.one_of("algos", name, tables)
    in_order = sorted(found, key=lambda name: list(tables).index(name.partition("/")[0]))
    return {name: found[name] for name in args.only or in_order if args.only or name.partition("/")[0] in args.algos}


def result(name: str, preset: Preset, args: Args) -> dict:
    """The summary of a finished run, training what is missing."""
    folder = args.folder / name.replace("/", "-").replace(", ", "-").replace(" ", "-")
    summary = folder / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["finished"]:
        return json.loads(summary.read_text())
    algo_name, _, env_name = name.partition(",")[0].partition("/")
    algo = MODULES[algo_name].make(envs.make(env_name), preset.config, preset.hyper)  # type: ignore[attr-defined]
    made = run.train(
        algo, jax.random.key(0), preset.env_steps, num_seeds=args.num_seeds, run_dir=folder, resume=folder.exists()
    )
    if not made.finished:
        raise KeyboardInterrupt
    return made.summary


def reached(scores: dict) -> str:
    """An evaluation in words, with the episodes that were cut off."""
    cut = scores.get("unfinished", 0)
    return stats.text(scores) + (f", {cut} episodes cut off" if cut else "")


def commit() -> str:
    """The commit that is checked out, with a plus sign where files differ from it."""
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=here)
    return done.stdout.strip() or "unknown"


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    found = chosen(args)
    print(
        "| algorithm | environment | steps | seeds | greedy: IQM (95% interval) | sampled: IQM (95% interval) | others |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, preset in found.items():
        s = result(name, preset, args)
        algo, _, env = name.partition("/")
        greedy, sampled = (reached(scores) for scores in (s["eval"], s["eval"]["sampled"]))
        row = (algo.upper(), env, f"{s['env_steps']:,}", s["num_seeds"], greedy, sampled, OTHERS.get(name, ""))
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(f"\nCommit {commit()}, {datetime.date.today()}, {host.description()}, {host.num_cores()} CPU cores.")


if __name__ == "__main__":
    cli.main(main)
