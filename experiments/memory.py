"""Policies that remember: PPO's return against how far back it must remember, by kind of memory.

    bash scripts/run experiments/memory.py                  MemoryChain: a bit shown at first is asked for at the end
    bash scripts/run experiments/memory.py --task recall    a symbol shown once is asked for 512 steps later

Kinds: none (feed-forward), gru, window (attention to the last 64 steps), dense and nsa (native sparse attention) over the episode.
Leaves memory.png and memory.csv in the folder: returns by length, or learning curves if there is one length. A run that is
finished there is not made again, and one that was interrupted goes on.
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from jrl import envs, nets, run
from jrl.algorithm import Algorithm
from jrl.algos import ppo
from jrl.nets.memory import AttentionConfig
from jrl.numerics import checks
from jrl.run import cli, plot, report, stats

WINDOW = 64
KINDS = ("none", "gru", "window", "dense", "nsa")


@dataclass(frozen=True)
class Args:
    """Compare kinds of memory."""

    task: Literal["chain", "recall"] = "chain"  # MemoryChain-bsuite, or recall.
    # Steps from the cue to the question; default: 10, 30, 100 for chain and 512 for recall.
    lengths: tuple[int, ...] = ()
    # Kinds of memory: none, gru, window, dense, nsa; default: none, gru, dense, nsa for chain and gru, window, nsa for recall.
    kinds: tuple[str, ...] = ()
    env_steps: int | None = None  # Environment steps of each seed; default: 200,000 for chain and 1,200,000 for recall.
    num_seeds: int = 4  # Seeds of each kind.
    seed: int = 0  # Seed of all runs.
    run_dir: cli.RunDir = None  # Folder of the runs; default: a new one in runs/.
    resume: bool = False  # Continue the runs in run_dir, bit for bit; those that are finished are not repeated.


def network(kind: str, length: int) -> nets.Config:
    """About the same size each: 64 units, and 4 query heads with 1 key head where there is attention."""
    if kind == "none":
        return nets.Config(hidden=(64, 64))
    if kind == "gru":
        return nets.Config(hidden=(64,), gru=64)
    context = {"window": WINDOW}.get(kind, length)
    sparse: dict[str, Any] = {"block": 16, "select_block": 16, "selected": 4, "window": 32} if kind == "nsa" else {}
    attention = AttentionConfig("nsa" if kind == "nsa" else "dense", context=context, num_kv_heads=1, **sparse)
    return nets.Config(hidden=(64,), attention=attention)


def chain(kind: str, length: int) -> Algorithm:
    """PPO on MemoryChain, whose only reward, 1 or -1, comes at the end. An unrolled sequence reaches from there to the start."""
    env = envs.make("MemoryChain-bsuite", memory_length=length)
    config = ppo.Config(num_envs=16, num_steps=max(64, length + 2), network=network(kind, length + 2))
    return ppo.make(env, config, ppo.Hyper(learning_rate=1e-3))


def recall(kind: str, length: int) -> Algorithm:
    """PPO on Recall, an episode an update. Each answer is rewarded at once, so nothing is discounted into the past.

    An update needs many episodes: however many answers one asks for, it shows one symbol.
    """
    queries = 32
    env = envs.make("Recall", delay=length, queries=queries)
    config = ppo.Config(num_envs=64, num_steps=length + queries, network=network(kind, length + queries))
    return ppo.make(env, config, ppo.Hyper(learning_rate=1e-3, gamma=0.0, gae_lambda=0.0))


TASKS = {
    "chain": (chain, (10, 30, 100), ("none", "gru", "dense", "nsa"), 200_000),
    "recall": (recall, (512,), ("gru", "window", "nsa"), 1_200_000),
}


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    make, lengths, kinds, env_steps = TASKS[args.task]
    lengths, kinds = args.lengths or lengths, args.kinds or kinds
    env_steps = env_steps if args.env_steps is None else args.env_steps
    for name, value in (("num_seeds", args.num_seeds), ("env_steps", env_steps)):
        checks.positive_int(name, value)
    for length in lengths:
        checks.positive_int("lengths", length)
    for kind in kinds:
        checks.one_of("kinds", kind, KINDS)
    folder = cli.folder_of_runs(args.run_dir, args.resume, f"memory-{args.task}")
    rows: list[dict[str, Any]] = []
    curves = []
    scores: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    for length in lengths:
        for kind in kinds:
            home, begin = folder / f"{kind}-{length}", time.monotonic()
            result = run.train(
                make(kind, length),
                jax.random.key(args.seed),
                env_steps,
                num_seeds=args.num_seeds,
                run_dir=home,
                resume=True,
            )
            if not result.finished:
                raise KeyboardInterrupt
            reached, m = result.summary["eval"], result.metrics
            curves.append((kind, *plot.curve(m["episode_return"], m["episodes"], m["env_steps"])))
            scores[kind].append(np.array(reached["per_seed"], float))
            rows.append({"steps back": length, "memory": kind, "return": stats.text(reached)})
            print(f"{kind} at {length}: {rows[-1]['return']}, {time.monotonic() - begin:.0f} s", flush=True)
    report.print_table(folder / "memory.csv", rows)
    title = {"chain": "MemoryChain", "recall": "Recall"}[args.task]
    if len(lengths) == 1:
        plot.learning_curves(folder / "memory.png", f"{title}, {lengths[0]} steps back", curves)
    else:
        lines = [(kind, np.array(lengths), np.stack(each, axis=1)) for kind, each in scores.items()]
        plot.draw(folder / "memory.png", [plot.Panel(title, "steps back", "return, greedy", lines, "x")])
    print(f"{folder}/memory.png")


if __name__ == "__main__":
    cli.main(main)
