"""What decoding remembers of keys and values: a ring of the last tokens, as a pytree of static shapes.

    cache = init(batch, capacity, kv_heads, head_dim)
    cache = write(cache, k, v, position)                  the token at ``position``, [B, K, D]
    out = decode_step(q, cache, position)                 its row of the full sequence's attention, [B, H, Dv]

A capacity as long as the sequence is a full cache; one as long as a window holds that window.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.attention.dense import masked_softmax
from jrl.numerics import checks

Array = jax.Array


class KV(NamedTuple):
    """Keys ``[B, capacity, K, D]`` and values ``[B, capacity, K, Dv]``; the token at position p lies at ``p % capacity``. Each is an array, or a
    ``Layer`` where tokens are written."""

    k: Any
    v: Any


class Layer(NamedTuple):
    """Rows of one layer among those of all ``[L, B, R, ...]``, so that a token is written in its place and no other row is copied."""

    rows: Array
    layer: Array  # int32: which


def seen(cache: Any) -> Any:
    """The cache with the rows ``[B, R, ...]`` of each ``Layer`` in it."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x.rows, x.layer, 0, keepdims=False) if is_layer(x) else x,
        cache,
        is_leaf=is_layer,
    )


def is_layer(x: Any) -> bool:
    return isinstance(x, Layer)


def init(
    batch: int,
    capacity: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> KV:
    """An empty cache. Raises ``ValueError`` for a size below 1."""
    for name, value in (("batch", batch), ("capacity", capacity), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        checks.positive_int(f"cache: {name}", value)
    shape = (batch, capacity, kv_heads)
    return KV(jnp.zeros((*shape, head_dim), dtype), jnp.zeros((*shape, value_dim or head_dim), dtype))


def put(rows: Any, new: Array, position: Array) -> Any:
    """``rows [B, R, ...]``, an array or a ``Layer``, with ``new [B, ...]`` written at ``position % R``; position is int32 ``[]`` or ``[B]``."""
    whole = rows.rows if is_layer(rows) else rows[None]
    layer = rows.layer if is_layer(rows) else 0
    if new.shape != (whole.shape[1], *whole.shape[3:]):
        raise ValueError(
            f"a cache of {list(whole.shape[1:])} takes {[whole.shape[1], *whole.shape[3:]]}; got {list(new.shape)}"
        )
    at, new = position % whole.shape[2], new.astype(whole.dtype)
    if jnp.ndim(at) == 0:
        place = [jnp.asarray(i, jnp.int32) for i in (layer, 0, at, *(0,) * (new.ndim - 1))]
        whole = jax.lax.dynamic_update_slice(whole, new[None, :, None], place)
    else:
        whole = whole.at[layer, jnp.arange(len(new)), at].set(new)
    return rows._replace(rows=whole) if is_layer(rows) else whole[0]


def write(cache: KV, k: Array, v: Array, position: Array) -> KV:
    """The cache with the token at ``position`` (int32 ``[]`` or ``[B]``), keys ``[B, K, D]`` and values ``[B, K, Dv]``."""
    return KV(put(cache.k, k, position), put(cache.v, v, position))


def fill(cache: KV, k: Array, v: Array) -> KV:
    """The cache after a whole sequence from position 0: keys ``[B, T, K, D]``, values ``[B, T, K, Dv]``."""
    return KV(put_all(cache.k, k), put_all(cache.v, v))


def put_all(rows: Array, new: Array) -> Array:
    """``rows [B, R, ...]`` after all of ``new [B, T, ...]`` was written from position 0."""
    length, capacity = new.shape[1], rows.shape[1]
    position = jnp.arange(max(0, length - capacity), length)
    return rows.at[:, position % capacity].set(new[:, position].astype(rows.dtype))


def decode_step(
    q: Array,
    cache: KV,
    position: Array,
    *,
    start: Array | int = 0,
    window: int | None = None,
    scale: float | None = None,
    prefix: tuple[Array, Array] | None = None,
) -> Array:
    """Attention of the query ``[B, H, D]`` at ``position`` to the cached tokens up to it: ``[B, H, Dv]``.

    Args:
        q: query of the newest token, which was written before.
        cache: with at least the tokens to be seen.
        position: int32 ``[]`` or ``[B]``.
        start: first position that may be seen (the beginning of the episode), int32 ``[]`` or ``[B]``.
        window: only the last so many tokens are seen.
        scale: of the scores; ``D ** -0.5`` if not given.
        prefix: Keys ``[N, K, D]`` and values ``[N, K, Dv]`` that every query sees.
    """
    cache = seen(cache)
    batch, heads, dim = q.shape
    capacity, kv_heads = cache.k.shape[1:3]
    if cache.k.shape[0] != batch or heads % kv_heads or cache.k.shape[3] != dim:
        raise ValueError(f"the query {list(q.shape)} does not fit the cache's keys {list(cache.k.shape)}")
    if window is not None:
        checks.positive_int("window", window)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    visible = visible_rows(position, start, window, batch, capacity)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("bkgd,bskd->bkgs", grouped, cache.k.astype(q.dtype), preferred_element_type=wide)
    if prefix is not None:
        more = jnp.einsum("bkgd,nkd->bkgn", grouped, prefix[0].astype(q.dtype), preferred_element_type=wide)
        scores, first = jnp.concatenate([more, scores], axis=-1), jnp.ones((batch, len(prefix[0])), bool)
        visible = jnp.concatenate([first, visible], axis=-1)
    p = masked_softmax(scores * (dim**-0.5 if scale is None else scale), visible[:, None, None]).astype(q.dtype)
    own = p[..., -capacity:]
    out = jnp.einsum("bkgs,bskd->bkgd", own, cache.v.astype(q.dtype), preferred_element_type=wide)
    if prefix is not None:
        of_prefix = p[..., :-capacity]
        out += jnp.einsum("bkgn,nkd->bkgd", of_prefix, prefix[1].astype(q.dtype), preferred_element_type=wide)
    return out.reshape(batch, heads, -1).astype(q.dtype)


def visible_rows(position: Array, start: Array | int, window: int | None, batch: int, capacity: int) -> Array:
    """Which rows of a ring hold a token that the one at ``position`` sees, bool ``[B, capacity]``."""
    behind = (per_row(position, batch)[:, None] - jnp.arange(capacity)[None]) % capacity
    furthest = per_row(position, batch) - per_row(start, batch)
    if window is not None:
        furthest = jnp.minimum(furthest, window - 1)
    return behind <= furthest[:, None]


def per_row(x: Array | int, batch: int) -> Array:
    """An int or int ``[B]`` as int32 ``[B]``."""
    return jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch,))
