"""Attention as the papers write it, for tests: who sees what is said token by token, then one softmax over it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np


def masked_mean(q, k, v, seen, scale):
    """Queries ``[T, D]``, keys ``[S, D]``, values ``[S, Dv]``, ``seen [T, S]`` (NumPy); nothing seen gives 0. Also the weights."""
    scores = jnp.where(seen, scale * (q @ k.T), -1e30)
    weight = jnp.where(seen, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    p = weight / jnp.where(seen.any(-1, keepdims=True), weight.sum(-1, keepdims=True), 1.0)
    return p @ v, p


def dense(q, k, v, causal=True, window=None, segment_ids=None, scale=None):
    """``[B, T, H, Dv]`` for ``[B, T, H, D]``, ``[B, S, K, D]``, ``[B, S, K, Dv]``."""
    batch, length, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    seen = np.zeros((batch, length, k.shape[1]), bool)
    for b, t, s in np.ndindex(seen.shape):
        near = (s <= t or not causal) and (window is None or t - s < window)
        seen[b, t, s] = near and (segment_ids is None or segment_ids[b][t] == segment_ids[b][s])
    mine = np.arange(heads) // (heads // k.shape[2])  # the key head of each head

    def row(q, k, v, seen):
        return jax.vmap(lambda q, k, v: masked_mean(q, k, v, seen, scale)[0], in_axes=1, out_axes=1)(q, k, v)

    return jax.vmap(row)(q, k[:, :, mine], v[:, :, mine], seen)


def nsa(phi, q, streams, gates, config, segment_ids=None, known=None):
    """Native sparse attention, each segment by itself, and the blocks of its segment that each query selects,
    ``{(b, kv head, t): blocks}``, unless they are known."""
    batch, length = q.shape[:2]
    rows, chosen = [], {}
    for b in range(batch):
        ids = np.zeros(length, int) if segment_ids is None else np.asarray(segment_ids[b])
        edges = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), length]
        parts = []
        for first, end in itertools.pairwise(edges):
            alone = [x[b, first:end] for x in (q, *streams, gates)]
            out, blocks = nsa_of_segment(
                phi,
                alone[0],
                alone[1:7],
                alone[7],
                config,
                known and (lambda kv, t, b=b, first=first: known[b, kv, first + t]),
            )
            parts.append(out)
            chosen |= {(b, kv, first + t): found for (kv, t), found in blocks.items()}
        rows.append(jnp.concatenate(parts))
    return jnp.stack(rows), chosen


def nsa_of_segment(phi, q, streams, gates, config, known=None):
    """Of one segment, ``[T, H, Dv]`` for q ``[T, H, D]``, streams ``[T, K, D]`` and gates ``[T, H, 3]``."""
    length, heads, dim = q.shape
    size, scale = config.select_block, dim**-0.5
    share = heads // streams[0].shape[1]
    number = max(0, (length - config.block) // config.stride + 1)
    t, s, i = np.arange(length)[:, None], np.arange(length)[None], np.arange(number)[None]
    over, window = i * config.stride + config.block - 1 <= t, (s <= t) & (t - s < config.window)
    out, chosen = {}, {}
    for kv in range(streams[0].shape[1]):
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = (x[:, kv] for x in streams)
        at = [slice(i * config.stride, i * config.stride + config.block) for i in range(number)]
        kc = jnp.stack([phi("k", k_cmp[s]) for s in at]) if number else jnp.zeros((0, dim))
        vc = jnp.stack([phi("v", v_cmp[s]) for s in at]) if number else jnp.zeros((0, v_cmp.shape[-1]))
        mine = range(kv * share, (kv + 1) * share)
        far = {
            h: masked_mean(q[:, h], kc, vc, over, scale) if number else (jnp.zeros((length, vc.shape[-1])), None)
            for h in mine
        }
        picked = np.zeros((length, length), bool)
        for t in range(length):
            if known:
                blocks = known(kv, t)
            else:
                p = sum(np.asarray(far[h][1][t]) for h in mine) if number else []
                blocks = select(p, t, config)
            chosen[kv, t] = blocks
            for s in range(t + 1):
                picked[t, s] = s // size in blocks
        for h in mine:
            parts = (
                far[h][0],
                masked_mean(q[:, h], k_slc, v_slc, picked, scale)[0],
                masked_mean(q[:, h], k_win, v_win, window, scale)[0],
            )
            out[h] = sum(gates[:, h, n, None] * part for n, part in enumerate(parts))
    return jnp.stack([out[h] for h in range(heads)], 1), chosen


def select(p, t, config):
    """The blocks of query t, for the summed probabilities p of compressed blocks: equation 9, then the largest."""
    size, per_select, per_block = (
        config.select_block,
        config.select_block // config.stride,
        config.block // config.stride,
    )
    candidates = range(t // size + 1)
    always = [j for j in candidates if j < config.initial or j > t // size - config.local]
    importance = {}
    for j in candidates:
        at = [per_select * j + m - n for m in range(per_select) for n in range(per_block)]
        importance[j] = sum(p[i] for i in at if 0 <= i < len(p))
    rest = sorted((j for j in candidates if j not in always), key=lambda j: (-importance[j], j))
    return sorted((always + rest)[: config.selected])
