"""Fused GPU kernels (Pallas Mosaic GPU, Hopper) for thousands of small neural networks, one per agent.

Every agent has its own network of two hidden layers of 64 units, and its own rows of input:

    h1 = activation(x @ W1 + b1)        x [N, D], W1 [D, 64]
    h2 = activation(h1 @ W2 + b2)       W2 [64, 64]
    out = h2 @ W3 + b3                  W3 [64, A], out [N, A]

All arrays carry a leading axis over the agents. ``forward`` computes ``out``; ``backward`` computes the gradients of
the weights from that of ``out``. Nothing of size [N, 64] ever leaves the chip: backward computes h1 and h2 again.

For wide inputs the first product is a real matrix product, which XLA makes well. ``forward_from_product`` and
``backward_from_product`` are the same kernels for the rest: they read x @ W1, transposed to [64, N], and backward writes
its gradient. Nothing else of that size is read or written: XLA would add b1, and sum over rows for its gradient, each
in a pass of its own that takes as long as the kernel, so the kernels do that too.

One warpgroup (128 threads) works on the rows of one agent, 64 rows (a tile) at a time. The three products of 64 x 64
matrices in a tile run on the tensor cores: each float32 operand is split into two bfloat16 numbers, value = high + low,
and high @ high + high @ low + low @ high is accumulated in float32, which leaves a relative error near 1e-5. Products
with the narrow matrices x, W1, W3 and dout are float32 outer products in registers.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jrl.numerics.mosaic import (
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    TRANSFORMS,
    along_rows,
    down_columns,
    hidden,
    load,
    transposed,
    zeros,
)

HIDDEN = 64
TILE = 64  # rows at a time; the tensor cores' instructions want 64
NARROW = 32  # up to so many rows an agent, as in acting, go through a forward kernel of their own
MULTIPROCESSORS = 132  # of an H100


def reciprocal(matrix):
    """Compute 1 / matrix with the hardware's instruction, to one unit in the last place (a division costs far more)."""

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,), return_type=plgpu.ShapeDtypeStruct(matrix.shape, matrix.dtype, layout=MATRIX)
    )
    def approximate(context, array):
        del context
        return array._pointwise(array._lift_fast_instr("rcp.approx.ftz.f32"))

    return approximate(matrix)


def activate(z, activation):
    """Apply the activation; tanh(z) = 1 - 2 / (exp(2 z) + 1), with an absolute error below 1e-6."""
    if activation == "relu":
        return jnp.maximum(z, 0.0)
    return 1.0 - 2.0 * reciprocal(jnp.exp2(z * (2.0 * math.log2(math.e))) + 1.0)


def through_activation(dh, h, activation):
    """Turn the gradient of h = activation(z) into that of z."""
    if activation == "relu":
        return jnp.where(h > 0.0, dh, 0.0)
    return dh * (1.0 - h * h)


def split(matrix):
    """Write a float32 matrix as a sum of two bfloat16 matrices, (high, low).

    The barrier makes the compiler convert pairs of numbers with one instruction instead of each by itself.
    """
    high = lax.optimization_barrier(matrix.astype(jnp.bfloat16))
    return high, (matrix - high.astype(jnp.float32)).astype(jnp.bfloat16)


def mine(split_refs, warpgroup):
    """Take this warpgroup's own part of a split matrix in shared memory.

    The same address each time would cost 80 registers.
    """
    index = hidden(warpgroup)
    return [ref.at[index] for ref in split_refs]


def transpose(split_refs):
    """View a split matrix in shared memory as its transpose."""
    return [transposed(ref) for ref in split_refs]


def store_split(split_refs, matrix):
    """Split a matrix into shared memory, where the tensor cores can read it after the next ``commit_smem``."""
    split_refs[0][...], split_refs[1][...] = split(matrix)


def multiply_add(*products):
    """Compute start + left @ right on the tensor cores for each (start, left, right).

    left and right are split matrices; right is in shared memory and left may also be in registers.
    """

    def accumulate(totals):
        for total, (_, left, right) in zip(totals, products, strict=True):
            plgpu.wgmma(total, left[0], right[0])
            plgpu.wgmma(total, left[0], right[1])
            plgpu.wgmma(total, left[1], right[0])

    return pl.run_state(accumulate)([plgpu.ACC.init(start) for start, _, _ in products])


def launch(kernel, name, items, out_type, operands, *, most_warpgroups, split_heights):
    """Run ``kernel`` once for each of the items, (agents, chunks of an agent's rows), on all multiprocessors.

    A kernel for one warpgroup a block has one block an item. One for several has as many blocks as run at the same
    time, and each warpgroup goes through items at a fixed stride, so that while some wait for the weights of their next
    agent, others compute; ``most_warpgroups`` then sets how many registers a thread gets, 65536 / 128 / most_warpgroups.
    ``split_heights`` are the heights of the split matrices, 64 wide, that each warpgroup needs in shared memory.
    """
    agents, chunks = items
    count = agents * chunks
    warpgroups = min(most_warpgroups, pl.cdiv(count, MULTIPROCESSORS))
    blocks = count if most_warpgroups == 1 else min(MULTIPROCESSORS, pl.cdiv(count, warpgroups))

    def body(*refs):
        warpgroup = lax.axis_index("warpgroup")
        first = warpgroup * blocks + lax.axis_index("block")  # so that the last turn is spread over all blocks
        stride = blocks * warpgroups

        @pl.loop(0, lax.div(count - first + (stride - 1), stride))
        def _(turn):
            item = first + turn * stride
            kernel(lax.div(item, chunks), lax.rem(item, chunks), warpgroup, *refs)

    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            [plgpu.SMEM((warpgroups, height, 64), jnp.bfloat16, transforms=TRANSFORMS)] * 2 for height in split_heights
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )(*operands)


def has_product(first):
    """Tell (product, b1), a first layer whose product XLA has made, from (x, W1, b1)."""
    return len(first) == 2


def z1_by_rows(first, agent, here):
    """Compute z1 for some rows of one agent by first = (x, W1, b1) or (product, b1); a matrix [rows, units]."""
    z1 = along_rows(load(first[-1].at[agent], PER_COLUMN))
    if has_product(first):
        transposed = first[0].at[agent, :, here].transpose((1, 0))
        return z1 + plgpu.layout_cast(load(transposed, plgpu.Layout.WGMMA_TRANSPOSED), MATRIX)
    x, W1, _ = first
    for d in range(x.shape[2]):
        z1 += down_columns(load(x.at[agent, here, d], PER_ROW)) * along_rows(load(W1.at[agent, d], PER_COLUMN))
    return z1


def z1_by_units(first, agent, here):
    """Do what ``z1_by_rows`` does, for x transposed, [agents, D, rows]; a matrix [units, rows]."""
    z1 = down_columns(load(first[-1].at[agent], PER_ROW), here.size)
    if has_product(first):
        return z1 + load(first[0].at[agent, :, here], MATRIX)
    x, W1, _ = first
    for d in range(x.shape[1]):
        row = along_rows(load(x.at[agent, d, here], PER_COLUMN))
        z1 += down_columns(load(W1.at[agent, d], PER_ROW), here.size) * row
    return z1


def tiles_of(chunk, chunks, tiles):
    """Divide an agent's tiles evenly over chunks; give the first tile of this chunk and that of the next."""
    return lax.div(chunk * tiles, chunks), lax.div((chunk + 1) * tiles, chunks)


def forward_kernel(activation, chunks, tiles, agent, chunk, warpgroup, first, W2, b2, W3_transposed, b3, out, W2_split):
    """Compute the output for one chunk of one agent's rows, as matrices [rows of a tile, units]."""
    store_split(mine(W2_split, warpgroup), load(W2.at[agent], MATRIX))
    plgpu.commit_smem()

    @pl.loop(*tiles_of(chunk, chunks, tiles))
    def _(tile):
        here = pl.ds(tile * TILE, TILE)
        h1 = activate(z1_by_rows(first, agent, here), activation)
        b2_rows = along_rows(load(b2.at[agent], PER_COLUMN))
        [z2] = multiply_add((b2_rows, split(h1), mine(W2_split, warpgroup)))
        h2 = activate(z2, activation)
        out_columns = []  # all computed before one is written: a write is a barrier for loads
        for a in range(out.shape[2]):
            weights = along_rows(load(W3_transposed.at[agent, a], PER_COLUMN))
            out_columns.append(jnp.sum(h2 * weights, axis=1) + b3[agent, a])
        for a, column in enumerate(out_columns):
            out[agent, here, a] = column


def narrow_forward_kernel(activation, agent, chunk, warpgroup, first, W2, b2, W3, b3, out, W2_split, h1_split):
    """Compute the output of one agent for a few rows, as matrices [units, rows]; x and out are transposed.

    Time goes into waiting for the weights here, so they are all asked for before the first is used.
    """
    del chunk
    outputs, width = out.shape[1:]
    W2_here = load(W2.at[agent], MATRIX)
    b2_columns = down_columns(load(b2.at[agent], PER_ROW), width)
    W3_columns = [down_columns(load(W3.at[agent, :, a], PER_ROW), width) for a in range(outputs)]
    z1 = z1_by_units(first, agent, pl.ds(0, width))

    w2, h1s = mine(W2_split, warpgroup), transpose(mine(h1_split, warpgroup))
    store_split(w2, W2_here)
    store_split(h1s, activate(z1, activation))
    plgpu.commit_smem()
    [z2] = multiply_add((b2_columns, transpose(w2), h1s))
    h2 = activate(z2, activation)
    for a, columns in enumerate(W3_columns):
        out[agent, a] = jnp.sum(h2 * columns, axis=0) + b3[agent, a]


def backward_kernel(
    activation, chunks, tiles, agent, chunk, warpgroup,
    first, W2, b2, W3, dout, dfirst, dW2, db2, dW3, W2_split, h1_split, dz2_split,
):  # fmt: skip
    """Sum the gradients over one chunk of one agent's rows, as matrices [units, rows of a tile].

    x and dout come transposed, [agents, D or A, rows]; rows of padding have dout = 0 and so add nothing. The gradients
    dfirst of first = (x, W1, b1) are (dW1, db1); those of (product, b1) are (dproduct, db1), where dproduct = dz1 is no
    sum over rows but written tile by tile.
    """
    store_split(mine(W2_split, warpgroup), load(W2.at[agent], MATRIX))
    plgpu.commit_smem()

    def add_tile(tile, sums):
        dW1_columns, db1_sum, dW2_sum, db2_sum, dW3_columns = sums
        here = pl.ds(tile * TILE, TILE)
        w2, h1s, dz2s = (mine(matrix, warpgroup) for matrix in (W2_split, h1_split, dz2_split))

        h1 = activate(z1_by_units(first, agent, here), activation)
        store_split(h1s, h1)
        plgpu.commit_smem()
        [z2] = multiply_add((down_columns(load(b2.at[agent], PER_ROW)), transpose(w2), h1s))
        h2 = activate(z2, activation)

        dh2 = zeros((64, 64), MATRIX)
        for a in range(dout.shape[1]):
            dout_row = along_rows(load(dout.at[agent, a, here], PER_COLUMN))
            dW3_columns[a] += jnp.sum(h2 * dout_row, axis=1)
            dh2 += down_columns(load(W3.at[agent, :, a], PER_ROW)) * dout_row
        dz2 = through_activation(dh2, h2, activation)
        db2_sum += jnp.sum(dz2, axis=1)
        store_split(dz2s, dz2)
        plgpu.commit_smem()
        dW2_sum, dh1 = multiply_add((dW2_sum, h1s, transpose(dz2s)), (zeros((64, 64), MATRIX), w2, dz2s))
        dz1 = through_activation(dh1, h1, activation)
        db1_sum += jnp.sum(dz1, axis=1)
        if has_product(first):
            dfirst[0][agent, :, here] = dz1
        else:
            x = first[0]
            for d in range(x.shape[1]):
                dW1_columns[d] += jnp.sum(dz1 * along_rows(load(x.at[agent, d, here], PER_COLUMN)), axis=1)
        return dW1_columns, db1_sum, dW2_sum, db2_sum, dW3_columns

    def vectors(count):
        return [zeros((64,), PER_ROW) for _ in range(count)]

    inputs = 0 if has_product(first) else first[0].shape[1]
    start = vectors(inputs), *vectors(1), zeros((64, 64), MATRIX), *vectors(1), vectors(dout.shape[1])
    first_tile, next_chunk = tiles_of(chunk, chunks, tiles)
    sums = lax.fori_loop(first_tile, next_chunk, add_tile, start)
    dW1_columns, db1_sum, dW2_sum, db2_sum, dW3_columns = sums
    dfirst[1][agent, chunk] = db1_sum
    dW2[agent, chunk] = dW2_sum
    db2[agent, chunk] = db2_sum
    for d, column in enumerate(dW1_columns):
        dfirst[0][agent, chunk, d] = column
    for a, column in enumerate(dW3_columns):
        dW3[agent, chunk, :, a] = column


def count_chunks(agents, tiles, most_warpgroups):
    """Choose in how many chunks every agent's tiles are divided.

    There is more than one only where there are too few agents to keep the whole GPU busy.
    """
    most = min(tiles, max(1, most_warpgroups * MULTIPROCESSORS // agents))
    return pl.cdiv(tiles, pl.cdiv(tiles, most))


def pad_rows(array, multiple, axis):
    """Append zeros along the axis of the rows, to a multiple of some number of rows."""
    rows = array.shape[axis]
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, multiple * pl.cdiv(rows, multiple) - rows)
    return jnp.pad(array, widths)


def transpose_rows(array, multiple):
    """Turn [agents, N, ...] into [agents, ..., N] with zeros at the end."""
    return pad_rows(array, multiple, axis=1).transpose(0, 2, 1)


def check_units(W2):
    """Refuse networks for which the kernels are not written."""
    if W2.shape[1:] != (HIDDEN, HIDDEN):
        raise ValueError(f"the kernels are written for {HIDDEN} units in each hidden layer, not for W2 {W2.shape[1:]}")


def run_forward(activation, first, rows, W2, b2, W3, b3):
    """Launch a forward kernel for some number of rows, which ``first`` holds as that kernel wants them."""
    check_units(W2)
    agents, outputs = W3.shape[0], W3.shape[2]
    if rows <= NARROW:
        width = first[0].shape[2]
        out = launch(
            functools.partial(narrow_forward_kernel, activation),
            "mlp_narrow_forward",
            (agents, 1),
            jax.ShapeDtypeStruct((agents, outputs, width), jnp.float32),
            (first, W2, b2, W3, b3),
            most_warpgroups=1,
            split_heights=(64, width),
        )
        return out.transpose(0, 2, 1)[:, :rows]
    tiles = pl.cdiv(rows, TILE)
    chunks = count_chunks(agents, tiles, most_warpgroups=4)
    out = launch(
        functools.partial(forward_kernel, activation, chunks, tiles),
        "mlp_forward",
        (agents, chunks),
        jax.ShapeDtypeStruct((agents, tiles * TILE, outputs), jnp.float32),
        (first, W2, b2, W3.transpose(0, 2, 1), b3),
        most_warpgroups=4,
        split_heights=(64,),
    )
    return out[:, :rows]


def run_backward(activation, first, W2, b2, W3, dout):
    """Launch the backward kernel; give the gradients of W1 or of the product, and of b1, W2, b2, W3 and b3."""
    agents, tiles = W2.shape[0], pl.cdiv(dout.shape[1], TILE)
    chunks = count_chunks(agents, tiles, most_warpgroups=3)

    def per_chunk(weight):
        return jax.ShapeDtypeStruct((agents, chunks, *weight.shape[1:]), jnp.float32)

    dfirst = jax.typeof(first[0]) if has_product(first) else per_chunk(first[1]), per_chunk(first[-1])
    (gradient, db1), *others = launch(
        functools.partial(backward_kernel, activation, chunks, tiles),
        "mlp_backward",
        (agents, chunks),
        [dfirst, *map(per_chunk, (W2, b2, W3))],
        (first, W2, b2, W3, transpose_rows(dout, TILE)),
        most_warpgroups=3,
        split_heights=(64, 64, 64),
    )
    if not has_product(first):
        gradient = jnp.sum(gradient, axis=1)
    return gradient, *(jnp.sum(sums, axis=1) for sums in (db1, *others)), jnp.sum(dout, axis=1)


@functools.partial(jax.jit, static_argnames="activation")
def forward(x, W1, b1, W2, b2, W3, b3, *, activation="tanh"):
    """Compute every agent's output [G, N, A] from x [G, N, D] and weights with a leading axis of length G."""
    rows = x.shape[1]
    x = transpose_rows(x, 8) if rows <= NARROW else pad_rows(x, TILE, axis=1)
    return run_forward(activation, (x, W1, b1), rows, W2, b2, W3, b3)


@functools.partial(jax.jit, static_argnames="activation")
def backward(x, W1, b1, W2, b2, W3, b3, dout, *, activation="tanh"):
    """Compute every agent's gradients (dW1, db1, dW2, db2, dW3, db3) from that of its output, dout [G, N, A]."""
    del b3
    return run_backward(activation, (transpose_rows(x, TILE), W1, b1), W2, b2, W3, dout)


@functools.partial(jax.jit, static_argnames="activation")
def forward_from_product(product, b1, W2, b2, W3, b3, *, activation="tanh"):
    """Compute every agent's output [G, N, A] from x @ W1, transposed to [G, 64, N]."""
    rows = product.shape[2]
    product = pad_rows(product, 8 if rows <= NARROW else TILE, axis=2)
    return run_forward(activation, (product, b1), rows, W2, b2, W3, b3)


@functools.partial(jax.jit, static_argnames="activation")
def backward_from_product(product, b1, W2, b2, W3, b3, dout, *, activation="tanh"):
    """Compute every agent's gradients (dproduct [G, 64, N], db1, dW2, db2, dW3, db3) from that of its output."""
    del b3
    padded = pad_rows(product, TILE, axis=2)
    dproduct, *others = run_backward(activation, (padded, b1), W2, b2, W3, dout)
    return dproduct[:, :, : product.shape[2]], *others
