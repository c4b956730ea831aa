"""Parameter-efficient fine-tuning at equal budgets: what is trained, what it costs, and what it reaches.

python experiments/adapters.py
python experiments/adapters.py --num-seeds 2 --kinds full lora --share 0.2
python experiments/adapters.py --resume --run-dir runs/mine      goes on; what is finished is not repeated

A decoder that was trained to reverse sequences is fine-tuned to sort them, by training all of it or one kind of adapter beside it. Each kind takes the
best of several learning rates. Memory is what the compiler plans for a step of one seed; times are ratios to those of training everything, and, of
sampling, to the plain decoder's. Leaves adapters.csv and adapters.png.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jrl import run
from jrl.algos import sft
from jrl.lm import tasks
from jrl.lm.policy import adapted, answer, language_model
from jrl.lm.sampling import Support, sample
from jrl.lm.texts import Texts
from jrl.nets import adapters, transformer
from jrl.numerics import checks
from jrl.run import cli, folders, plot, report, stats

Array = jax.Array
BEFORE, TASK = tasks.make("reverse", length=4), tasks.make("sort", length=4)
SHAPE = transformer.Config(dim=64, num_layers=2, num_heads=4, num_kv_heads=2)
MODEL = language_model(TASK, SHAPE, "float32")
KINDS = get_args(adapters.Kind)
RATES = (2e-3, 6e-3, 2e-2)
POINTS, MEASURED, BATCH = 8, 128, 32


@dataclass(frozen=True)
class Args:
    """Compare adapters."""

    kinds: tuple[str, ...] = KINDS  # Kinds of adapters.
    rank: int = 8  # Rank of lora and dora, width of houlsby and pfeiffer, and number of virtual tokens.
    updates: int = 300  # Updates of fine-tuning.
    num_seeds: int = 8  # Seeds, each with a decoder of its own.
    share: float = 1.0  # Share of the updates of every stage.
    seed: int = 0  # Seed from whose key every seed's key is split.
    run_dir: cli.RunDir = None  # Folder of the results; default: a new one in runs/.
    resume: bool = False  # Continue in run_dir; what is finished is not repeated.


def before(key: Array, share: float) -> Any:
    """Parameters of a decoder that reverses. Pure: vmap it."""
    algo = sft.make(BEFORE, sft.Config(SHAPE))
    return run.train_fn(algo, max(1, int(300 * share)) * algo.env_steps_per_update)(key)[0].params


def learner_of(kind: Any, rank: int) -> sft.Learner:
    what = adapters.Config(kind, rank=rank, tokens=rank)
    return sft.learner(MODEL, sft.Config(SHAPE, batch_size=BATCH, adapter=what))


def examples(key: Array) -> Texts:
    problems = jax.vmap(TASK.draw)(jax.random.split(key, BATCH))
    return sft.demonstrations(problems, jax.vmap(TASK.demonstrate)(problems))


def curve(key: Array, start: Any, rate: Any, learning: sft.Learner, updates: int) -> Array:
    """The share of right answers at the beginning and along the way, ``[POINTS + 1]``. Pure: vmap it."""
    key_state, key_train = jax.random.split(key)
    state = learning.init(key_state, start, sft.Hyper(learning_rate=rate), updates)

    def right(state: Any) -> Array:
        said = answer(jax.random.key(1), TASK, MODEL, learning.policy(state), MEASURED, 1, Support())
        return said.parts["correct"].mean()

    def step(state: Any, key: Array) -> tuple[Any, None]:
        key_draw, key_learn = jax.random.split(key)
        return learning.learn(state, key_learn, examples(key_draw))[0], None

    def some(state: Any, keys: Array) -> tuple[Any, Array]:
        state, _ = jax.lax.scan(step, state, keys)
        return state, right(state)

    every = max(1, updates // POINTS)
    keys = jax.random.split(key_train, POINTS * every).reshape(POINTS, every)
    return jnp.concatenate([right(state)[None], jax.lax.scan(some, state, keys)[1]])


def costs(start: Any, learning: sft.Learner, kind: str, rank: int) -> dict[str, float]:
    """Of one seed: trained numbers, bytes that a step needs besides its arguments, and seconds of a step and of sampling, with the adapter beside the
    decoder's matrices and merged into them."""
    state = jax.jit(lambda p: learning.init(jax.random.key(0), p, sft.Hyper(), 1))(start)
    batch = examples(jax.random.key(1))
    step = jax.jit(lambda s, b: learning.learn(s, jax.random.key(2), b)[0]).lower(state, batch).compile()
    plan = step.memory_analysis()
    problems = jax.vmap(TASK.draw)(jax.random.split(jax.random.key(3), MEASURED))

    def sampling(params_of: Callable[[Any], Any]) -> float:
        def said(state: Any) -> Any:
            more: dict[str, Any] = {"length": TASK.answer_length, "end": -1, "valid": problems.valid}
            return sample(jax.random.key(4), MODEL, params_of(state), problems.prompt, **more).tokens

        return seconds(jax.jit(said), state)

    adapter = MODEL.adapter(adapters.Config(kind, rank=rank, tokens=rank))  # type: ignore[arg-type]
    found = {
        "trained": float(sum(x.size for x in jax.tree.leaves(state.params))),
        "memory": float(plan.temp_size_in_bytes if plan is not None else np.nan),
        "step": seconds(step, state, batch),
        "beside": sampling(lambda s: adapted(MODEL, adapter, s.frozen, s.params)),
        "merged": np.nan,
    }
    if kind in adapters.BESIDE_MATRICES:
        whole = jax.jit(lambda s: adapter.merge(s.frozen, s.params))(state)
        found["merged"] = sampling(lambda s: whole)
    return found


def seconds(function: Callable[..., Any], *given: Any) -> float:
    """The least of several runs."""
    jax.block_until_ready(function(*given))
    times = []
    for _ in range(15):
        begin = time.perf_counter()
        jax.block_until_ready(function(*given))
        times.append(time.perf_counter() - begin)
    return min(times)


def measured(args: Args, kind: str, keys: Array, starts: Any) -> dict[str, Any]:
    """Curves ``[rates, seeds, points]`` and costs."""
    learning = learner_of(kind, args.rank)
    updates = max(POINTS, int(args.updates * args.share))

    def member(key: Array, start: Any, rate: Any) -> Array:
        return curve(key, start, rate, learning, updates)

    program = jax.vmap(jax.vmap(member, in_axes=(0, 0, None)), in_axes=(None, None, 0))
    curves = jax.jit(program)(keys, starts, jnp.array(RATES))
    one = jax.tree.map(lambda x: x[0], starts)
    return {"curves": np.asarray(curves).tolist(), "costs": costs(one, learning, kind, args.rank)}


def row_of(kind: str, found: dict[str, Any], full: dict[str, float], best: int) -> dict[str, Any]:
    at, curves = found["costs"], np.array(found["curves"])[best]
    merged = "" if np.isnan(at["merged"]) else f"{at['merged'] / full['merged']:.2f}"
    return {
        "trained": kind,
        "numbers": f"{at['trained']:,.0f}",
        "right": stats.brief(100 * curves[:, -1], ".1f") + " %",
        "half way": stats.brief(100 * curves[:, POINTS // 2], ".1f") + " %",
        "learning rate": f"{RATES[best]:g}",
        "memory of a step": f"{at['memory'] / 2**20:.1f} MiB",
        "time of a step": f"{at['step'] / full['step']:.2f}",
        "sampling, beside": f"{at['beside'] / full['merged']:.2f}",
        "merged": merged,
    }


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    checks.not_empty(kinds=args.kinds)
    for kind in args.kinds:
        checks.one_of("kinds", kind, KINDS)
    for name in ("rank", "updates", "num_seeds"):
        checks.positive_int(name, getattr(args, name))
    checks.above_zero("share", args.share)
    folder = cli.folder_of_runs(args.run_dir, args.resume, "adapters")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("rank", "updates", "num_seeds", "share", "seed")}
    key_before, key_after = jax.random.split(jax.random.key(args.seed))
    print("decoders that reverse", file=sys.stderr, flush=True)
    starts = jax.jit(jax.vmap(lambda key: before(key, args.share)))(jax.random.split(key_before, args.num_seeds))
    keys, found = jax.random.split(key_after, args.num_seeds), {}
    for i, kind in enumerate(dict.fromkeys(("full", *args.kinds)), start=1):
        print(f"{i} of {len(args.kinds)}: {kind}", file=sys.stderr, flush=True)
        make = partial(measured, args, kind, keys, starts)
        found[kind] = folders.remembered(folder / f"{kind}.json", settings, make)
    rows, lines = [], []
    for kind in args.kinds:
        curves = np.array(found[kind]["curves"])
        best = int(curves[:, :, -1].mean(1).argmax())
        rows.append(row_of(kind, found[kind], found["full"]["costs"], best))
        at = np.arange(POINTS + 1) * max(1, max(POINTS, int(args.updates * args.share)) // POINTS)
        lines.append((kind, at, curves[best]))
    report.print_table(folder / "adapters.csv", rows)
    plot.draw(
        folder / "adapters.png", [plot.Panel("From reversing to sorting", "update", "share of right answers", lines)]
    )
    print(f"{folder}/adapters.png")


if __name__ == "__main__":
    cli.main(main)
