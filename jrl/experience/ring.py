"""A ring of rows of any kind, each in the place of the oldest: what is worth keeping of what is seen."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Ring(NamedTuple):
    """Rows, a tree of arrays ``[capacity, ...]``, and how many were written."""

    rows: Any
    written: Array  # int32; once the ring is full, reduced by its length


def empty(spec: Any, capacity: int) -> Ring:
    """A ring without rows, whose shapes and dtypes are ``spec``."""
    return Ring(jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), spec), jnp.int32(0))


def add(ring: Ring, rows: Any, chosen: Array) -> Ring:
    """The ring with those of the rows ``[N, ...]`` that are ``chosen [N]``; N must be at most the ring's length."""
    length = jax.tree.leaves(ring.rows)[0].shape[0]
    if chosen.shape[0] > length:
        raise ValueError(f"ring: at most {length} rows can be added at once; got {chosen.shape[0]}")
    at = jnp.where(chosen, (ring.written + jnp.cumsum(chosen) - 1) % length, length)
    kept = jax.tree.map(lambda store, x: store.at[at].set(x, mode="drop"), ring.rows, rows)
    written = ring.written + chosen.sum(dtype=jnp.int32)
    return Ring(kept, jnp.where(written >= 2 * length, written - length, written))


def sample(ring: Ring, key: Array, number: int, newest: int | None = None) -> tuple[Any, Array]:
    """Rows ``[number, ...]``, each drawn uniformly from all or from the ``newest`` so many, and whether there are any, bool ``[]``."""
    length = jax.tree.leaves(ring.rows)[0].shape[0]
    stored = jnp.minimum(ring.written, min(length, newest or length))
    age = jax.random.randint(key, (number,), 0, jnp.maximum(stored, 1))
    at = (ring.written - 1 - age) % length
    return jax.tree.map(lambda x: x[at], ring.rows), stored > 0
