"""The selection branch of native sparse attention on Hopper GPUs (Pallas Mosaic GPU), forward and backward: see ``nsa_selected``.

Pairs of a query and a block that it reads are sorted by block. A tile is all heads of a few queries, gathered to the keys of one block, 64 rows
for the tensor cores. Each pair has its own softmax, and a query's pairs are put together afterwards. Several tiles of a block are a
piece, which one block of the grid computes, with the next tile's queries on their way. Gradients of keys are summed over pieces in
a fixed order, without atomics.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jrl.attention.flash_hopper import LOG2E
from jrl.attention.nsa_selected import pieces
from jrl.attention.spans_hopper import HIDDEN
from jrl.attention.visibility import spread
from jrl.numerics import mosaic
from jrl.numerics.mosaic import MATRIX, PER_COLUMN, PER_ROW, ROWS, along_rows, down_columns, load, transposed

Array = jax.Array
SIZE = 64  # tokens of a block
PIECE = 16  # tiles that one block of the grid computes, at most
CHUNK = 2**14  # queries of all key heads whose pairs are kept at once, about


def selected_attention(
    q: Array, k: Array, v: Array, token: Array, chosen: Array, t: Array, start: Array, scale: float
) -> Array:
    """The same as ``nsa_selected.selected_attention``: ``[B, K, T, G, Dv]``, for blocks of 64 tokens and at most 64 heads."""
    batch, kv_heads, length, heads, _ = q.shape
    group = max(8, 2 ** math.ceil(math.log2(heads)))  # a tile takes a whole number of queries
    chunk = _chunk(batch * kv_heads, length, k.shape[2], chosen.shape[3])

    def by_pair(x: Array, none: int = 0) -> Array:
        x = jnp.pad(x, [(0, 0)] * 2 + [(0, -length % chunk)] + [(0, 0)] * (x.ndim - 3), constant_values=none)
        return x.reshape(batch * kv_heads, *x.shape[2:])

    q = by_pair(jnp.pad(q, [(0, 0)] * 3 + [(0, group - heads), (0, 0)]))
    t, start = (by_pair(jnp.broadcast_to(x[:, None], (batch, kv_heads, length))) for x in (t, start))
    k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    out = _attend(q, k, v, token, by_pair(chosen, k.shape[1]), t, start, scale, chunk)
    return out.reshape(batch, kv_heads, -1, group, v.shape[-1])[:, :, :length, :heads]


# Of P pairs of sequence and key head: q [P, T, G, D], k [P, blocks, 64, D], token [B, blocks, 64], chosen [P, T, n], t and start [P, T]


def _chunk(pairs: int, length: int, blocks: int, selected: int) -> int:
    """Queries of a chunk: each block is read by 16 of them or more, so that few places in tiles are empty."""
    return min(length, max(CHUNK // pairs, 16 * blocks // selected, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attend(q, k, v, token, chosen, t, start, scale, chunk):
    return _forward(q, k, v, token, chosen, t, start, scale, chunk)[0]


def _forward(q, k, v, token, chosen, t, start, scale, chunk):
    """Output ``[P, T, G, Dv]``, and log-sum-exp ``[P, T, G]`` in units of log 2, infinite for a query that sees nothing."""

    def of_chunk(x: Any) -> tuple[Array, Array]:
        q, chosen, t, start = x
        group, there = q.shape[2], pieces(chosen, t, start, k.shape[1], q.shape[2], ROWS, PIECE)
        values, largest, weight = _of_pairs(q, k, v, token, there, scale)
        known = (there.slot < there.query.shape[1])[..., None]
        largest = jnp.where(known, _at(largest, there.slot, group), HIDDEN)  # [P, C, n, G]
        weight = jnp.where(known & (largest > HIDDEN / 2), _at(weight, there.slot, group), 0.0)
        top = largest.max(2)
        share = weight * jnp.exp2(largest - top[:, :, None])
        total = jnp.sum(share, axis=2)
        share /= jnp.where(total > 0, total, 1.0)[:, :, None]
        values = jnp.where(share[..., None] > 0, _at(values, there.slot, group).astype(jnp.float32), 0.0)
        out = jnp.sum(share[..., None] * values, axis=2).astype(v.dtype)
        return out, jnp.where(total > 0, top + jnp.log2(total), jnp.inf)

    return jax.tree.map(_join, lax.map(of_chunk, _chunks((q, chosen, t, start), chunk)))


def _save(q, k, v, token, chosen, t, start, scale, chunk):
    out, lse = _forward(q, k, v, token, chosen, t, start, scale, chunk)
    return out, (q, k, v, token, chosen, t, start, out, lse)


def _backward(scale, chunk, saved, d_out):
    q, k, v, token, chosen, t, start, out, lse = saved
    overlap = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def of_chunk(sums: tuple[Array, Array], x: Any) -> tuple[tuple[Array, Array], Array]:
        q, chosen, t, start, d_out, lse, overlap = x
        there = pieces(chosen, t, start, k.shape[1], q.shape[2], ROWS, PIECE)
        dq, *parts = _gradients_of_pairs(q, k, v, token, there, d_out, lse, overlap, scale)
        known = (there.slot < there.query.shape[1])[..., None, None]
        dq = jnp.where(known, _at(dq, there.slot, q.shape[2]).astype(jnp.float32), 0.0).sum(2)
        added = _sums_of_pieces(there.of_block, *parts)
        return (sums[0] + added[0], sums[1] + added[1]), dq.astype(q.dtype)

    zeros = spread((jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)), q)
    (dk, dv), dq = lax.scan(of_chunk, zeros, _chunks((q, chosen, t, start, d_out, lse, overlap), chunk))
    return *spread((_join(dq), dk.astype(k.dtype), dv.astype(v.dtype)), q), None, None, None, None


_attend.defvjp(_save, _backward)


def _chunks(tree: Any, chunk: int) -> Any:
    """``[P, T, ...]`` to ``[chunks, P, C, ...]``."""
    return jax.tree.map(lambda x: x.reshape(len(x), -1, chunk, *x.shape[2:]).swapaxes(0, 1), tree)


def _join(x: Array) -> Array:
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _at(x: Array, slot: Array, group: int) -> Array:
    """Of rows of tiles ``[P, rows, ...]``, those of each pair ``[P, C, n, G, ...]``; anything where there is no pair."""
    x = x.reshape(len(x), -1, group, *x.shape[2:])
    return jax.vmap(lambda x, slot: x[jnp.minimum(slot, len(x) - 1)])(x, slot)


# Kernels, of a block for each piece and pair of sequence and key head


def _of_pairs(q, k, v, token, there, scale):
    """Of each pair and head: the weighted mean of values ``[P, rows, Dv]``, largest score and sum of weights ``[P, rows]``."""
    (pairs, rows), width, (group, dim) = there.begin.shape, v.shape[3], q.shape[2:]

    def kernel(q, k, v, token, there, values, largest, weight, q_here, k_here, v_here, result, ready, arrived):
        at = _begin(there, token, (k, k_here), (v, v_here), ready)

        def of_tile(slot, here):
            s = mosaic.product(q_here.at[slot], transposed(k_here)) * (scale * LOG2E)
            position = along_rows(load(at.token, PER_COLUMN))
            begin, end = (down_columns(load(x.at[at.pair, here], PER_ROW)) for x in (there.begin, there.end))
            s = jnp.where((position >= begin) & (position <= end), s, HIDDEN)
            top = s.max(axis=1)
            p = jnp.exp2(s - down_columns(top))
            [total] = mosaic.add_products((mosaic.zeros((ROWS, width), MATRIX), p.astype(v.dtype), v_here))
            sums = p.sum(axis=1)
            result[...] = (total * down_columns(1 / sums, width)).astype(values.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(result, values.at[at.pair, here])
            largest[at.pair, here] = top
            weight[at.pair, here] = sums
            return ()

        _each_tile(at, there.query, group, arrived, [(q, q_here)], of_tile)
        plgpu.wait_smem_to_gmem(0)

    scalars = [jax.ShapeDtypeStruct((pairs, rows), jnp.float32)] * 2
    shared = [(2, ROWS, dim), (SIZE, dim), (SIZE, width), (ROWS, width)]
    return _call(
        kernel,
        "nsa_selected_forward",
        there,
        q,
        shared,
        [jax.ShapeDtypeStruct((pairs, rows, width), v.dtype), *scalars],
        1,
    )(_by_row(q), k, v, token, there)


def _gradients_of_pairs(q, k, v, token, there, d_out, lse, overlap, scale):
    """Of each pair and head the gradient of the query ``[P, rows, D]``, of each piece those of keys and values ``[P, pieces, 64, D]``."""
    (pairs, rows), width, (group, dim) = there.begin.shape, v.shape[3], q.shape[2:]
    of_query = jax.vmap(lambda x, query: x[query].reshape(-1))

    def kernel(
        q, k, v, token, there, d_out, lse, overlap, dq, dk, dv, q_here, k_here, v_here, d_here, ds_here, ready, arrived
    ):
        at = _begin(there, token, (k, k_here), (v, v_here), ready)

        def of_tile(slot, here, dk_total, dv_total):
            s = mosaic.product(k_here, transposed(q_here.at[slot])) * (scale * LOG2E)
            position = down_columns(load(at.token, PER_ROW))
            begin, end, total, share = (
                along_rows(load(x.at[at.pair, here], PER_COLUMN)) for x in (there.begin, there.end, lse, overlap)
            )
            s = jnp.where((position >= begin) & (position <= end), s, HIDDEN)
            p = jnp.exp2(s - total)
            nothing = mosaic.zeros((SIZE, ROWS), MATRIX)
            dv_total, dp = mosaic.add_products(
                (dv_total, p.astype(d_out.dtype), d_here.at[slot]), (nothing, v_here, transposed(d_here.at[slot]))
            )
            ds = (p * (dp - share) * scale).astype(q.dtype)
            ds_here[...] = ds
            plgpu.commit_smem()
            [dk_total] = mosaic.add_products((dk_total, ds, q_here.at[slot]))
            for first in range(0, dim, 64):  # the queries are not needed any more
                part = pl.ds(first, 64)
                q_here.at[slot, :, part][...] = mosaic.product(transposed(ds_here), k_here.at[:, part]).astype(dq.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_here.at[slot], dq.at[at.pair, here])
            return dk_total, dv_total

        sums = (mosaic.zeros((SIZE, n), MATRIX) for n in (dim, width))
        rows = [(q, q_here), (d_out, d_here)]
        dk_total, dv_total = _each_tile(at, there.query, group, arrived, rows, of_tile, *sums)
        dk[at.pair, at.piece] = dk_total
        dv[at.pair, at.piece] = dv_total
        plgpu.wait_smem_to_gmem(0)

    sums = [jax.ShapeDtypeStruct((*there.work.shape[:2], SIZE, n), jnp.float32) for n in (dim, width)]
    shared = [(2, ROWS, dim), (SIZE, dim), (SIZE, width), (2, ROWS, width), (SIZE, ROWS)]
    query = there.query
    return _call(
        kernel, "nsa_selected_backward", there, q, shared, [jax.ShapeDtypeStruct((pairs, rows, dim), q.dtype), *sums], 2
    )(_by_row(q), k, v, token, there, _by_row(d_out), of_query(lse, query), of_query(overlap, query))


def _sums_of_pieces(of_block, dk, dv):
    """Gradients of the keys and values of every block ``[P, blocks, 64, D]``, in the order of its pieces."""

    def kernel(of_block, dk, dv, dk_sum, dv_sum):
        pair, block = lax.axis_index("pair"), lax.axis_index("block")
        low, high = of_block[pair, block, 0], of_block[pair, block, 1]
        for x, out in ((dk, dk_sum), (dv, dv_sum)):

            def add(piece, total, x=x):
                return total + load(x.at[pair, piece], MATRIX)

            out[pair, block] = lax.fori_loop(low, high, add, mosaic.zeros(x.shape[2:], MATRIX))

    pairs, blocks = of_block.shape[:2]
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((pairs, blocks, *x.shape[2:]), x.dtype) for x in (dk, dv)],
        grid=(pairs, blocks),
        grid_names=("pair", "block"),
        kernel_name="nsa_selected_sums",
    )(of_block, dk, dv)


class _Here(NamedTuple):
    """What this block of the grid computes: its pair and piece, the first of its tiles, their number, and the tokens of its keys."""

    pair: Any
    piece: Any
    low: Any
    tiles: Any
    token: Any


def _begin(there: Any, token: Any, keys: Any, values: Any, ready: Any) -> _Here:
    """Find this block's piece, and wait for its keys and values."""
    pair, piece = lax.axis_index("pair"), lax.axis_index("piece")
    block, low, tiles = (there.work[pair, piece, i] for i in range(3))
    for source, target in (keys, values):
        plgpu.copy_gmem_to_smem(source.at[pair, block], target, ready)
    plgpu.barrier_wait(ready)
    heads = there.query.shape[0] // token.shape[0]
    return _Here(pair, piece, low, tiles, token.at[lax.div(pair, heads), block])


def _each_tile(at: _Here, query: Any, group: int, arrived: Any, rows: Any, of_tile: Any, *carry: Any) -> Any:
    """Run ``of_tile(slot, its rows, *carry)`` for each tile; what its queries need is fetched one tile ahead, into two slots in turn.

    ``rows`` are pairs of memory ``[P, T G, D]`` and shared memory ``[2, 64, D]``.
    """
    places = ROWS // group

    def fetch(i):
        slot = lax.rem(i, 2)
        for place in range(places):
            first = query[at.pair, (at.low + i) * places + place] * group
            for source, target in rows:
                here = target.at[slot, pl.ds(place * group, group)]
                plgpu.copy_gmem_to_smem(source.at[at.pair, pl.ds(first, group)], here, arrived.at[slot])

    def step(i, carry):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what is sent from the other slot
        pl.when(i + 1 < at.tiles)(lambda: fetch(i + 1))
        slot = lax.rem(i, 2)
        plgpu.barrier_wait(arrived.at[slot])
        return of_tile(slot, pl.ds((at.low + i) * ROWS, ROWS), *carry)

    pl.when(at.tiles > 0)(lambda: fetch(0))
    return lax.fori_loop(0, at.tiles, step, carry)


def _call(kernel, name, there, like, shared, out_type, fetched):
    """A kernel over pieces; ``shared`` are shapes in shared memory, and each query has ``fetched`` arrays of rows."""
    pairs, number, _ = there.work.shape
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[
            *(mosaic.in_shared_memory(shape, like.dtype) for shape in shared),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=2, num_arrivals=fetched * ROWS // like.shape[2]),
        ],
        grid=(pairs, number),
        grid_names=("pair", "piece"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )


def _by_row(x: Array) -> Array:
    return x.reshape(len(x), -1, x.shape[-1])
