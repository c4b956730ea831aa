"""The selection branch of native sparse attention over a whole sequence, for every platform: see ``nsa``.

A query that reads a block is a pair. Pairs are computed block by block rather than query by query: the pairs of a block, laid in
tiles of a few queries, are one product of all their heads with keys that stay where they are, where each query would gather
keys of its own. A chunk of queries at once:

    plan        sort the pairs by block, give each a slot in a tile
    forward     largest score, sum and weighted values of each pair, as in ``flash``; then those of a query are put together
    backward    dk and dv of a tile are added to its block; dq of each pair, then the sum over those of a query

Memory is linear in the sequence, and so is the time at a fixed number of selected blocks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.attention import platforms
from jrl.attention.visibility import spread

Array = jax.Array


class Sizes(NamedTuple):
    """What a platform computes fast.

    Attributes:
        rows: of a product, as queries x heads.
        scores: of a step.
        chunk: queries whose pairs are kept at once, at least.
    """

    rows: int = 128
    scores: int = 2**18
    chunk: int = 2048


WIDE = Sizes(256, 2**24, 4096)


class Tiles(NamedTuple):
    """How a chunk of queries is computed.

    Attributes:
        queries: in a tile.
        group: tiles at once.
        chunk: queries whose pairs are kept at once.
    """

    queries: int
    group: int
    chunk: int


def tiles(q: Array, k: Array, selected: int, chunk: int | None = None) -> Tiles:
    """What is fast. Half a tile of each block is left empty on average, so that a chunk has about four for each."""
    (batch, kv_heads, length, heads, _), (blocks, size) = q.shape, k.shape[2:4]
    sizes = WIDE if platforms.wide() else Sizes()
    most = max(1, sizes.rows // heads)
    chunk = min(length, max(sizes.chunk, 4 * most * blocks // selected) if chunk is None else chunk)
    queries = max(1, min(most, chunk * selected // (4 * blocks)))
    there = chunk * selected // queries + min(blocks, chunk * selected)
    return Tiles(queries, max(1, min(there, sizes.scores // (batch * kv_heads * queries * heads * size))), chunk)


def selected_attention(
    q: Array,
    k: Array,
    v: Array,
    token: Array,
    chosen: Array,
    t: Array,
    start: Array,
    scale: float,
    chunk: int | None = None,
) -> Array:
    """Attention of q ``[B, K, T, G, D]`` to the tokens of its chosen blocks ``[B, K, T, n]``: ``[B, K, T, G, Dv]``.

    Keys and values are ``[B, K, blocks, l', D]``, and ``token`` int ``[B, blocks, l']`` has their indices; a block that is not there
    reads nothing. Queries stand at ``t`` and see tokens from ``start`` on, both ``[B, T]``. A query that sees nothing gets 0.
    """
    length, sizes = q.shape[2], tiles(q, k, chosen.shape[-1], chunk)

    def pad(x, axis):
        return jnp.pad(x, [(0, -length % sizes.chunk if i == axis else 0) for i in range(x.ndim)])

    one = functools.partial(_attend, scale=scale, sizes=sizes)
    over_heads = jax.vmap(one, (0, 0, 0, None, 0, None, None))
    out = jax.vmap(over_heads)(pad(q, 2), k, v, token, pad(chosen, 2), pad(t, 1), pad(start, 1))
    return out[:, :, :length]


# One sequence and one head of keys: q [T, G, D], k [blocks, l', D], token [blocks, l'], chosen [T, n], t and start [T]


class Plan(NamedTuple):
    """Where the pairs of a chunk are: ``query [tiles, R]``, one past the last for none; ``block [tiles]``; ``slot [C, n]`` of each
    pair among all rows of tiles, one past the last for none; ``end [blocks]``, one past the last tile of each block."""

    query: Array
    block: Array
    slot: Array
    end: Array


def plan(chosen: Array, blocks: int, sizes: Tiles) -> Plan:
    """Tiles of the pairs of ``chosen [C, n]``; ``blocks`` there stands for none."""
    (length, selected), rows = chosen.shape, sizes.queries
    pairs = chosen.size
    most = -(-(pairs // rows + min(blocks, pairs)) // sizes.group) * sizes.group
    method = "compare_all" if platforms.wide() else "scan"  # a step of a loop takes a GPU longer than all comparisons
    order = jnp.argsort(chosen.ravel()).astype(jnp.int32)
    ordered = chosen.ravel()[order]
    first = jnp.searchsorted(ordered, jnp.arange(blocks + 1), method=method).astype(jnp.int32)
    end = jnp.cumsum(-(-jnp.diff(first) // rows))  # of each block's tiles
    begin = jnp.concatenate([_begins(end), jnp.full_like(end[:1], most)])
    slot = begin[ordered] * rows + jnp.arange(pairs, dtype=jnp.int32) - first[ordered]
    query = jnp.full_like(order, length, shape=most * rows).at[slot].set(order // selected, mode="drop")
    block = jnp.searchsorted(end, jnp.arange(most), side="right", method=method)
    slots = jnp.zeros_like(order).at[order].set(jnp.minimum(slot, most * rows))
    return Plan(query.reshape(most, rows), jnp.minimum(block, blocks - 1), slots.reshape(chosen.shape), end)


def _begins(ends: Array) -> Array:
    """Where runs begin that stand behind each other, by their ends."""
    return jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])


class Pieces(NamedTuple):
    """How kernels compute a chunk of C queries, for each of P pairs of sequence and key head; every entry is int32.

    Attributes:
        query: the query at each place of each tile ``[P, tiles R]``.
        begin: first token that each row of a tile sees ``[P, tiles rows]``.
        end: the last one, -1 for a place that is empty.
        slot: place of each pair among those of the tiles ``[P, C, n]``, one past the last for none.
        work: block, first tile and number of tiles of each piece ``[P, pieces, 3]``.
        of_block: the pieces of each block ``[P, blocks, 2]``, ``[low, high)``.
    """

    query: Array
    begin: Array
    end: Array
    slot: Array
    work: Array
    of_block: Array


def pieces(chosen: Array, t: Array, start: Array, blocks: int, group: int, rows: int, longest: int) -> Pieces:
    """For ``chosen [P, C, n]``, and ``t`` and ``start [P, C]``: tiles of ``rows`` rows, ``group`` for each query, at most ``longest`` in a piece."""

    def one(chosen, t, start):
        there = plan(chosen, blocks, Tiles(rows // group, 1, len(chosen)))
        query = there.query.ravel()
        empty = query == len(chosen)
        query = jnp.where(empty, 0, query)
        end, begin = jnp.where(empty, -1, t[query]), start[query]
        work, of_block = _work(there, blocks, longest)
        return Pieces(query, jnp.repeat(begin, group), jnp.repeat(end, group), there.slot, work, of_block)

    return jax.vmap(one)(chosen, t, start)


def _work(there: Plan, blocks: int, longest: int) -> tuple[Array, Array]:
    tiles = len(there.block)
    first = _begins(there.end)
    last_piece = jnp.cumsum(-(-(there.end - first) // longest)).astype(jnp.int32)
    first_piece = _begins(last_piece)
    index = jnp.arange(-(-tiles // longest) + blocks, dtype=jnp.int32)
    block = jnp.minimum(
        jnp.searchsorted(last_piece, index, side="right", method="compare_all").astype(jnp.int32), blocks - 1
    )
    low = first[block] + (index - first_piece[block]) * longest
    number = jnp.clip(there.end[block] - low, 0, longest)
    return jnp.stack([block, low, number], axis=-1), jnp.stack([first_piece, last_piece], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attend(q, k, v, token, chosen, t, start, scale, sizes):
    return _forward(q, k, v, token, chosen, t, start, scale, sizes)[0]


def _forward(q, k, v, token, chosen, t, start, scale, sizes):
    """Output ``[T, G, Dv]`` and log-sum-exp ``[T, G]``, infinite for a query that sees nothing."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    tiny, least = jnp.finfo(wide).tiny, jnp.finfo(wide).min

    def of_chunk(x: Any) -> tuple[Array, Array]:
        q, chosen, t, start = x
        there = plan(chosen, len(k), sizes)
        scores = _scorer(q, k, token, t, start, scale)

        def of_tiles(x: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            s = scores(*x)[0]
            largest = jnp.maximum(s.max(-1), least)
            p = jnp.exp(s - largest[..., None])
            values = jnp.einsum("mrgs,msd->mrgd", p.astype(v.dtype), v[x[1]], preferred_element_type=wide)
            return largest, p.sum(-1), values

        largest, total, values = _join(jax.lax.map(of_tiles, _groups(there, sizes)), 3)
        at, known = _slots(there, len(largest))
        of_pair = jnp.where(known[..., None], largest[at], -jnp.inf)  # [C, n, G]
        top = jnp.maximum(of_pair.max(1), least)
        weight = jnp.exp(of_pair - top[:, None])
        sums = jnp.sum(weight * total[at], axis=1)
        out = jnp.einsum("cng,cngd->cgd", weight, values[at]) / jnp.maximum(sums, tiny)[..., None]
        return out.astype(v.dtype), jnp.where(sums > 0, top + jnp.log(jnp.maximum(sums, tiny)), jnp.inf)

    return _join(jax.lax.map(of_chunk, _chunks((q, chosen, t, start), sizes)), 2)


def _save(q, k, v, token, chosen, t, start, scale, sizes):
    out, lse = _forward(q, k, v, token, chosen, t, start, scale, sizes)
    return out, (q, k, v, token, chosen, t, start, out, lse)


def _backward(scale, sizes, saved, d_out):
    q, k, v, token, chosen, t, start, out, lse = saved
    wide = jnp.promote_types(q.dtype, jnp.float32)
    overlap = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)

    def of_chunk(carry: tuple[Array, Array], x: Any) -> tuple[tuple[Array, Array], Array]:
        q, chosen, t, start, d_out, lse, overlap = x
        there = plan(chosen, len(k), sizes)
        scores = _scorer(q, k, token, t, start, scale)
        d_out, lse, overlap = _with_none(d_out), _with_none(lse, jnp.inf), _with_none(overlap)

        def of_tiles(carry: tuple[Array, Array], x: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
            (dk, dv), (query, block) = carry, x
            s, queries, keys = scores(query, block)
            d_tile = d_out[query]
            p = jnp.exp(s - lse[query][..., None])
            dp = jnp.einsum("mrgd,msd->mrgs", d_tile, v[block], preferred_element_type=wide)
            ds = (p * (dp - overlap[query][..., None]) * scale).astype(q.dtype)
            dq = jnp.einsum("mrgs,msd->mrgd", ds, keys, preferred_element_type=wide)
            dk_tile = jnp.einsum("mrgs,mrgd->msd", ds, queries, preferred_element_type=wide)
            dv_tile = jnp.einsum("mrgs,mrgd->msd", p.astype(d_tile.dtype), d_tile, preferred_element_type=wide)
            return (dk.at[block].add(dk_tile), dv.at[block].add(dv_tile)), dq

        carry, dq = jax.lax.scan(of_tiles, carry, _groups(there, sizes))
        dq = _join(dq, 3)
        at, known = _slots(there, len(dq))
        return carry, jnp.einsum("cn,cngd->cgd", known.astype(wide), dq[at]).astype(q.dtype)

    zeros = spread((jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)), q)
    (dk, dv), dq = jax.lax.scan(of_chunk, zeros, _chunks((q, chosen, t, start, d_out, lse, overlap), sizes))
    return _join(dq, 2), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None, None


_attend.defvjp(_save, _backward)


def _scorer(
    q: Array, k: Array, token: Array, t: Array, start: Array, scale: float
) -> Callable[..., tuple[Array, Array, Array]]:
    """``(query [m, R], block [m])`` to scores ``[m, R, G, l']``, minus infinity for what is not seen, with queries and keys."""
    q, t, start = _with_none(q), _with_none(t, -1), _with_none(start)
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def scores(query: Array, block: Array) -> tuple[Array, Array, Array]:
        queries, keys = q[query], k[block]
        s = jnp.einsum("mrgd,msd->mrgs", queries, keys, preferred_element_type=wide) * scale
        at = token[block][:, None]
        visible = (at <= t[query][..., None]) & (at >= start[query][..., None])
        return jnp.where(visible[:, :, None], s, -jnp.inf), queries, keys

    return scores


def _with_none(x: Array, value: float = 0) -> Array:
    """A row more, for the query that is none."""
    return jnp.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1), constant_values=value)


def _slots(there: Plan, rows: int) -> tuple[Array, Array]:
    return jnp.minimum(there.slot, rows - 1), there.slot < rows


def _groups(there: Plan, sizes: Tiles) -> tuple[Array, Array]:
    return jax.tree.map(lambda x: x.reshape(-1, sizes.group, *x.shape[1:]), (there.query, there.block))


def _chunks(tree: Any, sizes: Tiles) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, sizes.chunk, *x.shape[1:]), tree)


def _join(tree: Any, axes: int) -> Any:
    """The first so many axes as one."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), tree)
