"""Sampling answers with a cache. The log-probabilities that training uses (``lm.scoring``) are those of the sampler.

rollout = sample(key, model, params, prompt, length=64, end=2, valid=valid, support=Support(temperature=0.7, top_p=0.9))
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.lm.model import Model
from jrl.numerics import checks, sharding
from jrl.numerics.types import Params

Array = jax.Array
LONG = 128  # tokens of an answer from which decoding goes in stages


class Support(NamedTuple):
    """The distribution that tokens are drawn from, made of the model's.

    Attributes:
        temperature: of the softmax; may be traced.
        top_k: the likeliest so many; 0 for all.
        top_p: the fewest, likeliest first, that have this probability together (1904.09751); 1 for all.
        min_p: those at least so likely as a share of the likeliest (2407.01082); 0 for all.
    """

    temperature: Array | float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def check_support(support: Support, vocab_size: int) -> None:
    """Raise ``ValueError`` for a setting out of range."""
    checks.above_zero("temperature", support.temperature)
    checks.positive_int("top_k", support.top_k, at_least=0)
    checks.within("top_k", support.top_k, 0, vocab_size)
    checks.above_zero("top_p", support.top_p)
    checks.within("top_p", support.top_p, 0, 1)
    checks.within("min_p", support.min_p, 0, 1)


def kept(logits: Array, support: Support) -> Array:
    """Which tokens remain, bool ``[..., V]``, for logits already divided by the temperature. The likeliest always does.

    Each rule goes by the probabilities of all tokens; what is as likely as the last one kept is kept too.
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    keep = jnp.ones(logits.shape, bool)
    if support.top_k:
        keep &= logits >= descending[..., support.top_k - 1 : support.top_k]
    if support.top_p < 1:
        p = jax.nn.softmax(descending)
        needed = jnp.sum(jnp.cumsum(p, axis=-1) - p < support.top_p, axis=-1, keepdims=True)
        keep &= logits >= jnp.take_along_axis(descending, needed - 1, axis=-1)
    if support.min_p:
        keep &= logits >= descending[..., :1] + jnp.log(support.min_p)
    return keep


def supported(logits: Array, support: Support) -> tuple[Array, Array | None]:
    """Logits ``[..., V]`` of the distribution that tokens are drawn from, -inf where cut off, and which remain; None for all."""
    logits = logits / support.temperature
    if not support.truncates:
        return logits, None
    keep = kept(logits, support)
    return jnp.where(keep, logits, -jnp.inf), keep


class Rollout(NamedTuple):
    """Answers ``[B, T]``: what was said, up to and including the first end token, and padding behind.

    Attributes:
        tokens: int32.
        mask: bool, true up to and including the end token.
        log_prob: float32, of each token in the distribution it was drawn from; 0 where masked.
        kept: the tokens that truncation left, as bits uint8 ``[B, T, ceil(V / 8)]``; None without truncation.
    """

    tokens: Array
    mask: Array
    log_prob: Array
    kept: Array | None


def sample(
    key: Array,
    model: Model,
    params: Params,
    prompt: Array,
    *,
    length: int,
    end: int | Sequence[int],
    valid: Array | None = None,
    pad: int = 0,
    support: Support = Support(),
    copies: int = 1,
) -> Rollout:
    """Answers of up to ``length`` tokens to prompts int ``[N, P]``, padded on the left where ``valid`` is false: ``copies`` to each, side by side,
    of which the prompt is read once, ``B = N copies`` in all.

    The key is one, from which each row's is folded, or one a row ``[B]``: a row does not depend on the rows beside it; a raw one of
    ``jax.random.PRNGKey`` will do. The loop stops when every row has said ``end``, or one of several; ``pad`` may be one of them.
    Raises ``ValueError`` for wrong shapes and settings.
    """
    checks.positive_int("length", length)
    checks.positive_int("copies", copies)
    check_support(support, model.vocab_size)
    if prompt.ndim != 2 or (valid is not None and valid.shape != prompt.shape):
        given = None if valid is None else list(valid.shape)
        raise ValueError(f"sample: prompt must be [N, P] and valid like it; got {list(prompt.shape)} and {given}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    ends = jnp.atleast_1d(jnp.asarray(end, jnp.int32))
    valid = jnp.ones(prompt.shape, bool) if valid is None else valid
    if copies > 1 and (model.repeat is None or len(prompt) % (sharding.data_devices() or 1)):
        prompt, valid = (jnp.repeat(x, copies, axis=0) for x in (prompt, valid))
        copies = 1
    batch, width = prompt.shape[0] * copies, prompt.shape[1]
    prompt, valid = sharding.rows((prompt, valid))
    start = jnp.repeat((width - valid.sum(1)).astype(jnp.int32), copies)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch)) if key.ndim == 0 else key

    def say(out: Rollout, logits: Array, t: Array, alive: Array) -> tuple[Rollout, Array, Array]:
        """The answers with the token at t, that token, and which rows go on."""
        logits, keep = supported(logits, support)
        drawn = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in, (0, None))(keys, t), logits)
        token = jnp.where(alive, drawn, pad).astype(jnp.int32)
        log_prob = jnp.where(alive, of_tokens(jax.nn.log_softmax(logits), drawn), 0.0)
        new = Rollout(token, alive, log_prob, None if keep is None else jnp.packbits(keep, axis=-1))
        return jax.tree.map(lambda rows, x: rows.at[:, t].set(x), out, new), token, alive & ~jnp.isin(token, ends)

    def go(carry: Any) -> Any:
        t, token, cache, alive, out = carry
        logits, cache = model.step(params, token, cache, width + t - 1, start)
        out, token, alive = say(out, logits, t, alive)
        return t + 1, token, cache, alive, out

    shape = (batch, length)
    bits = jnp.zeros((*shape, -(-model.vocab_size // 8)), jnp.uint8) if support.truncates else None
    empty = Rollout(jnp.full(shape, pad, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32), bits)
    stages = rooms(width, length) if model.grow else [width + length]
    logits, cache = model.prefill(params, prompt, valid, stages[0])
    if copies > 1:
        assert model.repeat is not None
        logits, cache = jnp.repeat(logits, copies, axis=0), model.repeat(cache, copies)
    out, token, alive = say(empty, logits, jnp.int32(0), jnp.ones(batch, bool))
    carry: Any = (jnp.int32(1), token, cache, alive, out)
    for room in stages:
        t, token, cache, alive, out = carry
        cache = model.grow(cache, room) if model.grow else cache
        goes_on = functools.partial(_goes_on, min(length, room - width + 1))
        carry = jax.lax.while_loop(goes_on, go, (t, token, cache, alive, out))
    return carry[4]


def _goes_on(most: int, carry: Any) -> Array:
    t, _, _, alive, _ = carry
    return (t < most) & jnp.any(alive)


def rooms(width: int, length: int) -> list[int]:
    """How many tokens the cache has room for in each stage of decoding, which attends to all that it has room for: of long answers a quarter,
    a half, and all."""
    parts = (4, 2, 1) if length >= LONG else (1,)
    return [width + -(-length // part) for part in parts]


def of_tokens(log_p: Array, token: Array) -> Array:
    """Numbers of tokens int ``[...]`` among those of all, ``[..., V]``."""
    return jnp.take_along_axis(log_p, token[..., None], axis=-1)[..., 0]
