"""Tokens a second of a language model that answers and learns, and what the cache and one program for all seeds give.

    bash scripts/bench --algo grpo                        a small decoder that reverses 32 symbols, at 1 and 8 seeds
    bash scripts/run scripts/bench_grpo.py --task-params length=100 --seeds 1 --config.model.dim 256

Sampling is with the cache of keys and values, and without: then the whole sequence is read again for each token. Training is an
update's learning from those answers. A whole update of all seeds is one program (vmap, laid over devices as the run loop does),
or a program for one seed, called for each. Tokens are those of answers, of all seeds. Each is compiled once, then timed; the figure
is the best of --repeats, and the order alternates, since a shared machine drifts.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algos import grpo
from jrl.lm import tasks
from jrl.lm.model import Model
from jrl.lm.policy import language_model
from jrl.lm.sampling import Rollout
from jrl.nets import transformer
from jrl.numerics import checks
from jrl.run import cli, layout, report, stats
from jrl.run.timing import fastest

Array = jax.Array


@dataclass(frozen=True)
class Args:
    """Measure sampling and training."""

    task: str = "reverse"  # Task with a verifier.
    task_params: tuple[str, ...] = ("length=32",)  # Parameters of the task, as NAME=NUMBER ...
    seeds: tuple[int, ...] = (1, 8)  # Numbers of seeds.
    repeats: int = 3  # Measurements, of which the best counts.
    config: grpo.Config = field(  # Static settings of GRPO.
        default_factory=lambda: grpo.Config(model=transformer.Config(dim=64, num_layers=2), num_minibatches=2)
    )
    folder: Path = Path("runs/bench")  # Folder for the table.


class Read(NamedTuple):
    """All that was read, in place of a cache."""

    tokens: Array
    valid: Array


def without_cache(model: Model) -> Model:
    """A model that reads the whole sequence for each token."""

    def hidden(params: Any, tokens: Array, valid: Array) -> Array:
        return model.hidden_and_load(params, tokens, valid, valid)[0]

    def prefill(params: Any, tokens: Array, valid: Array, capacity: int) -> tuple[Array, Read]:
        rest = ((0, 0), (0, capacity - tokens.shape[1]))
        last = hidden(params, tokens, valid)[:, -1]
        return model.head(params, last), Read(jnp.pad(tokens, rest), jnp.pad(valid, rest))

    def step(params: Any, token: Array, read: Read, position: Array, start: Array) -> tuple[Array, Read]:
        read = Read(read.tokens.at[:, position].set(token), read.valid.at[:, position].set(True))
        return model.head(params, hidden(params, *read)[:, position]), read

    return model._replace(prefill=prefill, step=step, grow=None, repeat=None, insert=None)


def programs(task: tasks.Task, config: grpo.Config, num_seeds: int) -> dict[str, Callable[[], Any]]:
    """What is timed. No answer ends before the longest, so that all do the same work."""
    cached = language_model(task, config.model, config.precision)
    learner, slow = (
        grpo.learner(model, config, length=task.answer_length, end=-1, pad=tasks.PAD)
        for model in (cached, without_cache(cached))
    )
    lay = layout.choose(num_seeds, jax.devices(), None)

    def over(f):
        return jax.jit(layout.over_members(lay, jax.vmap(f)))

    def init(key: Array) -> Any:
        problems = jax.vmap(task.draw)(jax.random.split(key, config.num_prompts))
        asked = [jnp.repeat(x, config.group_size, axis=0) for x in (problems.prompt, problems.valid)]
        return learner.init(key, cached.init(key), grpo.Hyper()), *asked

    def say(x: Any, by: grpo.Learner = learner) -> Any:
        return by.sample(x[0], x[0].key, *x[1:])

    def learn(x: Any, said: Rollout) -> Any:
        reward = jax.random.uniform(x[0].key, (config.rows,))
        return learner.learn(x[0], x[0].key, *x[1:], said, reward)

    def update(x: Any) -> Any:
        return learn(x, say(x))

    members = over(init)(layout.put(lay, layout.pad(lay, jax.random.split(jax.random.key(0), num_seeds))))
    each = [jax.tree.map(lambda x, i=i: jax.device_put(x[i], jax.devices()[0]), members) for i in range(num_seeds)]
    sampling, reading, training, at_once = (
        over(say),
        over(lambda x: say(x, slow)),
        over(lambda x: learn(*x)),
        over(update),
    )
    said, one = sampling(members), jax.jit(update)
    return {
        "sampling, cache": lambda: sampling(members),
        "sampling, no cache": lambda: reading(members),
        "training": lambda: training((members, said)),
        "update, seeds at once": lambda: at_once(members),
        "update, one by one": lambda: [one(x) for x in each],
    }


SLOWER = {"sampling, cache": "sampling, no cache", "update, seeds at once": "update, one by one"}


def main(args: Args) -> None:
    checks.not_empty(seeds=args.seeds)
    for n in (*args.seeds, args.repeats):
        checks.positive_int("seeds and repeats", n)
    task = tasks.make(args.task, **cli.parse_params(args.task_params))
    shapes = jax.eval_shape(language_model(task, args.config.model, args.config.precision).init, jax.random.key(0))
    size = sum(x.size for x in jax.tree.leaves(shapes))
    print(f"{task.name}: {size:,} parameters, {args.config.rows} answers of {task.answer_length} tokens", flush=True)
    rows = []
    for n in args.seeds:
        calls = programs(task, args.config, n)
        jax.block_until_ready([call() for call in calls.values()])  # compiles
        seconds = fastest(calls, args.repeats)
        for name, taken in seconds.items():
            speed = f"{n * args.config.rows * task.answer_length / taken:,.0f}"
            slower = f"{seconds[SLOWER[name]] / taken:.2f}x {SLOWER[name]}" if name in SLOWER else ""
            rows.append({"seeds": n, "what": name, "tokens/s": speed, "": slower})
        print(f"{stats.seeds(n)}: done", file=sys.stderr)
    report.print_table(args.folder / "grpo.csv", rows)


if __name__ == "__main__":
    cli.main(lambda argv: main(cli.parse(Args, argv, doc=__doc__)))
