"""Native sparse attention (Yuan et al. 2025, arXiv 2502.11089), with memory linear in the sequence.

Query t sees its past three times, and gates add up the outputs (eq. 5): ``o = g_cmp o_cmp + g_slc o_slc + g_win o_win``.

    compression   block i is tokens [i d, i d + l), as one key and one value phi(block)                         (eq. 7)
                  seen when it is over: i d + l - 1 <= t
    selection     blocks of l' tokens with the largest importance; the first and the last ones always           (eq. 11, 12)
                  p_slc[j] = sum_{m < l'/d} sum_{n < l/d} p_cmp[(l'/d) j + m - n]                               (eq. 9)
                  summed over the heads that share keys (eq. 10), so that they read the same blocks; tokens up to t
    window        the last w tokens

Equation 9 is written here for blocks counted from 0, where the paper's ``-m-n`` holds for blocks counted from 1. Selection takes no
gradient through the choice; ties go to the lowest index. Each branch may have its own keys and values, as in the paper.

With ``segment_ids`` (episodes, packed sequences, padding) nothing is seen beyond the segment, and blocks count from its first token:
a segment gives the same outputs alone, behind padding, and anywhere in a packed row. Segments must be contiguous. ``nsa_blocks``
says how.
"""

import importlib
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jrl.attention import nsa_blocks, platforms
from jrl.attention.dense import group
from jrl.attention.flash import flash
from jrl.attention.nsa_branches import (
    Config,
    Streams,
    check_phi,
    compress,
    compressed_attention,
    init,
    phi,
    select,
    shared,
)
from jrl.attention.nsa_selected import selected_attention
from jrl.attention.visibility import NO_QUERY, Rule, check_shapes, segments
from jrl.numerics import checks, host
from jrl.numerics.types import Params

__all__ = ["Config", "Implementation", "Streams", "attend", "init", "mix", "phi", "segment_starts", "select", "shared"]

Array = jax.Array
Implementation = Literal["xla", "pallas_tpu", "mosaic_gpu"]
KERNELS: dict[str, Implementation] = {"tpu": "pallas_tpu", "gpu": "mosaic_gpu"}  # of a platform
CHUNK = 16  # queries whose scores with compressed blocks are there at once
WIDE_SCORES = 2**28  # or, where more at once is faster, so many scores
LEVELS = 4  # parts of a sequence, whose queries are spared the compressed keys behind their part


def attend(
    params: Params,
    q: Array,
    streams: Streams,
    gates: Array,
    config: Config = Config(),
    *,
    segment_ids: Array | None = None,
    scale: float | None = None,
    chunk: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Array:
    """Causal native sparse attention of a sequence with itself: ``[B, T, H, Dv]``.

    Args:
        params: of phi, from ``init``.
        q: queries ``[B, T, H, D]``.
        streams: keys and values of the branches, S = T.
        gates: of compression, selection and window, ``[B, T, H, 3]``; the paper takes a sigmoid of an MLP of the token.
        config: sizes.
        segment_ids: int ``[B, T]``, contiguous; nothing is seen beyond a segment.
        scale: of the scores; ``D ** -0.5`` if not given.
        chunk: queries that xla computes at once; changes memory and speed alone. None is what is fast.
        implementation: xla, for every platform; or kernels of our own for compression and selection, pallas_tpu for TPUs and
            mosaic_gpu for Hopper GPUs. None takes the kernels where they can, else xla. A named one that cannot compute this raises.
        interpret: run the TPU's kernels in Pallas's interpreter, for tests.

    Raises ``ValueError`` for shapes that do not fit, and for kernels that cannot, with the reason.
    """
    for k, v in (streams[0:2], streams[2:4], streams[4:6]):
        check_shapes(q, k, v)
        if k.shape[1] != q.shape[1]:
            raise ValueError(
                f"native sparse attention takes as many keys as queries; got {k.shape[1]} and {q.shape[1]}"
            )
        if (k.shape[2], v.shape[3]) != (streams[0].shape[2], streams[1].shape[3]):
            raise ValueError(
                "the branches must have one number of key heads and one width of values; got "
                + ", ".join(f"{name} {list(x.shape)}" for name, x in streams._asdict().items())
            )
    if gates.shape != (*q.shape[:3], 3):
        raise ValueError(f"gates must be {[*q.shape[:3], 3]}: compression, selection, window; got {list(gates.shape)}")
    check_phi(params, config)
    if chunk is not None:
        checks.positive_int("chunk", chunk)
    (batch, length), dim = q.shape[:2], q.shape[3]
    scale = dim**-0.5 if scale is None else scale
    t = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    segment_ids = segments("token", batch, length, segment_ids, None, NO_QUERY)
    origin = None if segment_ids is None else segment_starts(segment_ids)
    chosen = choose(implementation, q, streams, config)
    cudnn = implementation in (None, "mosaic_gpu")
    o_win = _window(q, streams, segment_ids, Rule(window=config.window), scale, chosen, interpret, cudnn)
    return mix(
        params,
        q,
        streams,
        gates,
        o_win,
        t,
        jnp.zeros_like(t) if origin is None else origin,
        config,
        origin=origin,
        scale=scale,
        chunk=chunk,
        implementation=chosen,
        interpret=interpret,
        in_order=True,
    )


def choose(name: Implementation | None, q: Array, streams: Streams, config: Config) -> Implementation:
    """The implementation to use. Raises ``ValueError`` for a named one that cannot, with the reason."""
    if name is not None:
        checks.one_of("implementation", name, get_args(Implementation))
    wanted = KERNELS.get(host.platform(), "xla") if name is None else name
    if wanted == "xla" or (name is None and wanted == "mosaic_gpu" and not host.has_kernels()):
        return "xla"
    reason = _kernels(wanted).why_not(q, streams, config)
    if name and reason:
        raise ValueError(f"implementation={name!r} cannot do this: {reason}")
    return "xla" if reason else wanted


def _kernels(name: Implementation) -> Any:
    """The module of these kernels; Pallas takes a while to import."""
    return importlib.import_module("jrl.attention." + {"pallas_tpu": "nsa_tpu", "mosaic_gpu": "nsa_hopper"}[name])


def _window(q, streams, segment_ids, rule, scale, implementation, interpret, cudnn):
    """The window branch: by cuDNN where that may and can, else by the kernels' kind where it can, else by xla."""
    k, v = streams.k_window, streams.v_window
    if cudnn and not platforms.why_not_cudnn(q, k, v, rule, segment_ids is not None):
        return platforms.cudnn(q, k, v, rule, scale)
    if implementation == "mosaic_gpu":
        from jrl.attention import flash_hopper

        return flash_hopper.attend(q, k, v, segment_ids, segment_ids, rule, scale)
    if implementation == "xla" or platforms.why_not_splash(q, k, v, rule):
        return flash(q, k, v, segment_ids, segment_ids, rule, scale)
    return platforms.splash(q, k, v, segment_ids, segment_ids, rule, scale, interpret)


def mix(
    params: Params,
    q: Array,
    streams: Streams,
    gates: Array,
    o_win: Array,
    t: Array,
    start: Array,
    config: Config,
    **options: Any,
) -> Array:
    """``attend`` for queries ``[B, T, H, D]`` that stand at ``t`` among the keys and see them from ``start`` on, both int ``[B, T]``.

    ``o_win [B, T, H, Dv]`` is the window branch's output; ``options`` are those of ``compress_and_select``.
    """
    wide = jnp.promote_types(gates.dtype, jnp.float32)
    parts = (*compress_and_select(params, q, streams, t, start, config, **options), o_win)
    mixed = sum(x.astype(wide) * gates[..., i, None].astype(wide) for i, x in enumerate(parts))
    return jnp.asarray(mixed).astype(o_win.dtype)


def compress_and_select(
    params: Params,
    q: Array,
    streams: Streams,
    t: Array,
    start: Array,
    config: Config,
    *,
    origin: Array | None = None,
    scale: float | None = None,
    chunk: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
    in_order: bool = False,
) -> tuple[Array, Array]:
    """The outputs of two branches, compression and selection, each ``[B, T, H, Dv]``, for queries as in ``mix``.

    Blocks count from ``origin`` int ``[B, S]``, the index of the first token of each key's segment, or from the first key if it is not
    given. No query may see further back than its own segment. Queries that stand at 0, 1, 2 ... are ``in_order``, which saves
    what lies above the diagonal. The other options are those of ``attend``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    how = _How(choose(implementation, q, streams, config), chunk, interpret)
    if origin is None:
        blocks = nsa_blocks.of_one_segment(streams.k_select.shape[1], t, start, config)
    else:
        blocks = nsa_blocks.of_segments(origin, t, start, config)
    in_order = in_order and blocks.segments is None
    o_cmp, chosen = _compress_and_choose(params, q, streams, blocks, t, start, config, scale, how, in_order)
    return o_cmp, _attend_selected(q, streams, blocks, chosen, t, start, scale, how)


class _How(NamedTuple):
    """How the branches are computed, as the arguments of ``attend`` say."""

    implementation: Implementation
    chunk: int | None
    interpret: bool


def segment_starts(segment_ids: Array) -> Array:
    """Index of the first token of each token's segment, int32 ``[B, T]``."""
    at = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None], segment_ids.shape)
    before = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
    return jax.lax.cummax(jnp.where(segment_ids != before, at, 0), axis=1)


def _compress_and_choose(params, q, streams, blocks, t, start, config, scale, how, in_order):
    """The compression branch's output ``[B, T, H, Dv]`` and the blocks that each query selects ``[B, K, T, n]``."""
    (length, num_keys), kv_heads = (q.shape[1], streams.k_compress.shape[1]), streams.k_compress.shape[2]
    num_blocks = blocks.token.shape[1]
    if not config.num_compressed(num_keys):
        out = jnp.zeros((*q.shape[:3], streams.v_compress.shape[-1]), q.dtype)
        importance = jnp.zeros((q.shape[0], kv_heads, length, 0), jnp.float32)
        return out, select(importance, blocks.own, blocks.oldest, num_blocks, config)
    first = None if blocks.segments is None else blocks.first
    k = compress(params.get("k"), streams.k_compress, config, first)
    v = compress(params.get("v"), streams.v_compress, config, first)
    queries = (t, start, blocks.own, blocks.oldest)
    if how.implementation == "pallas_tpu":
        return _compress_on_tpu(q, k, v, blocks.first, queries, num_blocks, config, scale, how.interpret)
    if how.implementation == "mosaic_gpu":
        from jrl.attention import nsa_hopper

        return nsa_hopper.compressed_attention(q, k, v, blocks.first, queries, num_blocks, config, scale)

    @jax.checkpoint
    def of_chunk(k: Array, v: Array, first: Array, q: Array, t: Array, start: Array, own: Array, oldest: Array):
        out, importance = compressed_attention(q, k, v, first, t, start, config, scale)
        return out.astype(v.dtype), select(importance, own, oldest, num_blocks, config)

    fast = max(CHUNK, WIDE_SCORES // (q.shape[0] * q.shape[2] * k.shape[1])) if platforms.wide() else CHUNK
    rows = min(fast if how.chunk is None else how.chunk, length)
    parts = jax.tree.map(lambda x: _split(x, rows), (q, *queries))
    number = -(-length // rows)
    levels = LEVELS if in_order and number >= 2 * LEVELS else 1
    bounds = [number * i // levels for i in range(levels + 1)]

    def of_level(begin: int, end: int) -> tuple[Array, Array]:
        """Some chunks in a row, none of which sees keys behind the last one's end."""
        sees = k.shape[1] if end == number else config.num_compressed(end * rows)
        near = (k[:, :sees], v[:, :sees], blocks.first[:, :sees])
        return jax.lax.map(lambda part: of_chunk(*near, *part), jax.tree.map(lambda x: x[begin:end], parts))

    out, chosen = jax.tree.map(lambda *x: jnp.concatenate(x), *map(of_level, bounds[:-1], bounds[1:]))
    out = jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *out.shape[3:])[:, :length]
    chosen = jnp.moveaxis(chosen, 0, 2).reshape(q.shape[0], kv_heads, -1, chosen.shape[-1])
    return out, chosen[:, :, :length]


def _compress_on_tpu(q, k, v, first, queries, num_blocks, config, scale, interpret):
    from jrl.attention import nsa_tpu

    (batch, length, heads, _), rows = q.shape, nsa_tpu.ROWS
    whole, number = length + -length % rows, nsa_tpu.columns(num_blocks, config)
    by_head = _pad_to(group(q, k.shape[2]), whole).transpose(0, 2, 3, 1, 4)
    k, v = (_pad_to(x, number).transpose(0, 2, 1, 3) for x in (k, v))
    first = _pad_to(first, number, num_blocks * config.select_block)
    queries = tuple(_pad_to(x, whole) for x in queries)
    out, chosen = nsa_tpu.compressed_attention(by_head, k, v, first, queries, num_blocks, config, scale, interpret)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, whole, heads, -1)[:, :length], chosen[:, :, :length]


def _attend_selected(q, streams, blocks, chosen, t, start, scale, how):
    (batch, length, heads, _), kv_heads = q.shape, streams.k_select.shape[2]
    _, num_blocks, size = blocks.token.shape

    def lay(x: Array) -> Array:
        """Keys or values ``[B, S, K, D]`` in blocks ``[B, K, blocks, l', D]``."""
        if blocks.segments is not None:
            x = nsa_blocks.permute(x, blocks.segments.order, blocks.segments.place)
        return _pad_to(x, num_blocks * size).reshape(batch, num_blocks, size, *x.shape[2:]).transpose(0, 3, 1, 2, 4)

    k, v, chosen = lay(streams.k_select), lay(streams.v_select), nsa_blocks.read(chosen, blocks)
    grouped = group(q, kv_heads).transpose(0, 2, 1, 3, 4)
    if how.implementation == "mosaic_gpu":
        from jrl.attention import nsa_selected_hopper

        out = nsa_selected_hopper.selected_attention(grouped, k, v, blocks.token, chosen, t, start, scale)
    elif how.implementation == "pallas_tpu":
        from jrl.attention import nsa_tpu

        whole = length + -length % nsa_tpu.ROWS
        grouped, chosen = (jnp.moveaxis(_pad_to(jnp.moveaxis(x, 2, 1), whole), 1, 2) for x in (grouped, chosen))
        t, start = _pad_to(t, whole), _pad_to(start, whole)
        out = nsa_tpu.selected_attention(grouped, k, v, blocks.token, chosen, t, start, scale, how.interpret)
    else:
        out = selected_attention(grouped, k, v, blocks.token, chosen, t, start, scale, how.chunk)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, -1, heads, v.shape[-1])[:, :length]


def _pad_to(x: Array, length: int, value: int = 0) -> Array:
    """``x [B, L, ...]`` with ``value`` behind, ``[B, length, ...]``."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=value)


def _split(x: Array, rows: int) -> Array:
    """``[B, T, ...] -> [chunks, B, rows, ...]``, padded with zeros."""
    x = _pad_to(x, x.shape[1] + -x.shape[1] % rows)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, rows, *x.shape[2:]), 1, 0)
