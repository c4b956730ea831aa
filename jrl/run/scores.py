"""Evaluations of all members of a run: the programs, and the scores by cell."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jrl.algorithm import Algorithm
from jrl.run import layout, stats
from jrl.run.evaluate import evaluate
from jrl.run.layout import Layout

EVAL_SEED = 20_000_003  # evaluation keys: apart from training's, the same for every seed and run

Cells = dict[str, dict[str, Any]]


def one_by_one(function: Callable[[Any, jax.Array], Any]) -> Callable[[Any, jax.Array], Any]:
    """``function`` of each member and a key, one after the other: on the host no member waits for the longest episode of all."""
    return lambda members, key: jax.lax.map(lambda member: function(member, key), members)


class Scorer:
    """Greedy and sampled evaluation of every member in ``episodes`` whole episodes each."""

    def __init__(self, algo: Algorithm, cells: Sequence[str], layout: Layout, episodes: int) -> None:
        self.episodes = episodes
        self._algo, self._cells, self._layout = algo, cells, layout
        self._programs: dict[str, Future] = {}

    def compile(self, states: Any) -> None:
        """Begin to compile the programs in the background, for states of these shapes."""
        if self._programs:
            return
        shapes = layout.shapes(self._layout, states)

        each = one_by_one if self._algo.env.host else functools.partial(jax.vmap, in_axes=(0, None))

        def compiled(greedy: bool) -> Any:
            def one(state: Any, key: jax.Array) -> Any:
                return evaluate(self._algo, state, key, self.episodes, greedy)

            members = layout.over_members(self._layout, each(one))
            return jax.jit(members).lower(shapes, jax.random.key(EVAL_SEED)).compile()

        pool = ThreadPoolExecutor(2)
        self._programs = {"greedy": pool.submit(compiled, True), "sampled": pool.submit(compiled, False)}

    def __call__(self, states: Any, seed: int, broken: Sequence[int]) -> Cells:
        """Summaries by cell, of the members that are not ``broken``, on the episodes of a seed."""
        self.compile(states)
        by_mode = {}
        for mode, program in self._programs.items():
            out = layout.fetch(self._layout, program.result()(states, jax.random.key(seed)))
            means, cut = out.returns.mean(1).astype(float), (~out.finished).sum(1)
            means[list(broken)] = np.nan
            by_cell = means.reshape(len(self._cells), -1), cut.reshape(len(self._cells), -1).sum(1)
            by_mode[mode] = [
                stats.summarize(scores) | {"mode": mode, "unfinished": int(number)}
                for scores, number in zip(*by_cell, strict=True)
            ]
        pairs = zip(self._cells, by_mode["greedy"], by_mode["sampled"], strict=True)
        return {cell: greedy | {"sampled": sampled} for cell, greedy, sampled in pairs}
