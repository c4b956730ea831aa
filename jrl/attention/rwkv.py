"""RWKV-6 time mixing (Peng et al. 2024, arXiv 2404.05892, section 4.2): attention without softmax, as a recurrence.

Each head keeps a matrix S ``[D, Dv]``, whose rows fade by a decay that depends on the token:

    y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)                    u: a bonus for the token itself           (eq. 18)
    S_t = diag(w_t) S_{t-1} + k_t^T v_t                        0 < w_t < 1                               (eq. 19)

Its memory does not grow with the sequence. ``recur`` is the recurrence, a token at a time; ``mix`` gives the same in chunks, whose
tokens are worked on together: with ``W_t = log w_1 + ... + log w_t`` inside a chunk that begins with S_0,

    y_t = (r_t exp(W_{t-1})) S_0 + sum_{i<t} (r_t exp(W_{t-1} - W_i) . k_i) v_i + (r_t u . k_t) v_t

No exponent is above 0.
"""

import jax
import jax.numpy as jnp

from jrl.attention.visibility import spread

Array = jax.Array


def recur(
    r: Array, k: Array, v: Array, log_w: Array, u: Array, state: Array, first: Array | None = None
) -> tuple[Array, Array]:
    """One token of each row: ``(y [B, H, Dv], state [B, H, D, Dv])`` in float32.

    Args:
        r: receptance, what a query is elsewhere ``[B, H, D]``.
        k: keys ``[B, H, D]``.
        v: values ``[B, H, Dv]``.
        log_w: logarithm of the decay, below 0 ``[B, H, D]``.
        u: bonus of the token itself ``[H, D]``.
        state: before the token.
        first: bool ``[B]``: the state is forgotten before the token.
    """
    r, k, v, log_w, u = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (r, k, v, log_w, u))
    if first is not None:
        state = jnp.where(first[:, None, None, None], 0.0, state)
    new = k[..., :, None] * v[..., None, :]
    y = jnp.einsum("bhd,bhdv->bhv", r, state + jnp.broadcast_to(u[None, :, :, None], new.shape) * new)
    return y, jnp.exp(log_w)[..., None] * state + new


def mix(
    r: Array,
    k: Array,
    v: Array,
    log_w: Array,
    u: Array,
    state: Array | None = None,
    first: Array | None = None,
    chunk: int = 16,
) -> tuple[Array, Array]:
    """A whole sequence ``[B, T, H, ...]``: ``(y [B, T, H, Dv], state after it [B, H, D, Dv])``; arguments as in ``recur``, ``first`` ``[B, T]``."""
    wide = jnp.promote_types(r.dtype, jnp.float32)
    batch, length, heads, dim = r.shape
    if not (batch and length):
        raise ValueError(f"rwkv needs at least one token of one sequence; got {list(r.shape)}")
    begin = jnp.zeros((batch, heads, dim, v.shape[-1]), wide) if state is None else state
    first = jnp.zeros((batch, length), bool) if first is None else first
    pad = -length % chunk

    def split(x: Array, dtype: jax.typing.DTypeLike) -> Array:
        """``[B, T, ...] -> [chunks, B, chunk, ...]``; padding neither adds nor fades."""
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)).astype(dtype)
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    before = jnp.tril(jnp.ones((chunk, chunk), bool), -1)

    def gaps(log_w: Array) -> tuple[Array, Array]:
        """``W_{t-1} - W_i`` for i before t, ``[B, t, i, H, D]``, and ``W_last - W_i``: summed, not subtracted, which would
        cancel where a token fades all."""
        after = jnp.where(before[None, :, :, None, None], log_w[:, :, None], 0.0)  # of token t, if it is after i
        total = jnp.cumsum(after, axis=1)
        return jnp.pad(total[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * 3), total[:, -1]

    def step(state: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        r, k, v, log_w, first = part
        fade = jnp.cumsum(log_w, axis=1)  # W_t
        earlier = jnp.pad(fade[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)])  # W_{t-1}
        between, after = gaps(log_w)
        episode = jnp.cumsum(first, axis=1)  # nothing goes over the start of an episode
        carried = (episode == 0)[:, :, None, None]
        y = jnp.einsum("bthd,bhdv->bthv", jnp.where(carried, r * jnp.exp(earlier), 0.0), state)
        pairs = before[None] & (episode[:, :, None] == episode[:, None, :])
        gap = jnp.where(pairs[..., None, None], between, -jnp.inf)
        scores = jnp.einsum("bthd,bihd,btihd->btih", r, k, jnp.exp(gap))
        y = y + jnp.einsum("btih,bihv->bthv", scores, v)
        own = jnp.sum(r * jnp.broadcast_to(u.astype(wide)[None, None], r.shape) * k, axis=-1, keepdims=True)
        y = y + own * v
        last = episode[:, -1:]
        kept = jnp.where((episode == last)[:, :, None, None], jnp.exp(after), 0.0)
        old = jnp.where((last == 0)[..., None, None], jnp.exp(fade[:, -1])[..., None], 0.0)
        return old * state + jnp.einsum("bthd,bthv->bhdv", k * kept, v), y

    parts = (*(split(x, wide) for x in (r, k, v, log_w)), split(first, bool))
    end, y = jax.lax.scan(step, spread(begin, r), parts)
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, heads, v.shape[-1])[:, :length], end
