"""Native sparse attention's own kernels for TPUs: compression with its choice of blocks, and selection, each with its backward pass.

One key head's keys and values lie in VMEM while all its queries go by. A softmax has at most n l' or N logits, so whole rows
of it are held, and the backward pass computes them again: nothing but the choice of blocks is kept between the two. With

    dp = do v^T        ds = p * (dp - sum(p * dp))        dq = scale ds k        dk = scale ds^T q        dv = p^T do

where ``sum(p * dp) = do . o``. A TPU walks its grid in order, so dk and dv are summed where they lie, without atomics.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jrl.attention.nsa_branches import Config, Streams

Array = jax.Array
LANES = 128
ROWS = 128  # queries of a step
VMEM = 128 * 2**20  # of v5e and v6e; v5p has half
SPARE = 10 * 2**20  # of it: a step's queries, and what the compiler needs
HIDDEN = -1e30  # a score that is not seen


def why_not(q: Array, streams: Streams, config: Config) -> str | None:
    """What keeps these kernels from computing this, or None."""
    size, width = config.select_block, q.dtype.itemsize
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, got {q.dtype}"
    if size % 16 or (LANES % size and size % LANES):
        return f"it takes a select_block of 16, 32, 64 or a multiple of {LANES}, got {size}"
    if config.block // config.stride > LANES:
        return f"it takes a block of at most {LANES} strides"
    tokens = streams.k_select.shape[1] + -streams.k_select.shape[1] % size
    needed, room = _vmem_of(tokens, streams.k_select, streams.v_select, width), vmem() - SPARE
    if needed > room:
        return f"a key head of {tokens} tokens takes {needed / 2**20:.0f} MiB of VMEM, more than {room / 2**20:.0f}"
    return None


def vmem() -> int:
    """Bytes of VMEM of the TPU compiled for: this machine's, or that of the mesh in ``jax.set_mesh``; VMEM if it is not known."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:  # compiled elsewhere
        return VMEM


def _vmem_of(tokens: int, k: Array, v: Array, width: int) -> int:
    return tokens * width * sum(-(-x.shape[-1] // LANES) * LANES for x in (k, v))


# Selection: every query reads its own blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def selected_attention(
    q: Array,
    k: Array,
    v: Array,
    token: Array,
    chosen: Array,
    t: Array,
    start: Array,
    scale: float,
    interpret: bool,
) -> Array:
    """The same as ``nsa_selected.selected_attention``: ``[B, K, T, G, Dv]``, T a multiple of ROWS."""
    call = _over_selected(_select_forward, q, k, v, token, chosen, t, start, scale)
    return call((_queries(q.shape[3], v.shape[-1]),), (_like(q, v.shape[-1]),), interpret)(q, k, v)[0]


def _save_selected(q, k, v, token, chosen, t, start, scale, interpret):
    saved = (q, k, v, token, chosen, t, start)
    return selected_attention(*saved, scale, interpret), saved


def _selected_backward(scale, interpret, saved, d_out):
    q, k, v, token, chosen, t, start = saved
    parts = _parts(k, v)
    call = _over_selected(_select_backward, q, k, v, token, chosen, t, start, scale, d_out, parts=parts)

    def tokens(x):
        return jax.ShapeDtypeStruct((*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4]), jnp.float32)

    def part(x):
        return (1, 1, tokens(x).shape[2] // parts, x.shape[4])

    def spec(x):
        return pl.BlockSpec(part(x), lambda b, h, p, i: (b, h, p, 0), pipeline_mode=pl.Buffered(1))

    specs = (_queries(q.shape[3], q.shape[-1]), spec(k), spec(v))
    dq, dk, dv = call(specs, (_like(q, q.shape[-1]), tokens(k), tokens(v)), interpret)(q, k, v, d_out)
    return dq, dk.reshape(k.shape).astype(k.dtype), dv.reshape(v.shape).astype(v.dtype), None, None, None, None


selected_attention.defvjp(_save_selected, _selected_backward)


def _parts(k: Array, v: Array) -> int:
    """In how many parts dk and dv are summed, so that one of them, float32, fits beside all keys and values."""
    num_blocks, tokens, width = k.shape[2], k.shape[2] * k.shape[3], k.dtype.itemsize
    room = vmem() - SPARE - _vmem_of(tokens, k, v, width)
    fits = [n for n in range(1, num_blocks + 1) if num_blocks % n == 0 and _vmem_of(tokens // n, k, v, 4) <= room]
    return min(fits, default=num_blocks)


def _over_selected(kernel, q, k, v, token, chosen, t, start, scale, *more, parts=1):
    """``(out_specs, out_shapes, interpret) -> (q, k, v, *more) -> outputs`` of a kernel over selected blocks."""
    batch, kv_heads, length, group, _ = q.shape
    (num_blocks, size), count = k.shape[2:4], chosen.shape[-1]
    per = max(1, LANES // size)
    chosen = jnp.pad(chosen, [(0, 0)] * 3 + [(0, -count % per)], constant_values=num_blocks)
    count = chosen.shape[-1]
    # A row of lanes for each block, as often as blocks stand side by side in them, and one of none: past every query.
    token = jnp.pad(jnp.tile(token, (1, 1, per)), [(0, 0), (0, 1), (0, 0)], constant_values=num_blocks * size)
    smem = functools.partial(pl.BlockSpec, memory_space=pltpu.SMEM)
    scalars = (chosen.reshape(batch, kv_heads, 1, length * count), t[:, None], start[:, None])
    in_specs = [
        smem((1, 1, 1, ROWS * count), lambda b, h, p, i: (b, h, 0, i)),
        *[smem((1, 1, ROWS), lambda b, h, p, i: (b, 0, i))] * 2,
        _row(token.shape[1:]),
        _queries(group, q.shape[-1]),
        *(_head((x.shape[2] * size, x.shape[-1])) for x in (k, v)),
        *(_queries(group, x.shape[-1]) for x in more),
    ]
    body = functools.partial(kernel, count=count, size=size, per=per, scale=scale)

    def with_outputs(out_specs, out_shapes, interpret):
        call = _call(body, (batch, kv_heads, parts, length // ROWS), in_specs, out_specs, out_shapes, interpret)

        def flat(x):
            return x.reshape(*x.shape[:2], -1, x.shape[-1])

        return lambda q, k, v, *rest: call(*scalars, token, q, flat(k), flat(v), *rest)

    return with_outputs


def _rows_of(chosen, t, start, token, k, v, i, count, size, per):
    """For query i of a step: its blocks ``[(first tokens, keys, values, seen)]``, ``per`` of them side by side in the lanes."""
    num_blocks = k.shape[2] // size
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, per * size), 1)
    groups = []
    for j in range(0, count, per):
        at = [chosen[0, 0, 0, i * count + j + b] for b in range(per)]
        position = token[0, pl.ds(at[0], 1), :]
        for b in range(1, per):
            position = jnp.where(lane >= b * size, token[0, pl.ds(at[b], 1), :], position)
        visible = (position <= t[0, 0, i]) & (position >= start[0, 0, i])
        first = [pl.multiple_of(jnp.minimum(a, num_blocks - 1) * size, size) for a in at]
        keys, values = (jnp.concatenate([x[0, 0, pl.ds(f, size), :] for f in first], axis=0) for x in (k, v))
        groups.append((first, keys, values, visible))
    return groups


def _softmax_of(q_i, groups, scale):
    """Probabilities of each group ``[G, per l']``, float32, over all groups together."""
    scores = [jnp.where(visible, _dot(q_i, keys, 1, 1) * scale, HIDDEN) for _, keys, _, visible in groups]
    largest = functools.reduce(jnp.maximum, scores).max(axis=1, keepdims=True)
    weight = [jnp.where(g[3], jnp.exp(s - largest), 0.0) for g, s in zip(groups, scores, strict=True)]
    total = _add(weight).sum(axis=1, keepdims=True)
    share = 1 / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return [w * share for w in weight]


def _select_forward(chosen, t, start, token, q, k, v, out, *, count, size, per, scale):
    def query(i, _):
        groups = _rows_of(chosen, t, start, token, k, v, i, count, size, per)
        p = _softmax_of(q[0, 0, i], groups, scale)
        parts = [_dot(x.astype(v.dtype), values, 1, 0) for x, (_, _, values, _) in zip(p, groups, strict=True)]
        out[0, 0, i] = _add(parts).astype(out.dtype)
        return 0

    jax.lax.fori_loop(0, ROWS, query, 0)


def _select_backward(chosen, t, start, token, q, k, v, d_out, dq, dk, dv, *, count, size, per, scale):
    _zero_at_first(dk, dv)
    tokens = dk.shape[2]
    base = pl.program_id(2) * tokens  # first token of the part that is summed now

    def add(first, dk_block, dv_block):
        at = pl.multiple_of(first - base, size)

        @pl.when((at >= 0) & (at < tokens))
        def _():
            dk[0, 0, pl.ds(at, size), :] += dk_block
            dv[0, 0, pl.ds(at, size), :] += dv_block

    def query(i, _):
        groups = _rows_of(chosen, t, start, token, k, v, i, count, size, per)
        q_i, d_i = q[0, 0, i], d_out[0, 0, i]
        p = _softmax_of(q_i, groups, scale)
        dp = [_dot(d_i, values, 1, 1) for _, _, values, _ in groups]
        overlap = _add([x * y for x, y in zip(p, dp, strict=True)]).sum(axis=1, keepdims=True)
        ds = [(x * (y - overlap) * scale).astype(q.dtype) for x, y in zip(p, dp, strict=True)]
        parts = [_dot(d, keys, 1, 0) for d, (_, keys, _, _) in zip(ds, groups, strict=True)]
        dq[0, 0, i] = _add(parts).astype(dq.dtype)
        for d, x, (first, _, _, _) in zip(ds, p, groups, strict=True):
            dk_group, dv_group = _dot(d, q_i, 0, 0), _dot(x.astype(d_i.dtype), d_i, 0, 0)
            for b, f in enumerate(first):
                add(f, dk_group[b * size : (b + 1) * size], dv_group[b * size : (b + 1) * size])
        return 0

    jax.lax.fori_loop(0, ROWS, query, 0)


# Compression: every query reads all blocks that are over, and chooses


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def compressed_attention(
    q: Array,
    k: Array,
    v: Array,
    first: Array,
    queries: tuple[Array, Array, Array, Array],
    num_blocks: int,
    config: Config,
    scale: float,
    interpret: bool,
) -> tuple[Array, Array]:
    """The compression branch's output ``[B, K, G, T, Dv]`` and the blocks chosen ``[B, K, T, n]``, as ``nsa.select`` gives them.

    For q ``[B, K, G, T, D]`` and compressed keys and values ``[B, K, N, D]``, T a multiple of ROWS and N of ``columns``. ``first``
    ``[B, N]`` has the index of the first token of each compressed block; ``queries`` are the index of each query, of the first token
    that it sees, its own block and the oldest one that it may read, all ``[B, T]``.
    """
    batch, kv_heads, group, length, _ = q.shape
    count = min(config.selected, num_blocks)
    body = functools.partial(_compress_forward, config=config, scale=scale, num_blocks=num_blocks)
    out_specs = (_heads(group, v.shape[-1]), pl.BlockSpec((1, 1, ROWS, count), lambda b, h, p, i: (b, h, i, 0)))
    out_shapes = (_like(q, v.shape[-1]), jax.ShapeDtypeStruct((batch, kv_heads, length, count), jnp.int32))
    scratch = [pltpu.VMEM((ROWS, k.shape[2]), jnp.float32)]
    return tuple(_over_compressed(body, q, k, v, first, queries, out_specs, out_shapes, interpret, scratch))


def _save_compressed(q, k, v, first, queries, num_blocks, config, scale, interpret):
    saved = (q, k, v, first, queries)
    return compressed_attention(*saved, num_blocks, config, scale, interpret), saved


def _compressed_backward(num_blocks, config, scale, interpret, saved, d_outputs):
    q, k, v, first, queries = saved
    body = functools.partial(_compress_backward, config=config, scale=scale)

    def wide(x):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32)

    specs = (_heads(q.shape[2], q.shape[-1]), _head(k.shape[2:]), _head(v.shape[2:]))
    shapes = (_like(q, q.shape[-1]), wide(k), wide(v))
    dq, dk, dv = _over_compressed(body, q, k, v, first, queries[:2], specs, shapes, interpret, [], d_outputs[0])
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


compressed_attention.defvjp(_save_compressed, _compressed_backward)


def columns(num_blocks: int, config: Config) -> int:
    """Compressed blocks that the kernel takes, padded: whole lanes of selection's blocks."""
    return (num_blocks + -num_blocks % LANES) * (config.select_block // config.stride)


def _over_compressed(body, q, k, v, first, queries, out_specs, out_shapes, interpret, scratch, *more):
    batch, kv_heads, group, length, _ = q.shape
    first, columns = first[:, None], [x[..., None] for x in queries]
    column = pl.BlockSpec((1, ROWS, 1), lambda b, h, p, i: (b, i, 0))
    in_specs = [
        _row(first.shape[1:]),
        *[column] * len(columns),
        _heads(group, q.shape[-1]),
        _head(k.shape[2:]),
        _head(v.shape[2:]),
    ]
    in_specs += [_heads(group, x.shape[-1]) for x in more]
    call = _call(body, (batch, kv_heads, 1, length // ROWS), in_specs, out_specs, out_shapes, interpret, scratch)
    return call(first, *columns, q, k, v, *more)


def _visible(first, t, start, config):
    return (first[0] + config.block - 1 <= t[0]) & (first[0] >= start[0])


def _probabilities(q_g, k, visible, scale):
    scores = jnp.where(visible, _dot(q_g, k, 1, 1) * scale, HIDDEN)
    weight = jnp.where(visible, jnp.exp(scores - scores.max(axis=1, keepdims=True)), 0.0)
    total = weight.sum(axis=1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1.0)


def _compress_forward(first, t, start, own, oldest, q, k, v, out, chosen, importance, *, config, scale, num_blocks):
    visible = _visible(first, t, start, config)
    importance[...] = jnp.zeros(importance.shape, jnp.float32)

    def head(g, _):
        p = _probabilities(q[0, 0, g], k[0, 0], visible, scale)
        out[0, 0, g] = _dot(p.astype(v.dtype), v[0, 0], 1, 0).astype(out.dtype)
        importance[...] += p
        return 0

    jax.lax.fori_loop(0, q.shape[2], head, 0)
    score = jnp.concatenate(list(_block_scores(importance, config)), axis=1)
    block = jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
    forced = (block < oldest[0] + config.initial) | (block > own[0] - config.local)
    score = jnp.where(forced, jnp.inf, score)
    score = jnp.where((block <= own[0]) & (block >= oldest[0]), score, -1.0)
    place = jax.lax.broadcasted_iota(jnp.int32, (ROWS, chosen.shape[-1]), 1)

    def pick(j, carry):
        score, picked = carry
        best = score.max(axis=1, keepdims=True)
        at = jnp.where(score == best, block, score.shape[1]).min(axis=1, keepdims=True)
        picked = jnp.where(place == j, jnp.where(best >= 0, at, num_blocks), picked)
        return jnp.where(block == at, -2.0, score), picked

    chosen[0, 0] = jax.lax.fori_loop(0, chosen.shape[-1], pick, (score, jnp.zeros(place.shape, jnp.int32)))[1]


def _block_scores(importance, config):
    """Equation 9, LANES blocks of selection at a time, as products with matrices of ones: ``[ROWS, LANES]`` each."""
    per_select, per_block = config.select_block // config.stride, config.block // config.stride
    width = LANES * per_select

    def counts(rows: int, shift: int) -> Array:
        """How often compressed block ``shift + i`` of this span counts for block j of selection."""
        i = shift + jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
        j = per_select * jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
        return sum(((i + n >= j) & (i + n < j + per_select)).astype(jnp.float32) for n in range(per_block))

    inside, before = counts(width, 0), counts(LANES, -LANES)
    exact = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    for first in range(0, importance.shape[1], width):
        score = exact(importance[:, first : first + width], inside)
        if first and per_block > 1:
            score = score + exact(importance[:, first - LANES : first], before)
        yield score


def _compress_backward(first, t, start, q, k, v, d_out, dq, dk, dv, *, config, scale):
    _zero_at_first(dk, dv)
    visible = _visible(first, t, start, config)

    def head(g, _):
        q_g, d_g = q[0, 0, g], d_out[0, 0, g]
        p = _probabilities(q_g, k[0, 0], visible, scale)
        dp = _dot(d_g, v[0, 0], 1, 1)
        ds = (p * (dp - (p * dp).sum(axis=1, keepdims=True)) * scale).astype(q.dtype)
        dq[0, 0, g] = _dot(ds, k[0, 0], 1, 0).astype(dq.dtype)
        dk[0, 0] += _dot(ds, q_g, 0, 0)
        dv[0, 0] += _dot(p.astype(d_g.dtype), d_g, 0, 0)
        return 0

    jax.lax.fori_loop(0, q.shape[2], head, 0)


# What the kernels share


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """A product of matrices over these axes, summed in float32; of float32 in full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _add(parts: list[Array]) -> Array:
    return functools.reduce(jnp.add, parts)


def _zero_at_first(*refs: Any) -> None:
    """Zero sums ``[1, 1, S, D]`` before the first queries go by, a piece at a time: at once would unroll."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        for ref in refs:
            piece = 128 if ref.shape[2] % 128 == 0 else ref.shape[2]

            def zero(i, _, ref=ref, piece=piece):
                ref[0, 0, pl.ds(i * piece, piece), :] = jnp.zeros((piece, ref.shape[3]), jnp.float32)
                return 0

            jax.lax.fori_loop(0, ref.shape[2] // piece, zero, 0)


def _call(body, grid, in_specs, out_specs, out_shapes, interpret, scratch=()):
    """A kernel over a grid of batch, key heads, parts of a key head, and steps of queries."""
    params = pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem() - 4 * 2**20
    )
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shapes,
        scratch_shapes=list(scratch),
        compiler_params=params,
        interpret=interpret,
    )


def _queries(group: int, dim: int) -> pl.BlockSpec:
    """A step's queries ``[1, 1, ROWS, G, D]``."""
    return pl.BlockSpec((1, 1, ROWS, group, dim), lambda b, h, p, i: (b, h, i, 0, 0))


def _heads(group: int, dim: int) -> pl.BlockSpec:
    """A step's queries, head by head ``[1, 1, G, ROWS, D]``."""
    return pl.BlockSpec((1, 1, group, ROWS, dim), lambda b, h, p, i: (b, h, 0, i, 0))


def _head(shape: tuple[int, ...]) -> pl.BlockSpec:
    """All of a key head ``[1, 1, S, D]``; held once, not twice, while the queries go by."""
    return pl.BlockSpec((1, 1, *shape), lambda b, h, p, i: (b, h, 0, 0), pipeline_mode=pl.Buffered(1))


def _row(shape: tuple[int, ...]) -> pl.BlockSpec:
    """What all key heads of a row share ``[1, *shape]``."""
    return pl.BlockSpec((1, *shape), lambda b, h, p, i: (b, 0, 0), pipeline_mode=pl.Buffered(1))


def _like(q: Array, dim: int) -> Any:
    return jax.ShapeDtypeStruct((*q.shape[:-1], dim), q.dtype)
