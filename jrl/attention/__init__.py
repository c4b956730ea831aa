"""Attention, ``[batch, seq, heads, head_dim]``: dense, in blocks, sliding window, and native sparse attention.

    out = attend(q, k, v)                                        causal, what fits the platform and the size
    out = attend(q, k, v, window=512, segment_ids=episode)       never over the end of an episode
    out = nsa.attend(...)                                        native sparse attention (2502.11089)

Pure functions, differentiable, under jit and vmap. ``cache`` holds what decoding remembers.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jrl.attention import platforms
from jrl.attention.dense import dense
from jrl.attention.flash import flash
from jrl.attention.visibility import NO_KEY, NO_QUERY, Rule, check_shapes, check_window, segments
from jrl.numerics import checks, host

Array = jax.Array
Implementation = Literal["xla", "pallas_tpu", "cudnn", "mosaic_gpu", "reference"]

# Up to so many scores a head, all of them at once are faster than blocks.
SMALL = 256 * 256
LEAST_ROWS = 64  # queries that fill a tile of the tensor cores


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    valid: Array | None = None,
    kv_valid: Array | None = None,
    q_offset: int = 0,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Array:
    """Attention of queries ``[B, T, H, D]`` to keys ``[B, S, K, D]`` and values ``[B, S, K, Dv]``: ``[B, T, H, Dv]``.

    Args:
        q: queries; H is a multiple of K, and each key head serves H / K query heads in a row.
        k: keys.
        v: values.
        causal: a query sees keys at its own position and before.
        window: of those, it sees the last so many; None for all.
        segment_ids: int ``[B, T]``, at least 0: a query sees keys of its own segment (packed sequence, episode).
        kv_segment_ids: of the keys, ``[B, S]``; the queries' if not given.
        valid: bool ``[B, T]``, false for padding, whose rows are 0.
        kv_valid: of the keys, ``[B, S]``; the queries' if not given.
        q_offset: position of the first query among the keys, for queries that continue a sequence.
        scale: of the scores; ``D ** -0.5`` if not given.
        implementation: reference writes every score down; xla works in blocks, in memory linear in T and S, on every
            platform; pallas_tpu is JAX's splash attention; cudnn is cuDNN's flash attention; mosaic_gpu is ours for Hopper GPUs, which
            takes segments and padding. None picks what fits platform and size; all compute the same function. A named one
            that cannot compute this raises.

    Softmax is in float32 at least; a query that sees nothing gets 0. Raises ``ValueError`` for shapes that do not fit, and for
    an implementation that is not there, with the reason.
    """
    check_shapes(q, k, v)
    check_window(window, causal)
    batch, length, num_keys = q.shape[0], q.shape[1], k.shape[1]
    checks.positive_int("q_offset", q_offset, at_least=0)
    own = (
        kv_segment_ids is None and kv_valid is None and (length == num_keys or (segment_ids is None and valid is None))
    )
    if length == num_keys:
        kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
        kv_valid = valid if kv_valid is None else kv_valid
    if (segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("segment_ids and kv_segment_ids must both be given where queries and keys differ in length")
    q_seg = segments("query", batch, length, segment_ids, valid, NO_QUERY)
    k_seg = segments("key", batch, num_keys, kv_segment_ids, kv_valid, NO_KEY)
    if q_seg is None and k_seg is not None:
        q_seg = jnp.zeros((batch, length), jnp.int32)
    if k_seg is None and q_seg is not None:
        k_seg = jnp.zeros((batch, num_keys), jnp.int32)
    rule = Rule(causal, window, q_start=q_offset)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    match _choose(implementation, q, k, v, rule, q_seg is not None, own):
        case "reference":
            return dense(q, k, v, q_seg, k_seg, rule, scale)
        case "xla":
            return flash(q, k, v, q_seg, k_seg, rule, scale)
        case "pallas_tpu":
            return platforms.splash(q, k, v, q_seg, k_seg, rule, scale)
        case "mosaic_gpu":
            from jrl.attention import flash_hopper

            return flash_hopper.attend(q, k, v, q_seg, k_seg, rule, scale)
        case _:
            return platforms.cudnn(q, k, v, rule, scale)


def _choose(
    name: Implementation | None, q: Array, k: Array, v: Array, rule: Rule, segmented: bool, own: bool
) -> Implementation:
    """The implementation to use. Raises ``ValueError`` for a named one that cannot."""
    if name is not None:
        checks.one_of("implementation", name, get_args(Implementation))
    if name in ("xla", "reference"):
        return name

    def why_not(kernels: Implementation) -> str | None:
        match kernels:
            case "pallas_tpu":
                return platforms.why_not_splash(q, k, v, rule, own)
            case "cudnn":
                return platforms.why_not_cudnn(q, k, v, rule, segmented)
            case _:
                from jrl.attention import flash_hopper  # Pallas takes a while to import

                return flash_hopper.why_not(q, k, v)

    if name is not None:
        if reason := why_not(name):
            raise ValueError(f"implementation={name!r} cannot do this: {reason}")
        return name
    offered: dict[Implementation, bool] = {
        "pallas_tpu": jax.default_backend() == "tpu",
        "cudnn": True,
        "mosaic_gpu": q.shape[1] >= LEAST_ROWS and host.has_kernels(),
    }
    for kernels, there in offered.items():
        if there and not why_not(kernels):
            return kernels
    return "reference" if q.shape[1] * k.shape[1] <= SMALL else "xla"
