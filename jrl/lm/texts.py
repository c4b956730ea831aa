"""Texts as rows of tokens, several to a row where that saves padding.

    plan = pack(lengths, room=1024, how="bfd")           which pieces of which texts stand in each row
    batch = rows_of(plan[:8], corpus, room=1024)         Texts [8, 1024]

Packing is the best fit of TRL's ``pack_dataset``: bins of equal size, filled in the order of falling lengths.
"""

import bisect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jrl.numerics import checks

How = Literal["none", "bfd", "bfd_split", "wrapped"]


class Texts(NamedTuple):
    """Rows of texts ``[B, L]``.

    Attributes:
        tokens: int32.
        learned: bool, true for the tokens that are learned from; never for the first of a text, which nothing predicts.
        segments: int32, the number of the text in its row, from 1; 0 for padding behind the last.
    """

    tokens: Any
    learned: Any
    segments: Any


class Corpus(NamedTuple):
    """All texts one after the other: ``tokens`` int32 ``[N]``, ``learned`` bool ``[N]``; text i is ``[offsets[i], offsets[i + 1])``."""

    tokens: np.ndarray
    learned: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


class Piece(NamedTuple):
    """Tokens ``[begin, end)`` of a text."""

    text: int
    begin: int
    end: int


Row = tuple[Piece, ...]


def pack(lengths: Sequence[int] | np.ndarray, room: int, how: How = "bfd") -> list[Row]:
    """The pieces of texts in each row of ``room`` tokens.

    Args:
        lengths: of the texts, in tokens. Empty ones are left out.
        room: Tokens of a row.
        how: "none" has one text a row, cut at its end. "bfd" (best fit, decreasing) fills rows with whole texts, longest first, and cuts
            those that are longer than a row; "bfd_split" makes pieces of these instead. "wrapped" cuts the stream of all texts into rows.

    Raises ``ValueError`` for a setting out of range.
    """
    checks.positive_int("room", room)
    checks.one_of("packing", how, get_args(How))
    pieces = [Piece(i, 0, int(n)) for i, n in enumerate(lengths) if n]
    if how == "wrapped":
        return _wrapped(pieces, room)
    if how == "bfd_split":
        pieces = [Piece(i, at, min(at + room, end)) for i, _, end in pieces for at in range(0, end, room)]
    pieces = [piece._replace(end=min(piece.end, piece.begin + room)) for piece in pieces]
    return [(piece,) for piece in pieces] if how == "none" else _best_fit(pieces, room)


def _best_fit(pieces: Sequence[Piece], room: int) -> list[Row]:
    """Each piece goes to the row with the least room that is enough; among equals, to the one that has had it for longest."""
    rows: list[list[Piece]] = []
    by_space: dict[int, list[int]] = {}  # rows with so much space, the oldest first
    spaces: list[int] = []  # those that occur, in order
    for piece in sorted(pieces, key=lambda piece: piece.begin - piece.end):
        length = piece.end - piece.begin
        at = bisect.bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            row = by_space[space].pop(0)
            if not by_space[space]:
                del by_space[space], spaces[at]
        else:
            row, space = len(rows), room
            rows.append([])
        rows[row].append(piece)
        if left := space - length:
            if left not in by_space:
                bisect.insort(spaces, left)
            by_space.setdefault(left, []).append(row)
    return [tuple(row) for row in rows]


def _wrapped(pieces: Sequence[Piece], room: int) -> list[Row]:
    rows: list[list[Piece]] = [[]]
    space = room
    for text, begin, end in pieces:
        while begin < end:
            if not space:
                rows.append([])
                space = room
            cut = min(end, begin + space)
            rows[-1].append(Piece(text, begin, cut))
            begin, space = cut, space - (cut - begin)
    return [tuple(row) for row in rows if row]


def rows_of(plan: Sequence[Row], corpus: Corpus, room: int, pad: int = 0) -> Texts:
    """The rows ``[B, room]`` of a plan, arrays of numpy. The first token of each piece is not learned from."""
    tokens = np.full((len(plan), room), pad, np.int32)
    learned, segments = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.int32)
    for i, row in enumerate(plan):
        at = 0
        for number, (text, begin, end) in enumerate(row, start=1):
            here, there = slice(at, at + end - begin), slice(corpus.offsets[text] + begin, corpus.offsets[text] + end)
            tokens[i, here], learned[i, here], segments[i, here] = corpus.tokens[there], corpus.learned[there], number
            learned[i, at] = False
            at += end - begin
    return Texts(tokens, learned, segments)


def batch_of(step: int, size: int, number: int, seed: int) -> np.ndarray:
    """Which of ``number`` rows the batch of a step holds, int ``[size]``: the next ones of all rows in an order that is new in each epoch, so that a run
    may go on from any step. A batch at the end of an epoch goes on with the next one."""
    places = np.arange(step * size, (step + 1) * size)
    return np.array([_order(number, seed, epoch)[at] for epoch, at in zip(*divmod(places, number), strict=True)])


@lru_cache(maxsize=2)
def _order(number: int, seed: int, epoch: int) -> np.ndarray:
    """Of an epoch, drawn once for all its batches."""
    return np.random.default_rng((seed, epoch)).permutation(number)
