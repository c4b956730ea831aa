"""Which key a query sees: one rule for every kind of attention."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.numerics import checks

Array = jax.Array
NO_KEY, NO_QUERY = -1, -2  # segments of padding: they equal no other


class Rule(NamedTuple):
    """Query ``t`` stands at ``q_start + t``, key ``s`` at ``k_start + k_step s``; static, hashable.

    Attributes:
        causal: a query sees keys at its own position and before.
        window: it sees keys that are fewer than so many positions behind it; None for all.
        q_start: position of the first query.
        k_start: position of the first key.
        k_step: positions between keys, for keys that stand for several tokens.
    """

    causal: bool = True
    window: int | None = None
    q_start: int = 0
    k_start: int = 0
    k_step: int = 1

    def sees(self, t: Array, s: Array) -> Array:
        """Bool ``[T, S]`` for indices ``t [T]`` of queries and ``s [S]`` of keys."""
        behind = (self.q_start + t)[:, None] - (self.k_start + self.k_step * s)[None]
        visible = (behind >= 0) if self.causal else jnp.ones(behind.shape, bool)
        return visible if self.window is None else visible & (behind < self.window)

    def key_range(self, first: Array, last: Array, num_keys: int) -> tuple[Array, Array]:
        """``[low, high)``: outside it no key is seen by the queries ``first`` to ``last``."""
        low, high = jnp.zeros_like(first), jnp.full_like(last, num_keys)
        if self.causal:
            high = jnp.clip((self.q_start + last - self.k_start) // self.k_step + 1, 0, num_keys)
        if self.window is not None:
            gone = (self.q_start + first - self.window - self.k_start) // self.k_step  # the last that is out of sight
            low = jnp.clip(gone + 1, 0, num_keys)
        return low, high


def segments(name: str, batch: int, length: int, ids: Array | None, valid: Array | None, padding: int) -> Array | None:
    """Segment of each token, int32 ``[B, L]``; ``padding`` where not valid. None if there is one segment and no padding.

    Raises ``ValueError`` for a wrong shape or dtype.
    """
    for what, x, kind in (("segment_ids", ids, jnp.integer), ("valid", valid, jnp.bool_)):
        if x is not None and (x.shape != (batch, length) or not jnp.issubdtype(x.dtype, kind)):
            wanted = "int" if kind is jnp.integer else "bool"
            raise ValueError(f"{name} {what} must be {wanted} [{batch}, {length}]; got {x.dtype} {list(x.shape)}")
    if ids is None and valid is None:
        return None
    ids = jnp.zeros((batch, length), jnp.int32) if ids is None else ids.astype(jnp.int32)
    return ids if valid is None else jnp.where(valid, ids, padding)


def spread(x: Any, like: Array) -> Any:
    """Constants as varying over the axes of ``shard_map`` that ``like`` varies over, so that a loop may carry them."""
    zero = jnp.where(jnp.isnan(like[(0,) * like.ndim]), 0, 0)  # no constant for the tracer, one for the compiler
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), x)


def check_shapes(q: Array, k: Array, v: Array) -> None:
    """Raise ``ValueError`` unless these are queries ``[B, T, H, D]``, keys ``[B, S, K, D]`` and values ``[B, S, K, Dv]``."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention takes [batch, seq, heads, head_dim]; got {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"keys and values must have one [batch, seq, heads], and queries their batch; got {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"queries and keys must have one head_dim; got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"the number of query heads must be a multiple of that of key heads; got {shapes}")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"attention needs at least one of each; got {shapes}")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"queries must be floats; got {q.dtype}")


def check_window(window: int | None, causal: bool) -> None:
    """Raise ``ValueError`` for a window below 1, or one without causality."""
    if window is not None:
        checks.positive_int("window", window)
        if not causal:
            raise ValueError("window needs causal=True: it looks back only")
