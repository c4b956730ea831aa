"""Learning from rows of files, some of which are held out: the part that supervised learning, reward models and DPO share."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jrl.lm import texts
from jrl.numerics import checks
from jrl.run import steps
from jrl.run.language import Opened, start
from jrl.run.steps import Plan, Row


class Job(NamedTuple):
    """What is learned from rows.

    Attributes:
        init: ``(key, params, hyper, updates) -> state``.
        learn: ``(state, key, batch) -> (state, metrics)``.
        evaluate: ``(state, batch) -> metrics``, means over what counts.
        batch: ``(held_out, rows) -> batch``; the row -1 is one that does not count.
        counted: ``batch ->`` how much of it counts, for means over several.
        sizes: numbers of rows that are learned from, and that are held out.
        batch_size: rows of a batch.
    """

    init: Callable[..., Any]
    learn: Callable[..., tuple[Any, dict[str, Any]]]
    evaluate: Callable[..., dict[str, Any]]
    batch: Callable[[bool, np.ndarray], Any]
    counted: Callable[[Any], float]
    sizes: tuple[int, int]
    batch_size: int

    def updates(self, epochs: float) -> int:
        """So many passes over the rows that are learned from."""
        return max(1, math.ceil(epochs * self.sizes[0] / self.batch_size))


def learn(job: Job, it: Opened, plan: Plan, hyper: Any, seed: int) -> tuple[Any, int, list[Row]]:
    """Batches of rows in an order that is new in each epoch, evaluated on what is held out: the state that is best there, or the last one, how many updates
    are done, and their metrics."""
    key_init, key_run = jax.random.split(jax.random.key(seed))
    with jax.set_mesh(it.mesh):
        state, where = start(it, job.init, key_init, it.params, hyper, plan.updates)
    learning = jax.jit(steps.unless_broken(job.learn), donate_argnums=0, out_shardings=(where, None))
    judging = jax.jit(job.evaluate)

    def step(state: Any, done: int) -> tuple[Any, Row, list[Any]]:
        batch = job.batch(False, texts.batch_of(done, job.batch_size, job.sizes[0], seed))
        begin = time.monotonic()
        with jax.set_mesh(it.mesh):
            state, metrics = jax.block_until_ready(learning(state, jax.random.fold_in(key_run, done), batch))
        row = {name: float(x) for name, x in metrics.items()}
        return state, row | {"counted_per_s": job.counted(batch) / (time.monotonic() - begin)}, []

    def evaluate(state: Any) -> Row:
        found: list[tuple[float, Any]] = []
        for rows in _batches(job.sizes[1], job.batch_size):
            batch = job.batch(True, rows)
            with jax.set_mesh(it.mesh):
                found.append((job.counted(batch), judging(state, batch)))
        weights = [weight for weight, _ in found]
        return {name: float(np.average([float(x[name]) for _, x in found], weights=weights)) for name in plan.evaluated}

    plan = plan._replace(where=where, evaluate=evaluate if job.sizes[1] else None)
    state, done, rows = steps.train(plan, state, step)
    return steps.best_of(plan, state), done, rows


def _batches(number: int, size: int) -> list[np.ndarray]:
    """All rows in order, in batches of one size: the last one is filled with -1."""
    rows = np.arange(number)
    whole = np.pad(rows, (0, -number % size), constant_values=-1)
    return list(whole.reshape(-1, size))


def held_out(number: int, share: float, given: bool, seed: int) -> np.ndarray:
    """Which of so many rows are held out, bool ``[number]``: a share of them, drawn by the seed; none where other rows are ``given`` for that.

    Raises ``ValueError`` for a share that leaves none to learn from.
    """
    held = np.zeros(number, bool)
    if given or not share:
        return held
    checks.within("eval_share", share, 0, 1)
    count = max(1, int(number * share))
    if count >= number:
        raise ValueError(f"eval_share = {share:g} leaves none of the {number} rows to learn from")
    held[np.random.default_rng(seed).permutation(number)[:count]] = True
    return held


def check_files(args: Any) -> None:
    """Raise ``ValueError`` for words of the command line that are wrong."""
    checks.above_zero("epochs", args.epochs)
    for name in ("save_every", "eval_every"):
        checks.positive_int(name, getattr(args, name))
    for name in ("steps", "length", "prompt_length", "answer_length"):
        if getattr(args, name, None) is not None:
            checks.positive_int(name, getattr(args, name), at_least=2 if name == "length" else 1)
    checks.not_empty(data=args.data)
