"""The settings of native sparse attention, its compression, and its branches for a few queries: see ``nsa``."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrl.attention import nsa_blocks
from jrl.attention.dense import group, masked_softmax
from jrl.numerics.settings import NonNegativeInt, Positive, Settings
from jrl.numerics.types import Params

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings, prefix="nsa"):
    """Shape of native sparse attention; the defaults are the paper's (section 4.1)."""

    block: Positive = 32  # l, tokens that are compressed into one.
    stride: Positive = 16  # d, tokens between the starts of such blocks; d = l for blocks that do not overlap.
    select_block: Positive = 64  # l', tokens of a block that is selected.
    selected: Positive = 16  # n, blocks that a query selects, including the initial and the local ones.
    initial: NonNegativeInt = 1  # First blocks, which are always selected.
    local: Positive = 2  # Last blocks, which are always selected, the query's own among them.
    window: Positive = 512  # w, tokens of the sliding window.
    pooling: Literal["mlp", "mean"] = "mlp"  # phi: an MLP with a position encoding inside the block, or the mean.

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block", "select_block"):
            if getattr(self, name) % self.stride:
                raise ValueError(
                    f"nsa.{name} must be a multiple of nsa.stride = {self.stride}; got {getattr(self, name)}"
                )
        if self.block > self.select_block:
            raise ValueError(f"nsa.block must be at most nsa.select_block = {self.select_block}; got {self.block}")
        if self.selected < self.initial + self.local:
            least = self.initial + self.local
            raise ValueError(f"nsa.selected must be at least nsa.initial + nsa.local = {least}; got {self.selected}")

    def num_compressed(self, length: int) -> int:
        """Blocks of compression in a sequence."""
        return max(0, (length - self.block) // self.stride + 1)


class Streams(NamedTuple):
    """Keys ``[B, S, K, D]`` and values ``[B, S, K, Dv]`` of each branch; give one pair three times to share it (``shared``)."""

    k_compress: Array
    v_compress: Array
    k_select: Array
    v_select: Array
    k_window: Array
    v_window: Array


def shared(k: Array, v: Array) -> Streams:
    """One pair of keys and values for every branch."""
    return Streams(k, v, k, v, k, v)


# Compression


def init(key: Array, config: Config, head_dim: int, value_dim: int, hidden: int | None = None) -> Any:
    """Parameters of phi for keys and for values, float32: positions ``[l, D]`` and an MLP ``[l D] -> hidden -> [D]``.

    ``hidden`` is ``2 D`` if not given. Empty for mean pooling.
    """
    if config.pooling == "mean":
        return {}

    def of(key: Array, dim: int) -> dict[str, Array]:
        width = hidden or 2 * dim
        key_position, key_in, key_out = jax.random.split(key, 3)
        fan_in = config.block * dim
        return {
            "position": 0.02 * jax.random.normal(key_position, (config.block, dim), jnp.float32),
            "w_in": jax.random.normal(key_in, (fan_in, width), jnp.float32) * fan_in**-0.5,
            "b_in": jnp.zeros(width, jnp.float32),
            "w_out": jax.random.normal(key_out, (width, dim), jnp.float32) * width**-0.5,
            "b_out": jnp.zeros(dim, jnp.float32),
        }

    key_k, key_v = jax.random.split(key)
    return {"k": of(key_k, head_dim), "v": of(key_v, value_dim)}


def check_phi(params: Params, config: Config) -> None:
    """Raise ``ValueError`` unless these are parameters of the configured phi."""
    if bool(params) != (config.pooling == "mlp"):
        given = "parameters of an mlp" if params else "no parameters"
        raise ValueError(
            f"nsa.pooling={config.pooling} does not go with {given}: take those of nsa.init(key, config, ...)"
        )
    if params and params["k"]["position"].shape[0] != config.block:
        raise ValueError(
            f"these are parameters for blocks of {params['k']['position'].shape[0]}, not nsa.block={config.block}"
        )


def phi(params: Params, block: Array) -> Array:
    """Tokens ``[..., l, D]`` of a block as one, ``[..., D]``; without parameters their mean."""
    if not params:
        return block.astype(jnp.promote_types(block.dtype, jnp.float32)).mean(-2).astype(block.dtype)
    p = jax.tree.map(lambda x: x.astype(block.dtype), params)
    x = (block + jnp.broadcast_to(p["position"], block.shape)).reshape(*block.shape[:-2], -1)
    x = x @ p["w_in"]
    x = jax.nn.silu(x + jnp.broadcast_to(p["b_in"], x.shape)) @ p["w_out"]
    return x + jnp.broadcast_to(p["b_out"], x.shape)


def compress(params: Params, x: Array, config: Config, first: Array | None = None) -> Array:
    """``[B, S, K, D]`` to one row for each block, ``[B, N, K, D]``.

    ``first`` int ``[B, N]`` has the index of each block's first token; 0, d, 2 d ... for the ``N = (S - l) // d + 1`` of a whole row
    if not given.
    """
    if first is not None:
        return phi(params, jnp.moveaxis(nsa_blocks.gather(x, first, config.block), 2, 3))
    number, per_block = config.num_compressed(x.shape[1]), config.block // config.stride
    strides = number + per_block - 1 if number else 0
    parts = x[:, : strides * config.stride].reshape(x.shape[0], strides, config.stride, *x.shape[2:])
    blocks = jnp.concatenate([parts[:, i : i + number] for i in range(per_block)], axis=2)  # [B, N, l, K, D]
    return phi(params, jnp.moveaxis(blocks, 2, 3))


# The branches for a few queries q [B, C, H, D] that stand at t [B, C] and see keys from start [B, C] on


def compressed_attention(
    q: Array, k: Array, v: Array, first: Array, t: Array, start: Array, config: Config, scale: float
) -> tuple[Array, Array]:
    """Attention to compressed blocks ``[B, N, K, D]``: ``[B, C, H, Dv]``, and importance ``[B, K, C, N]``, in float32.

    ``first`` int ``[B, N]`` has the index of each block's first token.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bckgd,bnkd->bkgcn", group(q, k.shape[2]), k, preferred_element_type=wide) * scale
    first = first[:, None]
    visible = (first + config.block - 1 <= t[..., None]) & (first >= start[..., None])
    p = masked_softmax(scores, visible[:, None, None])
    out = jnp.einsum("bkgcn,bnkd->bckgd", p.astype(v.dtype), v, preferred_element_type=wide)
    return out.reshape(*q.shape[:3], -1), jax.lax.stop_gradient(p.sum(2))


def select(importance: Array, own: Array, oldest: Array, num_blocks: int, config: Config) -> Array:
    """Blocks that each query reads, int32 ``[B, K, C, n]``, ``num_blocks`` where there are fewer than n to choose from.

    It may read blocks from ``oldest`` to its ``own``, both int ``[B, C]``.
    """
    per_select, per_block = config.select_block // config.stride, config.block // config.stride
    width = num_blocks * per_select
    total = sum(
        jnp.pad(importance, [(0, 0)] * 3 + [(n, max(0, width - n - importance.shape[-1]))])[..., :width]
        for n in range(per_block)
    )
    score = jnp.asarray(total).reshape(*importance.shape[:-1], num_blocks, per_select).sum(-1)
    block = jnp.arange(num_blocks)[None, None]
    own, first = own[..., None], oldest[..., None]
    candidate = (block <= own) & (block >= first)
    forced = (block < first + config.initial) | (block > own - config.local)
    score = jnp.where(forced[:, None], jnp.inf, score)
    score = jnp.where(candidate[:, None], score, -1.0)
    best, chosen = jax.lax.top_k(score, min(config.selected, num_blocks))
    return jnp.where(best >= 0, chosen, num_blocks).astype(jnp.int32)
