"""Self-speculative decoding: the first module of multi-token prediction drafts a token, and the decoder reads it with the one before it.

A draft d from Q is taken with probability min(1, P(d) / Q(d)); if it is not, the token is drawn from max(0, P - Q), normalized. So each token is
distributed as the decoder's own (Leviathan et al. 2023, 2211.17192, theorem 1), and a step says one token or two.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.lm.sampling import Rollout, Support, check_support, of_tokens, supported
from jrl.nets import ahead, decoding, transformer
from jrl.nets.transformer import Config
from jrl.numerics import checks
from jrl.numerics.types import Params

Array = jax.Array


class Drafted(NamedTuple):
    """Answers, how many steps each took, and how many drafts were taken, int32 ``[B]``."""

    rollout: Rollout
    steps: Array
    taken: Array


class _Carry(NamedTuple):
    cache: Any  # of the decoder: all tokens but the newest
    draft_cache: Any
    number: Array  # tokens of each answer so far
    token: Array  # the newest
    draft: Array  # for the one after it
    draft_logits: Array
    alive: Array
    out: Rollout
    steps: Array
    taken: Array


def sample(
    key: Array,
    params: Params,
    config: Config,
    prompt: Array,
    *,
    length: int,
    end: int | Sequence[int],
    valid: Array | None = None,
    pad: int = 0,
    support: Support = Support(),
) -> Drafted:
    """Answers of up to ``length`` tokens to prompts int ``[B, P]``, padded on the left where ``valid`` is false, as those of ``sampling.sample`` are
    distributed.

    Raises ``ValueError`` for a decoder without ``config.ahead`` or with attention that is not dense, and for a truncated ``support``.
    """
    checks.positive_int("length", length)
    checks.positive_int("transformer.ahead", config.ahead)
    check_support(support, config.vocab_size)
    if support.truncates:
        raise ValueError("speculative decoding draws from all tokens: top_k, top_p and min_p must be left out")
    valid = jnp.ones(prompt.shape, bool) if valid is None else valid
    batch, width = prompt.shape
    start = (width - valid.sum(1)).astype(jnp.int32)
    ends = jnp.atleast_1d(jnp.asarray(end, jnp.int32))
    module, shape = ahead.as_decoder(params, config)
    first = jax.tree.map(lambda x: x[0], module["layers"])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))

    def draw(logits: Array, number: Array, use: int) -> Array:
        """A token of each row; ``use`` keeps the keys of what is drawn for one place apart."""
        one = jax.vmap(lambda key, n: jax.random.fold_in(jax.random.fold_in(key, n), use))(keys, number)
        return jax.vmap(jax.random.categorical)(one, logits)

    def head(x: Array) -> Array:
        return supported(transformer.logits(params, x, config), support)[0]

    def embedded(tokens: Array) -> Array:
        return params["embedding"][tokens]

    def drafted(hidden: Array, tokens: Array, cache: Any, position: Array) -> tuple[Array, Any]:
        """The module's logits behind each of ``tokens [B, S]``, which follow the stream ``hidden``."""
        x = ahead.joined(first, embedded(tokens), hidden, config)
        x, cache = decoding.decode_several(module, x, cache, position, shape, start=start)
        return head(x), cache

    def go(carry: _Carry) -> _Carry:
        at = width + carry.number - 1  # of the newest token
        both = jnp.stack([carry.token, carry.draft], axis=1)
        hidden, cache = decoding.decode_several(params, embedded(both), carry.cache, at, config, start=start)
        logits = head(hidden)
        p, q = (jax.nn.log_softmax(x) for x in (logits[:, 0], carry.draft_logits))
        ratio = of_tokens(p, carry.draft) - of_tokens(q, carry.draft)
        number = carry.number
        one = jax.vmap(lambda key, n: jax.random.fold_in(jax.random.fold_in(key, n), 1))(keys, number)
        takes = jnp.log(jax.vmap(jax.random.uniform)(one)) < ratio
        rest = jnp.log(jnp.maximum(jnp.exp(p) - jnp.exp(q), 0.0))
        token = jnp.where(takes, carry.draft, draw(rest, number, 2)).astype(jnp.int32)
        behind = draw(logits[:, 1], number + 1, 3).astype(jnp.int32)
        out, alive, count = said(carry.out, carry.alive, carry.number, token, of_tokens(p, token))
        second = of_tokens(jax.nn.log_softmax(logits[:, 1]), behind)
        out, alive, count = said(out, alive, count, behind, second, takes)
        newest = jnp.where(takes, behind, token)
        q_logits, draft_cache = drafted(hidden, jnp.stack([token, behind], axis=1), carry.draft_cache, at)
        q_next = jnp.where(takes[:, None], q_logits[:, 1], q_logits[:, 0])
        draft = draw(q_next, count, 4).astype(jnp.int32)
        steps, taken = carry.steps + carry.alive, carry.taken + (carry.alive & takes)
        return _Carry(cache, draft_cache, count, newest, draft, q_next, alive, out, steps, taken)

    def said(
        out: Rollout, alive: Array, count: Array, token: Array, log_prob: Array, goes: Array | bool = True
    ) -> tuple[Rollout, Array, Array]:
        """The answers with one more token in the rows that are alive and go, which rows go on, and the numbers of tokens."""
        writes = alive & goes
        at = jnp.where(writes, count, length)  # out of range, and dropped
        row = jnp.arange(batch)
        tokens = out.tokens.at[row, at].set(token, mode="drop")
        mask, log_p = out.mask.at[row, at].set(True, mode="drop"), out.log_prob.at[row, at].set(log_prob, mode="drop")
        count = count + writes
        ended = writes & (jnp.isin(token, ends) | (count >= length))
        return Rollout(tokens, mask, log_p, None), alive & ~ended, count

    capacity = width + length + 1
    cache = decoding.init_cache(config, batch, capacity, params["embedding"].dtype)
    hidden, cache = decoding.prefill_blocks(params, embedded(prompt), cache, config, valid=valid)
    logits = head(hidden[:, -1])
    token = draw(logits, jnp.zeros(batch, jnp.int32), 0).astype(jnp.int32)
    empty = Rollout(
        jnp.full((batch, length), pad, jnp.int32),
        jnp.zeros((batch, length), bool),
        jnp.zeros((batch, length), jnp.float32),
        None,
    )
    none, all_rows = jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool)
    out, alive, count = said(empty, all_rows, none, token, of_tokens(jax.nn.log_softmax(logits), token))
    # The module has read each token of the prompt with the stream before it, and the first of the answer.
    pairs = ahead.joined(first, embedded(jnp.concatenate([prompt[:, 1:], token[:, None]], axis=1)), hidden, config)
    draft_cache = decoding.init_cache(shape, batch, capacity, pairs.dtype)
    x, draft_cache = decoding.prefill_blocks(module, pairs, draft_cache, shape, valid=valid)
    q_logits = head(x[:, -1])
    draft = draw(q_logits, count, 4).astype(jnp.int32)
    carry = _Carry(cache, draft_cache, count, token, draft, q_logits, alive, out, none, none)
    carry = jax.lax.while_loop(lambda carry: jnp.any(carry.alive), go, carry)
    return Drafted(carry.out, carry.steps, carry.taken)
