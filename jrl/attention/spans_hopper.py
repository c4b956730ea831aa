"""Which tokens rows of queries see and keys stand for, on Hopper GPUs, and which tiles of them see each other: see ``flash_hopper``."""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from jrl.attention.visibility import NO_KEY, NO_QUERY
from jrl.numerics.mosaic import PER_COLUMN, PER_ROW, along_rows, down_columns, load

Array = jax.Array
HIDDEN = -1e30  # a score that is not seen


class Rows(NamedTuple):
    """What rows of queries see, int32 ``[B, R]``: the first and the last token, and the segment."""

    begin: Array
    end: Array
    segment: Array


class Keys(NamedTuple):
    """What keys stand for, int32 ``[B, N]``: the first and the last token, and the segment."""

    first: Array
    last: Array
    segment: Array


END = 2**30  # behind every token
BEHIND_ROWS, BEHIND_KEYS = Rows(END, -1, NO_QUERY), Keys(-1, END, NO_KEY)  # type: ignore[arg-type]


def pad(tokens: Any, none: Any, tile: int) -> Any:
    """``Rows`` or ``Keys`` with ``none`` behind, to whole tiles."""
    return jax.tree.map(lambda x, n: jnp.pad(x, [(0, 0), (0, -x.shape[1] % tile)], constant_values=n), tokens, none)


def visits(rows: Rows, keys: Keys, tile: int, size: int, of_keys: bool = False) -> Array:
    """Tiles of ``size`` keys that each tile of ``tile`` rows visits, ``[low, high)``, and those that all its rows see whole: ``[B, tiles, 4]``.

    ``of_keys`` the other way round: tiles of rows that each tile of keys visits.
    """
    in_row, in_key = (size, tile) if of_keys else (tile, size)
    rows, keys = lax.optimization_barrier((rows, keys))  # the compiler would spend seconds on what is known before
    rows = Rows(*(x.reshape(len(x), -1, in_row) for x in rows))
    keys = Keys(*(x.reshape(len(x), -1, in_key) for x in keys))

    def within(low: Any, high: Any, begin: Array, end: Array, first: Array, last: Array) -> Array:
        """Whether keys may lie within what rows see, by the ``low`` and the ``high`` ends of tiles."""
        row = [x[:, None] if of_keys else x[:, :, None] for x in (low(begin, -1), high(end, -1))]
        key = [x[:, :, None] if of_keys else x[:, None] for x in (high(first, -1), low(last, -1))]
        return (key[0] >= row[0]) & (key[1] <= row[1])

    def both(low: Any, high: Any) -> Array:
        tokens = within(low, high, rows.begin, rows.end, keys.first, keys.last)
        return tokens & within(low, high, rows.segment, rows.segment, keys.segment, keys.segment)

    some, every = both(jnp.min, jnp.max), both(jnp.max, jnp.min)
    number = some.shape[-1]
    index = jnp.arange(number, dtype=jnp.int32)
    low, whole = (jnp.min(jnp.where(x, index, number), -1) for x in (some, every))
    high = jnp.max(jnp.where(some, index + 1, 0), -1)
    whole_end = jnp.min(jnp.where(~every & (index >= whole[..., None]), index, number), -1)
    return jnp.stack([jnp.minimum(low, high), high, whole, whole_end], axis=-1)


class Visit:
    """The tiles that a block of the grid visits: ``steps`` of them from ``low`` on; of ``parts`` of all, one."""

    def __init__(self, seen, batch, tile, part=0, parts=1):
        low, high, self._whole, self._whole_end = (seen[batch, tile, i] for i in range(4))
        self.low = low + lax.div((high - low) * part, parts)
        self.steps = low + lax.div((high - low) * (part + 1), parts) - self.low

    def tile(self, step, size):
        """Where a tile's rows or keys are, and whether all of them are seen by all."""
        tile = self.low + step
        return pl.ds(tile * size, size), (tile >= self._whole) & (tile < self._whole_end)


def hide(s: Any, whole: Any, rows: Any, keys: Any) -> Any:
    """Scores where rows see keys, HIDDEN elsewhere; ``rows`` and ``keys`` give the matrices of ``Rows`` and ``Keys``."""

    def masked(s):
        (begin, end, own), (first, last, other) = rows(), keys()
        return jnp.where((first >= begin) & (last <= end) & (own == other), s, HIDDEN)

    return lax.cond(whole, lambda s: s, masked, s)


def down(tokens: Any, at: Any, width: int) -> list[Any]:
    """Matrices of ``Rows`` or ``Keys`` that stand along the rows of the scores."""
    return [down_columns(load(x.at[at], PER_ROW), width) for x in tokens]


def along(tokens: Any, at: Any) -> list[Any]:
    """Matrices of ``Rows`` or ``Keys`` that stand along the columns of the scores."""
    return [along_rows(load(x.at[at], PER_COLUMN)) for x in tokens]
