"""Attention as it is written down: every score, then softmax, then the mean of values. Memory grows with ``T S``."""

import jax
import jax.numpy as jnp

from jrl.attention.visibility import Rule

Array = jax.Array


def dense(
    q: Array, k: Array, v: Array, q_segments: Array | None, k_segments: Array | None, rule: Rule, scale: float
) -> Array:
    """``softmax(scale q k^T) v`` over the keys that are seen, ``[B, T, H, Dv]`` in the dtype of ``v`` (1706.03762, eq. 1).

    Softmax is in float32 at least; a query that sees nothing gets 0. Each key head serves ``H / K`` query heads in a row.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btkgd,bskd->bkgts", group(q, k.shape[2]), k, preferred_element_type=wide) * scale
    visible = rule.sees(jnp.arange(q.shape[1]), jnp.arange(k.shape[1]))[None]
    if q_segments is not None and k_segments is not None:
        visible = visible & (q_segments[:, :, None] == k_segments[:, None, :])
    p = masked_softmax(scores, visible[:, None, None])
    out = jnp.einsum("bkgts,bskd->btkgd", p.astype(v.dtype), v, preferred_element_type=wide)
    return out.reshape(*q.shape[:3], v.shape[-1]).astype(v.dtype)


def masked_softmax(scores: Array, visible: Array) -> Array:
    """Softmax over the last axis of what is seen; a row without anything is 0, and so is its gradient."""
    visible = jnp.broadcast_to(visible, scores.shape)
    scores = jnp.where(visible, scores, -jnp.inf)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    largest = jnp.where(jnp.isneginf(largest), 0.0, largest)
    weight = jnp.where(visible, jnp.exp(jnp.where(visible, scores - largest, 0.0)), 0.0)
    total = weight.sum(-1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1.0)


def group(q: Array, num_kv_heads: int) -> Array:
    """``[B, T, H, D] -> [B, T, K, H / K, D]``."""
    return q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[-1])
