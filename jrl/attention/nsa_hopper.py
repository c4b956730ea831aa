"""Native sparse attention on Hopper GPUs (Pallas Mosaic GPU): compression with its choice of blocks; see ``nsa``.

Compression is ``flash_hopper``, whose log-sum-exp then gives every probability again, in a second kernel that sums them into scores of blocks
and keeps the best: 64 queries by 64 blocks of selection at a time, head by head. The compressed blocks that count for block j of selection
are 4 j - 1 ... 4 j + 3 at the paper's sizes. They are laid in one set for each offset, so that equation 9 is a sum of products of matrices.

Selection is in ``nsa_selected_hopper``.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jrl.attention import flash_hopper
from jrl.attention.flash_hopper import LOG2E
from jrl.attention.nsa_branches import Config, Streams
from jrl.attention.nsa_selected_hopper import SIZE
from jrl.attention.spans_hopper import BEHIND_KEYS, Keys, Rows, along, down, hide, pad, visits
from jrl.numerics import mosaic
from jrl.numerics.mosaic import MATRIX, PER_ROW, ROWS, down_columns, load, transposed

Array = jax.Array
SHARED = 225 * 2**10  # bytes of shared memory that a block of the grid may have, less those of barriers
MOST = 64  # blocks that a query selects
FORCED = 3e38  # the score of a block that is always read


def why_not(q: Array, streams: Streams, config: Config) -> str | None:
    """What keeps these kernels from computing this, or None."""
    for k, v in (streams[0:2], streams[2:4], streams[4:6]):
        if reason := flash_hopper.why_not(q, k, v):
            return reason
    if config.select_block != SIZE:
        return f"it takes a select_block of {SIZE}, got {config.select_block}"
    if q.shape[2] // streams.k_select.shape[2] > ROWS:
        return f"it takes at most {ROWS} query heads for a key head, got {q.shape[2] // streams.k_select.shape[2]}"
    if config.selected > MOST:
        return f"it takes at most {MOST} selected blocks, got {config.selected}"
    needed = (len(_offsets(config)) + 2) * SIZE * q.shape[3] * 2
    if needed > SHARED:
        given = f"{len(_offsets(config))} compressed blocks that count for a block of selection"
        return f"{given} take {needed / 2**10:.0f} KiB of shared memory, more than {SHARED // 2**10}"
    return None


# Compression: every query reads all blocks that are over, and chooses


def compressed_attention(
    q: Array,
    k: Array,
    v: Array,
    first: Array,
    queries: tuple[Array, Array, Array, Array],
    num_blocks: int,
    config: Config,
    scale: float,
) -> tuple[Array, Array]:
    """The compression branch's output ``[B, T, H, Dv]`` and the blocks chosen ``[B, K, T, n]``, as ``nsa.select`` gives them.

    For q ``[B, T, H, D]`` and compressed keys and values ``[B, N, K, D]``. ``first`` ``[B, N]`` has the index of the first token of each compressed
    block; ``queries`` are the index of each query, of the first token that it sees, its own block and the oldest one that it may
    read, all ``[B, T]``.
    """
    (batch, length, heads, _), kv_heads = q.shape, k.shape[2]
    group, padding = heads // kv_heads, (0, -length % flash_hopper.TILE)
    t, start, own, oldest = (jnp.pad(x, [(0, 0), padding]) for x in queries)
    rows, keys = Rows(start, t, jnp.zeros_like(t)), Keys(first, first + config.block - 1, jnp.zeros_like(first))
    q = flash_hopper.by_group(jnp.pad(q, [(0, 0), padding, (0, 0), (0, 0)]), kv_heads)
    k, v = map(flash_hopper.by_head, (k, v))
    by_row = Rows(*(jnp.repeat(x, group, 1) for x in rows))
    behind = pad(keys, BEHIND_KEYS, flash_hopper.TILE)
    near = map(flash_hopper.pad_rows, (k, v))
    out, lse = flash_hopper.attention(q.reshape(len(q), -1, q.shape[3]), *near, by_row, behind, scale)
    lse = lse.reshape(*q.shape[:3]).swapaxes(1, 2)
    q, k, lse = map(lax.stop_gradient, (q, k, lse))
    chosen = _choose(q, k, lse, rows, keys, own, oldest, num_blocks, config, scale)
    out = flash_hopper.by_token(out, batch, group)[:, :length]
    return out, chosen.reshape(batch, kv_heads, *chosen.shape[1:])[:, :, :length]


def _offsets(config: Config) -> dict[int, int]:
    """Equation 9: how often compressed block ``(l'/d) j + offset`` counts for block j of selection."""
    counts: dict[int, int] = {}
    for m in range(config.select_block // config.stride):
        for n in range(config.block // config.stride):
            counts[m - n] = counts.get(m - n, 0) + 1
    return dict(sorted(counts.items()))


def _choose(q, k, lse, rows, keys, own, oldest, num_blocks, config, scale):
    """The blocks that each query reads ``[P, T, n]``, for q ``[P, T, G, D]``, keys ``[P, N, D]`` and lse ``[P, G, T]``."""
    (pairs, length, _, dim), offsets = q.shape, _offsets(config)
    batch, count, tiles = len(own), min(config.selected, num_blocks), -(-num_blocks // SIZE)
    width = count + -count % 8  # of a matrix

    def in_sets(x: Array, padding: Any) -> Array:
        """``[B, N, ...]`` as one set for each offset, ``[B, sets, blocks, ...]``."""
        each, before = config.select_block // config.stride, -min(offsets)
        behind = (tiles * SIZE + 1) * each - x.shape[1]
        x = jnp.pad(x, [(0, 0), (before, behind), *[(0, 0)] * (x.ndim - 2)], constant_values=padding)
        return jnp.stack([x[:, before + o :: each][:, : tiles * SIZE] for o in offsets], axis=1)

    keys = Keys(*(in_sets(x, none) for x, none in zip(keys, BEHIND_KEYS, strict=True)))
    by_tile = (x.reshape(batch, -1, tiles, SIZE).swapaxes(1, 2).reshape(batch, -1) for x in keys)
    whole = visits(rows, Keys(*by_tile), ROWS, len(offsets) * SIZE)[..., 2:]
    oldest_near, own_near = oldest.reshape(batch, -1, ROWS).min(-1), own.reshape(batch, -1, ROWS).max(-1)
    near = jnp.stack([oldest_near // SIZE, own_near // SIZE + 1], axis=-1).clip(0, tiles)
    sizes = {"heads": pairs // batch, "weights": tuple(offsets.values()), "num_blocks": num_blocks}
    chosen = plgpu.kernel(
        functools.partial(_choose_body, **sizes, config=config, scale=scale),
        out_type=jax.ShapeDtypeStruct((pairs, length, width), jnp.int32),
        scratch_types=[
            mosaic.in_shared_memory((2, ROWS, dim), q.dtype),
            mosaic.in_shared_memory((len(offsets), SIZE, dim), q.dtype),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=len(offsets)),
        ],
        grid=(pairs, length // ROWS),
        grid_names=("pair", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="nsa_choose",
    )(q, in_sets(k, 0), lse, rows, keys, own, oldest, jnp.concatenate([near, whole], axis=-1))
    return chosen[..., :count]


def _choose_body(
    q, k, lse, rows, keys, own, oldest, seen, chosen, q_here, k_here, q_ready, k_ready,
    *, heads, weights, num_blocks, config, scale,
):  # fmt: skip
    """Blocks of 64 queries: their scores, tile by tile of blocks, each merged into the best so far."""
    pair, tile = lax.axis_index("pair"), lax.axis_index("tile")
    batch, here = lax.div(pair, heads), pl.ds(tile * ROWS, ROWS)
    group, width = q.shape[2], chosen.shape[2]
    low, high, whole, whole_end = (seen[batch, tile, i] for i in range(4))

    def fetch(g):
        slot = lax.rem(g, 2)
        plgpu.copy_gmem_to_smem(q.at[pair, here, g], q_here.at[slot], q_ready.at[slot])

    def scores(at):
        """Scores of 64 blocks ``[ROWS, 64]``, equations 9 and 10."""
        blocks, is_whole = pl.ds(at * SIZE, SIZE), (at >= whole) & (at < whole_end)
        for i in range(len(weights)):
            plgpu.copy_gmem_to_smem(k.at[pair, i, blocks], k_here.at[i], k_ready)
        fetch(0)
        plgpu.barrier_wait(k_ready)

        def of_head(g, score):
            slot = lax.rem(g, 2)
            pl.when(g + 1 < group)(lambda: fetch(g + 1))
            plgpu.barrier_wait(q_ready.at[slot])
            total = down_columns(load(lse.at[pair, g, here], PER_ROW))
            for i, weight in enumerate(weights):
                this = mosaic.hidden(i)
                s = mosaic.product(q_here.at[slot], transposed(k_here.at[this])) * (scale * LOG2E)
                s = hide(
                    s,
                    is_whole,
                    lambda: down(rows, (batch, here), SIZE),
                    lambda this=this: along(keys, (batch, this, blocks)),
                )
                score += weight * jnp.exp2(s - total)
            return score

        return lax.fori_loop(0, group, of_head, mosaic.zeros((ROWS, SIZE), MATRIX))

    def of_tile(at, best):
        score = scores(at)
        block = at * SIZE + plgpu.broadcasted_iota(jnp.int32, (ROWS, SIZE), 1, layout=MATRIX)
        last, first = (down_columns(load(x.at[batch, here], PER_ROW)) for x in (own, oldest))
        forced = (block < first + config.initial) | (block > last - config.local)
        there = (block >= first) & (block <= last) & (block < num_blocks)
        score = jnp.where(there, jnp.where(forced, FORCED, score), -1.0)
        return _merge(score, block.astype(jnp.float32), *best)

    best = mosaic.full((ROWS, width), -2.0, MATRIX), mosaic.full((ROWS, width), num_blocks, MATRIX)
    best, block = lax.fori_loop(low, high, of_tile, best)
    chosen[pair, here] = jnp.where(best >= 0, block, float(num_blocks)).astype(jnp.int32)


def _merge(score, block, best, best_block):
    """The highest scores ``[ROWS, n]`` of these and the best so far, in order, the lowest block first among equals."""
    width = best.shape[1]
    place = plgpu.broadcasted_iota(jnp.int32, best.shape, 1, layout=MATRIX)

    def highest(x, y):
        return jnp.maximum(x.max(axis=1), y.max(axis=1))

    def pick(j, carry):
        score, best, old_block, new, new_block = carry
        top = highest(score, best)
        behind = [
            jnp.where(x == down_columns(top, x.shape[1]), -b, -FORCED) for x, b in ((score, block), (best, old_block))
        ]
        at = -highest(*behind)
        score = jnp.where(block == down_columns(at), -2.0, score)
        best = jnp.where(old_block == down_columns(at, width), -2.0, best)
        new = jnp.where(place == j, down_columns(top, width), new)
        return score, best, old_block, new, jnp.where(place == j, down_columns(at, width), new_block)

    *_, best, best_block = lax.fori_loop(0, width, pick, (score, best, best_block, best, best_block))
    return best, best_block
