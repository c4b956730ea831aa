"""What kernels for Hopper GPUs share: Pallas Mosaic GPU's layouts of matrices in registers, and products on the tensor cores.

A warpgroup (128 threads) holds a matrix of 64 rows, or a multiple; the tensor cores read one operand or both from shared memory, laid out by
``TRANSFORMS``.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

ROWS = 64  # of a matrix on the tensor cores
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # of shared memory, for 16-bit numbers

# How matrices, and vectors along their rows and columns, are spread over the threads of a warpgroup.
MATRIX = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def load(ref: Any, layout: Any) -> Any:
    """Read memory straight into registers."""
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]


def down_columns(vector: Any, width: int = 64) -> Any:
    """Make a matrix whose every column is ``vector`` (which has layout PER_ROW)."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], width), (0,))


def along_rows(vector: Any, height: int = 64) -> Any:
    """Make a matrix whose every row is ``vector`` (which has layout PER_COLUMN)."""
    return lax.broadcast_in_dim(vector, (height, *vector.shape), (1,))


def full(shape: tuple[int, ...], value: float, layout: Any) -> Any:
    """Make a float32 array of one value with the given layout in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def zeros(shape: tuple[int, ...], layout: Any) -> Any:
    """Make a float32 array of zeros with the given layout in registers."""
    return full(shape, 0, layout)


def transposed(ref: Any) -> Any:
    """View a matrix in shared memory as its transpose."""
    return ref.transpose((1, 0))


def hidden(index: Any) -> Any:
    """The same index, as one that the compiler does not know.

    It would compute all the tensor cores' operand addresses once and for all, and need registers to keep them.
    """
    return lax.optimization_barrier(jnp.asarray(index, jnp.int32))


def product(left: Any, right: Any) -> Any:
    """Compute left @ right, summed in float32, of matrices in shared memory."""

    def compute(total):
        plgpu.wgmma(total, left, right)
        return total[...]

    return pl.run_scoped(compute, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))


def add_products(*products: tuple[Any, Any, Any]) -> list[Any]:
    """Compute start + left @ right for each (start, left, right); right is in shared memory, left there or in registers."""

    def accumulate(totals):
        for total, (_, left, right) in zip(totals, products, strict=True):
            plgpu.wgmma(total, left, right)

    return pl.run_state(accumulate)([plgpu.ACC.init(start) for start, _, _ in products])


def in_shared_memory(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for matrices ``[..., rows, columns]`` of 16-bit numbers that the tensor cores read."""
    return plgpu.SMEM(shape, jnp.dtype(dtype), transforms=TRANSFORMS)
