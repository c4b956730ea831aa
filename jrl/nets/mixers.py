"""How tokens of a decoder see each other, one record a kind: its parameters, a whole sequence, and one token behind a cache.

    dense, window   keys and values of every token, or of the last ones
    nsa             native sparse attention (2502.11089): three pairs of them, of which a query reads a few blocks
    mla             multi-head latent attention (2405.04434): one small latent a token
    dsa             latent attention to the tokens that an indexer picks (2512.02556): a narrow key more
    rwkv            RWKV-6 time mixing (2404.05892): a state of one size, and the token before

All take the normalized stream ``[B, T, dim]`` (a step: ``[B, dim]``) and give heads ``[..., H, width]`` for the output projection.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.attention import attend, dsa, mla, nsa, nsa_cache, rwkv
from jrl.attention import cache as kv_cache
from jrl.attention.rotary import rms_norm, rope
from jrl.numerics.lora import product

Array = jax.Array


class Leaf(NamedTuple):
    """Shape of a parameter, the names of its axes, and its standard deviation at the start (None for ones, 0 for zeros)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float | None


class Tokens(NamedTuple):
    """Where tokens stand: ``position`` int ``[B, T]``, and what hides them from each other (or None), as in ``attend``."""

    position: Array
    segment_ids: Array | None
    valid: Array | None


class Mixer(NamedTuple):
    """One kind of mixing; ``config`` is the decoder's.

    Attributes:
        leaves: ``config -> {name: Leaf}`` of a layer, or a tree of them.
        sequence: ``(layer, y [B, T, dim], tokens, config) -> [B, T, H, width]``.
        init_cache: ``(config, batch, capacity, dtype) -> cache`` of a layer.
        step: ``(layer, y [B, dim], cache, position, start, config) -> ([B, H, width], cache)``; the leaves of the cache are arrays or
            ``cache.Layer``, and those of the one that is returned too.
        prefill: ``(layer, y, tokens, cache, config) -> ([B, T, H, width], cache)``: a whole sequence, kept in an empty cache; its
            padding is a segment.
        low_rank: Names of the matrices that may have an adapter beside them (``lora.LowRank``).
    """

    leaves: Callable[[Any], dict[str, Any]]
    sequence: Callable[[Any, Array, Tokens, Any], Array]
    init_cache: Callable[[Any, int, int, Any], Any]
    step: Callable[[Any, Array, Any, Array, Array | int, Any], tuple[Array, Any]]
    prefill: Callable[[Any, Array, Tokens, Any, Any], tuple[Array, Any]]
    low_rank: tuple[str, ...] = ()


# Queries, keys and values of each token


def projections(config: Any) -> dict[str, Any]:
    """Parameters of ``project``, for ``config.branches`` pairs of keys and values."""
    d, h, k, w, n = config.dim, config.num_heads, config.num_kv_heads, config.width, config.branches
    found = {
        "q": Leaf((d, h, w), ("dim", "heads", "head_dim"), d**-0.5),
        "k": Leaf((n, d, k, w), ("branch", "dim", "kv_heads", "head_dim"), d**-0.5),
        "v": Leaf((n, d, k, w), ("branch", "dim", "kv_heads", "head_dim"), d**-0.5),
    }
    if config.qkv_bias:
        found["q_bias"] = Leaf((h, w), ("heads", "head_dim"), 0.0)
        found["k_bias"] = found["v_bias"] = Leaf((n, k, w), ("branch", "kv_heads", "head_dim"), 0.0)
    if config.qk_norm:
        found["q_norm"] = found["k_norm"] = Leaf((w,), ("head_dim",), None)
    return found


def project(layer: Any, x: Array, config: Any) -> tuple[Array, Array, Array]:
    """Queries ``[..., H, D]``, keys and values ``[n, ..., K, D]`` of each branch, without positions."""

    def p(name):
        return layer[name].astype(x.dtype)

    q = product("...d,dhw->...hw", x, layer["q"])
    k, v = (product("...d,ndhw->n...hw", x, layer[name]) for name in ("k", "v"))
    if config.qkv_bias:
        q = q + jnp.broadcast_to(p("q_bias"), q.shape)
        k, v = (
            y + p(f"{name}_bias").reshape(y.shape[0], *(1,) * (x.ndim - 1), *y.shape[-2:])
            for name, y in (("k", k), ("v", v))
        )
    if config.qk_norm:
        q, k = (rms_norm(y, layer[f"{name}_norm"], config.norm_eps) for name, y in (("q", q), ("k", k)))
    return q, k, v


def _placed(layer: Any, y: Array, tokens: Tokens, config: Any) -> tuple[Array, Array, Array]:
    q, k, v = project(layer, y, config)
    theta, scaling = config.rope_theta, config.rope_scaling
    position = tokens.position + (len(layer["prefix_k"]) if "prefix_k" in layer else 0)
    return rope(q, position, theta, scaling), rope(k, position[None], theta, scaling), v


def _placed_step(layer: Any, y: Array, position: Array, start: Array | int, config: Any) -> tuple[Array, Array, Array]:
    """Of one token; rotary positions count from ``start``."""
    at = kv_cache.per_row(position, len(y)) - kv_cache.per_row(start, len(y))
    q, k, v = _placed(layer, y[:, None], Tokens(at[:, None], None, None), config)
    return q[:, 0], k[:, :, 0], v[:, :, 0]


# Dense and window


def _sequence(layer: Any, y: Array, tokens: Tokens, config: Any) -> Array:
    return _attend(layer, *_placed(layer, y, tokens, config), tokens, config)


def _prefill(layer: Any, y: Array, tokens: Tokens, cache: Any, config: Any) -> tuple[Array, Any]:
    q, k, v = _placed(layer, y, tokens, config)
    if "prefix_k" in layer and tokens.segment_ids is not None:  # which is seen across segments
        tokens = tokens._replace(segment_ids=None, valid=jnp.asarray(tokens.segment_ids > 0))
    return _attend(layer, q, k, v, tokens, config), kv_cache.fill(cache, k[0], v[0])


def _attend(layer: Any, q: Array, k: Array, v: Array, tokens: Tokens, config: Any) -> Array:
    if "prefix_k" in layer:
        return _attend_behind(layer["prefix_k"], layer["prefix_v"], q, k[0], v[0], tokens, config)
    return attend(
        q,
        k[0],
        v[0],
        causal=config.causal,
        window=_window(config),
        segment_ids=tokens.segment_ids,
        valid=tokens.valid,
        implementation=config.implementation,
    )


def _attend_behind(
    prefix_k: Array, prefix_v: Array, q: Array, k: Array, v: Array, tokens: Tokens, config: Any
) -> Array:
    """With the keys and values of a prefix ``[N, K, D]``, which all tokens see (2101.00190, eq. 3)."""
    if tokens.segment_ids is not None:
        raise ValueError("segment_ids: a prefix is of one sequence a row; do not pack several")

    def behind(prefix, x):
        return jnp.concatenate([jnp.broadcast_to(prefix.astype(x.dtype), (len(x), *prefix.shape)), x], axis=1)

    there = None if tokens.valid is None else jnp.pad(tokens.valid, [(0, 0), (len(prefix_k), 0)], constant_values=True)
    return attend(
        q,
        behind(prefix_k, k),
        behind(prefix_v, v),
        causal=config.causal,
        valid=tokens.valid,
        kv_valid=there,
        q_offset=len(prefix_k),
        implementation=config.implementation,
    )


def _init_cache(config: Any, batch: int, capacity: int, dtype: Any) -> Any:
    rows = min(capacity, _window(config) or capacity)
    return kv_cache.init(batch, rows, config.num_kv_heads, config.width, dtype=dtype)


def _step(layer: Any, y: Array, cache: Any, position: Array, start: Array | int, config: Any) -> tuple[Array, Any]:
    q, k, v = _placed_step(layer, y, position, start, config)
    cache = kv_cache.write(cache, k[0], v[0], position)
    prefix = (layer["prefix_k"], layer["prefix_v"]) if "prefix_k" in layer else None
    return kv_cache.decode_step(q, cache, position, start=start, window=_window(config), prefix=prefix), cache


def steps(layer: Any, y: Array, cache: Any, position: Array, start: Array | int, config: Any) -> tuple[Array, Any]:
    """Several tokens ``[B, S, dim]`` behind a cache of dense attention, the first at ``position`` int32 ``[B]``; each sees those before it."""
    number = y.shape[1]
    at = position[:, None] + jnp.arange(number)[None]
    placed = Tokens(at - kv_cache.per_row(start, len(y))[:, None], None, None)
    q, k, v = _placed(layer, y, placed, config)
    for i in range(number):
        cache = kv_cache.write(cache, k[0][:, i], v[0][:, i], at[:, i])
    # Tokens behind a query are in the cache already, and out of its sight as long as the ring has not come round.
    sight = jax.vmap(lambda q, at: kv_cache.decode_step(q, cache, at, start=start), in_axes=1, out_axes=1)
    return sight(q, at), cache


def _window(config: Any) -> int | None:
    return config.window if config.attention == "window" else None


# Native sparse attention


def _sparse_leaves(config: Any) -> dict[str, Any]:
    d, h = config.dim, config.num_heads
    phi = jax.eval_shape(lambda: nsa.init(jax.random.key(0), config.sparse, config.width, config.width))

    def leaf(path: Any, x: Any) -> Leaf:
        name = path[-1].key
        std = 0.02 if name == "position" else 0.0 if name.startswith("b_") else x.shape[0] ** -0.5
        return Leaf(x.shape, ("compress",) * x.ndim, std)

    return projections(config) | {
        "branch_gate": Leaf((d, h, 3), ("dim", "heads", "branch"), d**-0.5),
        "branch_gate_bias": Leaf((h, 3), ("heads", "branch"), 0.0),
        "compress": jax.tree_util.tree_map_with_path(leaf, phi),
    }


def branch_gates(layer: Any, x: Array) -> Array:
    """NSA's gates ``[..., H, 3]``: a sigmoid for each head and branch (2502.11089, section 3.3)."""
    gate = jnp.einsum("...d,dhn->...hn", x, layer["branch_gate"].astype(x.dtype))
    return jax.nn.sigmoid(gate + jnp.broadcast_to(layer["branch_gate_bias"].astype(x.dtype), gate.shape))


def _streams(k: Array, v: Array) -> nsa.Streams:
    """Of as many branches as there are, one shared by all or each its own."""
    pairs = [(k[i % len(k)], v[i % len(v)]) for i in range(3)]
    return nsa.Streams(*(x for pair in pairs for x in pair))


def _sparse_sequence(layer: Any, y: Array, tokens: Tokens, config: Any) -> Array:
    if tokens.valid is not None:
        raise ValueError("valid: native sparse attention takes padding as a segment of its own, in segment_ids")
    q, k, v = _placed(layer, y, tokens, config)
    return _sparse_attend(layer, y, q, _streams(k, v), tokens, config)


def _sparse_prefill(layer: Any, y: Array, tokens: Tokens, cache: Any, config: Any) -> tuple[Array, Any]:
    q, k, v = _placed(layer, y, tokens, config)
    streams = _streams(k, v)
    start = 0 if tokens.segment_ids is None else nsa.segment_starts(tokens.segment_ids)[:, -1]
    cache = nsa_cache.fill(layer["compress"], cache, streams, config.sparse, start=start)
    return _sparse_attend(layer, y, q, streams, tokens, config), cache


def _sparse_attend(layer: Any, y: Array, q: Array, streams: nsa.Streams, tokens: Tokens, config: Any) -> Array:
    return nsa.attend(
        layer["compress"],
        q,
        streams,
        branch_gates(layer, y),
        config.sparse,
        segment_ids=tokens.segment_ids,
        implementation=config.implementation,
    )


def _sparse_cache(config: Any, batch: int, capacity: int, dtype: Any) -> Any:
    return nsa_cache.init(config.sparse, batch, capacity, config.num_kv_heads, config.width, dtype=dtype)


def _sparse_step(layer: Any, y: Array, cache: Any, position: Array, start: Array | int, config: Any):
    q, k, v = _placed_step(layer, y, position, start, config)
    cache = nsa_cache.write(layer["compress"], cache, _streams(k, v), position, config.sparse, start=start)
    gates = branch_gates(layer, y)
    return nsa_cache.decode_step(q, gates, cache, position, config.sparse, start=start), cache


# Latent attention


def _latent_leaves(config: Any) -> dict[str, Any]:
    shapes = jax.eval_shape(lambda: mla.init(jax.random.key(0), config.latent, config.dim, config.num_heads))
    names = {3: ("latent", "heads", "head_dim"), 2: ("dim", "latent"), 1: ("latent",)}

    def leaf(x):
        return Leaf(x.shape, names[x.ndim], None if x.ndim == 1 else x.shape[0] ** -0.5)

    return {"latent": jax.tree.map(leaf, shapes)}


def _latent_sequence(layer: Any, y: Array, tokens: Tokens, config: Any) -> Array:
    return mla.attend(layer["latent"], y, config.latent, positions=tokens.position, segment_ids=tokens.segment_ids,
                      valid=tokens.valid, implementation=config.implementation)  # fmt: skip


def _latent_prefill(layer: Any, y: Array, tokens: Tokens, cache: Any, config: Any) -> tuple[Array, Any]:
    kept = mla.latents(layer["latent"], y, tokens.position, config.latent)
    return _latent_sequence(layer, y, tokens, config), mla.fill(cache, *kept)


def _latent_cache(config: Any, batch: int, capacity: int, dtype: Any) -> Any:
    return mla.init_cache(config.latent, batch, capacity, dtype)


def _latent_step(layer: Any, y: Array, cache: Any, position: Array, start: Array | int, config: Any):
    params, y = layer["latent"], y[:, None]
    at = (kv_cache.per_row(position, len(y)) - kv_cache.per_row(start, len(y)))[:, None]
    latent, key = mla.latents(params, y, at, config.latent)
    nope, turned = mla.queries(params, y, at, config.latent)
    cache = mla.write(cache, latent[:, 0], key[:, 0], position)
    return mla.decode_step(params, nope[:, 0], turned[:, 0], cache, position, config.latent, start=start), cache


# DeepSeek sparse attention


def _indexed_leaves(config: Any) -> dict[str, Any]:
    shapes = jax.eval_shape(lambda: dsa.init(jax.random.key(0), config.indexer, config.latent, config.dim))
    names = {
        "query": ("latent", "index_heads", "head_dim"),
        "key": ("dim", "head_dim"),
        "weight": ("dim", "index_heads"),
    }
    indexer = {name: Leaf(x.shape, names.get(name, ("head_dim",)), x.shape[0] ** -0.5) for name, x in shapes.items()}
    norm = {
        "key_norm": indexer["key_norm"]._replace(std=None),
        "key_norm_bias": indexer["key_norm_bias"]._replace(std=0.0),
    }
    return _latent_leaves(config) | {"indexer": indexer | norm}


def _indexed_sequence(layer: Any, y: Array, tokens: Tokens, config: Any) -> Array:
    return dsa.attend(layer["latent"], layer["indexer"], y, config.indexer, config.latent, positions=tokens.position,
                      segment_ids=tokens.segment_ids, valid=tokens.valid, implementation=config.implementation)  # fmt: skip


def _indexed_prefill(layer: Any, y: Array, tokens: Tokens, cache: Any, config: Any) -> tuple[Array, Any]:
    params, indexer = layer["latent"], layer["indexer"]
    cache = dsa.fill(params, indexer, y, cache, tokens.position, config.indexer, config.latent)
    return _indexed_sequence(layer, y, tokens, config), cache


def _indexed_cache(config: Any, batch: int, capacity: int, dtype: Any) -> Any:
    return dsa.init_cache(config.indexer, config.latent, batch, capacity, dtype)


def _indexed_step(layer: Any, y: Array, cache: Any, position: Array, start: Array | int, config: Any):
    params, indexer = layer["latent"], layer["indexer"]
    return dsa.decode_step(params, indexer, y, cache, position, config.indexer, config.latent, start=start)


# RWKV


class Recurrent(NamedTuple):
    """What RWKV remembers: a matrix of each head ``[B, H, D, D]`` and the token before ``[B, dim]``."""

    state: Array
    before: Array


MIXED = ("r", "k", "v", "w", "g")  # each sees its own mixture of the token and the one before it
SHIFT_RANK, DECAY_RANK = 8, 16


def _rwkv_leaves(config: Any) -> dict[str, Any]:
    d, h, w = config.dim, config.num_heads, config.width
    found = {x: Leaf((d, h, w), ("dim", "heads", "head_dim"), d**-0.5) for x in ("r", "k", "v", "g")}
    return found | {
        "shift": Leaf((len(MIXED), d), ("mixed", "dim"), 0.0),
        "shift_all": Leaf((d,), ("dim",), 0.0),
        "shift_down": Leaf((len(MIXED), d, SHIFT_RANK), ("mixed", "dim", "rank"), d**-0.5),
        "shift_up": Leaf((len(MIXED), SHIFT_RANK, d), ("mixed", "rank", "dim"), 0.1 * SHIFT_RANK**-0.5),
        "decay": Leaf((h, w), ("heads", "head_dim"), 0.0),
        "decay_down": Leaf((d, DECAY_RANK), ("dim", "rank"), d**-0.5),
        "decay_up": Leaf((DECAY_RANK, h, w), ("rank", "heads", "head_dim"), 0.1 * DECAY_RANK**-0.5),
        "bonus": Leaf((h, w), ("heads", "head_dim"), 0.1),
        "head_norm": Leaf((h, w), ("heads", "head_dim"), None),
        "head_norm_bias": Leaf((h, w), ("heads", "head_dim"), 0.0),
    }


def _rwkv_inputs(layer: Any, y: Array, before: Array) -> tuple[Array, ...]:
    """r, k, v, log w and the gate, ``[..., H, D]`` (2404.05892, eq. 14-17): how much of the token before is mixed in, and the decay
    ``exp(-exp(w))``, depend on the token. Mixtures start at a half, decays at ``exp(-exp(-2))``."""

    def p(name):
        return layer[name].astype(y.dtype)

    back = before - y
    halfway = y + back * jnp.broadcast_to(0.5 + p("shift_all"), y.shape)
    low = jnp.tanh(jnp.einsum("...d,mdn->m...n", halfway, p("shift_down")))
    share = jnp.einsum("m...n,mnd->m...d", low, p("shift_up"))
    share += 0.5 + jnp.broadcast_to(jnp.expand_dims(p("shift"), tuple(range(1, y.ndim))), share.shape)
    x = {m: y + back * share[i] for i, m in enumerate(MIXED)}
    r, k, v, g = (jnp.einsum("...d,dhw->...hw", x[m], p(m)) for m in ("r", "k", "v", "g"))
    w = jnp.einsum("...n,nhw->...hw", jnp.tanh(x["w"] @ p("decay_down")), p("decay_up"))
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    w += jnp.broadcast_to(layer["decay"].astype(w.dtype), w.shape)  # not in half a width: see precision.FLOAT32
    return r, k, v, -jnp.exp(w - 2.0), g


def _rwkv_out(layer: Any, mixed: Array, gate: Array, config: Any) -> Array:
    """The layer norm of each head, times ``silu`` of the gate (eq. 20)."""
    centred = mixed - mixed.mean(-1, keepdims=True)
    normed = rms_norm(centred, layer["head_norm"], config.norm_eps)
    normed += jnp.broadcast_to(layer["head_norm_bias"].astype(normed.dtype), normed.shape)
    return normed.astype(gate.dtype) * jax.nn.silu(gate)


def _rwkv_sequence(layer: Any, y: Array, tokens: Tokens, config: Any) -> Array:
    if tokens.valid is not None:
        raise ValueError("valid: rwkv takes padding as a segment of its own, in segment_ids")
    return _rwkv_whole(layer, y, tokens, config)[0]


def _rwkv_prefill(layer: Any, y: Array, tokens: Tokens, cache: Any, config: Any) -> tuple[Array, Any]:
    mixed, state = _rwkv_whole(layer, y, tokens, config)
    return mixed, Recurrent(state, y[:, -1].astype(cache.before.dtype))


def _rwkv_whole(layer: Any, y: Array, tokens: Tokens, config: Any) -> tuple[Array, Array]:
    """Heads, and the state after the last token."""
    first = jnp.zeros(y.shape[:2], bool).at[:, 0].set(True)
    if (ids := tokens.segment_ids) is not None:
        first = first.at[:, 1:].set(ids[:, 1:] != ids[:, :-1])
    before = jnp.where(first[..., None], 0, jnp.pad(y[:, :-1], [(0, 0), (1, 0), (0, 0)]))
    r, k, v, log_w, gate = _rwkv_inputs(layer, y, before)
    mixed, state = rwkv.mix(r, k, v, log_w, layer["bonus"], first=first)
    return _rwkv_out(layer, mixed, gate, config), state


def _rwkv_cache(config: Any, batch: int, capacity: int, dtype: Any) -> Any:
    wide = jnp.promote_types(dtype, jnp.float32)  # a sum over the whole past
    heads = (batch, config.num_heads, config.width, config.width)
    return Recurrent(jnp.zeros(heads, wide), jnp.zeros((batch, config.dim), dtype))


def _rwkv_step(layer: Any, y: Array, cache: Any, position: Array, start: Array | int, config: Any):
    cache = kv_cache.seen(cache)
    first = kv_cache.per_row(position, len(y)) == kv_cache.per_row(start, len(y))
    before = jnp.where(first[:, None], 0, cache.before.astype(y.dtype))
    r, k, v, log_w, gate = _rwkv_inputs(layer, y, before)
    mixed, state = rwkv.recur(r, k, v, log_w, layer["bonus"], cache.state, first)
    return _rwkv_out(layer, mixed, gate, config), Recurrent(state, y.astype(cache.before.dtype))


_DENSE = Mixer(projections, _sequence, _init_cache, _step, _prefill, ("q", "k", "v"))
MIXERS = {
    "dense": _DENSE,
    "window": _DENSE,
    "nsa": Mixer(_sparse_leaves, _sparse_sequence, _sparse_cache, _sparse_step, _sparse_prefill, ("q", "k", "v")),
    "mla": Mixer(_latent_leaves, _latent_sequence, _latent_cache, _latent_step, _latent_prefill),
    "dsa": Mixer(_indexed_leaves, _indexed_sequence, _indexed_cache, _indexed_step, _indexed_prefill),
    "rwkv": Mixer(_rwkv_leaves, _rwkv_sequence, _rwkv_cache, _rwkv_step, _rwkv_prefill),
}
