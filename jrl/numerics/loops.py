"""Loops laid out for the machine that runs them; their numbers are the same on all of them.

A GPU starts a kernel for each array that a step writes, and each costs a microsecond or two however small it is, which is most of the
time of a small step. So on a GPU a step writes the numbers that it gives out side by side into one array, and several steps
are compiled as one body. On a CPU and a TPU the loops are ``jax.lax.scan`` as it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.numerics import host

Array = jax.Array
LARGE = 4096  # bytes of an output, for each step, that is written by itself: it gains nothing, and would be copied once more


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    gpu_unroll: int = 1,
) -> tuple[Any, Any]:
    """``jax.lax.scan``; on a GPU with outputs written together, and ``gpu_unroll`` steps in one body."""
    if host.platform() != "gpu":
        return jax.lax.scan(step, carry, xs, length, reverse)
    packings = []  # how the outputs are packed is known once the step is traced

    def packed_step(carry: Any, x: Any) -> tuple[Any, Any]:
        carry, y = step(carry, x)
        packings.append(_Packing.of(y))
        return carry, packings[-1].pack(y)

    carry, packed = jax.lax.scan(packed_step, carry, xs, length, reverse, unroll=gpu_unroll)
    return carry, packings[-1].unpack(packed)


class _Packing(NamedTuple):
    """Which leaves of a tree stand side by side in one array of words, and which by themselves."""

    treedef: Any
    shapes: list[Any]
    together: dict[str, list[int]]  # dtype of the words -> leaves
    alone: list[int]

    @classmethod
    def of(cls, tree: Any) -> "_Packing":
        leaves, treedef = jax.tree.flatten(tree)
        shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
        together: dict[str, list[int]] = {}
        alone = []
        for i, x in enumerate(shapes):
            key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            if key or x.size * x.dtype.itemsize > LARGE or not x.size:
                alone.append(i)
            else:
                together.setdefault(_word(x.dtype), []).append(i)
        return cls(treedef, shapes, together, alone)

    def pack(self, tree: Any) -> tuple[dict[str, Array], list[Array]]:
        leaves = jax.tree.leaves(tree)
        words = {
            word: jnp.concatenate([_bits(jnp.asarray(leaves[i]), word).ravel() for i in those])
            for word, those in self.together.items()
        }
        return words, [leaves[i] for i in self.alone]

    def unpack(self, packed: tuple[dict[str, Array], list[Array]]) -> Any:
        """The tree of arrays with a leading axis, from packed ones with a leading axis."""
        words, alone = packed
        leaves: list[Any] = [None] * len(self.shapes)
        for i, x in zip(self.alone, alone, strict=True):
            leaves[i] = x
        for word, those in self.together.items():
            start = 0
            for i in those:
                shape = self.shapes[i]
                part = words[word][:, start : start + shape.size].reshape(-1, *shape.shape)
                leaves[i] = _bits(part, shape.dtype)
                start += shape.size
        return jax.tree.unflatten(self.treedef, leaves)


def _word(dtype: Any) -> str:
    """The type that numbers stand in: floats keep theirs, so that gradients go through, and int32 stands beside float32."""
    if jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 4:
        return str(dtype)
    return "float32" if dtype.itemsize == 4 else f"uint{8 * dtype.itemsize}"


def _bits(x: Array, dtype: Any) -> Array:
    """The same bits as another type of the same width."""
    dtype = jnp.dtype(dtype)
    if x.dtype == dtype:
        return x
    return x.astype(dtype) if bool in (x.dtype, dtype) else jax.lax.bitcast_convert_type(x, dtype)


def sum_over_parts(function: Callable[[Any], Any], rows: Any, parts: int) -> Any:
    """The sum of ``function`` over ``parts`` of rows ``[N, ...]``, one after another, each computed again in the backward pass: the memory is that of
    one part."""
    if parts == 1:
        return function(rows)
    found = jax.lax.map(jax.checkpoint(function), split(rows, parts))
    return jax.tree.map(lambda x: x.sum(0), found)


def in_parts(function: Callable[[Any], Any], rows: Any, parts: int) -> Any:
    """``function`` of rows ``[N, ...]``, a tree of arrays ``[N, ...]``, in ``parts`` one after another."""
    found = jax.lax.map(function, split(rows, parts))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def split(rows: Any, parts: int) -> Any:
    """Rows ``[N, ...]`` as ``[parts, N / parts, ...]``."""
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)
