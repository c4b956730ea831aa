"""Attention on Hopper GPUs (Pallas Mosaic GPU), where a key stands for a span of tokens and a query sees a span of them.

Row r of queries sees key n when the key's tokens lie in what it sees, ``begin[r] <= first[n]`` and ``last[n] <= end[r]``, and both are of
one segment. Causal attention, windows, packed sequences and the compressed blocks of native sparse attention are such spans. Tiles of keys that
a tile of rows cannot see are not visited.

The equations are those of ``flash``; scores are in units of log 2, so that ``p = exp2(s - lse)``. A block has two warpgroups that
compute and one that fetches. Gradients of keys are summed over parts of the rows, and then over the parts: nothing depends on the
order in which blocks run.
"""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jrl.attention.dense import group as group_heads
from jrl.attention.spans_hopper import (
    BEHIND_KEYS,
    BEHIND_ROWS,
    END,
    HIDDEN,
    Keys,
    Rows,
    Visit,
    along,
    down,
    hide,
    pad,
    visits,
)
from jrl.attention.visibility import Rule, spread
from jrl.numerics import host, mosaic
from jrl.numerics.mosaic import MATRIX, PER_COLUMN, PER_ROW, ROWS, along_rows, down_columns, load, transposed

Array = jax.Array
GROUPS = 2  # warpgroups of a block that compute
WIDTHS = (64, 128, 192)  # of heads
TILE = GROUPS * ROWS  # rows, or keys in the pass for their gradients, of a block
LOG2E = math.log2(math.e)
BLOCKS = 4 * 132  # that keep a GPU of 132 multiprocessors busy


def attend(
    q: Array, k: Array, v: Array, q_segments: Array | None, k_segments: Array | None, rule: Rule, scale: float
) -> Array:
    """The same as ``dense``, where ``why_not`` has no reason."""
    (batch, length), (num_keys, kv_heads) = q.shape[:2], k.shape[1:3]
    group = q.shape[2] // kv_heads
    at, key_at = rule.q_start + jnp.arange(length), rule.k_start + rule.k_step * jnp.arange(num_keys)
    begin = jnp.zeros_like(at) if rule.window is None else at - rule.window + 1
    end = at if rule.causal else jnp.full_like(at, END - 1)

    def of_batch(x: Array, length: int) -> Array:
        return jnp.broadcast_to(x.astype(jnp.int32), (batch, length))

    if q_segments is None or k_segments is None:
        q_segments, k_segments = jnp.zeros_like(at), jnp.zeros_like(key_at)
    rows = Rows(*(of_batch(x, length) for x in (begin, end, q_segments)))
    keys = Keys(*(of_batch(x, num_keys) for x in (key_at, key_at, k_segments)))
    rows = pad(Rows(*(jnp.repeat(x, group, 1) for x in rows)), BEHIND_ROWS, TILE)
    grouped = by_group(q, kv_heads).reshape(batch * kv_heads, -1, q.shape[3])
    q, k, v = (pad_rows(x) for x in (grouped, *(by_head(x) for x in (k, v))))
    out = attention(q, k, v, rows, pad(keys, BEHIND_KEYS, TILE), scale)[0]
    return by_token(out[:, : length * group], batch, group)


def why_not(q: Array, k: Array, v: Array) -> str | None:
    """What keeps these kernels from computing attention, or None."""
    if reason := host.why_no_kernels():
        return reason
    if q.dtype not in (jnp.float16, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"it takes float16 and bfloat16, one for all, got {q.dtype}, {k.dtype} and {v.dtype}"
    if any(dim not in WIDTHS for dim in (q.shape[3], v.shape[3])):
        return f"it takes heads of width {', '.join(map(str, WIDTHS))}, got {q.shape[3]} and {v.shape[3]}"
    return None


def by_group(q: Array, kv_heads: int) -> Array:
    """``[B, T, H, D]`` as ``[B K, T, G, D]``, the queries of each key head."""
    grouped = group_heads(q, kv_heads).swapaxes(1, 2)
    return grouped.reshape(-1, *grouped.shape[2:])


def by_token(out: Array, batch: int, group: int) -> Array:
    """The other way round: rows ``[B K, T G, D]`` as ``[B, T, H, D]``."""
    pairs, rows, dim = out.shape
    by_key_head = out.reshape(batch, pairs // batch, rows // group, group, dim)
    return by_key_head.swapaxes(1, 2).reshape(batch, rows // group, -1, dim)


def by_head(x: Array) -> Array:
    """``[B, S, K, D]`` as ``[B K, S, D]``."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def pad_rows(x: Array) -> Array:
    """``[P, R, D]`` with zeros behind, to whole tiles."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % TILE), (0, 0)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attention(q: Array, k: Array, v: Array, rows: Rows, keys: Keys, scale: float) -> tuple[Array, Array]:
    """Attention of q ``[P, R, D]`` to keys ``[P, N, D]`` and values ``[P, N, Dv]``: ``[P, R, Dv]``, and lse ``[P, R]`` without a gradient.

    P is a multiple of the B of ``rows`` and ``keys``, R and N are multiples of TILE. A row that sees nothing gets 0, and an infinite lse.
    """
    return _forward(q, k, v, rows, keys, scale)


def _save(q, k, v, rows, keys, scale):
    out, lse = _forward(q, k, v, rows, keys, scale)
    return (out, lse), (q, k, v, rows, keys, out, lse)


def _backward(scale, saved, d_outputs):
    q, k, v, rows, keys, out, lse = saved
    d_out = d_outputs[0]
    overlap = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dq = _row_gradients(q, k, v, rows, keys, d_out, lse, overlap, scale)
    dk, dv = _key_gradients(q, k, v, rows, keys, d_out, lse, overlap, scale)
    return *spread((dq, dk, dv), q), None, None


attention.defvjp(_save, _backward)


def _forward(q, k, v, rows, keys, scale):
    (pairs, length, dim), width = q.shape, v.shape[2]
    size = 128 if dim + width <= 256 else 64  # keys of a tile, so that two tiles of them fit beside the rows
    heads = pairs // len(rows.begin)

    def kernel(q, k, v, rows, keys, seen, out, lse, own, result, ready):
        at, tile, pair, batch, here = _place(heads, last_first=True)
        visit = Visit(seen, batch, tile)

        def compute(pipeline):
            _fetch([(q.at[pair, here], own.at[at])], ready.at[at])
            vectors = mosaic.full((ROWS,), HIDDEN, PER_ROW), mosaic.zeros((ROWS,), PER_ROW)
            total, largest, weight = pipeline((mosaic.zeros((ROWS, width), MATRIX), *vectors))
            sees = largest > HIDDEN / 2
            share = jnp.where(sees, 1 / weight, 0.0)
            _send((total * down_columns(share, width)).astype(out.dtype), result.at[at], out.at[pair, here])
            lse[pair, here] = jnp.where(sees, largest + jnp.log2(weight), jnp.inf)

        def step(indices, k, v, carry):
            total, largest, weight = carry
            there, whole = visit.tile(indices[0], size)
            s = mosaic.product(own.at[at], transposed(k)) * (scale * LOG2E)
            s = hide(s, whole, lambda: down(rows, (batch, here), size), lambda: along(keys, (batch, there)))
            before, largest = largest, jnp.maximum(largest, s.max(axis=1))
            p = jnp.exp2(s - down_columns(largest, size))
            shrink = jnp.exp2(before - largest)
            weight = weight * shrink + p.sum(axis=1)
            [total] = mosaic.add_products((total * down_columns(shrink, width), p.astype(v.dtype), v))
            return total, largest, weight

        specs = [_matrix(size, dim, visit), _matrix(size, width, visit)]
        _pipeline(step, visit, specs, compute)(k.at[pair], v.at[pair])

    types = jax.ShapeDtypeStruct((pairs, length, width), q.dtype), jax.ShapeDtypeStruct((pairs, length), jnp.float32)
    call = _call(kernel, "flash_forward", (pairs, length // TILE), types, [_own(dim, q), _own(width, q)], copies=1)
    return call(q, k, v, rows, keys, visits(rows, keys, TILE, size))


def _row_gradients(q, k, v, rows, keys, d_out, lse, overlap, scale):
    """Gradients of the queries ``[P, R, D]``."""
    (pairs, length, dim), width, size = q.shape, v.shape[2], ROWS
    heads = pairs // len(rows.begin)

    def kernel(q, k, v, rows, keys, seen, d_out, lse, overlap, dq, own_q, own_d, ready):
        at, tile, pair, batch, here = _place(heads, last_first=True)
        visit = Visit(seen, batch, tile)

        def compute(pipeline):
            _fetch([(q.at[pair, here], own_q.at[at]), (d_out.at[pair, here], own_d.at[at])], ready.at[at])
            vectors = (load(x.at[pair, here], PER_ROW) for x in (lse, overlap))
            total, _, _ = pipeline((mosaic.zeros((ROWS, dim), MATRIX), *vectors))
            _send(total.astype(dq.dtype), own_q.at[at], dq.at[pair, here])

        def step(indices, k, v, carry):
            total, lse, overlap = carry
            there, whole = visit.tile(indices[0], size)
            s = mosaic.product(own_q.at[at], transposed(k)) * (scale * LOG2E)
            s = hide(s, whole, lambda: down(rows, (batch, here), size), lambda: along(keys, (batch, there)))
            p = jnp.exp2(s - down_columns(lse, size))
            ds = p * (mosaic.product(own_d.at[at], transposed(v)) - down_columns(overlap, size)) * scale
            [total] = mosaic.add_products((total, ds.astype(k.dtype), k))
            return total, lse, overlap

        specs = [_matrix(size, dim, visit), _matrix(size, width, visit)]
        _pipeline(step, visit, specs, compute)(k.at[pair], v.at[pair])

    own = [_own(dim, q), _own(width, q)]
    types = jax.ShapeDtypeStruct(q.shape, q.dtype)
    call = _call(kernel, "flash_row_gradients", (pairs, length // TILE), types, own, copies=2)
    return call(q, k, v, rows, keys, visits(rows, keys, TILE, size), d_out, lse, overlap)


def _key_gradients(q, k, v, rows, keys, d_out, lse, overlap, scale):
    """Gradients of keys ``[P, N, D]`` and values, by parts of the rows."""
    (pairs, length, dim), (_, num_keys, width), size = q.shape, v.shape, ROWS
    heads, tiles = pairs // len(rows.begin), num_keys // TILE
    parts = max(1, min(length // size, BLOCKS // (pairs * tiles)))

    def kernel(q, k, v, rows, keys, seen, d_out, lse, overlap, dk, dv, own_k, own_v, ready):
        at, tile, pair, batch, here = _place(heads)
        part = lax.axis_index("part")
        visit = Visit(seen, batch, tile, part, parts)

        def compute(pipeline):
            _fetch([(k.at[pair, here], own_k.at[at]), (v.at[pair, here], own_v.at[at])], ready.at[at])
            dk_total, dv_total = pipeline(tuple(mosaic.zeros((ROWS, n), MATRIX) for n in (dim, width)))
            dk[part, pair, here] = dk_total
            dv[part, pair, here] = dv_total

        def step(indices, q, d_out, lse, overlap, carry):
            dk_total, dv_total = carry
            (there, whole), own = visit.tile(indices[0], size), mosaic.hidden(at)
            s = mosaic.product(own_k.at[own], transposed(q)) * (scale * LOG2E)
            s = hide(s, whole, lambda: along(rows, (batch, there)), lambda: down(keys, (batch, here), size))
            p = jnp.exp2(s - along_rows(load(lse, PER_COLUMN)))
            nothing = mosaic.zeros((ROWS, size), MATRIX)
            dv_total, dp = mosaic.add_products(
                (dv_total, p.astype(d_out.dtype), d_out), (nothing, own_v.at[own], transposed(d_out))
            )
            ds = p * (dp - along_rows(load(overlap, PER_COLUMN))) * scale
            [dk_total] = mosaic.add_products((dk_total, ds.astype(q.dtype), q))
            return dk_total, dv_total

        specs = [_matrix(size, dim, visit), _matrix(size, width, visit), *[_vector(size, visit)] * 2]
        _pipeline(step, visit, specs, compute)(*(x.at[pair] for x in (q, d_out, lse, overlap)))

    types = [jax.ShapeDtypeStruct((parts, *x.shape), jnp.float32) for x in (k, v)]
    call = _call(kernel, "flash_key_gradients", (pairs, parts, tiles), types, [_own(dim, k), _own(width, k)], copies=2)
    dk, dv = call(q, k, v, rows, keys, visits(rows, keys, TILE, size, of_keys=True), d_out, lse, overlap)
    return dk.sum(0).astype(k.dtype), dv.sum(0).astype(v.dtype)


# What the passes share


def _place(heads, last_first=False):
    """Of this warpgroup: its number, its tile, its pair of sequence and key head, the sequence, and its own rows or keys.

    The last rows see most where attention is causal, as do the first keys: what takes longest begins first.
    """
    at, tile, pair = (lax.axis_index(name) for name in ("group", "tile", "pair"))
    if last_first:
        tile = lax.axis_size("tile") - 1 - tile
    return at, tile, pair, lax.div(pair, heads), pl.ds(tile * TILE + at * ROWS, ROWS)


def _fetch(copies, ready):
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, ready)
    plgpu.barrier_wait(ready)


def _send(matrix, through, target):
    """Write a matrix from registers through shared memory."""
    through[...] = matrix
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(through, target)
    plgpu.wait_smem_to_gmem(0)


def _own(width: int, like: Array) -> Any:
    """What each warpgroup that computes keeps in shared memory."""
    return mosaic.in_shared_memory((GROUPS, ROWS, width), like.dtype)


def _matrix(size: int, width: int, visit: Visit) -> plgpu.BlockSpec:
    return plgpu.BlockSpec((size, width), lambda i: (visit.low + i, 0), transforms=mosaic.TRANSFORMS)


def _vector(size: int, visit: Visit) -> plgpu.BlockSpec:
    return plgpu.BlockSpec((size,), lambda i: (visit.low + i,))


def _pipeline(step, visit, in_specs, compute):
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(visit.steps,),
        in_specs=in_specs,
        max_concurrent_steps=2,
        num_compute_wgs=GROUPS,
        memory_registers=40,
        wg_axis="group",
        compute_context=compute,
    )


def _call(kernel, name, grid, out_type, own, copies):
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[*own, plgpu.Barrier(num_barriers=GROUPS, num_arrivals=copies)],
        grid=grid,
        grid_names=("pair", "tile") if len(grid) == 2 else ("pair", "part", "tile"),  # the last may be the longest
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )
