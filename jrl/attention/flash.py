"""Attention in blocks, with memory linear in the sequence (Dao et al. 2022, arXiv 2205.14135), for every platform.

Online softmax (Milakov & Gimelshein 2018, 1805.02867): over blocks of keys keep the largest score so far m, the sum
``l = sum exp(s - m)`` and the weighted values ``o = sum exp(s - m) v``. A block with scores s' and largest ``m'`` brings

    m_new = max(m, m')
    l_new = exp(m - m_new) l + sum exp(s' - m_new)
    o_new = exp(m - m_new) o + exp(s' - m_new) v'

and after the last block ``o / l`` is the softmax-weighted mean. Only ``lse = m + log l`` is kept for the backward pass, which
computes the probabilities ``p = exp(s - lse)`` again (2205.14135, algorithm 4):

    D  = sum(do * o)                 dv = p^T do
    ds = p * (do v^T - D)            dq = scale ds k         dk = scale ds^T q

Blocks of keys that a block of queries cannot see are not visited.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.attention import platforms
from jrl.attention.visibility import NO_KEY, NO_QUERY, Rule, spread

Array = jax.Array


class Blocks(NamedTuple):
    """Queries of one step (counted with the heads that share a key head) and keys of one step."""

    queries: int = 512
    keys: int = 512


WIDE = Blocks(16384, 1024)


def flash(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array | None,
    k_segments: Array | None,
    rule: Rule,
    scale: float,
    blocks: Blocks | None = None,
) -> Array:
    """The same as ``dense``, in blocks: ``[B, T, H, Dv]``; None takes blocks that are fast."""
    if blocks is None:
        blocks = WIDE if platforms.wide() else Blocks()
    (batch, length, heads, _), num_keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    rows = max(1, min(blocks.queries // (heads // kv_heads), length))
    columns = min(blocks.keys, num_keys)
    if rule.window is not None:  # whole blocks are computed, whose ends the window does not see
        columns = min(columns, max(128, rule.window // 4))
    pad_q, pad_k = -length % rows, -num_keys % columns
    if pad_q or pad_k or q_segments is not None:
        q_segments = _pad(jnp.zeros((batch, length), jnp.int32) if q_segments is None else q_segments, pad_q, NO_QUERY)
        k_segments = _pad(jnp.zeros((batch, num_keys), jnp.int32) if k_segments is None else k_segments, pad_k, NO_KEY)
    q, k, v = _pad(q, pad_q), _pad(k, pad_k), _pad(v, pad_k)
    # [B, K, T, G, D]: the heads that share a key head are rows of one product.
    q = q.reshape(batch, -1, kv_heads, heads // kv_heads, q.shape[-1]).transpose(0, 2, 1, 3, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out = _flash(q, k, v, q_segments, k_segments, rule, scale, rows, columns)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, -1, heads, v.shape[-1])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _flash(q, k, v, q_segments, k_segments, rule, scale, rows, columns):
    return _forward(q, k, v, q_segments, k_segments, rule, scale, rows, columns)[0]


def _forward(q, k, v, q_segments, k_segments, rule, scale, rows, columns):
    """Output ``[B, K, T, G, Dv]`` and log-sum-exp ``[B, K, T, G]``, infinite for a query that sees nothing."""
    batch, kv_heads, length, group, _ = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def of_queries(i: Array) -> tuple[Array, Array]:
        q_i = _slice(q, i, rows, 2)
        shape = (batch, kv_heads, rows, group)

        def step(j: Array, carry: Any) -> Any:
            m, total, out = carry
            v_j = _slice(v, j, columns, 2)
            s = _scores(q_i, _slice(k, j, columns, 2), i, j, q_segments, k_segments, rule, scale)
            m_new = jnp.maximum(m, s.max(-1))
            shift = jnp.where(jnp.isneginf(m_new), 0.0, m_new)
            p = jnp.exp(s - shift[..., None])
            fade = jnp.exp(m - shift)
            part = jnp.einsum("bktgs,bksd->bktgd", p.astype(v.dtype), v_j, preferred_element_type=wide)
            return m_new, fade * total + p.sum(-1), fade[..., None] * out + part

        start = (
            jnp.full(shape, -jnp.inf, wide),
            jnp.zeros(shape, wide),
            jnp.zeros((*shape, v.shape[-1]), wide),
        )
        blocks = _key_blocks(rule, i, rows, columns, k.shape[2])
        m, total, out = jax.lax.fori_loop(*blocks, step, spread(start, q))
        out = out / jnp.where(total > 0, total, 1.0)[..., None]
        return out.astype(v.dtype), jnp.where(total > 0, m + jnp.log(jnp.where(total > 0, total, 1.0)), jnp.inf)

    out, lse = jax.lax.map(of_queries, jnp.arange(length // rows))
    return _join(out), _join(lse)


def _save(q, k, v, q_segments, k_segments, rule, scale, rows, columns):
    out, lse = _forward(q, k, v, q_segments, k_segments, rule, scale, rows, columns)
    return out, (q, k, v, q_segments, k_segments, out, lse)


def _backward(rule, scale, rows, columns, saved, d_out):
    q, k, v, q_segments, k_segments, out, lse = saved
    wide = jnp.promote_types(q.dtype, jnp.float32)
    overlap = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)

    def of_queries(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        q_i, d_i, lse_i, overlap_i = (_slice(x, i, rows, 2) for x in (q, d_out, lse, overlap))

        def step(j: Array, carry: Any) -> Any:
            dq, dk, dv = carry
            k_j, v_j = _slice(k, j, columns, 2), _slice(v, j, columns, 2)
            s = _scores(q_i, k_j, i, j, q_segments, k_segments, rule, scale)
            p = jnp.exp(s - lse_i[..., None])
            dp = jnp.einsum("bktgd,bksd->bktgs", d_i, v_j, preferred_element_type=wide)
            ds = (p * (dp - overlap_i[..., None]) * scale).astype(q.dtype)
            dq += jnp.einsum("bktgs,bksd->bktgd", ds, k_j, preferred_element_type=wide)
            dk = _add(dk, j, jnp.einsum("bktgs,bktgd->bksd", ds, q_i, preferred_element_type=wide), columns)
            part = jnp.einsum("bktgs,bktgd->bksd", p.astype(d_i.dtype), d_i, preferred_element_type=wide)
            return dq, dk, _add(dv, j, part, columns)

        dq = spread(jnp.zeros(q_i.shape, wide), q)
        dq, dk, dv = jax.lax.fori_loop(*_key_blocks(rule, i, rows, columns, k.shape[2]), step, (dq, *carry))
        return (dk, dv), dq.astype(q.dtype)

    start = jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    (dk, dv), dq = jax.lax.scan(of_queries, spread(start, q), jnp.arange(q.shape[2] // rows))
    return _join(dq), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_flash.defvjp(_save, _backward)


def _scores(q_i, k_j, i, j, q_segments, k_segments, rule, scale):
    """Scaled scores ``[B, K, rows, G, columns]``, minus infinity where the key is not seen."""
    rows, columns = q_i.shape[2], k_j.shape[2]
    wide = jnp.promote_types(q_i.dtype, jnp.float32)
    s = jnp.einsum("bktgd,bksd->bktgs", q_i, k_j, preferred_element_type=wide) * scale
    visible = rule.sees(i * rows + jnp.arange(rows), j * columns + jnp.arange(columns))[None]
    if q_segments is not None:
        visible = visible & (
            _slice(q_segments, i, rows, 1)[:, :, None] == _slice(k_segments, j, columns, 1)[:, None, :]
        )
    return jnp.where(visible[:, None, :, None, :], s, -jnp.inf)


def _key_blocks(rule: Rule, i: Array, rows: int, columns: int, num_keys: int) -> tuple[Array, Array]:
    low, high = rule.key_range(i * rows, i * rows + rows - 1, num_keys)
    return low // columns, (high + columns - 1) // columns


def _slice(x: Array, i: Array, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _add(x: Array, j: Array, part: Array, size: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _slice(x, j, size, 2) + part, j * size, 2)


def _join(blocks: Array) -> Array:
    """``[n, B, K, rows, ...] -> [B, K, n rows, ...]``."""
    moved = jnp.moveaxis(blocks, 0, 2)
    return moved.reshape(*moved.shape[:2], -1, *moved.shape[4:])


def _pad(x: Array, rows: int, value: int = 0) -> Array:
    return jnp.pad(x, [(0, 0), (0, rows)] + [(0, 0)] * (x.ndim - 2), constant_values=value) if rows else x
