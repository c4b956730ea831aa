"""What layers of attention share besides attention: RMSNorm and rotary positions."""

import jax
import jax.numpy as jnp

Array = jax.Array


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """``x / rms(x) * weight`` over the last axis, in float32 (1910.07467, eq. 4)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normal.astype(x.dtype) * jnp.broadcast_to(weight.astype(x.dtype), x.shape)


def rope(x: Array, position: Array, theta: float) -> Array:
    """Rotary positions of heads ``[..., T, H, D]`` at ``position [..., T]``: halves rotated by ``p theta^(-2i/D)`` (2104.09864, eq. 34)."""
    half = x.shape[-1] // 2
    wide = jnp.promote_types(x.dtype, jnp.float32)
    frequency = theta ** (-jnp.arange(half, dtype=wide) / half)
    angle = (position[..., None].astype(wide) * frequency.reshape((1,) * position.ndim + (half,)))[..., None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(wide), x[..., half:].astype(wide)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
