"""What networks have in common: a torso over the observation, an optional GRU, and heads whose outputs are float32."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jrl.envs.types import MaskedObs
from jrl.nets import memory as memories_of
from jrl.nets import transformer
from jrl.nets.initializers import orthogonal
from jrl.nets.memory import AttentionConfig
from jrl.nets.types import Network
from jrl.numerics import checks, precision
from jrl.numerics.settings import NonNegativeInt, Positive, Settings
from jrl.numerics.types import Memory, Observation, Params

Array = jax.Array
Activation = Literal["tanh", "relu", "silu", "gelu"]
Torso = Literal["auto", "mlp", "conv", "vit"]
Norm = Literal["none", "layer"]


@dataclass(frozen=True)
class TorsoConfig(Settings, prefix="network"):
    """Shape of a torso."""

    # What reads an observation: mlp flattens it; conv and vit (a vision transformer) expect [height, width, channels]; auto takes conv
    # for such observations, else mlp. Images of uint8 are divided by 255; other integers are taken as they are.
    torso: Torso = "auto"
    hidden: tuple[Positive, ...] = (64, 64)  # Widths of the dense layers (for conv and vit, of those after it).
    channels: tuple[Positive, ...] = (16,)  # Widths of the 3x3 convolutions.
    patch: Positive = 2  # Height and width of vit's patches; observations are padded with zeros to whole ones.
    vit_dim: int = 64  # Width of vit.
    vit_layers: int = 2  # Layers of vit.
    vit_heads: int = 4  # Heads of vit.
    activation: Activation = "tanh"  # Activation between layers.
    norm: Norm = "none"  # Layer normalization before each activation (Ba et al. 2016, arXiv 1607.06450), or none.
    gru: NonNegativeInt = 0  # Width of a GRU after the torso; 0 for none.
    attention: AttentionConfig = field(default_factory=AttentionConfig)  # Transformer over the episode so far.

    def vit(self) -> transformer.Config:
        """The layers of the vision transformer."""
        return transformer.Config(
            dim=self.vit_dim,
            num_layers=self.vit_layers,
            num_heads=self.vit_heads,
            num_kv_heads=self.vit_heads,
            ffn_dim=2 * self.vit_dim,
            causal=False,
        )

    @property
    def remembers(self) -> bool:
        """Whether it has a memory."""
        return bool(self.gru) or self.attention.kind != "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.within("network.gru", self.gru, 0, 2**31 - 1)  # an empty memory is made before a state's size is known
        if self.torso == "vit":
            self.vit()
        if self.attention.kind != "none":
            if self.gru or not self.hidden:
                raise ValueError("network.attention needs network.gru = 0 and a hidden layer, whose width it takes")
            self.attention.transformer(self.hidden[-1])


def observation_shape(config: TorsoConfig, obs_spec: Any) -> tuple[int, ...]:
    """Shape of one observation.

    Raises ``ValueError`` if it is no array or a lone integer, not an image where a conv torso is asked for, or an image whose channels
    come first.
    """
    spec = obs_spec.obs if isinstance(obs_spec, MaskedObs) else obs_spec
    shape = getattr(spec, "shape", None)
    if shape is None:
        raise ValueError("observations must be one array, or MaskedObs(obs, mask)")
    if shape == () and jnp.issubdtype(spec.dtype, jnp.integer):
        raise ValueError(
            "observations are single integers, which a network would take for quantities: make them one-hot, "
            "jax.nn.one_hot(obs, n)"
        )
    if config.torso != "mlp" and len(shape) == 3 and shape[0] in (1, 3, 4) and min(shape[1:]) >= 8:
        raise ValueError(
            f"observations {shape} look like [channels, height, width]; a conv torso expects [height, width, channels]: "
            "move the first axis to the end (jnp.moveaxis), or take network.torso=mlp"
        )
    if config.torso in ("conv", "vit") and len(shape) != 3:
        raise ValueError(f"network.torso={config.torso} needs observations [height, width, channels], got {shape}")
    convolves = config.torso == "conv" or (config.torso == "auto" and len(shape) == 3)
    if convolves and min(shape[:2]) <= 2 * len(config.channels):
        raise ValueError(
            f"network.channels: {len(config.channels)} convolutions of 3x3 leave nothing of observations {shape}; "
            "take network.torso=mlp"
        )
    return shape


def split_mask(module: nn.Module, obs: Observation, obs_rank: int) -> tuple[Array, Array | None]:
    """The observation as floats, and its mask. Integers and booleans are computed in the dtype of the parameters."""
    obs, mask = obs if isinstance(obs, MaskedObs) else (obs, None)
    params = jax.tree.leaves(module.variables.get("params", {}))
    dtype = params[0].dtype if params else jnp.float32
    if is_image(obs, obs_rank):
        obs = shares(obs).astype(dtype)
    elif not jnp.issubdtype(obs.dtype, jnp.floating):
        wide = obs.dtype.itemsize > 1 and dtype != jnp.float32  # a large integer may be beyond the range of float16
        obs = precision.cast(obs.astype(jnp.float32), str(dtype)) if wide else obs.astype(dtype)
    return obs, mask


def is_image(obs: Array, obs_rank: int) -> bool:
    """Whether observations are images of bytes: uint8 of two axes or more."""
    return obs.dtype == jnp.uint8 and obs_rank >= 2


def shares(image: Array) -> Array:
    """Bytes as shares of 255, float32."""
    return image.astype(jnp.float32) / 255


def empty_memory(config: TorsoConfig) -> Any:
    """The memory of one agent that has not begun; ``()`` without one."""
    if config.attention.kind != "none":
        return memories_of.empty(config.attention, config.hidden[-1])
    return jnp.zeros(config.gru, jnp.float32) if config.gru else ()


def remember(config: TorsoConfig, name: str, memory: Memory, x: Array, first: Array) -> tuple[Any, Array]:
    """Features with what is remembered, ``(memories, [T, B, width])``; inside a module."""
    if config.attention.kind != "none":
        return memories_of.AttentionMemory(config.attention, name=f"{name}_attention")(memory, x, first)
    if config.gru:
        x = Recurrent(config.gru, name=f"{name}_gru")(memory, x, first)
        return x, x
    return (), x


def as_network(module: nn.Module, config: TorsoConfig, obs_spec: Any, memory: Memory) -> Network:
    """The record of a module ``(memory [B], obs [T, B], first [T, B]) -> (memories, outputs [T, B])``."""
    attention = config.attention.kind != "none"

    def memory_at(memories: Any, t: Array, b: Array) -> Any:
        if not attention:
            return jax.tree.map(lambda x: x[t, b], memories)

        def is_line(x):
            return isinstance(x, memories_of.Timeline)

        return jax.tree.map(
            lambda line: memories_of.memory_at(line, t, b, config.attention.context), memories, is_leaf=is_line
        )

    def unroll(params: Params, memory: Memory, obs: Observation, first: Array) -> tuple[Any, Any]:
        return module.apply(params, memory, obs, first)  # type: ignore[return-value]

    def step(params: Params, memory: Memory, obs: Observation, first: Array) -> tuple[Any, Any]:
        memories, outputs = unroll(params, memory, *jax.tree.map(lambda x: x[None], (obs, first)))
        rows = jnp.arange(first.shape[0])
        return memory_at(memories, jnp.zeros_like(rows), rows), jax.tree.map(lambda x: x[0], outputs)

    @jax.jit  # else flax would compute, and compile, every operation of the network alone
    def init(key: Array) -> Any:
        batched = jax.tree.map(lambda x: jnp.zeros((1, 1, *x.shape), x.dtype), obs_spec)
        start = jax.tree.map(lambda x: x[None], memory)
        return module.init(key, start, batched, jnp.ones((1, 1), bool))

    return Network(init, step, unroll, memory, memory_at, attention)


class Features(nn.Module):
    """The torso: ``[..., *observation] -> [..., width]``."""

    config: TorsoConfig
    obs_rank: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch_shape = x.shape[: x.ndim - self.obs_rank]
        if self.config.torso == "conv" or (self.config.torso == "auto" and self.obs_rank == 3):
            for width in self.config.channels:
                x = activated(self.config, Conv3x3(width)(x))
        if self.config.torso == "vit":
            x = VisionTransformer(self.config, name="vit")(x)
        x = x.reshape(*batch_shape, -1)
        for width in self.config.hidden:
            x = activated(self.config, nn.Dense(width, kernel_init=orthogonal(math.sqrt(2)))(x))
        return x


def activated(config: TorsoConfig, x: Array) -> Array:
    """Layer normalization, if asked for, and the activation; inside a module."""
    x = nn.LayerNorm()(x) if config.norm == "layer" else x
    return getattr(nn, config.activation)(x)


class VisionTransformer(nn.Module):
    """A transformer over patches (Dosovitskiy et al. 2021, arXiv 2010.11929): ``[..., H, W, C] -> [..., dim]``, the mean over patches."""

    config: TorsoConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size, shape = self.config.patch, self.config.vit()
        batch_shape, (height, width, channels) = x.shape[:-3], x.shape[-3:]
        x = x.reshape(-1, height, width, channels)
        x = jnp.pad(x, [(0, 0), (0, -height % size), (0, -width % size), (0, 0)])
        rows, columns = x.shape[1] // size, x.shape[2] // size
        x = x.reshape(-1, rows, size, columns, size, channels).swapaxes(2, 3).reshape(x.shape[0], rows * columns, -1)
        x = nn.Dense(shape.dim, name="patches")(x)
        position = self.param("position", nn.initializers.normal(0.02), (rows * columns, shape.dim), jnp.float32)
        x = x + jnp.broadcast_to(position.astype(x.dtype), x.shape)
        params = self.param("blocks", lambda key: transformer.init(key, shape))
        nowhere = jnp.zeros(x.shape[:2], jnp.int32)  # positions are learned: none is rotated
        return transformer.blocks(params, x, shape, positions=nowhere).mean(-2).reshape(*batch_shape, shape.dim)


class Conv3x3(nn.Module):
    """A 3x3 convolution without padding, ``[..., H, W, C] -> [..., H - 2, W - 2, width]``, as one product of matrices.

    Vmapped over seeds a convolution is a grouped one, which XLA's CPU backend runs at a tenth of a product's speed.
    """

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rows, columns, channels = x.shape[-3] - 2, x.shape[-2] - 2, x.shape[-1]
        shape = (3, 3, channels, self.width)
        kernel = self.param("kernel", orthogonal(math.sqrt(2)), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)
        around = [x[..., i : i + rows, j : j + columns, :] for i in range(3) for j in range(3)]
        y = jnp.concatenate(around, axis=-1) @ kernel.reshape(-1, self.width)
        return y + jnp.broadcast_to(bias, y.shape)


class Recurrent(nn.Module):
    """A GRU over time (Cho et al. 2014, arXiv 1406.1078) that starts from zero where ``first`` is true."""

    width: int

    @nn.compact
    def __call__(self, memory: Array, x: Array, first: Array) -> Array:
        cell = nn.GRUCell(self.width, kernel_init=orthogonal(1.0), recurrent_kernel_init=orthogonal(1.0))

        def step(cell: nn.GRUCell, h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            x_t, first_t = inputs
            h = jnp.where(first_t[:, None], jnp.zeros_like(h), h)
            h, _ = cell(h, x_t)
            return h, h

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        return scan(cell, memory.astype(x.dtype), (x, first))[1]


def wide_dot(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    """The heads' product, given out in float32 at least: a value of 100 rounded to bfloat16 would be off by a quarter."""
    options["preferred_element_type"] = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, kernel, *args, **options)
