"""A decoder (Vaswani et al. 2017, 1706.03762) as plain functions of plain parameters, with any kind of attention.

Each layer: ``x += attention(rms_norm(x))``, then ``x += ffn(rms_norm(x))`` (pre-norm; RMSNorm 1910.07467), with rotary positions
(RoPE, 2104.09864, halves rotated), grouped-query heads (2305.13245) and SwiGLU (2002.05202). Layers are stacked, so that one
scan runs them: every leaf of ``params["layers"]`` is ``[layers, ...]``, and ``axes`` names the axes of each for sharding. Layers
without experts before layers with them are a stack of their own, ``params["first"]``.

    logits = forward(params, tokens, config)                               [B, T, V], float32

``nets.decoding`` reads one token after another behind caches, with the same numbers.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jrl.attention import Implementation, dsa, mla, nsa
from jrl.attention.rotary import Scaling, rms_norm
from jrl.nets import bottleneck, moe
from jrl.nets.mixers import MIXERS, Leaf, Tokens
from jrl.numerics import lora
from jrl.numerics.settings import AtLeastOne, NonNegativeInt, Positive, Settings, Unit
from jrl.numerics.types import Params

Array = jax.Array
Kind = Literal["dense", "window", "nsa", "mla", "dsa", "rwkv"]


@dataclass(frozen=True)
class Config(Settings, prefix="transformer"):
    """Shape of a decoder."""

    vocab_size: NonNegativeInt = 0  # Number of tokens; 0 for a decoder of vectors, without embedding and head.
    dim: Positive = 64  # Width of the residual stream.
    num_layers: Positive = 2  # Number of layers.
    num_heads: Positive = 4  # Query heads.
    num_kv_heads: Positive = 4  # Key heads, each for num_heads / num_kv_heads query heads.
    head_dim: NonNegativeInt = 0  # Width of keys, queries and values; dim / num_heads if 0.
    ffn_dim: NonNegativeInt = 0  # Width of SwiGLU; about 8/3 dim if 0.
    # dense, window, nsa (native sparse attention), mla (latent attention), dsa (that, to what an indexer picks) or rwkv (RWKV-6, without attention).
    attention: Kind = "dense"
    causal: bool = True  # Tokens see only those before them; false for dense attention alone.
    window: Positive = 512  # Tokens that window attention sees.
    sparse: nsa.Config = field(default_factory=nsa.Config)  # Sizes of native sparse attention.
    shared_kv: bool = False  # One pair of keys and values for all branches of nsa, where the paper has one for each.
    latent: mla.Config = field(default_factory=mla.Config)  # Sizes of latent attention, which ignores head_dim.
    indexer: dsa.Config = field(
        default_factory=dsa.Config
    )  # Sizes of the indexer of dsa, which has those of latent, too.
    experts: moe.Config = field(default_factory=moe.Config)  # Mixture of experts in place of SwiGLU, if it has experts.
    dense_layers: NonNegativeInt = 0  # Number of layers at the start that have SwiGLU all the same.
    implementation: Implementation | None = None  # Of dense, window and native sparse attention; None picks a fast one.
    rope_theta: AtLeastOne = 10_000.0  # Base of the rotary frequencies (latent attention has its own).
    rope_scaling: Scaling = Scaling()  # Stretching of rotary positions (latent attention has its own).
    norm_eps: Unit = 1e-5  # Added to the mean square in RMSNorm.
    qkv_bias: bool = False  # Biases on queries, keys and values, as in Qwen2.
    out_bias: bool = False  # A bias on the output of attention.
    ffn_bias: bool = False  # Biases in SwiGLU.
    qk_norm: bool = False  # RMSNorm of each query and key head, as in Qwen3.
    tie_embeddings: bool = True  # The head is the embedding.
    ahead: NonNegativeInt = 0  # Modules that predict tokens further ahead, one token each (jrl.nets.ahead).
    remat: bool = False  # Recompute each layer in the backward pass instead of keeping it.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"transformer.num_heads must be a multiple of num_kv_heads = {self.num_kv_heads}; got {self.num_heads}"
            )
        if not self.head_dim and self.dim % self.num_heads:
            raise ValueError(
                f"transformer.dim must be a multiple of num_heads = {self.num_heads}, or give head_dim; got {self.dim}"
            )
        if self.dense_layers and not (self.experts.experts and self.dense_layers < self.num_layers):
            raise ValueError(
                f"transformer.dense_layers must be below num_layers = {self.num_layers}, of layers with experts; "
                f"got {self.dense_layers}"
            )
        if not self.causal and self.attention != "dense":
            raise ValueError(f"transformer.causal=False needs transformer.attention=dense; got {self.attention}")
        if self.attention == "rwkv" and self.implementation is not None:
            raise ValueError(
                f"transformer.implementation must be None for transformer.attention=rwkv; got {self.implementation}"
            )
        if self.ahead and not (self.vocab_size and self.causal):
            raise ValueError("transformer.ahead needs transformer.vocab_size and transformer.causal=True")
        if self.width % 2:
            raise ValueError(f"transformer.head_dim must be even, for rotary positions; got {self.width}")

    @property
    def width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def inner(self) -> int:
        """Width of SwiGLU."""
        return self.ffn_dim or -(-8 * self.dim // 3 // 8) * 8

    @property
    def branches(self) -> int:
        """Number of pairs of keys and values of a token."""
        return 3 if self.attention == "nsa" and not self.shared_kv else 1

    @property
    def value_width(self) -> int:
        """Width of a head of the output of attention."""
        return self.latent.value_dim if self.attention in ("mla", "dsa") else self.width


# Parameters


def stacks(config: Config) -> dict[str, Config]:
    """The shape of each stack of like layers, in their order, by its name in the parameters and in the caches."""
    if not config.dense_layers:
        return {"layers": config}
    first = replace(config, num_layers=config.dense_layers, dense_layers=0, experts=moe.Config())
    return {
        "first": first,
        "layers": replace(config, num_layers=config.num_layers - config.dense_layers, dense_layers=0),
    }


def leaves(config: Config) -> dict[str, Any]:
    """What parameters there are."""
    d = config.dim
    tree: dict[str, Any] = {"norm": Leaf((d,), ("dim",), None)}
    for name, shape in stacks(config).items():
        tree[name] = _stacked(_layer_leaves(shape, config.num_layers), shape.num_layers)
    if config.vocab_size:
        tree["embedding"] = Leaf((config.vocab_size, d), ("vocab", "dim"), 0.02)
        if not config.tie_embeddings:
            tree["head"] = Leaf((d, config.vocab_size), ("dim", "vocab"), d**-0.5)
    if config.ahead:
        last = list(stacks(config).values())[-1]
        one = _layer_leaves(last, config.num_layers + config.ahead) | {
            "token_norm": Leaf((d,), ("dim",), None),
            "hidden_norm": Leaf((d,), ("dim",), None),
            "join": Leaf((2 * d, d), ("both", "dim"), (2 * d) ** -0.5),
            "norm": Leaf((d,), ("dim",), None),
        }
        tree["ahead"] = _stacked(one, config.ahead)
    return tree


def _stacked(tree: Any, number: int) -> Any:
    """So many of each leaf."""

    def stack(x: Leaf) -> Leaf:
        return Leaf((number, *x.shape), ("layers", *x.axes), x.std)

    return jax.tree.map(stack, tree, is_leaf=_is_leaf)


def _layer_leaves(config: Config, depth: int) -> dict[str, Any]:
    """Of one layer in a decoder of ``depth``."""
    d, h, w, f = config.dim, config.num_heads, config.value_width, config.inner
    layer: dict[str, Any] = {"attention_norm": Leaf((d,), ("dim",), None), "ffn_norm": Leaf((d,), ("dim",), None)}
    layer |= MIXERS[config.attention].leaves(config)
    layer["o"] = Leaf((h, w, d), ("heads", "head_dim", "dim"), (h * w * 2 * depth) ** -0.5)
    if config.out_bias:
        layer["o_bias"] = Leaf((d,), ("dim",), 0.0)
    if config.experts.experts:
        for name, (shape, names) in moe.shapes(config.experts, d).items():
            small = 2 * depth if name.endswith("down") else 1
            layer[name] = Leaf(shape, names, 0.0 if name == "bias" else (shape[-2] * small) ** -0.5)
    else:
        layer["gate"] = layer["up"] = Leaf((d, f), ("dim", "ffn"), d**-0.5)
        layer["down"] = Leaf((f, d), ("ffn", "dim"), (f * 2 * depth) ** -0.5)
        if config.ffn_bias:
            layer["gate_bias"] = layer["up_bias"] = Leaf((f,), ("ffn",), 0.0)
            layer["down_bias"] = Leaf((d,), ("dim",), 0.0)
    return layer


def low_rank(config: Config) -> str:
    """A regular expression for the paths of those matrices that may have an adapter beside them, ``lora.LowRank``."""
    paths = []
    for name, shape in stacks(config).items():
        dense = () if shape.experts.experts else ("gate", "up", "down")
        paths.append(f"{name}/({'|'.join((*MIXERS[shape.attention].low_rank, 'o', *dense))})")
    return f"^({'|'.join(paths)})$"


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)


def init(key: Array, config: Config) -> dict[str, Any]:
    """Parameters, float32; what writes into the residual stream starts small, by the number of layers."""
    tree, structure = jax.tree.flatten(leaves(config), is_leaf=_is_leaf)

    def start(key: Array, leaf: Leaf) -> Array:
        if leaf.std is None:
            return jnp.ones(leaf.shape, jnp.float32)
        return leaf.std * jax.random.normal(key, leaf.shape, jnp.float32)

    keys = jax.random.split(key, len(tree))
    return jax.tree.unflatten(structure, [start(k, x) for k, x in zip(keys, tree, strict=True)])


def axes(config: Config) -> dict[str, Any]:
    """Names of the axes of every parameter, in a tree like theirs: for sharding by rules such as ``{"ffn": "model"}``."""
    return jax.tree.map(lambda x: x.axes, leaves(config), is_leaf=_is_leaf)


# The parts of a layer


def ffn(layer: Any, x: Array, config: Config) -> Array:
    """SwiGLU of the normalized stream: ``(silu(x W_gate) * x W_up) W_down`` (2002.05202, eq. 6), or a mixture of them."""
    return ffn_and_load(layer, x, config)[0]


def ffn_and_load(layer: Any, x: Array, config: Config, counted: Array | None = None) -> tuple[Array, moe.Load]:
    """``ffn``, and the load of its experts by the tokens that are ``counted`` (``moe.apply``)."""
    x = rms_norm(x, layer["ffn_norm"], config.norm_eps)
    if config.experts.experts:
        return moe.apply(layer, x, config.experts, counted)
    inner = jax.nn.silu(_linear(layer, "gate", x)) * _linear(layer, "up", x)
    return _linear(layer, "down", inner), moe.no_load()


def _linear(layer: Any, name: str, x: Array) -> Array:
    return _biased(layer, name, lora.product("...d,df->...f", x, layer[name]))


def _biased(layer: Any, name: str, y: Array) -> Array:
    """With the bias of that name, if the layer has one."""
    bias = layer.get(f"{name}_bias")
    return y if bias is None else y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def out(layer: Any, mixed: Array) -> Array:
    """Heads ``[..., H, D]`` back into the stream."""
    return _biased(layer, "o", lora.product("...hw,hwd->...d", mixed, layer["o"]))


# A whole sequence


def forward(
    params: Params,
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
    params: Params,
    x: Array,
    config: Config,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    valid: Array | None = None,
) -> Array:
    """``blocks_and_loads`` without the loads."""
    return blocks_and_loads(params, x, config, positions=positions, segment_ids=segment_ids, valid=valid)[0]


def blocks_and_loads(
    params: Params,
    x: Array,
    config: Config,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    valid: Array | None = None,
    counted: Array | None = None,
) -> tuple[Array, moe.Load]:
    """All layers and the last norm: vectors ``[B, T, dim]`` to ``[B, T, dim]``, and the load of the experts of each
    of ``params["layers"]``, ``[layers, experts]``, which ``balanced`` and ``balance_loss`` even.

    Args:
        params: of ``init``.
        x: what each token starts with.
        config: shape.
        positions: int ``[B, T]``, for rotary positions; 0, 1, 2 ... if not given. What is seen goes by the order in the array.
        segment_ids: int ``[B, T]``, contiguous: tokens see their own segment alone.
        valid: bool ``[B, T]``, false for padding (not with nsa and rwkv, where padding is a segment of its own).
        counted: bool ``[B, T]``, tokens that are part of the load; ``valid`` if not given.
    """
    counted = valid if counted is None else counted
    tokens = _tokens(x, positions, segment_ids, valid)

    for name, shape in stacks(config).items():
        layer = partial(one_layer, tokens=tokens, counted=counted, config=shape)
        x, loads = jax.lax.scan(jax.checkpoint(layer) if config.remat else layer, x, params[name])
    return rms_norm(x, params["norm"], config.norm_eps), loads


def _tokens(x: Array, positions: Array | None, segment_ids: Array | None, valid: Array | None) -> Tokens:
    """Where the tokens of ``x [B, T, dim]`` stand: at 0, 1, 2 ... if no positions are given."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    return Tokens(positions, segment_ids, valid)


def one_layer(x: Array, layer: Any, tokens: Tokens, counted: Array | None, config: Config) -> tuple[Array, moe.Load]:
    """Attention and feed-forward of one layer over a whole sequence ``[B, T, dim]``, and the load of its experts."""
    y = rms_norm(x, layer["attention_norm"], config.norm_eps)
    mixed = MIXERS[config.attention].sequence(layer, y, tokens, config)
    x = bottleneck.added(layer, "attention", x, out(layer, mixed))
    output, load = ffn_and_load(layer, x, config, counted)
    return bottleneck.added(layer, "ffn", x, output), load


def index_loss(
    params: Params,
    x: Array,
    config: Config,
    *,
    sparse: bool = True,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    valid: Array | None = None,
) -> Array:
    """What the indexers of ``attention="dsa"`` learn from: the mean of ``dsa.index_loss`` over layers, for arguments as in ``blocks``.

    It has no gradient but that of the indexers, which have no other. Raises ``ValueError`` for another attention.
    """
    if config.attention != "dsa":
        raise ValueError(f"index_loss needs transformer.attention=dsa; got {config.attention}")
    tokens = _tokens(x, positions, segment_ids, valid)

    def of_layer(x: Array, layer: Any, shape: Config) -> tuple[Array, Array]:
        y = rms_norm(x, layer["attention_norm"], shape.norm_eps)
        seen = {"positions": tokens.position, "segment_ids": segment_ids, "valid": valid}
        loss = dsa.index_loss(layer["latent"], layer["indexer"], y, shape.indexer, shape.latent, sparse=sparse, **seen)
        return one_layer(x, layer, tokens, valid, shape)[0], loss

    losses = []
    for name, shape in stacks(config).items():
        x, each = jax.lax.scan(partial(of_layer, shape=shape), x, params[name])
        losses.append(each)
    return jnp.concatenate(losses).mean()


def balanced(params: Params, load: moe.Load, config: Config, rate: float = 1e-3) -> Any:
    """Parameters with the bias of each router moved to even the ``load`` of its experts in a step of learning, as after every step
    of DeepSeek-V3 (``moe.balance``). The parameters themselves if no router has a bias."""
    if not (config.experts.experts and config.experts.scores == "sigmoid"):
        return params
    layers = params["layers"]
    return params | {"layers": layers | {"bias": moe.balance(layers["bias"], load.chosen, rate)}}


def balance_loss(load: moe.Load, config: Config) -> Array | float:
    """``moe.balance_loss``, where routers have no bias that evens the load; 0 if they have one, and without experts."""
    softmax = config.experts.experts and config.experts.scores == "softmax"
    return moe.balance_loss(load, config.experts) if softmax else 0.0


def logits(params: Params, x: Array, config: Config) -> Array:
    """The head: ``[..., dim]`` to float32 ``[..., V]``."""
    head = params["embedding"].T if config.tie_embeddings else params["head"]
    return jnp.einsum(
        "...d,dv->...v", x, head.astype(x.dtype), preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)
    )
