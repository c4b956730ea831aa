"""Where the blocks of native sparse attention lie: see ``nsa``.

Blocks count from the first token of their segment, so that padding and neighbours in a packed row change nothing. In a row of one
segment they lie at multiples of their size. A row of several is put into another order, where whole blocks of l' tokens lie at
multiples of l' again:

    whole blocks of every segment, then the unfinished block at the end of every segment

Both parts keep the order of the tokens, and nothing is added, so that the shapes do not depend on the segments. Only a query inside
an unfinished block sees it, always as its own block. It spans at most two blocks of the new order; what else lies in them is hidden,
since a query sees a token by the token's index in the row.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jrl.attention.nsa_branches import Config

Array = jax.Array


class Blocks(NamedTuple):
    """Blocks of S keys, and those that the queries ``[B, T]`` may read; every entry is int32.

    Attributes:
        first: index of the first token of each compressed block ``[B, N]``; S where there is none. The l'/d that begin in a block
            of selection stand side by side.
        token: index of the token at each place of each block of selection ``[B, blocks, l']``; S where there is none.
        own: the block of each query ``[B, T]``; for a query in an unfinished block, one past its segment's last whole block.
        oldest: the first block that each query may read ``[B, T]``.
        segments: what a row of several segments needs besides, or None.
    """

    first: Array
    token: Array
    own: Array
    oldest: Array
    segments: "Segments | None"


class Segments(NamedTuple):
    """The new order of a row.

    Attributes:
        order: index of the token at each place ``[B, S]``.
        place: place of the token at each index ``[B, S]``.
        unfinished: whether each query stands in an unfinished block, bool ``[B, T]``.
        tail: the blocks with the first and the last token that it sees of that unfinished block ``[B, T, 2]``.
    """

    order: Array
    place: Array
    unfinished: Array
    tail: Array


def of_one_segment(num_keys: int, t: Array, start: Array, config: "Config") -> Blocks:
    """Blocks of rows of one segment, for queries that stand at ``t`` and see keys from ``start`` on, both ``[B, T]``."""
    size, batch = config.select_block, t.shape[0]
    first = jnp.arange(config.num_compressed(num_keys), dtype=jnp.int32) * config.stride
    token = jnp.arange(num_keys + -num_keys % size, dtype=jnp.int32).reshape(-1, size)
    first, token = (jnp.broadcast_to(x[None], (batch, *x.shape)) for x in (first, token))
    return Blocks(first, token, t // size, start // size, None)


def of_segments(origin: Array, t: Array, start: Array, config: "Config") -> Blocks:
    """Blocks of rows of segments, where ``origin [B, S]`` is the index of the first token of each token's segment."""
    (batch, length), size, stride = origin.shape, config.select_block, config.stride
    at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], origin.shape)

    def fits(first: Array, tokens: int) -> Array:
        """Whether so many tokens from ``first`` on are there, in the segment of the token at hand."""
        last = first + tokens - 1
        return (first >= 0) & (last < length) & (_at(origin, jnp.clip(last, 0, length - 1)) == origin)

    head = at - (at - origin) % size  # first token of each token's block
    whole = fits(head, size)
    before = jnp.cumsum(whole, axis=1, dtype=jnp.int32) - whole  # tokens of whole blocks before each token
    total = whole.sum(1, dtype=jnp.int32, keepdims=True)
    place = jnp.where(whole, before, total + at - before)
    order = _listed(place, length, length)
    token = jnp.pad(order, [(0, 0), (0, -length % size)], constant_values=length).reshape(batch, -1, size)

    begins = (at - origin) % stride == 0
    compressed = begins & fits(at, config.block)
    # Those that begin in unfinished blocks come last.
    behind = jnp.cumsum(compressed & ~whole, axis=1, dtype=jnp.int32) - 1
    slot = jnp.where(whole, before // stride, total // stride + behind)
    first = _listed(jnp.where(compressed, slot, length), length // stride, length)

    tail = jnp.stack([_at(place, jnp.maximum(_at(head, t), start)), _at(place, t)], axis=-1) // size
    own, oldest = _at(before, t) // size, _at(before, start) // size
    return Blocks(first, token, own, oldest, Segments(order, place, ~_at(whole, t), tail))


def read(chosen: Array, blocks: Blocks) -> Array:
    """Blocks of the new order that hold the ``chosen`` ones ``[B, K, T, n]``: one more, for the second half of an unfinished one."""
    if blocks.segments is None:
        return chosen
    none = blocks.token.shape[1]
    tail, unfinished = blocks.segments.tail[:, None], blocks.segments.unfinished[:, None, :, None]
    own = unfinished & (chosen == blocks.own[:, None, :, None])
    spans = unfinished & (tail[..., :1] != tail[..., 1:])
    second = jnp.broadcast_to(jnp.where(spans, tail[..., 1:], none), (*chosen.shape[:3], 1))
    return jnp.concatenate([jnp.where(own, tail[..., :1], chosen), second], axis=-1)


def gather(x: Array, first: Array, size: int) -> Array:
    """``size`` tokens of ``x [B, S, ...]`` from each of ``first [B, N]`` on: ``[B, N, size, ...]``."""
    of_row = jax.vmap(lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, size), (None, 0))
    return jax.vmap(of_row)(x, first)


@jax.custom_vjp
def permute(x: Array, order: Array, place: Array) -> Array:
    """``x [B, S, ...]`` in the new order. Its gradient goes back by the inverse order, where JAX would add row by row."""
    return jax.vmap(lambda x, order: x[order])(x, order)


permute.defvjp(
    lambda x, order, place: (permute(x, order, place), (order, place)),
    lambda saved, d: (permute(d, saved[1], saved[0]), None, None),
)


def _listed(slot: Array, number: int, none: int) -> Array:
    """Which index went to each of ``number`` slots, ``none`` where no one did: int32 ``[B, number]`` for ``slot [B, S]``."""
    index = jnp.arange(slot.shape[1], dtype=jnp.int32)
    return jax.vmap(lambda slot: jnp.full(number, none, jnp.int32).at[slot].set(index, mode="drop"))(slot)


def _at(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index, axis=1)
