"""The members of a run, cells x seeds, and which of them turned NaN."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.algorithm import Algorithm
from jrl.numerics import checks
from jrl.run import layout, sweep
from jrl.run.layout import Layout
from jrl.run.program import Rows


class Members(NamedTuple):
    """The cells x seeds of a run, flattened.

    Attributes:
        keys: ``[members]``; those of a seed are equal in all cells.
        hypers: hyperparameters, leaves float32 ``[members]``.
        cells: labels of the cells.
        columns: the hyperparameters in which cells differ, by cell.
        labels: constant columns of each member in a table: its seed, and in a sweep its cell.
        shape: ``(seeds,)``, or ``(cells, seeds)`` in a sweep.
    """

    keys: jax.Array
    hypers: Any
    cells: list[str]
    columns: dict[str, dict[str, float]]
    labels: list[dict[str, Any]]
    shape: tuple[int, ...]


def members_of(algo: Algorithm, key: jax.Array, num_seeds: int, hypers: Mapping[str, Any] | None) -> Members:
    """``num_seeds`` members of each cell. Raises ``ValueError`` for hyperparameters that the algorithm does not take."""
    cells = {"": algo.hyper} if hypers is None else dict(hypers)
    for cell, hyper in (hypers or {}).items():  # the algorithm's own were checked with it
        checks.instances("hypers", **{cell: (hyper, type(algo.hyper))})
        if algo.check_hyper is not None:
            algo.check_hyper(hyper)
        else:
            jax.eval_shape(lambda key, hyper=hyper: algo.init(key, hyper), key)
    rows = np.repeat(np.arange(len(cells)), num_seeds)
    stacked = jax.tree.map(lambda *xs: np.array(xs, np.float32)[rows], *cells.values())
    columns = sweep.columns(cells)
    labels: list[dict[str, Any]] = [
        ({} if hypers is None else {"cell": cell} | columns[cell]) | {"seed": seed}
        for cell in cells
        for seed in range(num_seeds)
    ]
    shape = (num_seeds,) if hypers is None else (len(cells), num_seeds)
    keys = jax.random.split(key, num_seeds)[np.tile(np.arange(num_seeds), len(cells))]
    return Members(keys, stacked, list(cells), columns, labels, shape)


class NanWatch:
    """Which members turned NaN, and at which update; each is reported once.

    Attributes:
        found: update by member.
    """

    def __init__(self, algo: Algorithm, labels: list[dict[str, Any]], layout: Layout) -> None:
        self.found: dict[int, int] = {}
        self._labels, self._layout = labels, layout
        self._is_broken = jax.jit(jax.vmap(lambda state: _has_nan(algo.learned(state))))

    def look_at_rows(self, rows: Rows, start: int, say: Callable[[str], None]) -> None:
        """Note whose loss was not finite in a chunk, on the host, that began after ``start`` updates."""
        for member in np.flatnonzero(rows.first_bad >= 0).tolist():
            self._note(member, start + int(rows.first_bad[member]) + 1, say)

    def look_at_state(self, state: Any, updates: int, say: Callable[[str], None]) -> None:
        """Note what the very last update broke, which shows in no metric yet."""
        for member in self.broken(state):
            self._note(member, updates, say)

    def broken(self, state: Any) -> list[int]:
        """Members whose parameters, optimizer or statistics are not numbers any more."""
        return np.flatnonzero(layout.fetch(self._layout, self._is_broken(state))).tolist()

    def among(self, members: Iterable[int]) -> list[int]:
        """Those of the members that are well."""
        return [member for member in members if member not in self.found]

    def report(self) -> list[dict[str, Any]]:
        """Labels of the members that turned NaN, with the update."""
        return [self._labels[member] | {"update": update} for member, update in sorted(self.found.items())]

    def _note(self, member: int, update: int, say: Callable[[str], None]) -> None:
        if member in self.found:
            return
        self.found[member] = update
        label = self._labels[member]
        name = f"seed {label['seed']}" + (f" of {label['cell']}" if "cell" in label else "")
        say(f"{name} turned NaN at update {update}; it is left out of the aggregates, the others go on")


def _has_nan(tree: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.array([jnp.isnan(x).any() for x in floats]).any()
