"""Does precision change what is learned, and what does it save? PPO under each way of computing, over many seeds.

python experiments/precision.py                                   all variants, 16 seeds of CartPole-v1
python experiments/precision.py --env Breakout-MinAtar --env-steps 2000000 --variants float32 bfloat16
python experiments/precision.py --speed-widths 64 256 1024 4096   how fast one update is, by the width of the layers

With --resume, what is finished in --run-dir is not trained again. It leaves precision.png and precision.csv there.
"""

import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jrl import algorithm, envs, run
from jrl.algorithm import Algorithm
from jrl.algos import ppo
from jrl.algos.presets import Preset, ppo_preset
from jrl.numerics import checks, host, precision
from jrl.run import cli, memory, plot, report, stats

EXACT = "float32 exact"  # products of matrices in float32 too: a GPU rounds their operands to TF32, a TPU to bfloat16, unless told
# The policy, how parameters are stepped, and the dtype of the optimizer's moments.
VARIANTS = {
    "float32": ("float32", "nearest", "float32"),
    "bfloat16": ("bfloat16", "nearest", "float32"),
    "float16 scaled": ("float16", "nearest", "float32"),
    "pure bfloat16": ("pure_bfloat16", "nearest", "float32"),
    "pure bfloat16 stochastic": ("pure_bfloat16", "stochastic", "float32"),
    "pure bfloat16 kahan": ("pure_bfloat16", "kahan", "float32"),
    "pure bfloat16 master": ("pure_bfloat16", "master", "float32"),
    "all bfloat16 stochastic": ("pure_bfloat16", "stochastic", "bfloat16"),
    EXACT: ("float32", "nearest", "float32"),
}


@dataclass(frozen=True)
class Args:
    """Compare precisions on PPO."""

    env: str = "CartPole-v1"  # Environment, with its preset.
    # Precisions to compare with the first of them; "float32 exact" is float32 without the rounding of products on GPUs and TPUs.
    variants: tuple[str, ...] = tuple(name for name in VARIANTS if name != EXACT)
    env_steps: int | None = None  # Environment steps of each seed; default: the preset's.
    num_seeds: int = 16  # Seeds of each variant.
    seed: int = 0  # Seed from whose key every seed's key is split.
    run_dir: cli.RunDir = None  # Folder of the runs; default: a new one in runs/.
    resume: bool = False  # Continue the runs in run_dir, bit for bit; those that are finished are not repeated.
    memory_width: int = 1024  # Width of hidden layers for a second look at the memory; 0 for none.
    # Measure only the speed of an update, with hidden layers of these widths; on a GPU or TPU it is measured by default too, at 64,
    # 256, 1024 and 4096.
    speed_widths: tuple[int, ...] = ()


def variant(preset: Preset, env: envs.Environment, name: str, width: int | None = None) -> Algorithm:
    """The preset under a variant of precision, with hidden layers of ``width`` if given."""
    policy, rounding, moments = VARIANTS[name]
    optimizer = replace(preset.config.optimizer, rounding=rounding, moments=moments)
    config = replace(preset.config, optimizer=optimizer)
    if width is not None:
        config = replace(config, network=replace(config.network, hidden=(width, width)))
    algo = precision.apply(policy, ppo.make(env, config, preset.hyper))
    return algo._replace(update=precision.exact(algo.update)) if name == EXACT else algo


def compare(args: Args, preset: Preset, folder: Path) -> None:
    """Train every variant, draw the curves and print the table."""
    env, steps = envs.make(args.env), preset.env_steps if args.env_steps is None else args.env_steps
    rows, curves = [], []
    first: dict[str, Any] = {}
    for name in args.variants:
        print(name, flush=True)
        algo, home = variant(preset, env, name), folder / name.replace(" ", "-")
        key = jax.random.key(args.seed)
        result = run.train(algo, key, steps, num_seeds=args.num_seeds, run_dir=home, resume=True)
        if not result.finished:
            raise KeyboardInterrupt
        m, scores = result.metrics, result.summary["eval"]
        first = first or scores
        curves.append((name, *plot.curve(m["episode_return"], m["episodes"], m["env_steps"])))
        row = {"variant": name, "return": stats.text(scores)}
        row |= {f"overlaps {args.variants[0]}": "yes" if overlap(scores, first) else "no"}
        row |= sizes(algo, args.num_seeds, "")
        if args.memory_width:
            wide = variant(preset, env, name, args.memory_width)
            row |= sizes(wide, args.num_seeds, f" at width {args.memory_width}")
        rows.append(row)
        title = f"PPO on {env.name} by precision, {stats.seeds(args.num_seeds)}"
        plot.learning_curves(folder / "precision.png", title, curves)
    report.print_table(folder / "precision.csv", rows)
    print(f"{folder}/precision.png")


def overlap(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two 95% intervals have a point in common; none has where fewer than two seeds stayed finite."""
    bounds = (a["ci_low"], b["ci_high"], b["ci_low"], a["ci_high"])
    return None not in bounds and bounds[0] <= bounds[1] and bounds[2] <= bounds[3]


def sizes(algo: Algorithm, num_seeds: int, suffix: str) -> dict[str, str]:
    """Memory of parameters and optimizer, KiB a seed, and of the whole update on a v5e by its compiler."""
    state = jax.eval_shape(algo.init, jax.random.key(0))
    kib = memory.state_bytes((state.params, state.opt_state)) / 2**10
    try:
        gib = f"{memory.tpu_gib('v5e', algo, num_seeds):.3f}"
    except ImportError:
        gib = "needs libtpu"
    except RuntimeError as error:  # of the compiler
        gib = str(error).partition(":")[0]
    return {f"state KiB{suffix}": f"{kib:,.0f}", f"v5e GiB{suffix}": gib}


def compare_speed(args: Args, preset: Preset, widths: tuple[int, ...], folder: Path) -> None:
    """Print environment steps a second of each variant by the width of the hidden layers, learning included."""
    env = envs.make(args.env)
    rows: list[dict[str, Any]] = []
    jobs = 1 if jax.default_backend() == "cpu" else host.num_cores() // 2
    with ThreadPoolExecutor(max(1, jobs)) as pool:  # compilers work beside each other, what they made is timed alone
        made = {
            (width, name): pool.submit(compiled, variant(preset, env, name, width), args.num_seeds)
            for width in widths
            for name in args.variants
        }
        wait(made.values())
    for width in widths:
        speeds = {n: steps_per_second(*made.pop((width, n)).result(), args.num_seeds, args.seed) for n in args.variants}
        for name, speed in speeds.items():
            ratio = f"{speed / speeds[args.variants[0]]:.2f}"
            rows.append({"width": width, "variant": name, "steps/s": f"{speed:,.0f}", "speed": ratio})
    report.print_table(folder / "speed.csv", rows)


def compiled(algo: Algorithm, num_seeds: int) -> tuple[Algorithm, Any]:
    """The algorithm over seeds, and its update compiled."""
    algo = algorithm.over_seeds(algo)
    states = jax.eval_shape(algo.init, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_seeds)))
    lowered = jax.jit(algo.update, donate_argnums=0).lower(states)
    return algo, lowered.compile(compiler_options=host.compiler_options())


def steps_per_second(algo: Algorithm, update: Any, num_seeds: int, seed: int) -> float:
    """Environment steps of all seeds a second: the median over updates of at least a second."""
    state = jax.jit(algo.init)(jax.random.split(jax.random.key(seed), num_seeds))
    for _ in range(2):  # a GPU records the second call, and repeats it from then on
        state = jax.block_until_ready(update(state)[0])
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < 1.0:
        begin = time.perf_counter()
        state = jax.block_until_ready(update(state)[0])
        seconds.append(time.perf_counter() - begin)
    return num_seeds * algo.env_steps_per_update / float(np.median(seconds))


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    checks.positive_int("num_seeds", args.num_seeds)
    checks.not_empty(variants=args.variants)
    checks.positive_int("memory_width", args.memory_width, at_least=0)
    for width in args.speed_widths:
        checks.positive_int("speed_widths", width)
    for name in args.variants:
        checks.one_of("variants", name, VARIANTS)
    preset = ppo_preset("auto", args.env)
    folder = cli.folder_of_runs(args.run_dir, args.resume, f"precision-{args.env}")
    accelerated = jax.default_backend() != "cpu"
    if not args.speed_widths:
        compare(args, preset, folder)
    if widths := args.speed_widths or ((64, 256, 1024, 4096) if accelerated else ()):
        compare_speed(args, preset, widths, folder)


if __name__ == "__main__":
    cli.main(main)
