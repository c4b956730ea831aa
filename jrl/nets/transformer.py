"""A decoder (Vaswani et al. 2017, 1706.03762) as plain functions of plain parameters, with any kind of attention.

Each layer: ``x += attention(rms_norm(x))``, then ``x += ffn(rms_norm(x))`` (pre-norm; RMSNorm 1910.07467), with rotary positions
(RoPE, 2104.09864, halves rotated), grouped-query heads (2305.13245) and SwiGLU (2002.05202). Layers are stacked, so that one
scan runs them: every leaf of ``params["layers"]`` is ``[layers, ...]``, and ``axes`` names the axes of each for sharding.

    logits = forward(params, tokens, config)                               [B, T, V], float32
    logits, cache = decode(params, token, cache, position, config)         one token [B] after another, the same numbers
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrl import checks
from jrl.attention import Implementation, attend, nsa, nsa_cache
from jrl.attention import cache as kv_cache
from jrl.attention.rotary import rms_norm as rms_norm
from jrl.attention.rotary import rope as rope
from jrl.nets import moe

Array = jax.Array
Kind = Literal["dense", "window", "nsa"]


@dataclass(frozen=True)
class Config:
    """Shape of a decoder.

    Attributes:
        vocab_size: tokens; 0 for a decoder of vectors, without embedding and head.
        dim: width of the residual stream.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key heads, each for num_heads / num_kv_heads query heads.
        head_dim: of keys, queries and values; dim / num_heads if 0.
        ffn_dim: width of SwiGLU; about 8/3 dim if 0.
        attention: dense, window, or nsa (native sparse attention).
        causal: tokens see those before them alone; false for dense attention alone.
        window: tokens that window attention sees.
        sparse: sizes of native sparse attention.
        experts: a mixture of experts in place of SwiGLU, if it has experts.
        implementation: of dense and window attention; None picks.
        rope_theta: base of the rotary frequencies.
        norm_eps: of RMSNorm.
        qkv_bias: biases on queries, keys and values, as Qwen2 has them.
        qk_norm: RMSNorm of each query and key head, as Qwen3 has it.
        tie_embeddings: the head is the embedding.
        remat: compute each layer again in the backward pass instead of keeping it.
    """

    vocab_size: int = 0
    dim: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 0
    ffn_dim: int = 0
    attention: Kind = "dense"
    causal: bool = True
    window: int = 512
    sparse: nsa.Config = field(default_factory=nsa.Config)
    experts: moe.Config = field(default_factory=moe.Config)
    implementation: Implementation | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "window"):
            checks.positive_int(f"transformer.{name}", getattr(self, name))
        for name in ("vocab_size", "head_dim", "ffn_dim"):
            checks.positive_int(f"transformer.{name}", getattr(self, name), at_least=0)
        checks.one_of("transformer.attention", self.attention, ("dense", "window", "nsa"))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"transformer.num_heads must be a multiple of num_kv_heads = {self.num_kv_heads}; got {self.num_heads}"
            )
        if not self.head_dim and self.dim % self.num_heads:
            raise ValueError(
                f"transformer.dim must be a multiple of num_heads = {self.num_heads}, or give head_dim; got {self.dim}"
            )
        if not self.causal and self.attention != "dense":
            raise ValueError(f"transformer.causal=False needs transformer.attention=dense; got {self.attention}")
        if self.width % 2:
            raise ValueError(f"transformer.head_dim must be even, for rotary positions; got {self.width}")

    @property
    def width(self) -> int:
        """Of a head."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def inner(self) -> int:
        """Of SwiGLU."""
        return self.ffn_dim or -(-8 * self.dim // 3 // 8) * 8

    @property
    def branches(self) -> int:
        """Pairs of keys and values of a token."""
        return 3 if self.attention == "nsa" else 1


# Parameters


class Leaf(NamedTuple):
    """Shape of a parameter, the names of its axes, and its standard deviation at the start (None for ones, 0 for zeros)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float | None


def leaves(config: Config) -> dict[str, Any]:
    """What parameters there are, but those of NSA's compression."""
    d, h, k, w, f, n = config.dim, config.num_heads, config.num_kv_heads, config.width, config.inner, config.branches
    layer = {
        "attention_norm": Leaf((d,), ("dim",), None),
        "q": Leaf((d, h, w), ("dim", "heads", "head_dim"), d**-0.5),
        "k": Leaf((n, d, k, w), ("branch", "dim", "kv_heads", "head_dim"), d**-0.5),
        "v": Leaf((n, d, k, w), ("branch", "dim", "kv_heads", "head_dim"), d**-0.5),
        "o": Leaf((h, w, d), ("heads", "head_dim", "dim"), (h * w * 2 * config.num_layers) ** -0.5),
        "ffn_norm": Leaf((d,), ("dim",), None),
    }
    if config.experts.experts:
        for name, (shape, names) in moe.shapes(config.experts, d).items():
            small = 2 * config.num_layers if name.endswith("down") else 1
            layer[name] = Leaf(shape, names, 0.0 if name == "bias" else (shape[-2] * small) ** -0.5)
    else:
        layer["gate"] = layer["up"] = Leaf((d, f), ("dim", "ffn"), d**-0.5)
        layer["down"] = Leaf((f, d), ("ffn", "dim"), (f * 2 * config.num_layers) ** -0.5)
    if config.qkv_bias:
        layer["q_bias"] = Leaf((h, w), ("heads", "head_dim"), 0.0)
        layer["k_bias"] = Leaf((n, k, w), ("branch", "kv_heads", "head_dim"), 0.0)
        layer["v_bias"] = Leaf((n, k, w), ("branch", "kv_heads", "head_dim"), 0.0)
    if config.qk_norm:
        layer["q_norm"] = layer["k_norm"] = Leaf((w,), ("head_dim",), None)
    if config.attention == "nsa":
        layer["branch_gate"] = Leaf((d, h, 3), ("dim", "heads", "branch"), d**-0.5)
        layer["branch_gate_bias"] = Leaf((h, 3), ("heads", "branch"), 0.0)
    stacked = {name: Leaf((config.num_layers, *x.shape), ("layers", *x.axes), x.std) for name, x in layer.items()}
    tree: dict[str, Any] = {"layers": stacked, "norm": Leaf((d,), ("dim",), None)}
    if config.vocab_size:
        tree["embedding"] = Leaf((config.vocab_size, d), ("vocab", "dim"), 0.02)
        if not config.tie_embeddings:
            tree["head"] = Leaf((d, config.vocab_size), ("dim", "vocab"), d**-0.5)
    return tree


def init(key: Array, config: Config) -> dict[str, Any]:
    """Parameters, float32; what writes into the residual stream starts small, by the number of layers."""
    tree, structure = jax.tree.flatten(leaves(config), is_leaf=lambda x: isinstance(x, Leaf))
    keys = jax.random.split(key, len(tree) + 1)

    def start(key: Array, leaf: Leaf) -> Array:
        return jnp.ones(leaf.shape) if leaf.std is None else leaf.std * jax.random.normal(key, leaf.shape)

    params = jax.tree.unflatten(structure, [start(k, x) for k, x in zip(keys, tree, strict=False)])
    if config.attention == "nsa":
        of_layer = lambda k: nsa.init(k, config.sparse, config.width, config.width)  # noqa: E731
        params["layers"]["compress"] = jax.vmap(of_layer)(jax.random.split(keys[-1], config.num_layers))
    return params


def axes(config: Config) -> dict[str, Any]:
    """Names of the axes of every parameter, in a tree like theirs: for sharding by rules such as ``{"ffn": "model"}``."""
    tree = jax.tree.map(lambda x: x.axes, leaves(config), is_leaf=lambda x: isinstance(x, Leaf))
    if config.attention == "nsa":
        shapes = jax.eval_shape(lambda: nsa.init(jax.random.key(0), config.sparse, config.width, config.width))
        tree["layers"]["compress"] = jax.tree.map(lambda x: ("layers",) + ("compress",) * x.ndim, shapes)
    return tree


# The parts of a layer


def project(layer: Any, x: Array, config: Config) -> tuple[Array, Array, Array]:
    """Queries ``[..., H, D]``, keys and values ``[n, ..., K, D]`` of each branch, without positions."""
    p = lambda name: layer[name].astype(x.dtype)  # noqa: E731
    q = jnp.einsum("...d,dhw->...hw", x, p("q"))
    k, v = (jnp.einsum("...d,ndhw->n...hw", x, p(name)) for name in ("k", "v"))
    if config.qkv_bias:
        q = q + jnp.broadcast_to(p("q_bias"), q.shape)
        k, v = (
            y + p(f"{name}_bias").reshape(y.shape[0], *(1,) * (x.ndim - 1), *y.shape[-2:])
            for name, y in (("k", k), ("v", v))
        )
    if config.qk_norm:
        q, k = (rms_norm(y, layer[f"{name}_norm"], config.norm_eps) for name, y in (("q", q), ("k", k)))
    return q, k, v


def ffn(layer: Any, x: Array, config: Config) -> Array:
    """SwiGLU of the normalized stream: ``(silu(x W_gate) * x W_up) W_down`` (2002.05202, eq. 6), or a mixture of them."""
    x = rms_norm(x, layer["ffn_norm"], config.norm_eps)
    if config.experts.experts:
        return moe.apply(layer, x, config.experts)[0]
    p = lambda name: layer[name].astype(x.dtype)  # noqa: E731
    return (jax.nn.silu(x @ p("gate")) * (x @ p("up"))) @ p("down")


def branch_gates(layer: Any, x: Array) -> Array:
    """NSA's gates ``[..., H, 3]``: a sigmoid for each head and branch (2502.11089, section 3.3)."""
    gate = jnp.einsum("...d,dhn->...hn", x, layer["branch_gate"].astype(x.dtype))
    return jax.nn.sigmoid(gate + jnp.broadcast_to(layer["branch_gate_bias"].astype(x.dtype), gate.shape))


def out(layer: Any, mixed: Array) -> Array:
    """Heads ``[..., H, D]`` back into the stream."""
    return jnp.einsum("...hw,hwd->...d", mixed, layer["o"].astype(mixed.dtype))


# A whole sequence


def forward(
    params: Any,
    tokens: Array,
    config: Config,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    valid: Array | None = None,
) -> Array:
    """Logits ``[B, T, V]`` in float32 of ``tokens`` int ``[B, T]``: see ``blocks`` for the rest."""
    x = params["embedding"][tokens]
    return logits(params, blocks(params, x, config, positions=positions, segment_ids=segment_ids, valid=valid), config)


def blocks(
    params: Any,
    x: Array,
    config: Config,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    valid: Array | None = None,
) -> Array:
    """All layers and the last norm: vectors ``[B, T, dim]`` to ``[B, T, dim]``.

    Args:
        params: of ``init``.
        x: what each token starts with.
        config: shape.
        positions: int ``[B, T]``, for rotary positions; 0, 1, 2 ... if not given. What is seen goes by the order in the array.
        segment_ids: int ``[B, T]``, contiguous: tokens see their own segment alone.
        valid: bool ``[B, T]``, false for padding (not with nsa, where padding is a segment of its own).
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    if config.attention == "nsa" and valid is not None:
        raise ValueError("valid: native sparse attention takes padding as a segment of its own, in segment_ids")

    def layer(x: Array, layer: Any) -> tuple[Array, None]:
        y = rms_norm(x, layer["attention_norm"], config.norm_eps)
        q, k, v = project(layer, y, config)
        q, k = rope(q, positions, config.rope_theta), rope(k, positions[None], config.rope_theta)
        if config.attention == "nsa":
            streams = nsa.Streams(k[0], v[0], k[1], v[1], k[2], v[2])
            mixed = nsa.attend(
                layer["compress"], q, streams, branch_gates(layer, y), config.sparse, segment_ids=segment_ids
            )
        else:
            mixed = attend(
                q,
                k[0],
                v[0],
                causal=config.causal,
                window=config.window if config.attention == "window" else None,
                segment_ids=segment_ids,
                valid=valid,
                implementation=config.implementation,
            )
        x = x + out(layer, mixed)
        return x + ffn(layer, x, config), None

    x, _ = jax.lax.scan(jax.checkpoint(layer) if config.remat else layer, x, params["layers"])
    return rms_norm(x, params["norm"], config.norm_eps)


def logits(params: Any, x: Array, config: Config) -> Array:
    """The head: ``[..., dim]`` to float32 ``[..., V]``."""
    head = params["embedding"].T if config.tie_embeddings else params["head"]
    return jnp.einsum(
        "...d,dv->...v", x, head.astype(x.dtype), preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)
    )


# One token after another


def init_cache(config: Config, batch: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Any:
    """Empty caches of all layers, leaves ``[layers, B, ...]``, for sequences of up to ``capacity`` tokens."""
    if config.attention == "nsa":
        one: Any = nsa_cache.init(config.sparse, batch, capacity, config.num_kv_heads, config.width, dtype=dtype)
    else:
        rows = min(capacity, config.window) if config.attention == "window" else capacity
        one = kv_cache.init(batch, rows, config.num_kv_heads, config.width, dtype=dtype)
    return jax.tree.map(lambda x: jnp.zeros((config.num_layers, *x.shape), x.dtype), one)


def decode(
    params: Any, token: Array, cache: Any, position: Array, config: Config, *, start: Array | int = 0
) -> tuple[Array, Any]:
    """Logits ``[B, V]`` of ``token`` int ``[B]`` at ``position`` (int32 ``[]`` or ``[B]``), and the caches with it.

    It sees positions from ``start`` on; rotary positions count from there, too.
    """
    x, cache = decode_blocks(params, params["embedding"][token], cache, position, config, start=start)
    return logits(params, x, config), cache


def decode_blocks(
    params: Any, x: Array, cache: Any, position: Array, config: Config, *, start: Array | int = 0
) -> tuple[Array, Any]:
    """All layers for one vector ``[B, dim]`` of each row."""
    batch = x.shape[0]
    at = kv_cache.per_row(position, batch) - kv_cache.per_row(start, batch)

    def layer(x: Array, both: tuple[Any, Any]) -> tuple[Array, Any]:
        layer, cache = both
        y = rms_norm(x, layer["attention_norm"], config.norm_eps)
        q, k, v = project(layer, y, config)
        q = rope(q[:, None], at[:, None], config.rope_theta)[:, 0]
        k = rope(k[:, :, None], at[None, :, None], config.rope_theta)[:, :, 0]
        if config.attention == "nsa":
            streams = nsa.Streams(k[0], v[0], k[1], v[1], k[2], v[2])
            cache = nsa_cache.write(layer["compress"], cache, streams, position, config.sparse)
            mixed = nsa_cache.decode_step(q, branch_gates(layer, y), cache, position, config.sparse, start=start)
        else:
            cache = kv_cache.write(cache, k[0], v[0], position)
            window = config.window if config.attention == "window" else None
            mixed = kv_cache.decode_step(q, cache, position, start=start, window=window)
        x = x + out(layer, mixed)
        return x + ffn(layer, x, config), cache

    x, cache = jax.lax.scan(layer, x, (params["layers"], cache))
    return rms_norm(x, params["norm"], config.norm_eps), cache
