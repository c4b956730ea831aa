"""Decoding with native sparse attention: each step reads one row for every d tokens, n blocks, and a window."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.attention import cache as kv
from jrl.attention.cache import KV, per_row
from jrl.attention.dense import group, masked_softmax
from jrl.attention.nsa_branches import Config, Streams, compress, compressed_attention, phi, select
from jrl.numerics.types import Params

Array = jax.Array


class Cache(NamedTuple):
    """What each branch remembers. Static shapes; a sequence longer than the capacity does not fit.

    Attributes:
        recent: the last l tokens of the compression branch, which the next block is made of.
        compressed: one row for each block of compression, ``[B, N, K, D]``, counted from the first token of the sequence.
        select: all tokens of the selection branch, ``[B, capacity, K, D]``, from the first token of the sequence on.
        window: the last w tokens of the window branch.
    """

    recent: KV
    compressed: KV
    select: KV
    window: KV


def init(
    config: Config,
    batch: int,
    capacity: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Cache:
    """An empty cache for sequences of up to ``capacity`` tokens (rounded up to whole blocks)."""
    capacity += -capacity % config.select_block
    sizes = (config.block, max(1, config.num_compressed(capacity)), capacity, config.window)
    return Cache(*(kv.init(batch, size, kv_heads, head_dim, value_dim, dtype) for size in sizes))


def write(
    params: Params, cache: Cache, streams: Streams, position: Array, config: Config, *, start: Array | int = 0
) -> Cache:
    """The cache with the token at ``position``; ``streams`` holds its ``[B, K, D]`` of each branch.

    The sequence began at ``start``, where its blocks count from; both are int32 ``[]`` or ``[B]``.
    """
    k_compress, v_compress, k_select, v_select, k_window, v_window = streams
    cache = cache._replace(recent=kv.seen(cache.recent), compressed=kv.seen(cache.compressed))  # small, and read here
    recent = kv.write(cache.recent, k_compress, v_compress, position)
    batch, rows = k_compress.shape[0], cache.compressed.k.shape[1]
    first = per_row(position - start, batch) + 1 - config.block  # of the block that ends here, if one does
    block = jnp.where((first >= 0) & (first % config.stride == 0), first // config.stride, rows)
    in_order = (per_row(position, batch)[:, None] + 1 + jnp.arange(config.block)[None]) % config.block

    def add(name: str, tokens: Array, compressed: Array) -> Array:
        tokens = jnp.take_along_axis(tokens, in_order[..., None, None], axis=1)
        row = phi(params.get(name), jnp.moveaxis(tokens, 1, 2))
        return compressed.at[jnp.arange(batch), block].set(row.astype(compressed.dtype), mode="drop")

    return Cache(
        recent=recent,
        compressed=KV(add("k", recent.k, cache.compressed.k), add("v", recent.v, cache.compressed.v)),
        select=kv.write(cache.select, k_select, v_select, position - start),
        window=kv.write(cache.window, k_window, v_window, position),
    )


def fill(params: Params, cache: Cache, streams: Streams, config: Config, *, start: Array | int = 0) -> Cache:
    """The empty ``cache`` after tokens from position 0 on, ``[B, T, K, D]`` of each branch.

    The sequence begins at ``start`` int32 ``[]`` or ``[B]``; what stands before it is padding.
    """
    k_compress, v_compress, k_select, v_select, k_window, v_window = streams
    batch, length = k_compress.shape[:2]
    start, compressed = per_row(start, batch), cache.compressed
    if number := config.num_compressed(length):
        first = start[:, None] + jnp.arange(number)[None] * config.stride
        over = (first + config.block <= length)[..., None, None]
        rows = (compress(params.get(name), x, config, first) for name, x in (("k", k_compress), ("v", v_compress)))
        compressed = kv.fill(compressed, *(jnp.where(over, x, 0) for x in rows))
    return Cache(
        recent=kv.fill(cache.recent, k_compress, v_compress),
        compressed=compressed,
        select=jax.tree.map(
            lambda x: jax.vmap(jnp.roll, (0, 0, None))(x, -start, 0), kv.fill(cache.select, k_select, v_select)
        ),
        window=kv.fill(cache.window, k_window, v_window),
    )


def decode_step(
    q: Array,
    gates: Array,
    cache: Cache,
    position: Array,
    config: Config,
    *,
    start: Array | int = 0,
    scale: float | None = None,
) -> Array:
    """The row of ``nsa.attend`` at ``position``: ``[B, H, Dv]`` for a query ``[B, H, D]`` and gates ``[B, H, 3]``.

    ``position`` and ``start`` (the first position that may be seen, with which the tokens were written) are int32 ``[]`` or ``[B]``;
    the token at ``position`` was written before.
    """
    cache = kv.seen(cache)
    batch, heads, dim = q.shape
    if gates.shape != (batch, heads, 3):
        raise ValueError(f"gates must be {[batch, heads, 3]}: compression, selection, window; got {list(gates.shape)}")
    scale = dim**-0.5 if scale is None else scale
    t = per_row(position - start, batch)[:, None]  # among the tokens of the sequence
    zero = jnp.zeros_like(t)
    one = q[:, None]
    compressed = jax.tree.map(lambda x: x.astype(q.dtype), cache.compressed)
    first = jnp.broadcast_to(jnp.arange(compressed.k.shape[1])[None] * config.stride, compressed.k.shape[:2])
    out_compress, importance = compressed_attention(one, compressed.k, compressed.v, first, t, zero, config, scale)

    size, (capacity, kv_heads) = config.select_block, cache.select.k.shape[1:3]
    chosen = select(importance, t // size, zero, capacity // size, config)  # [B, K, 1, n]
    grouped = group(one, kv_heads).transpose(0, 2, 1, 3, 4)
    k, v = (take_blocks(x, chosen[:, :, 0], size)[:, :, None].astype(q.dtype) for x in cache.select)
    scores, visible = selected_scores(grouped, k, chosen, t, scale)
    p = masked_softmax(scores, visible)
    values = v.reshape(*v.shape[:3], -1, v.shape[-1])
    out_select = jnp.einsum("bkcgs,bkcsd->bkgd", p.astype(q.dtype), values, preferred_element_type=p.dtype)

    out_window = kv.decode_step(q, cache.window, position, start=start, window=config.window, scale=scale)
    parts = [out_compress[:, 0], out_select.reshape(batch, heads, -1), out_window]
    out = sum(gates[..., i, None] * part.astype(gates.dtype) for i, part in enumerate(parts))
    return jnp.asarray(out).astype(q.dtype)


def selected_scores(q: Array, k: Array, chosen: Array, t: Array, scale: float) -> tuple[Array, Array]:
    """Scores ``[B, K, C, G, n l']`` of the tokens of chosen blocks, and which are seen ``[B, K, C, 1, n l']``.

    q is ``[B, K, C, G, D]``; k has the keys of the chosen blocks, ``[B, K, C, n, l', D]``.
    """
    size = k.shape[-2]
    inside = jnp.broadcast_to(jnp.arange(size), (*chosen.shape, size))
    position = (chosen[..., None] * size + inside).reshape(*chosen.shape[:3], -1)
    visible = position <= t[:, None, :, None]
    keys = k.reshape(*k.shape[:3], -1, k.shape[-1])
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("bkcgd,bkcsd->bkcgs", q, keys, preferred_element_type=wide) * scale, visible[:, :, :, None]


def take_blocks(x: Array, chosen: Array, size: int) -> Array:
    """Blocks ``[B, K, n, l', D]`` of tokens ``[B, S, K, D]``, read where they lie."""
    blocks = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    at = jnp.minimum(chosen, blocks.shape[1] - 1)
    heads = jnp.arange(x.shape[2])
    return jax.vmap(lambda blocks, at: blocks[at, :, heads[:, None]])(blocks, at)
