"""Attention one query at a time, as the papers write it, for tests: slow, and differentiable."""

import jax.numpy as jnp
import numpy as np


def softmax_mean(q, keys, values, scale):
    """One query ``[D]`` and the keys it sees ``[n, D]``; nothing seen gives 0. Also the probabilities."""
    if len(keys) == 0:
        return jnp.zeros(values.shape[-1], q.dtype), jnp.zeros(0, q.dtype)
    scores = scale * keys @ q
    weight = jnp.exp(scores - scores.max())
    p = weight / weight.sum()
    return p @ values, p


def dense(q, k, v, causal=True, window=None, segment_ids=None, scale=None):
    """``[B, T, H, Dv]`` for ``[B, T, H, D]``, ``[B, T, K, D]``, ``[B, T, K, Dv]``."""
    batch, length, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    rows = []
    for b in range(batch):
        for t in range(length):
            seen = [
                s
                for s in range(k.shape[1])
                if (s <= t or not causal)
                and (window is None or t - s < window)
                and (segment_ids is None or segment_ids[b][t] == segment_ids[b][s])
            ]
            at = np.array(seen, int)
            for h in range(heads):
                kv = h // (heads // k.shape[2])
                rows.append(softmax_mean(q[b, t, h], k[b, at, kv], v[b, at, kv], scale)[0])
    return jnp.stack(rows).reshape(batch, length, heads, -1)


def nsa(phi, q, streams, gates, config, segment_ids=None, known=None):
    """Native sparse attention, and the blocks that each query selects, ``{(b, kv head, t): blocks}``, unless they are known."""
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = streams
    batch, length, heads, dim = q.shape
    share, scale = heads // k_cmp.shape[2], dim**-0.5
    length_of, d, size = config.block, config.stride, config.select_block
    out, chosen = {}, {}
    for b in range(batch):
        starts = [
            min(s for s in range(length) if segment_ids is None or segment_ids[b][s] == segment_ids[b][t])
            for t in range(length)
        ]
        for kv in range(k_cmp.shape[2]):
            number = max(0, (length - length_of) // d + 1)
            kc = [phi("k", k_cmp[b, i * d : i * d + length_of, kv]) for i in range(number)]
            vc = [phi("v", v_cmp[b, i * d : i * d + length_of, kv]) for i in range(number)]
            for t in range(length):
                start = starts[t]
                over = [i for i in range(number) if i * d + length_of - 1 <= t and i * d >= start]
                importance = np.zeros(-(-length // size))
                for h in range(kv * share, (kv + 1) * share):
                    keys = jnp.stack([kc[i] for i in over]) if over else jnp.zeros((0, dim))
                    values = jnp.stack([vc[i] for i in over]) if over else jnp.zeros((0, v_cmp.shape[-1]))
                    answer, p = softmax_mean(q[b, t, h], keys, values, scale)
                    out[b, t, h] = gates[b, t, h, 0] * answer
                    by_block = {} if known else dict(zip(over, np.asarray(p), strict=True))
                    for j in range(len(importance)):
                        for m in range(size // d):
                            for n in range(length_of // d):
                                importance[j] += by_block.get(size // d * j + m - n, 0.0)
                candidates = range(start // size, t // size + 1)
                always = [j for j in candidates if j < start // size + config.initial or j > t // size - config.local]
                rest = sorted((j for j in candidates if j not in always), key=lambda j: (-importance[j], j))
                blocks = known[b, kv, t] if known else sorted((always + rest)[: config.selected])
                chosen[b, kv, t] = blocks
                tokens = np.array([s for j in blocks for s in range(j * size, (j + 1) * size) if start <= s <= t], int)
                near = np.arange(max(start, t - config.window + 1), t + 1)
                for h in range(kv * share, (kv + 1) * share):
                    out[b, t, h] += (
                        gates[b, t, h, 1]
                        * softmax_mean(q[b, t, h], k_slc[b, tokens, kv], v_slc[b, tokens, kv], scale)[0]
                    )
                    out[b, t, h] += (
                        gates[b, t, h, 2] * softmax_mean(q[b, t, h], k_win[b, near, kv], v_win[b, near, kv], scale)[0]
                    )
    rows = [out[b, t, h] for b in range(batch) for t in range(length) for h in range(heads)]
    return jnp.stack(rows).reshape(batch, length, heads, -1), chosen
