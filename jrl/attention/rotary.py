"""What layers of attention share besides attention: RMSNorm and rotary positions."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jrl.numerics.settings import AboveZero, NonNegative, Positive, Settings

Array = jax.Array
Stretch = Literal["none", "linear", "llama3", "yarn"]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """``x / rms(x) * weight`` over the last axis, in float32 (1910.07467, eq. 4)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normal.astype(x.dtype) * jnp.broadcast_to(weight.astype(x.dtype), x.shape)


@dataclass(frozen=True)
class Scaling(Settings, prefix="rope"):
    """How rotary positions are stretched, for sequences longer than those first learnt.

    A frequency that turns often within ``context`` is kept, one that hardly turns is divided by ``factor``, between them a mixture:

        linear      all are divided
        llama3      the share kept grows with the number of turns, from ``slow`` to ``fast`` of them (Llama 3.1, 2407.21783)
        yarn        it grows with the frequency's index, between those of ``slow`` and ``fast`` turns (YaRN, 2309.00071, section 3.2)
    """

    kind: Stretch = "none"  # none, linear, llama3 or yarn.
    factor: AboveZero = 1.0  # How many times as long.
    context: Positive = 8192  # Tokens of the sequences first learnt.
    slow: float = 1.0  # Turns up to which frequencies are divided.
    fast: float = 4.0  # Turns from which they are kept.
    whole: bool = True  # Yarn's two indices are rounded outwards.
    amplitude: NonNegative = 0.0  # Yarn's factor on queries and keys; given by mscale and mscale_all if 0.
    mscale: NonNegative = 0.0  # DeepSeek's weight of 0.1 log(factor) in that factor, with the one below in its divisor.
    mscale_all: NonNegative = 0.0  # Its weight in a factor on all scores of latent attention.

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.slow < self.fast < math.inf:
            raise ValueError(f"rope.slow must be above 0 and below rope.fast = {self.fast:g}; got {self.slow:g}")

    @property
    def on_heads(self) -> float:
        """Factor on rotated queries and keys."""
        if self.kind != "yarn" or self.amplitude:
            return self.amplitude or 1.0
        both = self.mscale and self.mscale_all
        return self._grown(self.mscale) / self._grown(self.mscale_all) if both else self._grown(1.0)

    @property
    def on_scores(self) -> float:
        """Factor on the scores of latent attention (DeepSeek-V2, 2405.04434, section 3.1.4)."""
        return self._grown(self.mscale_all) ** 2 if self.kind == "yarn" else 1.0

    def _grown(self, weight: float) -> float:
        return 1 + 0.1 * weight * math.log(max(self.factor, 1.0))


def rope(x: Array, position: Array, theta: float, scaling: Scaling = Scaling()) -> Array:
    """Rotary positions of heads ``[..., T, H, D]`` at ``position [..., T]``: halves rotated by ``p theta^(-2i/D)`` (2104.09864, eq. 34)."""
    half = x.shape[-1] // 2
    wide = jnp.promote_types(x.dtype, jnp.float32)
    frequency = frequencies(half, theta, scaling, wide)
    angle = (position[..., None].astype(wide) * frequency.reshape((1,) * position.ndim + (half,)))[..., None, :]
    cos, sin = scaling.on_heads * jnp.cos(angle), scaling.on_heads * jnp.sin(angle)
    a, b = x[..., :half].astype(wide), x[..., half:].astype(wide)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def frequencies(half: int, theta: float, scaling: Scaling, dtype: jax.typing.DTypeLike) -> Array:
    """Radians a position of each pair of numbers, ``[half]``: ``theta^(-i / half)``, stretched."""
    index = jnp.arange(half, dtype=dtype)
    frequency = theta ** (-index / half)
    if scaling.kind == "none":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.context * frequency / (2 * math.pi)
        kept = (turns - scaling.slow) / (scaling.fast - scaling.slow)
    else:

        def place(turns):
            return half * math.log(scaling.context / (turns * 2 * math.pi)) / math.log(theta)

        first, last = place(scaling.fast), place(scaling.slow)
        if scaling.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        kept = 1 - (index - first) / (last - first if last != first else 1e-3)
    kept = jnp.clip(kept, 0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)
