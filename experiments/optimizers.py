"""Is it the optimizer? Each one over learning rates and seeds, on PPO and on a supervised toy, one compiled program each.

python experiments/optimizers.py
python experiments/optimizers.py --optimizers adam lion schedule_free_adamw --learning-rates 1e-4 1e-3 1e-2
python experiments/optimizers.py --env Acrobot-v1 --num-seeds 16

With --resume, a PPO run that is finished in --run-dir is not made again. It leaves optimizers.png and optimizers.csv there.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jrl import envs, run
from jrl.algos import ppo
from jrl.algos.presets import Preset, ppo_preset
from jrl.numerics import checks, optim
from jrl.numerics.optim import OptimizerConfig
from jrl.run import cli, memory, plot, report, stats

Array = jax.Array


@dataclass(frozen=True)
class Args:
    """Compare optimizers over learning rates and seeds."""

    # Optimizers: sgd, adam, adamw, rmsprop, lion, muon, schedule_free_adamw.
    optimizers: tuple[str, ...] = ("sgd", "adam", "adamw", "muon")
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # Initial learning rates.
    num_seeds: int = 8  # Seeds of each optimizer at each learning rate.
    env: str = "CartPole-v1"  # Environment for PPO, with its preset.
    env_steps: int = 200_000  # Environment steps of each of PPO's seeds.
    toy_steps: int = 2_000  # Gradient steps of each of the toy problem's seeds.
    seed: int = 0  # Seed from whose key every seed's key is split.
    run_dir: cli.RunDir = None  # Folder of the runs; default: a new one in runs/.
    resume: bool = False  # Continue the runs in run_dir, bit for bit; those that are finished are not repeated.


# A student network learns what a random teacher says of inputs whose sizes differ a hundredfold.
STUDENT = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(1)])
TEACHER = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(1)])
SCALES = np.logspace(0, -2, 16, dtype=np.float32)  # of NumPy: JAX may not look for its platform yet
POINTS = 50


def toy(config: OptimizerConfig, num_steps: int, learning_rate: Array, key: Array) -> Array:
    """Mean squared test error of one student at POINTS moments of its training, ``[POINTS]``."""
    key_teacher, key_student, key_test, key_run = jax.random.split(key, 4)
    example = jnp.zeros((1, SCALES.size))
    teacher, params = TEACHER.init(key_teacher, example), STUDENT.init(key_student, example)
    hyper = optim.Hyper()

    def data(key: Array, n: int) -> tuple[Array, Any]:
        x = jax.random.normal(key, (n, SCALES.size))
        return x * SCALES, TEACHER.apply(teacher, 3 * x)

    def loss(params: Any, x: Array, y: Array) -> tuple[Array, None]:
        answer: Any = STUDENT.apply(params, x)
        return jnp.mean((answer - y) ** 2), None

    test = data(key_test, 1024)

    def step(carry, inputs):
        params, opt_state = carry
        progress, key = inputs
        tx = optim.make(config, hyper, learning_rate * optim.schedule(config, hyper, progress), 1.0)
        x, y = data(key, 128)
        done = optim.minimize(tx, lambda p: loss(p, x, y), params, opt_state)
        return (done.params, done.opt_state), None

    def span(carry, inputs):
        carry, _ = jax.lax.scan(step, carry, inputs)
        params, opt_state = carry
        return carry, loss(optim.eval_params(opt_state, params), *test)[0]

    inputs = jnp.arange(num_steps) / num_steps, jax.random.split(key_run, num_steps)
    spans = jax.tree.map(lambda x: x.reshape(POINTS, -1), inputs)
    return jax.lax.scan(span, (params, optim.make(config, hyper).init(params)), spans)[1]


def train_toy(args: Args, name: str) -> np.ndarray:
    """Test errors ``[learning rates, seeds, POINTS]``, in one program."""
    config = OptimizerConfig(name, clip="norm")  # type: ignore[arg-type]  # checked in main
    over_seeds = jax.vmap(lambda lr, key: toy(config, args.toy_steps, lr, key), in_axes=(None, 0))
    over_both = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(args.seed), args.num_seeds)
    return np.asarray(over_both(jnp.array(args.learning_rates), keys))


def train_ppo(args: Args, preset: Preset, name: str, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Environment steps ``[points]``, returns in training ``[learning rates, seeds, points]``, and the greedy ones after it."""
    config = replace(preset.config, optimizer=replace(preset.config.optimizer, name=name))
    algo = ppo.make(envs.make(args.env), config, preset.hyper)
    grid = run.sweep.grid(algo.hyper, {"learning_rate": args.learning_rates})
    key, home = jax.random.key(args.seed), folder / name
    result = run.train(algo, key, args.env_steps, num_seeds=args.num_seeds, hypers=grid, run_dir=home, resume=True)
    if not result.finished:
        raise KeyboardInterrupt
    m = result.metrics
    curves = [plot.curve(m["episode_return"][i], m["episodes"][i], m["env_steps"]) for i in range(len(grid))]
    cells = result.summary.get("cells") or {next(iter(grid)): result.summary["eval"]}
    final = [cells[cell]["per_seed"] for cell in grid]
    return curves[0][0], np.stack([returns for _, returns in curves]), np.array(final, float)


def score(y: np.ndarray) -> str:
    """IQM and 95% interval of one number a seed; a seed that diverged counts as infinitely bad."""
    return stats.brief(y, ".4g")


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    for name in args.optimizers:
        checks.one_of("optimizers", name, get_args(optim.Name))
    checks.positive_int("num_seeds", args.num_seeds)
    checks.not_empty(optimizers=args.optimizers, learning_rates=args.learning_rates)
    if args.toy_steps < 1 or args.toy_steps % POINTS:
        raise ValueError(f"toy_steps must be a multiple of {POINTS}; got {args.toy_steps}")
    checks.within("learning_rates", args.learning_rates, 0, float("inf"))
    keys = jax.ShapeDtypeStruct((len(args.learning_rates), args.num_seeds, args.toy_steps, 2), jnp.uint32)
    memory.refuse_if_too_large("learning_rates, num_seeds and toy_steps", keys)
    preset = ppo_preset("auto", args.env)
    folder = cli.folder_of_runs(args.run_dir, args.resume, f"optimizers-{args.env}")

    rates = np.array(args.learning_rates)
    toy_steps = np.linspace(0, args.toy_steps, POINTS + 1)[1:]
    rows, finals, bests, toy_finals, toy_bests = [], [], [], [], []
    for name in args.optimizers:
        print(name, flush=True)
        env_steps, returns, final = train_ppo(args, preset, name, folder)
        errors = np.nan_to_num(train_toy(args, name), nan=np.inf, posinf=np.inf)
        final = np.nan_to_num(final, nan=-np.inf)
        best = np.argmax(stats.iqm(np.nanmean(returns, axis=-1), axis=1))  # learning fast counts, too
        toy_best = np.argmin(stats.iqm(errors[..., -1], axis=1))
        finals.append((name, rates, final.T))
        bests.append((f"{name}, {rates[best]:g}", env_steps, returns[best]))
        toy_finals.append((name, rates, errors[..., -1].T))
        toy_bests.append((f"{name}, {rates[toy_best]:g}", toy_steps, errors[toy_best]))
        for i, rate in enumerate(rates):
            rows.append(
                {
                    "optimizer": name,
                    "learning rate": f"{rate:g}",
                    "PPO return": score(final[i]),
                    "toy error": score(errors[i, :, -1]),
                }
            )
        plot.draw(
            folder / "optimizers.png",
            [
                plot.Panel(f"PPO on {args.env}", "learning rate", "greedy return after training", finals, "x"),
                plot.Panel("each at its best learning rate", "environment steps", "return in training", bests),
                plot.Panel("Supervised toy", "learning rate", "test error after training", toy_finals, "xy"),
                plot.Panel("each at its best learning rate", "gradient steps", "test error", toy_bests, "y"),
            ],
        )
    report.print_table(folder / "optimizers.csv", rows)
    print(f"{folder}/optimizers.png")


if __name__ == "__main__":
    cli.main(main)
