"""Kernels for Hopper GPUs: on such a GPU themselves, elsewhere in the interpreter of Pallas Mosaic GPU."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, set_gpu_interpret_mode

from jrl.nets import mlp_kernel
from jrl.numerics import host, mosaic


def add_products(*products):
    return [start + wide(left) @ wide(right) for start, left, right in products]


def multiply_add(*products):
    def one(start, left, right):
        left, right = ([wide(part) for part in pair] for pair in (left, right))
        return start + left[0] @ right[0] + left[0] @ right[1] + left[1] @ right[0]

    return [one(*product) for product in products]


def wide(matrix):
    return matrix[...].astype(jnp.float32)


def split(matrix):
    high = matrix.astype(jnp.bfloat16)
    return high, (matrix - high.astype(jnp.float32)).astype(jnp.bfloat16)


@contextlib.contextmanager
def interpreted(**params) -> Iterator[None]:
    """Run kernels in the interpreter, unless this is a GPU that has them; ``detect_races=True`` prints RACE DETECTED.

    Three things do not run in the interpreter, and are replaced by what they mean: inline instructions, products that add to a
    start, and those whose left operand is in registers.
    """
    if host.why_no_kernels() is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mosaic, "add_products", add_products)
        patch.setattr(mlp_kernel, "multiply_add", multiply_add)
        patch.setattr(mlp_kernel, "split", split)
        patch.setattr(mlp_kernel, "reciprocal", lambda x: 1.0 / x)
        patch.setattr(host, "hopper", lambda: True)
        jax.clear_caches()
        set_gpu_interpret_mode(InterpretGPUParams(**params))
        try:
            yield
        finally:
            set_gpu_interpret_mode(None)
            jax.clear_caches()
