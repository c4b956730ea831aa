"""What networks have in common: a torso over the observation, an optional GRU, and heads whose outputs are float32."""

import math
from collections.abc import Sequence
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
Torso = Literal["auto", "mlp", "conv", "nature", "impala", "vit"]
IMAGES = ("conv", "nature", "impala", "vit")  # torsos that read [height, width, channels]
NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # width, size and stride of each convolution (Mnih et al. 2015)
IMPALA = (16, 32, 32)  # widths of the sections (Espeholt et al. 2018)
Norm = Literal["none", "layer"]


@dataclass(frozen=True)
class TorsoConfig(Settings, prefix="network"):
    """Shape of a torso."""

    # What reads an observation: mlp flattens it; conv, nature (the network of DQN), impala (a residual network) and vit (a vision
    # transformer) expect [height, width, channels]; auto takes conv for such observations, else mlp. Of a dictionary or a tuple, what is
    # no image is flattened and put behind the images' features. Images of uint8 are divided by 255; other integers are taken as they are.
    torso: Torso = "auto"
    hidden: tuple[Positive, ...] = (64, 64)  # Widths of the dense layers (for images, of those after the convolutions).
    channels: tuple[Positive, ...] = (16,)  # Widths of conv's 3x3 convolutions.
    patch: Positive = 2  # Height and width of vit's patches; observations are padded with zeros to whole ones.
    vit_dim: int = 64  # Width of vit.
    vit_layers: int = 2  # Layers of vit.
    vit_heads: int = 4  # Heads of vit.
    activation: Activation = "tanh"  # Activation between layers.
    norm: Norm = "none"  # Layer normalization before each activation (Ba et al. 2016, arXiv 1607.06450), or none.
    gru: NonNegativeInt = 0  # Width of a GRU after the torso; 0 for none.
    lstm: NonNegativeInt = 0  # Width of an LSTM after the torso; 0 for none.
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
        return bool(self.gru or self.lstm) or self.attention.kind != "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gru", "lstm"):  # an empty memory is made before a state's size is known
            checks.within(f"network.{name}", getattr(self, name), 0, 2**31 - 1)
        if self.gru and self.lstm:
            raise ValueError(f"network.gru or network.lstm: a network has one memory; got {self.gru} and {self.lstm}")
        if self.torso == "vit":
            self.vit()
        if self.attention.kind != "none":
            if self.gru or self.lstm or not self.hidden:
                raise ValueError(
                    "network.attention needs network.gru = network.lstm = 0 and a hidden layer, whose width it takes"
                )
            self.attention.transformer(self.hidden[-1])


Shapes = tuple[tuple[int, ...], ...]


def observation_shapes(config: TorsoConfig, obs_spec: Any) -> Shapes:
    """Shapes of the arrays of one observation, in the order of ``jax.tree.leaves``.

    Raises ``ValueError`` for a lone integer, for an image whose channels come first, and where a torso for images finds none or none that is
    large enough.
    """
    spec = obs_spec.obs if isinstance(obs_spec, MaskedObs) else obs_spec
    arrays = jax.tree.leaves(spec)
    if isinstance(obs_spec, MaskedObs) and not hasattr(spec, "shape"):
        raise ValueError(f"observations beside a mask must be one array; got {spec}")
    if not arrays or not all(hasattr(array, "shape") for array in arrays):
        raise ValueError(f"observations must be arrays, or MaskedObs(obs, mask); got {spec}")
    for array in arrays:
        _check_array(config, array)
    shapes = tuple(array.shape for array in arrays)
    if config.torso in IMAGES and not any(len(shape) == 3 for shape in shapes):
        given = shapes[0] if len(shapes) == 1 else shapes
        raise ValueError(f"network.torso={config.torso} needs observations [height, width, channels], got {given}")
    return shapes


def _check_array(config: TorsoConfig, array: Any) -> None:
    shape = array.shape
    if shape == () and jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            "observations are single integers, which a network would take for quantities: make them one-hot, "
            "jax.nn.one_hot(obs, n)"
        )
    if config.torso == "mlp" or len(shape) != 3:
        return
    if shape[0] in (1, 3, 4) and min(shape[1:]) >= 8:
        raise ValueError(
            f"observations {shape} look like [channels, height, width]; a conv torso expects [height, width, channels]: "
            "move the first axis to the end (jnp.moveaxis), or take network.torso=mlp"
        )
    if config.torso == "nature" and _left(min(shape[:2]), NATURE) < 1:
        raise ValueError(
            f"the convolutions of network.torso=nature leave nothing of observations {shape}; take conv or mlp"
        )
    if config.torso in ("auto", "conv") and _left(min(shape[:2]), [(w, 3, 1) for w in config.channels]) < 1:
        raise ValueError(
            f"network.channels: {len(config.channels)} convolutions of 3x3 leave nothing of observations {shape}; "
            "take network.torso=mlp"
        )


def _left(length: int, convolutions: Sequence[tuple[int, int, int]]) -> int:
    """What convolutions without padding leave of a height or a width."""
    for _, size, stride in convolutions:
        length = (length - size) // stride + 1
    return length


def split_mask(module: nn.Module, obs: Observation, shapes: Shapes) -> tuple[list[Array], Array | None]:
    """The arrays of an observation as floats, and its mask. Integers and booleans are computed in the dtype of the parameters."""
    obs, mask = obs if isinstance(obs, MaskedObs) else (obs, None)
    params = jax.tree.leaves(module.variables.get("params", {}))
    dtype = params[0].dtype if params else jnp.float32

    def floats(x: Array, rank: int) -> Array:
        if is_image(x, rank):
            return shares(x).astype(dtype)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return x
        wide = x.dtype.itemsize > 1 and dtype != jnp.float32  # a large integer may be beyond the range of float16
        return precision.cast(x.astype(jnp.float32), str(dtype)) if wide else x.astype(dtype)

    return [floats(x, len(shape)) for x, shape in zip(jax.tree.leaves(obs), shapes, strict=True)], mask


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
    if config.lstm:
        return (jnp.zeros(config.lstm, jnp.float32),) * 2
    return jnp.zeros(config.gru, jnp.float32) if config.gru else ()


def remember(config: TorsoConfig, name: str, memory: Memory, x: Array, first: Array) -> tuple[Any, Array]:
    """Features with what is remembered, ``(memories, [T, B, width])``; inside a module."""
    if config.attention.kind != "none":
        return memories_of.AttentionMemory(config.attention, name=f"{name}_attention")(memory, x, first)
    if config.gru or config.lstm:
        cell: Literal["gru", "lstm"] = "lstm" if config.lstm else "gru"
        return Recurrent(config.lstm or config.gru, cell, name=f"{name}_{cell}")(memory, x, first)
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
    """The torso: arrays ``[..., *shape]`` of an observation, one for each of ``shapes``, to ``[..., width]``."""

    config: TorsoConfig
    shapes: Shapes

    @nn.compact
    def __call__(self, arrays: list[Array]) -> Array:
        batch_shape = arrays[0].shape[: arrays[0].ndim - len(self.shapes[0])]
        read = [self._read(x) if len(shape) == 3 else x for x, shape in zip(arrays, self.shapes, strict=True)]
        flat = [x.reshape(*batch_shape, -1) for x in read]
        x = flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)
        for width in self.config.hidden:
            x = activated(self.config, nn.Dense(width, kernel_init=orthogonal(math.sqrt(2)))(x))
        return x

    def _read(self, x: Array) -> Array:
        """An image ``[..., height, width, channels]``, convolved."""
        match self.config.torso:
            case "auto" | "conv":
                for width in self.config.channels:
                    x = activated(self.config, Conv3x3(width)(x))
            case "nature":
                for width, size, stride in NATURE:
                    x = activated(self.config, Convolution(width, size, stride)(x))
            case "impala":
                x = ResidualNetwork()(x)
            case "vit":
                x = VisionTransformer(self.config, name="vit" if len(self.shapes) == 1 else None)(x)
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


class Convolution(nn.Module):
    """A convolution without padding, ``[..., H, W, C] -> [..., (H - size) // stride + 1, ..., width]``, as one product of matrices.

    Vmapped over seeds a convolution is a grouped one, which XLA's CPU backend runs at a tenth of a product's speed.
    """

    width: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size, stride, channels = self.size, self.stride, x.shape[-1]
        rows, columns = ((n - size) // stride + 1 for n in x.shape[-3:-1])
        kernel = self.param("kernel", orthogonal(math.sqrt(2)), (size, size, channels, self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)

        def shifted(i: int, j: int) -> Array:
            return x[..., i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride, :]

        around = [shifted(i, j) for i in range(size) for j in range(size)]
        y = jnp.concatenate(around, axis=-1) @ kernel.reshape(-1, self.width)
        return y + jnp.broadcast_to(bias, y.shape)


class Conv3x3(Convolution):
    """One of 3x3, at every place."""


class ResidualNetwork(nn.Module):
    """The residual network of IMPALA (Espeholt et al. 2018, arXiv 1802.01561, figure 3), ``[..., H, W, C] -> [..., H/8, W/8, 32]``."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch_shape = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:])
        for width in IMPALA:
            x = nn.max_pool(self._conv(width, x), (3, 3), strides=(2, 2), padding="SAME")
            for _ in range(2):
                x = x + self._conv(width, nn.relu(self._conv(width, nn.relu(x))))
        return nn.relu(x).reshape(*batch_shape, *x.shape[1:])

    def _conv(self, width: int, x: Array) -> Array:
        return nn.Conv(width, (3, 3), kernel_init=orthogonal(math.sqrt(2)))(x)


class Recurrent(nn.Module):
    """A GRU (Cho et al. 2014, arXiv 1406.1078) or an LSTM (Hochreiter and Schmidhuber 1997) over time that starts from zero where ``first`` is
    true: ``(memories [T, B], outputs [T, B, width])``. The memory of an LSTM is a pair: cell and output."""

    width: int
    cell: Literal["gru", "lstm"]

    @nn.compact
    def __call__(self, memory: Memory, x: Array, first: Array) -> tuple[Any, Array]:
        kind: Any = nn.GRUCell if self.cell == "gru" else nn.OptimizedLSTMCell
        cell = kind(self.width, kernel_init=orthogonal(1.0), recurrent_kernel_init=orthogonal(1.0))

        def step(cell: Any, h: Any, inputs: tuple[Array, Array]) -> tuple[Any, Any]:
            x_t, first_t = inputs
            h = jax.tree.map(lambda part: jnp.where(first_t[:, None], jnp.zeros_like(part), part), h)
            h, out = cell(h, x_t)
            return h, (h, out)

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        return scan(cell, jax.tree.map(lambda part: part.astype(x.dtype), memory), (x, first))[1]


def wide_dot(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    """The heads' product, given out in float32 at least: a value of 100 rounded to bfloat16 would be off by a quarter."""
    options["preferred_element_type"] = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, kernel, *args, **options)
