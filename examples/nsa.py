"""Native sparse attention, NSA (Yuan et al. 2025, https://arxiv.org/abs/2502.11089), in a small decoder that learns to recall.

Query t reads its past in three ways, each with keys and values of its own, and gates put the answers together:

    output       o_t = g_cmp o_cmp + g_slc o_slc + g_win o_win,  gates in [0, 1] computed from token t              eq. 5
    compression  block i, the tokens i d ... i d + l - 1, is one key and one value: phi(keys of the block)          eq. 7
                 o_cmp is attention to all blocks that are over, p_cmp its probabilities                            eq. 8
    selection    blocks of l' tokens are ranked by the attention that compression paid to what they contain:
                 p_slc[j] = sum_{m < l'/d} sum_{n < l/d} p_cmp[(l'/d) j + m - n],  counted from block 0             eq. 9
                 added over the query heads that share keys                                                         eq. 10
                 o_slc is attention to the tokens of the n best, the first and the query's own block always included    eq. 11-12
    window       o_win is attention to the last w tokens

So a query reads about T/d + n l' + w keys instead of T: 5,632 of 65,536 at the paper's sizes. This file is for reading: it computes all
scores and masks those of keys that are not read, which costs more than dense attention. ``jrl.attention.nsa`` gives the same numbers
with memory linear in T.

The task is recall. The first half of a sequence is pairs of a key and a value in random order; the second half asks for every key
again, in another order, and is to answer with its value. Nearly all answers lie beyond the window: compression and selection find them.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

NUM_SEEDS, NUM_UPDATES, BATCH_SIZE = 2, 400, 16
LEARNING_RATE, MAX_GRAD_NORM = 3e-3, 1.0

NUM_PAIRS = 16  # keys are the tokens 0 to 15, values the tokens 16 to 31
VOCAB_SIZE, LENGTH = 2 * NUM_PAIRS, 4 * NUM_PAIRS  # V, T

BLOCK, STRIDE = 4, 2  # l, d
SELECT_BLOCK, SELECTED = 4, 4  # l', n
WINDOW = 4  # w
DIM, NUM_LAYERS, FFN_DIM = 64, 2, 128
NUM_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16  # H, K, D: groups of G = H / K query heads share keys and values

Array = jax.Array


def draw(key: Array) -> Array:
    """A sequence ``[T]``, as ``k1 v1 k2 v2 k3 v3   k3 v3 k1 v1 k2 v2`` with three pairs."""
    key_keys, key_values, key_order = jax.random.split(key, 3)
    keys = jax.random.permutation(key_keys, NUM_PAIRS)
    pairs = jnp.stack([keys, NUM_PAIRS + jax.random.randint(key_values, (NUM_PAIRS,), 0, NUM_PAIRS)], axis=1)
    return jnp.concatenate([pairs, jax.random.permutation(key_order, pairs)]).ravel()


def init_params(key: Array) -> Any:
    keys = iter(jax.random.split(key, 100))

    def normal(fan_in: int, *shape: int) -> Array:
        return fan_in**-0.5 * jax.random.normal(next(keys), shape)

    def init_phi() -> Any:
        inputs, hidden = BLOCK * HEAD_DIM, 2 * HEAD_DIM
        position = 0.02 * normal(1, BLOCK, HEAD_DIM)
        return {"position": position, "w_in": normal(inputs, inputs, hidden), "w_out": normal(hidden, hidden, HEAD_DIM)}

    layers = []
    for _ in range(NUM_LAYERS):
        layer = {"q": normal(DIM, DIM, NUM_HEADS, HEAD_DIM), "branch_gate": normal(DIM, DIM, NUM_HEADS, 3)}
        layer |= {name: normal(DIM, 3, DIM, KV_HEADS, HEAD_DIM) for name in "kv"}  # of each branch
        layer |= {name: init_phi() for name in ("phi_k", "phi_v")}
        layer |= {name: normal(DIM, DIM, FFN_DIM) for name in ("gate", "up")}
        # What writes into the stream starts smaller, by the number of writers.
        layer["o"] = normal(NUM_HEADS * HEAD_DIM * 2 * NUM_LAYERS, NUM_HEADS, HEAD_DIM, DIM)
        layer["down"] = normal(FFN_DIM * 2 * NUM_LAYERS, FFN_DIM, DIM)
        layers.append(layer | {"attention_norm": jnp.ones(DIM), "ffn_norm": jnp.ones(DIM)})
    return {"embedding": 0.02 * normal(1, VOCAB_SIZE, DIM), "layers": layers, "norm": jnp.ones(DIM)}


# Native sparse attention


def attention(q: Array, k: Array, v: Array, visible: Array) -> tuple[Array, Array]:
    """Answers ``[B, T, K, G, D]`` and probabilities ``[B, K, G, T, S]`` of queries ``[B, T, K, G, D]``.

    ``k, v [B, S, K, D]``; ``visible`` is bool and broadcasts to ``[B, K, G, T, S]``. A query that sees nothing gets 0.
    """
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) * HEAD_DIM**-0.5
    p = jnp.where(visible, jax.nn.softmax(jnp.where(visible, scores, -1e30)), 0.0)
    return jnp.einsum("bkgts,bskd->btkgd", p, v), p


def phi(params: Any, blocks: Array) -> Array:
    """Blocks ``[..., l, D]`` as one token each, ``[..., D]``: a multilayer perceptron, with positions inside the block."""
    x = (blocks + params["position"]).reshape(*blocks.shape[:-2], -1)
    return jax.nn.silu(x @ params["w_in"]) @ params["w_out"]


def select(p_cmp: Array) -> Array:
    """Which blocks each query reads, bool ``[B, K, T, T / l']``, of the probabilities ``[B, K, G, T, S]`` of compression."""
    i, j = jnp.arange(p_cmp.shape[-1])[:, None], jnp.arange(LENGTH // SELECT_BLOCK)
    # Equation 9: compressed block i counts as often as it has strides of d tokens in common with selected block j.
    begin, end = jnp.maximum(i * STRIDE, j * SELECT_BLOCK), jnp.minimum(i * STRIDE + BLOCK, (j + 1) * SELECT_BLOCK)
    p_slc = p_cmp.sum(2) @ (jnp.maximum(end - begin, 0) / STRIDE)  # the sum over heads is equation 10
    own = jnp.arange(LENGTH)[:, None] // SELECT_BLOCK
    score = jnp.where((j == 0) | (j == own), jnp.inf, p_slc)  # always read
    score = jnp.where(j <= own, score, -1.0)  # the future comes last
    _, best = jax.lax.top_k(score, SELECTED)  # equation 11
    return jnp.any(best[..., None] == j, axis=-2) & (j <= own)


def native_sparse_attention(phi_k: Any, phi_v: Any, q: Array, k: Array, v: Array, gates: Array) -> Array:
    """Answers ``[B, T, H, D]`` to queries ``[B, T, H, D]``, by gates ``[B, T, H, 3]``.

    ``k, v [3, B, T, K, D]`` are those of compression, selection and window, in this order.
    """
    grouped = q.reshape(*q.shape[:2], KV_HEADS, -1, HEAD_DIM)
    t, s = jnp.arange(LENGTH)[:, None], jnp.arange(LENGTH)

    blocks = jnp.arange(0, LENGTH - BLOCK + 1, STRIDE)[:, None] + jnp.arange(BLOCK)  # [blocks, l], the tokens of each
    k_cmp, v_cmp = (phi(p, jnp.moveaxis(x[0][:, blocks], 2, 3)) for p, x in ((phi_k, k), (phi_v, v)))
    o_cmp, p_cmp = attention(grouped, k_cmp, v_cmp, blocks[:, -1] <= t)

    chosen = jnp.repeat(select(p_cmp), SELECT_BLOCK, axis=-1)[:, :, None]  # the tokens of chosen blocks
    o_slc, _ = attention(grouped, k[1], v[1], chosen & (s <= t))
    o_win, _ = attention(grouped, k[2], v[2], (s <= t) & (s > t - WINDOW))
    branches = jnp.stack([o.reshape(q.shape) for o in (o_cmp, o_slc, o_win)], axis=-1)
    return jnp.sum(gates[..., None, :] * branches, axis=-1)


# The decoder around it: rotary positions, RMSNorm before each part of a layer, and SwiGLU


def rms_norm(x: Array, weight: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * weight


def rotate(x: Array) -> Array:
    """Rotary positions of heads ``[..., T, H, D]``: each pair of numbers is turned by an angle that grows with the position."""
    a, b = jnp.split(x, 2, axis=-1)
    frequency = 10_000.0 ** (-jnp.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    angle = (jnp.arange(LENGTH)[:, None] * frequency)[:, None]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)


def next_token_logits(params: Any, tokens: Array) -> Array:
    """Logits ``[B, T, V]`` of the token that follows each of ``tokens [B, T]``."""
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        y = rms_norm(x, layer["attention_norm"])
        q = jnp.einsum("btd,dhw->bthw", y, layer["q"])
        k, v = (jnp.einsum("btd,ndkw->nbtkw", y, layer[name]) for name in ("k", "v"))
        gates = jax.nn.sigmoid(jnp.einsum("btd,dhn->bthn", y, layer["branch_gate"]))
        heads = native_sparse_attention(layer["phi_k"], layer["phi_v"], rotate(q), rotate(k), v, gates)
        x = x + jnp.einsum("bthw,hwd->btd", heads, layer["o"])
        y = rms_norm(x, layer["ffn_norm"])
        x = x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]
    return rms_norm(x, params["norm"]) @ params["embedding"].T


def loss(params: Any, tokens: Array) -> tuple[Array, Array]:
    """Mean cross-entropy of the values that are asked for, in nats, and the share of them that the model has right."""
    logits, values = next_token_logits(params, tokens)[:, LENGTH // 2 :: 2], tokens[:, LENGTH // 2 + 1 :: 2]
    error = optax.softmax_cross_entropy_with_integer_labels(logits, values)
    return error.mean(), jnp.mean(jnp.argmax(logits, axis=-1) == values)


def train(key: Array) -> tuple[Any, tuple[Array, Array]]:
    """Parameters after a whole run, and the loss and the accuracy of each update, on sequences never seen before."""
    key_params, key_data = jax.random.split(key)
    params = init_params(key_params)
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, NUM_UPDATES // 20, NUM_UPDATES)
    tx = optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adam(schedule))

    def update(carry: Any, key: Array) -> tuple[Any, tuple[Array, Array]]:
        params, opt_state = carry
        tokens = jax.vmap(draw)(jax.random.split(key, BATCH_SIZE))
        (error, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(params, tokens)
        change, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, change), opt_state), (error, accuracy)

    (params, _), metrics = jax.lax.scan(update, (params, tx.init(params)), jax.random.split(key_data, NUM_UPDATES))
    return params, metrics


def main() -> None:
    begin = time.perf_counter()
    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    _, (_, accuracy) = jax.block_until_ready(jax.jit(jax.vmap(train))(keys))  # all seeds in one program
    print(f"NSA on recall, {NUM_SEEDS} seeds: {time.perf_counter() - begin:.0f} s, compilation included")
    print("   updates  mean accuracy  worst seed  best seed")
    for tenth, score in enumerate(accuracy.reshape(NUM_SEEDS, 10, -1).mean(-1).T, start=1):
        print(f"{tenth * NUM_UPDATES // 10:10,} {score.mean():14.3f} {score.min():11.3f} {score.max():10.3f}")


if __name__ == "__main__":
    main()
