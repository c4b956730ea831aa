"""Sampling answers with a cache, and scoring them: the log-probabilities that training uses are those of the sampler.

    rollout = sample(key, model, params, prompt, length=64, end=2, valid=valid, support=Support(temperature=0.7, top_p=0.9))
    scored = score(model, params, prompt, rollout, valid=valid, support=Support(temperature=0.7, top_p=0.9))

``scored.log_prob`` equals ``rollout.log_prob`` to rounding for the same parameters: temperature and truncation are part of the
policy, and under other parameters a token keeps the set of tokens that it was drawn from.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.equations import token_losses
from jrl.nets import adapters, moe, transformer
from jrl.numerics import checks, lora, precision, sharding
from jrl.numerics.types import Params

Array = jax.Array
AT_ONCE = 2**25  # logits that scoring holds at once
LONG = 128  # tokens of an answer from which decoding goes in stages


class Model(NamedTuple):
    """What sampling and scoring need of a language model; ``decoder`` makes one.

    Attributes:
        init: ``key -> params``.
        hidden_and_load: ``(params, tokens [B, L], valid [B, L], counted [B, L]) -> (hidden [B, L, dim], load)``: the stream before
            the head, and the load of experts by the tokens that are counted. Invalid tokens are padding on the left.
        head: ``(params, [..., dim]) -> logits [..., V]`` float32.
        prefill: ``(params, tokens [B, P], valid, capacity) -> (logits [B, V], cache)`` after the prompt.
        step: ``(params, token [B], cache, position, start [B]) -> (logits [B, V], cache)``.
        vocab_size: V.
        balance: ``(params, load) -> params`` after a step of learning, with routers' biases moved towards an even load.
        balance_loss: ``load -> []``, the loss that evens the load of routers without a bias; 0 for all others.
        low_rank: a regular expression for the parameters that may be ``lora.LowRank``; None for none.
        grow: ``(cache, capacity) -> cache`` with room for more tokens; None where room for all is needed from the start.
        repeat: ``(cache, copies) -> cache``, each row so many times, side by side; None to read a prompt once for each of its answers.
        adapter: ``adapters.Config -> lora.Adapter`` of what is trained.
    """

    init: Callable[[Array], Any]
    hidden_and_load: Callable[[Any, Array, Array, Array], tuple[Array, moe.Load]]
    head: Callable[[Any, Array], Array]
    prefill: Callable[[Any, Array, Array, int], tuple[Array, Any]]
    step: Callable[[Any, Array, Any, Array, Array], tuple[Array, Any]]
    vocab_size: int
    balance: Callable[[Any, moe.Load], Any] = lambda params, load: params
    balance_loss: Callable[[moe.Load], Array | float] = lambda load: 0.0
    low_rank: str | None = None
    grow: Callable[[Any, int], Any] | None = None
    repeat: Callable[[Any, int], Any] | None = None
    adapter: Callable[[adapters.Config], lora.Adapter] = lambda config: adapters.make(config, None)


def decoder(config: transformer.Config, dtype: jax.typing.DTypeLike = jnp.float32, tokens: int | None = None) -> Model:
    """A decoder of ``nets/transformer.py`` whose stream and caches are ``dtype``; logits are float32, and so are the parameters that
    ``precision.FLOAT32`` names.

    Published tables are often longer than the tokenizer's vocabulary. With ``tokens``, that vocabulary's size, the ids behind it have
    the logit -inf: they are never sampled, and have no part in any probability. Raises ``ValueError`` for a decoder without a
    vocabulary or that is not causal, and for more tokens than it has.
    """
    checks.positive_int("transformer.vocab_size", config.vocab_size)
    if not config.causal:
        raise ValueError("a language model needs transformer.causal=True")
    tokens = config.vocab_size if tokens is None else tokens
    checks.positive_int("tokens", tokens)
    checks.within("tokens", tokens, 1, config.vocab_size)

    def cast(params: Params) -> Any:
        return precision.cast_params(params, jnp.dtype(dtype).name)

    def hidden_and_load(params: Params, tokens: Array, valid: Array, counted: Array) -> tuple[Array, moe.Load]:
        # Padding goes behind the tokens, which never see what follows them: no segments, which cuDNN would refuse.
        params, padding = cast(params), jnp.argmax(valid, axis=1)
        tokens, counted = (_turned(x, -padding) for x in (tokens, counted))
        hidden, load = transformer.blocks_and_loads(params, params["embedding"][tokens], config, counted=counted)
        return _turned(hidden, padding), load

    def known(logits: Array) -> Array:
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return logits if tokens == config.vocab_size else jnp.where(ids < tokens, logits, -jnp.inf)

    def prefill(params: Params, prompt: Array, valid: Array, capacity: int) -> tuple[Array, Any]:
        empty = transformer.init_cache(config, len(prompt), capacity, dtype)
        logits, cache = transformer.prefill(cast(params), prompt, empty, config, valid=valid)
        return known(logits), cache

    def step(params: Params, token: Array, cache: Any, position: Array, start: Array) -> tuple[Array, Any]:
        logits, cache = transformer.decode(cast(params), token, cache, position, config, start=start)
        return known(logits), cache

    return Model(
        lambda key: transformer.init(key, config),
        hidden_and_load,
        lambda params, x: known(transformer.logits(cast(params), x, config)),
        prefill,
        step,
        config.vocab_size,
        lambda params, load: transformer.balanced(params, load, config),
        lambda load: transformer.balance_loss(load, config),
        transformer.low_rank(config),
        lambda cache, capacity: transformer.grown(cache, config, capacity),
        lambda cache, copies: jax.tree.map(lambda x: jnp.repeat(x, copies, axis=1), cache),
        lambda adapter: adapters.make(adapter, config),
    )


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
        log_prob = jnp.where(alive, _of(jax.nn.log_softmax(logits), drawn), 0.0)
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
        return _of(log_p, tokens), entropy, kl

    inputs = (hidden, ref_hidden, rollout.tokens, rollout.kept)
    if rollout.tokens.size * model.vocab_size <= AT_ONCE:
        log_prob, entropy, kl = of_rows(inputs)
    else:  # a few rows at once: all logits would be larger than the model
        batch, length = rollout.tokens.shape
        fit = [n for n in range(1, batch + 1) if batch % n == 0 and n * length * model.vocab_size <= AT_ONCE]
        rows = max(fit, default=1)
        log_prob, entropy, kl = jax.lax.map(jax.checkpoint(of_rows), inputs, batch_size=rows)
    return Scored(log_prob, entropy, kl, load)


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


@jax.custom_vjp
def _turned(x: Array, steps: Array) -> Array:
    """Each row of ``x [B, L, ...]`` moved on by ``steps [B]``, what leaves it at the end entering at the beginning. Its derivative turns
    back, where that of a gather would be a scatter."""
    length = x.shape[1]
    at = (jnp.arange(length)[None] - steps[:, None]) % length
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


def _turned_back(steps: Array, slope: Array) -> tuple[Array, None]:
    return _turned(slope, -steps), None


_turned.defvjp(lambda x, steps: (_turned(x, steps), steps), _turned_back)


def _of(log_p: Array, token: Array) -> Array:
    return jnp.take_along_axis(log_p, token[..., None], axis=-1)[..., 0]
