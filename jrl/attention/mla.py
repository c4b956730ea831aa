"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values made of one small latent a token.

    c_t = norm(x_t W_dkv)                    the latent, r numbers, and k^R_t = rope(x_t W_kr), shared by all heads   (eq. 9, 15)
    k_t = [c_t W_uk ; k^R_t],  v_t = c_t W_uv                                                                       (eq. 10, 11, 17)
    q_t = [norm(x_t W_dq) W_uq ; rope(...)]                                                                         (eq. 12-14)
    o_t = softmax(q_t k^T / sqrt(d_nope + d_rope)) v                                                                (eq. 18)

A whole sequence is attended with keys and values written out. A decode step reads the latents alone, with ``W_uk`` absorbed
into the query and ``W_uv`` into the output: ``q (c W_uk)^T = (q W_uk^T) c^T`` and ``p (c W_uv) = (p c) W_uv``.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.attention import cache as kv
from jrl.attention.dense import masked_softmax
from jrl.attention.rotary import Scaling, rms_norm, rope
from jrl.numerics.settings import NonNegativeInt, Positive, Settings
from jrl.numerics.types import Params

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings, prefix="mla"):
    """Shape of latent attention."""

    latent: Positive = 64  # r, numbers per token of which keys and values are made.
    query_latent: NonNegativeInt = 0  # The same for queries; 0 makes them of the token itself.
    nope_dim: Positive = 32  # Width of a head's queries and keys without position.
    rope_dim: Positive = 16  # Width of a head's queries and of the shared key, with rotary positions.
    value_dim: Positive = 32  # Width of a head's values.
    rope_theta: float = 10_000.0  # Base of the rotary frequencies.
    rope_scaling: Scaling = Scaling()  # Stretching of rotary positions.
    norm_eps: float = 1e-6  # Added to the mean square in RMSNorm.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_dim % 2:
            raise ValueError(f"mla.rope_dim must be even; got {self.rope_dim}")

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.rope_scaling.on_scores * (self.nope_dim + self.rope_dim) ** -0.5


class Cache(NamedTuple):
    """Latents ``[B, capacity, r]`` and shared keys ``[B, capacity, rope_dim]``; position p lies at ``p % capacity``."""

    latent: Array
    key: Array


def init(key: Array, config: Config, dim: int, heads: int) -> dict[str, Array]:
    """Parameters, float32, for tokens of width ``dim``."""
    shapes = {
        "down": (dim, config.latent),
        "key": (dim, config.rope_dim),
        "up_key": (config.latent, heads, config.nope_dim),
        "up_value": (config.latent, heads, config.value_dim),
        "query": (config.query_latent or dim, heads, config.nope_dim + config.rope_dim),
    }
    if config.query_latent:
        shapes["query_down"] = (dim, config.query_latent)
    keys = jax.random.split(key, len(shapes))
    params = {
        n: jax.random.normal(k, s, jnp.float32) * s[0] ** -0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }
    params["norm"] = jnp.ones(config.latent, jnp.float32)
    return params | ({"query_norm": jnp.ones(config.query_latent, jnp.float32)} if config.query_latent else {})


def _rope(x: Array, positions: Array, config: Config) -> Array:
    return rope(x, positions, config.rope_theta, config.rope_scaling)


def query_latents(params: Params, x: Array, config: Config) -> Array:
    """What queries are made of: latents ``[B, T, query_latent]``, or the tokens ``[B, T, dim]`` where there are none."""
    if not config.query_latent:
        return x
    return rms_norm(x @ params["query_down"].astype(x.dtype), params["query_norm"].astype(x.dtype), config.norm_eps)


def queries(params: Params, x: Array, positions: Array, config: Config) -> tuple[Array, Array]:
    """Queries ``[B, T, H, nope]`` and ``[B, T, H, rope]`` of tokens ``[B, T, dim]``."""
    q = jnp.einsum("...d,dhw->...hw", query_latents(params, x, config), params["query"].astype(x.dtype))
    return q[..., : config.nope_dim], _rope(q[..., config.nope_dim :], positions, config)


def latents(params: Params, x: Array, positions: Array, config: Config) -> tuple[Array, Array]:
    """What a token leaves: latents ``[B, T, r]`` and shared keys ``[B, T, rope]``."""
    p = jax.tree.map(lambda w: w.astype(x.dtype), params)
    latent = rms_norm(x @ p["down"], p["norm"], config.norm_eps)
    return latent, _rope((x @ p["key"])[..., None, :], positions, config)[..., 0, :]


def attend(
    params: Params,
    x: Array,
    config: Config,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    valid: Array | None = None,
    implementation: Any = None,
) -> Array:
    """Causal latent attention of tokens ``[B, T, dim]``: heads ``[B, T, H, value_dim]``, for an output projection.

    ``implementation`` is that of ``attention.attend``.
    """
    from jrl.attention import attend as attend_heads

    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    nope, turned = queries(params, x, positions, config)
    latent, key = latents(params, x, positions, config)
    k = jnp.einsum("btr,rhw->bthw", latent, params["up_key"].astype(x.dtype))
    v = jnp.einsum("btr,rhw->bthw", latent, params["up_value"].astype(x.dtype))
    k = jnp.concatenate([k, jnp.broadcast_to(key[:, :, None], (*k.shape[:3], config.rope_dim))], axis=-1)
    q = jnp.concatenate([nope, turned], axis=-1)
    return attend_heads(
        q, k, v, segment_ids=segment_ids, valid=valid, scale=config.scale, implementation=implementation
    )


def init_cache(config: Config, batch: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Cache:
    """An empty cache."""
    shape = (batch, capacity)
    return Cache(jnp.zeros((*shape, config.latent), dtype), jnp.zeros((*shape, config.rope_dim), dtype))


def write(cache: Cache, latent: Array, key: Array, position: Array) -> Cache:
    """The cache with the latent ``[B, r]`` and the shared key ``[B, rope]`` of the token at ``position`` (int32 ``[]`` or ``[B]``)."""
    return Cache(kv.put(cache.latent, latent, position), kv.put(cache.key, key, position))


def fill(cache: Cache, latent: Array, key: Array) -> Cache:
    """The cache after a whole sequence from position 0: latents ``[B, T, r]``, shared keys ``[B, T, rope]``."""
    return Cache(kv.put_all(cache.latent, latent), kv.put_all(cache.key, key))


def decode_step(
    params: Params,
    nope: Array,
    turned: Array,
    cache: Cache,
    position: Array,
    config: Config,
    *,
    start: Array | int = 0,
) -> Array:
    """The row of ``attend`` at ``position``, ``[B, H, value_dim]``, for its queries ``[B, H, nope]`` and ``[B, H, rope]``.

    It reads r + rope numbers a token, whatever the number of heads. Arguments as in ``cache.decode_step``.
    """
    wide = jnp.promote_types(nope.dtype, jnp.float32)
    p = jax.tree.map(lambda w: w.astype(nope.dtype), params)
    latent, key = (x.astype(nope.dtype) for x in kv.seen(cache))
    absorbed = jnp.einsum("bhw,rhw->bhr", nope, p["up_key"])
    scores = jnp.einsum("bhr,bsr->bhs", absorbed, latent, preferred_element_type=wide)
    scores = scores + jnp.einsum("bhw,bsw->bhs", turned, key, preferred_element_type=wide)
    visible = kv.visible_rows(position, start, None, *latent.shape[:2])
    weight = masked_softmax(scores * config.scale, visible[:, None]).astype(nope.dtype)
    return jnp.einsum("bhr,rhw->bhw", jnp.einsum("bhs,bsr->bhr", weight, latent), p["up_value"])
