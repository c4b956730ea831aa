"""Attention kernels that come with JAX: splash attention on a TPU, cuDNN on a GPU."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from jrl.attention.visibility import Rule
from jrl.numerics import host

Array = jax.Array
LANES = 128  # splash attention's blocks are multiples of it


def wide() -> bool:
    """Whether much is to be computed at once: a GPU's steps take as long when they are small, a CPU's caches hold little."""
    return host.platform() == "gpu"


def why_not_splash(q: Array, k: Array, v: Array, rule: Rule, own: bool = True) -> str | None:
    """What keeps splash attention from computing this, or None; ``own`` says that no query is without a key but padding."""
    if not own:
        return "queries and keys must be the same tokens where they have segments or padding"
    for name, length in (("queries", q.shape[1]), ("keys", k.shape[1])):
        if length % LANES:
            return f"it takes a multiple of {LANES} {name}, got {length}"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, got {q.dtype}"
    if rule.k_step != 1:
        return "its keys stand one position apart"
    if rule.window is not None and rule.q_start != rule.k_start:
        return "with a window its queries must stand at the keys' positions"
    return None


def splash(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array | None,
    k_segments: Array | None,
    rule: Rule,
    scale: float,
    interpret: bool = False,
) -> Array:
    """The same as ``dense`` by JAX's Pallas kernel for TPUs; see ``why_not_splash``."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    kernel = _splash_kernel(heads // kv_heads, length, k.shape[1], rule, interpret)
    ids = None
    if q_segments is not None and k_segments is not None:
        ids = kernels.SegmentIds(q_segments, k_segments)
    q = (q * scale).reshape(batch, length, kv_heads, -1, q.shape[-1]).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, D]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    of_head = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, ids), in_axes=(0, 0, 0, None))
    out = jax.vmap(of_head)(q, k, v, ids).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)
    if q_segments is not None and k_segments is not None:
        # A query that sees nothing (padding) gets 0; the kernel gives it a mean of what it must not see.
        out = jnp.where((q_segments >= 0)[..., None, None], out, 0)
    return out.astype(v.dtype)


@functools.lru_cache(maxsize=32)  # at 64k tokens the host needs seconds to lay out the blocks of the mask
def _splash_kernel(heads: int, length: int, num_keys: int, rule: Rule, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape, offset = (length, num_keys), rule.q_start - rule.k_start
    if rule.window is not None:
        mask = masks.LocalMask(shape, (rule.window - 1, 0), offset)
    elif rule.causal:
        mask = masks.CausalMask(shape, offset)
    else:
        mask = masks.FullMask(shape)
    rows, columns = _block(length), _block(num_keys)
    blocks = kernels.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    with jax.ensure_compile_time_eval():
        return kernels.make_splash_mqa_single_device(
            masks.MultiHeadMask([mask] * heads), block_sizes=blocks, interpret=interpret
        )


def _block(length: int) -> int:
    return int(np.max([size for size in (128, 256, 512) if length % size == 0]))


def why_not_cudnn(q: Array, k: Array, v: Array, rule: Rule, segmented: bool) -> str | None:
    """What keeps cuDNN from computing this, or None."""
    platform = jax.default_backend()
    if platform != "gpu" or "rocm" in jax.extend.backend.get_backend().platform_version.lower():
        return f"it needs an NVIDIA GPU, and this is a {platform}"
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it takes float16 and bfloat16, got {q.dtype}"
    if q.shape[3] != v.shape[3] or q.shape[3] > 128 or q.shape[3] % 8:
        return f"it takes one head_dim of at most 128, a multiple of 8, got {q.shape[3]} and {v.shape[3]}"
    if segmented:
        return "it takes no segments and no padding here"
    if rule.k_step != 1 or rule.q_start != rule.k_start or q.shape[1] != k.shape[1]:
        return "its queries and keys must stand at the same positions"
    return None


def cudnn(q: Array, k: Array, v: Array, rule: Rule, scale: float) -> Array:
    """The same as ``dense`` by cuDNN's flash attention; see ``why_not_cudnn``."""
    window = None if rule.window is None else (rule.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=rule.causal, local_window_size=window, implementation="cudnn"
    )
