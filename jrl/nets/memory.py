"""A memory of attention: a transformer over the observations of the episode so far.

What is remembered are the keys and values of the last ``context`` steps (Parisotto et al. 2019, 1910.06764, without its
gates), shifted by one at each step. An unrolled sequence sees them before its own, so that it gives the same numbers as its
steps; they carry no gradient. Where an episode begins, all before it is out of sight.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jrl.attention import attend, nsa
from jrl.attention.rotary import rms_norm, rope
from jrl.attention.visibility import NO_KEY
from jrl.nets import mixers, transformer
from jrl.numerics.settings import NonNegativeInt, Positive, Settings

Array = jax.Array
Kind = Literal["none", "dense", "nsa"]


@dataclass(frozen=True)
class AttentionConfig(Settings, prefix="network.attention"):
    """Shape of a memory of attention."""

    kind: Kind = "none"  # none, dense, or nsa (native sparse attention).
    context: Positive = 128  # Steps that are remembered; what is further back is out of sight.
    num_layers: Positive = 1  # Layers of the transformer.
    num_heads: Positive = 4  # Query heads.
    num_kv_heads: Positive = 4  # Key heads.
    block: Positive = 8  # Steps that nsa compresses into one, half as far apart.
    select_block: Positive = 16  # Steps of a block that nsa selects.
    selected: Positive = 4  # Blocks that nsa selects, the first one and the last two among them.
    window: NonNegativeInt = 0  # Last steps that are seen: by nsa's window (0: 16), or by dense attention (0: all).

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "nsa":
            if self.block > 1 and self.block % 2:
                raise ValueError(
                    f"network.attention.block must be 1 or even, for blocks half as far apart; got {self.block}"
                )
            self.sparse()

    def sparse(self) -> nsa.Config:
        """Sizes of native sparse attention."""
        stride = max(1, self.block // 2)
        return nsa.Config(self.block, stride, self.select_block, self.selected, window=self.window or 16)

    def transformer(self, dim: int) -> transformer.Config:
        """The layers, for a stream of width ``dim``."""
        return transformer.Config(
            dim=dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            ffn_dim=2 * dim,
            attention="nsa" if self.kind == "nsa" else "dense",
            sparse=self.sparse() if self.kind == "nsa" else nsa.Config(),
        )


class Memory(NamedTuple):
    """The last ``context`` steps of each agent, oldest first.

    Attributes:
        k: keys, before rotary positions ``[B, context, layers, branches, K, D]``.
        v: values.
        alive: whether the step belongs to the episode under way ``[B, context]``.
        position: Position of the step in its episode, int32 ``[B, context]``, by which the blocks of nsa count.
    """

    k: Array
    v: Array
    alive: Array
    position: Array


class Timeline(NamedTuple):
    """The memory and an unrolled sequence of T steps behind it ``[B, context + T, ...]``, with the episode of each step."""

    k: Array
    v: Array
    episode: Array
    position: Array


def empty(config: AttentionConfig, dim: int) -> Memory:
    """The memory of one agent before its first step."""
    shape = config.transformer(dim)
    rows = (config.context, config.num_layers, shape.branches, config.num_kv_heads, shape.width)
    return Memory(
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(config.context, bool),
        jnp.zeros(config.context, jnp.int32),
    )


def memory_at(line: Timeline, t: Array, b: Array, context: int) -> Memory:
    """Memories ``[N]`` after steps ``t [N]`` of agents ``b [N]``."""
    rows = (t + 1)[:, None] + jnp.arange(context)[None]
    at = b[:, None]
    own = line.episode[b, t + context]
    alive = line.episode[at, rows] == own[:, None]
    return Memory(line.k[at, rows], line.v[at, rows], alive, line.position[at, rows])


class AttentionMemory(nn.Module):
    """``(memory [B], x [T, B, dim], first [T, B]) -> (timeline, [T, B, dim])``."""

    config: AttentionConfig

    @nn.compact
    def __call__(self, memory: Memory, x: Array, first: Array) -> tuple[Timeline, Array]:
        shape = self.config.transformer(x.shape[-1])
        params = self.param("blocks", lambda key: transformer.init(key, shape))
        x, first = jnp.swapaxes(x, 0, 1), first.T
        episode = jnp.cumsum(first, axis=1, dtype=jnp.int32)
        episode = jnp.concatenate([jnp.where(memory.alive, 0, NO_KEY), episode], axis=1)
        position = _positions(memory, first)
        keys, values = [], []
        for i in range(self.config.num_layers):
            layer = jax.tree.map(lambda p, i=i: p[i], params["layers"])
            y = rms_norm(x, layer["attention_norm"], shape.norm_eps)
            q, k, v = mixers.project(layer, y, shape)
            past_k, past_v = (jnp.moveaxis(m[:, :, i], 2, 0).astype(k.dtype) for m in (memory.k, memory.v))
            k, v = jnp.concatenate([past_k, k], axis=2), jnp.concatenate([past_v, v], axis=2)
            keys.append(jnp.moveaxis(k, 0, 2))
            values.append(jnp.moveaxis(v, 0, 2))
            mixed = self._mix(layer, y, q, k, v, episode, position, shape)
            x = x + transformer.out(layer, mixed)
            x = x + transformer.ffn(layer, x, shape)
        x = rms_norm(x, params["norm"], shape.norm_eps)
        line = Timeline(jnp.stack(keys, axis=2), jnp.stack(values, axis=2), episode, position)
        return line, jnp.swapaxes(x, 0, 1)

    def _mix(self, layer, y, q, k, v, episode, position, shape):
        """Attention of queries ``[B, T, H, D]`` to the timeline of each branch ``[n, B, context + T, K, D]``."""
        context, length = self.config.context, k.shape[2]
        q = rope(q, position[:, context:], shape.rope_theta)
        k = rope(k, position[None], shape.rope_theta)
        horizon = context + 1
        if self.config.kind == "dense":
            window = min(self.config.window or horizon, horizon)
            return _window(q, k[0], v[0], episode, window, context)
        sparse = self.config.sparse()
        o_win = _window(q, k[2], v[2], episode, min(sparse.window, horizon), context)
        # Blocks count from the first step of the episode, which may lie before the timeline: room for the rest of a block there.
        room = sparse.select_block - 1
        early = jnp.maximum(position[:, :1] + jnp.arange(-room, 0, dtype=jnp.int32)[None], 0)
        position = jnp.concatenate([early, position], axis=1)
        at = jnp.broadcast_to(jnp.arange(room + length, dtype=jnp.int32)[None], position.shape)
        grown_k, grown_v = (jnp.pad(x[:2], [(0, 0), (0, 0), (room, 0), (0, 0), (0, 0)]) for x in (k, v))
        streams = nsa.Streams(grown_k[0], grown_v[0], grown_k[1], grown_v[1], k[2], v[2])
        t = at[:, room + context :]
        start = jnp.maximum(room + nsa.segment_starts(episode)[:, context:], t - context)
        gates = mixers.branch_gates(layer, y)
        return nsa.mix(layer["compress"], q, streams, gates, o_win, t, start, sparse, origin=at - position)


def _positions(memory: Memory, first: Array) -> Array:
    """Position in its episode of each step of the timeline, int32 ``[B, context + T]``."""
    before = jnp.where(memory.alive[:, -1], memory.position[:, -1], -1)  # of the last step before the sequence
    t = jnp.broadcast_to(jnp.arange(first.shape[1], dtype=jnp.int32)[None], first.shape)
    begun = jax.lax.cummax(jnp.where(first, t, -1), axis=1)
    return jnp.concatenate([memory.position, jnp.where(begun >= 0, t - begun, before[:, None] + 1 + t)], axis=1)


def _window(q: Array, k: Array, v: Array, episode: Array, window: int, context: int) -> Array:
    return attend(q, k, v, window=window, q_offset=context, segment_ids=episode[:, context:], kv_segment_ids=episode)
