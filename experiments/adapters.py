"""Parameter-efficient fine-tuning at equal budgets: what is trained, what it costs, and what it reaches.

python experiments/adapters.py
python experiments/adapters.py --num-seeds 2 --kinds full lora --share 0.2
python experiments/adapters.py --resume --run-dir runs/mine      goes on; what is finished is not repeated

A decoder that was trained to reverse sequences is fine-tuned to sort them, by training all of it or one kind of adapter beside it. Each kind takes the
best of several learning rates. Memory is what the compiler plans for a step of one seed. Times of a step and of merging are ratios to a step of training
everything, those of sampling to the plain decoder's; all are measured in turns. Leaves adapters.csv and adapters.png.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

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
from jrl.run import cli, folders, plot, report, stats, timing

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


class Costs(NamedTuple):
    """What is measured of one seed: trained numbers, the bytes that a step needs besides its arguments, and what is timed."""

    trained: int
    memory: float
    calls: dict[str, Callable[[], Any]]


def costs(start: Any, kind: str, rank: int) -> Costs:
    """What is timed are a step, sampling with the adapter beside the decoder's matrices and, where it can be, merged into them, and merging."""
    learning = learner_of(kind, rank)
    state = jax.jit(lambda p: learning.init(jax.random.key(0), p, sft.Hyper(), 1))(start)
    batch = examples(jax.random.key(1))
    step = jax.jit(lambda s, b: learning.learn(s, jax.random.key(2), b)[0]).lower(state, batch).compile()
    plan = step.memory_analysis()
    problems = jax.vmap(TASK.draw)(jax.random.split(jax.random.key(3), MEASURED))
    adapter = MODEL.adapter(adapters.Config(kind, rank=rank, tokens=rank))  # type: ignore[arg-type]

    @jax.jit
    def said(params: Any) -> Any:
        more: dict[str, Any] = {"length": TASK.answer_length, "end": -1, "valid": problems.valid}
        return sample(jax.random.key(4), MODEL, params, problems.prompt, **more).tokens

    beside = jax.jit(lambda s: said(adapted(MODEL, adapter, s.frozen, s.params)))
    calls = {"step": lambda: step(state, batch), "beside": lambda: beside(state)}
    if kind in adapters.BESIDE_MATRICES:
        merge = jax.jit(lambda s: adapter.merge(s.frozen, s.params))
        whole = merge(state)
        calls |= {"merged": lambda: said(whole), "merging": lambda: merge(state)}
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    return Costs(trained, float("nan" if plan is None else plan.temp_size_in_bytes), calls)


def side_by_side(start: Any, kinds: Sequence[str], rank: int) -> dict[str, Any]:
    """The costs of all kinds, timed in turns, since a shared machine drifts: seconds, the best of several."""
    print("what each costs", file=sys.stderr, flush=True)
    found = {kind: costs(start, kind, rank) for kind in kinds}
    seconds = timing.fastest(
        {f"{kind} {what}": call for kind, x in found.items() for what, call in x.calls.items()}, 30
    )
    numbers = {f"{kind} {name}": float(getattr(x, name)) for kind, x in found.items() for name in ("trained", "memory")}
    return {"costs": numbers | seconds}


def measured(args: Args, kind: str, keys: Array, starts: Any) -> dict[str, Any]:
    """Curves ``[rates, seeds, points]``."""
    learning = learner_of(kind, args.rank)
    updates = max(POINTS, int(args.updates * args.share))

    def member(key: Array, start: Any, rate: Any) -> Array:
        return curve(key, start, rate, learning, updates)

    program = jax.vmap(jax.vmap(member, in_axes=(0, 0, None)), in_axes=(None, None, 0))
    curves = jax.jit(program)(keys, starts, jnp.array(RATES))
    return {"curves": np.asarray(curves).tolist()}


def row_of(kind: str, curves: Any, costs: dict[str, float], best: int) -> dict[str, Any]:
    curves = curves[best]

    def ratio(name: str, to: str) -> str:
        seconds = costs.get(f"{kind} {name}")
        return "" if seconds is None else f"{seconds / costs[f'full {to}']:.2f}"

    return {
        "trained": kind,
        "numbers": f"{costs[f'{kind} trained']:,.0f}",
        "right": stats.brief(100 * curves[:, -1], ".1f") + " %",
        "half way": stats.brief(100 * curves[:, POINTS // 2], ".1f") + " %",
        "learning rate": f"{RATES[best]:g}",
        "memory of a step": f"{costs[f'{kind} memory'] / 2**20:.1f} MiB",
        "time of a step": ratio("step", "step"),
        "sampling, beside": ratio("beside", "merged"),
        "sampling, merged": ratio("merged", "merged"),
        "merging": "" if kind == "full" else ratio("merging", "step"),
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
    one, all_kinds = jax.tree.map(lambda x: x[0], starts), tuple(found)
    timed = folders.remembered(
        folder / "costs.json", settings | {"kinds": list(all_kinds)}, partial(side_by_side, one, all_kinds, args.rank)
    )
    spent, rows, lines = timed["costs"], [], []
    for kind in args.kinds:
        curves = np.array(found[kind]["curves"])
        best = int(curves[:, :, -1].mean(1).argmax())
        rows.append(row_of(kind, curves, spent, best))
        at = np.arange(POINTS + 1) * max(1, max(POINTS, int(args.updates * args.share)) // POINTS)
        lines.append((kind, at, curves[best]))
    report.print_table(folder / "adapters.csv", rows)
    plot.draw(
        folder / "adapters.png", [plot.Panel("From reversing to sorting", "update", "share of right answers", lines)]
    )
    print(f"{folder}/adapters.png")


if __name__ == "__main__":
    cli.main(main)
