"""DeepSeek sparse attention (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): latent attention to the tokens that a small indexer picks for each query.

    I_{t,s} = sum_j w_{t,j} ReLU( q^I_{t,j} . k^I_s )                          the indexer's scores, a few narrow heads            (eq. 1)
    o_t = attention of q_t to { c_s : I_{t,s} among the k largest, s <= t }    over the latents of ``mla``                         (eq. 2)
    L^I = sum_t KL( p_t || softmax(I_t) )                                      p_t: attention summed over heads, normalized        (eq. 3, 4)

Queries of the indexer are made of the latents that those of attention are made of, its keys of the token, with a layer norm; the first numbers of both have
rotary positions. Which tokens are picked has no gradient: the indexer learns from ``index_loss`` alone, first against dense attention, then against what it
picks. ``reference`` writes all scores down; ``xla`` reads the latents of the picked tokens, some queries at a time.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrl.attention import cache as kv
from jrl.attention import mla
from jrl.attention.dense import masked_softmax
from jrl.attention.rotary import rope
from jrl.numerics import checks
from jrl.numerics.settings import Positive, Settings
from jrl.numerics.types import Params

Array = jax.Array
Implementation = Literal["xla", "reference"]


@dataclass(frozen=True)
class Config(Settings, prefix="dsa"):
    """Sizes of the indexer."""

    heads: Positive = 4  # Heads of the indexer.
    dim: Positive = 32  # Width of its queries and keys.
    rope_dim: Positive = 16  # How many of these numbers, the first ones, have rotary positions.
    top_k: Positive = 64  # Tokens that each query sees.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_dim % 2 or self.rope_dim > self.dim:
            raise ValueError(f"dsa.rope_dim must be even and at most dsa.dim = {self.dim}; got {self.rope_dim}")


class Index(NamedTuple):
    """What the indexer makes of tokens: queries ``[B, T, J, D]``, the weights of its heads ``[B, T, J]``, and keys ``[B, T, D]``."""

    query: Array
    weight: Array
    key: Array


def init(key: Array, config: Config, latent: mla.Config, dim: int) -> dict[str, Array]:
    """Parameters of the indexer, float32, beside those of ``mla.init`` for tokens of width ``dim``."""
    shapes = {
        "query": (latent.query_latent or dim, config.heads, config.dim),
        "key": (dim, config.dim),
        "weight": (dim, config.heads),
    }
    keys = jax.random.split(key, len(shapes))
    params = {
        n: jax.random.normal(k, s, jnp.float32) * s[0] ** -0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }
    return params | {"key_norm": jnp.ones(config.dim), "key_norm_bias": jnp.zeros(config.dim)}


def index(
    params: Params, index_params: Params, x: Array, positions: Array, config: Config, latent: mla.Config
) -> Index:
    """The indexer's numbers of tokens ``[B, T, dim]``, which have no part in the gradient of what made them."""
    x, frozen = jax.lax.stop_gradient((x, params))
    p = jax.tree.map(lambda w: w.astype(x.dtype), index_params)
    q = jnp.einsum("...d,djw->...jw", mla.query_latents(frozen, x, latent), p["query"])
    k = _layer_norm(x @ p["key"], p["key_norm"], p["key_norm_bias"])
    weight = (x @ p["weight"]) * (config.heads * config.dim) ** -0.5
    return Index(
        _turned(q, positions, config, latent), weight, _turned(k[..., None, :], positions, config, latent)[..., 0, :]
    )


def _turned(x: Array, positions: Array, config: Config, latent: mla.Config) -> Array:
    first = rope(x[..., : config.rope_dim], positions, latent.rope_theta, latent.rope_scaling)
    return jnp.concatenate([first, x[..., config.rope_dim :]], axis=-1)


def _layer_norm(x: Array, scale: Array, bias: Array, eps: float = 1e-6) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + eps)
    return normed.astype(x.dtype) * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


def scores(query: Array, weight: Array, key: Array) -> Array:
    """``I`` of queries ``[B, T, J, D]`` with weights ``[B, T, J]`` for keys ``[B, S, D]``, float32 ``[B, T, S]`` (eq. 1)."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    each = jax.nn.relu(jnp.einsum("btjd,bsd->btjs", query, key, preferred_element_type=wide))
    return jnp.einsum("btjs,btj->bts", each, weight.astype(wide))


def picked(found: Array, visible: Array, top_k: int) -> tuple[Array, Array]:
    """Places of the ``top_k`` largest scores ``[..., S]`` among the visible ones, int32 ``[..., k]``, and which of these are visible."""
    best, at = jax.lax.top_k(jnp.where(visible, found, -jnp.inf), min(top_k, found.shape[-1]))
    return at, best > -jnp.inf


def attend(
    params: Params,
    index_params: Params,
    x: Array,
    config: Config,
    latent: mla.Config,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    valid: Array | None = None,
    implementation: Implementation | None = None,
    chunk: int = 128,
) -> Array:
    """Causal sparse attention of tokens ``[B, T, dim]``: heads ``[B, T, H, value_dim]``, for an output projection.

    Args:
        params: Parameters of latent attention, as ``mla.init`` makes them.
        index_params: Parameters of the indexer, as ``init`` makes them.
        x: Tokens.
        config: Sizes of the indexer.
        latent: Shape of latent attention.
        positions: int ``[B, T]``, for rotary positions; 0, 1, 2 ... if not given.
        segment_ids: int ``[B, T]``: tokens see their own segment alone.
        valid: bool ``[B, T]``, false for padding, whose rows are 0.
        implementation: reference writes every score down; xla gathers the picked latents. None is xla.
        chunk: Number of queries that xla processes at once. Affects only memory and speed.

    Raises ``ValueError`` for shapes that do not fit.
    """
    checks.one_of("implementation", implementation or "xla", ("xla", "reference"))
    batch, length = x.shape[:2]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    c, key = mla.latents(params, x, positions, latent)
    q = _absorbed(params, x, positions, latent)
    numbers = index(params, index_params, x, positions, config, latent)
    sees = _visible(batch, length, segment_ids, valid)
    if implementation == "reference":
        found = scores(*numbers)
        at, there = picked(found, sees, config.top_k)
        chosen = jnp.zeros(found.shape, bool).at[_rows(at)].max(there)
        mixed = _mix(q, c, key, chosen, latent)
        return _out(params, mixed)

    def some(x: tuple[tuple[Array, Array], Array, Array, Array]) -> Array:
        """Of a chunk of queries, ``[B, C, ...]``."""
        q, query, weight, sees = x
        at, there = picked(scores(query, weight, numbers.key), sees, config.top_k)
        near_c, near_key = (jnp.take_along_axis(y[:, None], at[..., None], axis=2) for y in (c, key))
        return _mix(q, near_c, near_key, there, latent)

    mixed = _in_chunks(some, (q, numbers.query, numbers.weight, sees), length, chunk)
    return _out(params, mixed)


def _absorbed(params: Params, x: Array, positions: Array, latent: mla.Config) -> tuple[Array, Array]:
    """Queries for latents ``[B, T, H, r]`` and for shared keys ``[B, T, H, rope]``."""
    nope, turned = mla.queries(params, x, positions, latent)
    return jnp.einsum("bthw,rhw->bthr", nope, params["up_key"].astype(x.dtype)), turned


def _mix(q: tuple[Array, Array], c: Array, key: Array, sees: Array, latent: mla.Config) -> Array:
    """Mixed latents ``[B, T, H, r]`` of queries ``[B, T, H, ...]``; see ``_weights``."""
    return jnp.einsum(f"bhts,{_of(c)}r->bthr", _weights(q, c, key, sees, latent).astype(c.dtype), c)


def _weights(q: tuple[Array, Array], c: Array, key: Array, sees: Array, latent: mla.Config) -> Array:
    """Attention ``[B, H, T, S]``, float32 at least, to latents and keys that all queries share, ``[B, S, ...]``, or to their own, ``[B, T, S, ...]``;
    ``sees`` bool ``[B, T, S]``."""
    wide = jnp.promote_types(q[0].dtype, jnp.float32)
    found = jnp.einsum(f"bthr,{_of(c)}r->bhts", q[0], c, preferred_element_type=wide)
    found += jnp.einsum(f"bthw,{_of(key)}w->bhts", q[1], key, preferred_element_type=wide)
    return masked_softmax(found * latent.scale, sees[:, None])


def _of(x: Array) -> str:
    return "bs" if x.ndim == 3 else "bts"


def _out(params: Params, mixed: Array) -> Array:
    return jnp.einsum("bthr,rhw->bthw", mixed, params["up_value"].astype(mixed.dtype))


def _visible(batch: int, length: int, segment_ids: Array | None, valid: Array | None) -> Array:
    """Which tokens each may see, bool ``[B, T, S]``."""
    at = jnp.arange(length)
    sees = jnp.broadcast_to(at[None, :, None] >= at[None, None, :], (batch, length, length))
    if segment_ids is not None:
        sees &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return sees if valid is None else sees & valid[:, None, :] & valid[:, :, None]


def _rows(at: Array) -> tuple[Array, Array, Array]:
    b, t, _ = at.shape
    return jnp.arange(b)[:, None, None], jnp.arange(t)[None, :, None], at


def _in_chunks(function: Any, rows: Any, length: int, chunk: int) -> Array:
    """``function`` of rows ``[B, T, ...]``, ``chunk`` of T at a time, each computed again in the backward pass."""
    checks.positive_int("chunk", chunk)
    parts = -(-length // chunk)
    behind = parts * chunk - length

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, behind if i == 1 else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(x.shape[0], parts, chunk, *x.shape[2:]), 1, 0)

    found = jnp.moveaxis(jax.lax.map(jax.checkpoint(function), jax.tree.map(cut, rows)), 0, 1)
    return found.reshape(found.shape[0], parts * chunk, *found.shape[3:])[:, :length]


def index_loss(
    params: Params,
    index_params: Params,
    x: Array,
    config: Config,
    latent: mla.Config,
    *,
    sparse: bool,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    valid: Array | None = None,
) -> Array:
    """The mean over tokens of the KL of the indexer's softmax to attention, which learns nothing from it: over all that a token sees (eq. 3), or, ``sparse``,
    over what is picked (eq. 4). Writes all scores down."""
    batch, length = x.shape[:2]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    sees = _visible(batch, length, segment_ids, valid)
    found = scores(*index(params, index_params, x, positions, config, latent))
    if sparse:
        at, there = picked(jax.lax.stop_gradient(found), sees, config.top_k)
        sees = jnp.zeros(found.shape, bool).at[_rows(at)].max(there)
    c, key = mla.latents(params, x, positions, latent)
    p = _weights(_absorbed(params, x, positions, latent), c, key, sees, latent).mean(1)
    p = jax.lax.stop_gradient(p)
    log_q = jax.nn.log_softmax(jnp.where(sees, found, -jnp.inf), where=sees, axis=-1)
    each = jnp.where(sees, p * (jnp.log(jnp.maximum(p, 1e-30)) - jnp.where(sees, log_q, 0.0)), 0.0).sum(-1)
    counts = sees.any(-1)
    return jnp.sum(each, where=counts) / jnp.maximum(counts.sum(), 1)


# One token after another


class Cache(NamedTuple):
    """What decoding remembers: latents and shared keys, and the indexer's keys ``[B, capacity, D]``."""

    latent: mla.Cache
    key: Any


def init_cache(
    config: Config, latent: mla.Config, batch: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Cache:
    """An empty cache."""
    return Cache(mla.init_cache(latent, batch, capacity, dtype), jnp.zeros((batch, capacity, config.dim), dtype))


def fill(
    params: Params,
    index_params: Params,
    x: Array,
    cache: Cache,
    positions: Array,
    config: Config,
    latent: mla.Config,
) -> Cache:
    """The empty ``cache`` after tokens ``[B, T, dim]`` from position 0 on; ``positions`` int ``[B, T]`` are those of the rotary embedding."""
    keys = index(params, index_params, x, positions, config, latent).key
    return Cache(mla.fill(cache.latent, *mla.latents(params, x, positions, latent)), kv.put_all(cache.key, keys))


def decode_step(
    params: Params,
    index_params: Params,
    x: Array,
    cache: Cache,
    position: Array,
    config: Config,
    latent: mla.Config,
    *,
    start: Array | int = 0,
) -> tuple[Array, Cache]:
    """The row of ``attend`` for the token ``[B, dim]`` at ``position`` int32 ``[]`` or ``[B]``, ``[B, H, value_dim]``, and the cache with it.

    Positions count from ``start``. It reads the indexer's keys of all tokens, and the latents of ``top_k`` alone.
    """
    batch = len(x)
    at = kv.per_row(position, batch) - kv.per_row(start, batch)
    x, place = x[:, None], at[:, None]
    c, key = mla.latents(params, x, place, latent)
    numbers = index(params, index_params, x, place, config, latent)
    cache = Cache(mla.write(cache.latent, c[:, 0], key[:, 0], position), kv.put(cache.key, numbers.key[:, 0], position))
    all_c, all_key, keys = (y.astype(x.dtype) for y in kv.seen((*cache.latent, cache.key)))
    visible = kv.visible_rows(position, start, None, *keys.shape[:2])
    rows, there = picked(scores(numbers.query, numbers.weight, keys), visible[:, None], config.top_k)
    near_c, near_key = (jnp.take_along_axis(y[:, None], rows[..., None], axis=2) for y in (all_c, all_key))
    q = _absorbed(params, x, place, latent)
    mixed = _mix(q, near_c, near_key, there, latent)
    return _out(params, mixed)[:, 0], cache
