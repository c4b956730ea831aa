"""Scoring answers and texts: log-probabilities of tokens, differentiable, without all logits at once.

    scored = score(model, params, prompt, rollout, valid=valid, support=Support(temperature=0.7, top_p=0.9))

``scored.log_prob`` equals ``rollout.log_prob`` to rounding for the same parameters: temperature and truncation are part of the
policy, and under other parameters a token keeps the set of tokens that it was drawn from.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.equations import token_losses
from jrl.lm.model import Model
from jrl.lm.sampling import Rollout, Support, of_tokens
from jrl.lm.texts import Texts
from jrl.nets import moe
from jrl.numerics import sharding
from jrl.numerics.types import Params

Array = jax.Array
AT_ONCE = 2**25  # logits that scoring holds at once


class Scored(NamedTuple):
    """Of each token of an answer, float32 ``[B, T]``; whatever stands where the rollout is masked.

    Attributes:
        log_prob: in the distribution that it was drawn from.
        entropy: of that distribution.
        kl: of that distribution to the reference's, over the whole vocabulary; 0 without a reference.
        load: Load of the experts by the tokens of prompts and answers without their padding.
    """

    log_prob: Array
    entropy: Array
    kl: Array
    load: moe.Load


def score(
    model: Model,
    params: Params,
    prompt: Array,
    rollout: Rollout,
    *,
    valid: Array | None = None,
    support: Support = Support(),
    reference: Any = None,
) -> Scored:
    """Log-probabilities and entropies of answers under ``params``, differentiable, in one pass over prompt and answer.

    ``reference`` are parameters that the exact KL is taken to.
    """
    hidden, load = answer_hidden(model, params, prompt, rollout, valid)
    ref_hidden = None if reference is None else answer_hidden(model, reference, prompt, rollout, valid)[0]

    def logits(params: Params, hidden: Array, bits: Array | None) -> Array:
        full = model.head(params, hidden) / support.temperature
        if bits is None:
            return full
        return jnp.where(jnp.unpackbits(bits, axis=-1, count=model.vocab_size).astype(bool), full, -jnp.inf)

    def of_rows(x: tuple[Array, Any, Array, Array | None]) -> tuple[Array, Array, Array]:
        hidden, ref_hidden, tokens, bits = x
        full = logits(params, hidden, bits)
        log_p = jax.nn.log_softmax(full)
        entropy = -jnp.sum(jnp.exp(log_p) * jnp.where(jnp.isneginf(log_p), 0.0, log_p), axis=-1)
        kl = jnp.zeros(tokens.shape, jnp.float32)
        if reference is not None:
            kl = token_losses.kl_exact(full, jax.lax.stop_gradient(logits(reference, ref_hidden, bits)))
        return of_tokens(log_p, tokens), entropy, kl

    inputs = (hidden, ref_hidden, rollout.tokens, rollout.kept)
    log_prob, entropy, kl = _by_rows(of_rows, inputs, rollout.tokens.size, model.vocab_size)
    return Scored(log_prob, entropy, kl, load)


def _by_rows(function: Callable[[Any], Any], inputs: tuple[Any, ...], tokens: int, vocab_size: int) -> Any:
    """``function`` of rows with so many tokens, of as many rows at once as their logits allow: all would be larger than the model."""
    if tokens * vocab_size <= AT_ONCE:
        return function(inputs)
    batch = len(inputs[0])
    fit = [n for n in range(1, batch + 1) if batch % n == 0 and n * tokens // batch * vocab_size <= AT_ONCE]
    return jax.lax.map(jax.checkpoint(function), inputs, batch_size=max(fit, default=1))


class Read(NamedTuple):
    """Of each token of a text ``[B, L]``; whatever stands at the first of a row.

    Attributes:
        log_prob: float32, given those before it.
        likeliest: bool, whether it is the likeliest.
        load: Load of the experts.
        further: Log-probabilities by each module that predicts further ahead (``model.ahead``), the first given all tokens but the last one; and so on.
    """

    log_prob: Array
    likeliest: Array
    load: moe.Load
    further: tuple[Array, ...] = ()


def read(model: Model, params: Params, texts: Texts, *, packed: bool = False) -> Read:
    """Log-probabilities of all tokens of texts, differentiable. Only ``packed`` rows may hold several.

    Raises ``ValueError`` for packed rows where the model cannot read them.
    """
    tokens, segments = sharding.rows((texts.tokens, texts.segments))
    if packed:
        if model.packed is None:
            raise ValueError("this model cannot read packed texts, of which several are in a row")
        hidden, load = model.packed(params, tokens[:, :-1], segments[:, :-1])
    else:
        counted = segments[:, :-1] > 0
        hidden, load = model.hidden_and_load(params, tokens[:, :-1], jnp.ones_like(counted), counted)

    def of_rows(x: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = model.head(params, x[0])
        return of_tokens(jax.nn.log_softmax(logits), x[1]), jnp.argmax(logits, axis=-1) == x[1]

    found = _by_rows(of_rows, (hidden, tokens[:, 1:]), tokens[:, 1:].size, model.vocab_size)
    log_prob, likeliest = (jnp.pad(x, [(0, 0), (1, 0)]) for x in found)
    further = []
    if model.ahead is not None:
        for k, stream in enumerate(
            model.ahead(params, hidden, tokens[:, :-1], segments[:, :-1] if packed else None), 2
        ):
            said = _by_rows(of_rows, (stream, tokens[:, k:]), tokens[:, k:].size, model.vocab_size)[0]
            further.append(jnp.pad(said, [(0, 0), (k, 0)]))
    return Read(log_prob, likeliest, load, tuple(further))


def answer_hidden(
    model: Model, params: Params, prompt: Array, rollout: Rollout, valid: Array | None = None
) -> tuple[Array, moe.Load]:
    """The stream that predicts each token of the answers ``[B, T]``, ``[B, T, dim]``, and the load of experts by what was read."""
    hidden, load = model.hidden_and_load(params, *_read(prompt, rollout, valid))
    return hidden[:, prompt.shape[1] - 1 :], load


def _read(prompt: Array, rollout: Rollout, valid: Array | None) -> tuple[Array, Array, Array]:
    """What the model reads of prompts and answers, which of it is no padding before a prompt, and which is no padding behind an
    answer either, ``[B, P + T - 1]``."""
    valid = jnp.ones(prompt.shape, bool) if valid is None else valid
    whole = jnp.concatenate([prompt, rollout.tokens], axis=1)[:, :-1]
    behind = jnp.ones(rollout.mask.shape, bool)
    return sharding.rows((whole, *(jnp.concatenate([valid, x], axis=1)[:, :-1] for x in (behind, rollout.mask))))
