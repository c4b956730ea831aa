"""A language model as sampling, scoring and learning need it: a record of functions. ``decoder`` makes that of a decoder."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.nets import adapters, ahead, decoding, moe, transformer
from jrl.numerics import checks, lora, precision
from jrl.numerics.types import Params

Array = jax.Array


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
        packed: ``(params, tokens [B, L], segments [B, L]) -> (hidden, load)`` of several texts a row, which do not see each other; segment 0 is padding.
            None where rows hold one text.
        ahead: ``(params, hidden [B, L, dim], tokens [B, L], segments [B, L] or None) -> streams`` of the modules that predict further ahead
            (``nets.ahead``); None where there are none.
        insert: ``(cache, rows, at) -> cache`` with the rows of another cache, of as many tokens, in the places ``at`` int ``[R]``; None where rows stay.
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
    packed: Callable[[Any, Array, Array], tuple[Array, moe.Load]] | None = None
    ahead: Callable[[Any, Array, Array, Array | None], list[Array]] | None = None
    insert: Callable[[Any, Any, Array], Any] | None = None


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
        tokens, counted = (turned(x, -padding) for x in (tokens, counted))
        hidden, load = transformer.blocks_and_loads(params, params["embedding"][tokens], config, counted=counted)
        return turned(hidden, padding), load

    def packed(params: Params, tokens: Array, segments: Array) -> tuple[Array, moe.Load]:
        params, places = cast(params), positions_in(segments)
        more: dict[str, Any] = {"positions": places, "segment_ids": segments, "counted": segments > 0}
        return transformer.blocks_and_loads(params, params["embedding"][tokens], config, **more)

    def further(params: Params, hidden: Array, tokens: Array, segments: Array | None) -> list[Array]:
        return ahead.streams(cast(params), hidden, tokens, config, segment_ids=segments)

    def known(logits: Array) -> Array:
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return logits if tokens == config.vocab_size else jnp.where(ids < tokens, logits, -jnp.inf)

    def prefill(params: Params, prompt: Array, valid: Array, capacity: int) -> tuple[Array, Any]:
        empty = decoding.init_cache(config, len(prompt), capacity, dtype)
        logits, cache = decoding.prefill(cast(params), prompt, empty, config, valid=valid)
        return known(logits), cache

    def step(params: Params, token: Array, cache: Any, position: Array, start: Array) -> tuple[Array, Any]:
        logits, cache = decoding.decode(cast(params), token, cache, position, config, start=start)
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
        lambda cache, capacity: decoding.grown(cache, config, capacity),
        lambda cache, copies: jax.tree.map(lambda x: jnp.repeat(x, copies, axis=1), cache),
        lambda adapter: adapters.make(adapter, config),
        packed,
        further if config.ahead else None,
        lambda cache, rows, at: jax.tree.map(lambda x, new: x.at[:, at].set(new), cache, rows),
    )


def positions_in(segments: Array) -> Array:
    """The place of each token in its segment, int32 ``[B, L]``."""
    at = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    return at - jax.lax.cummax(jnp.where(first, at, 0), axis=1)


@jax.custom_vjp
def turned(x: Array, steps: Array) -> Array:
    """Each row of ``x [B, L, ...]`` moved on by ``steps [B]``, what leaves it at the end entering at the beginning. Its derivative turns
    back, where that of a gather would be a scatter."""
    length = x.shape[1]
    at = (jnp.arange(length)[None] - steps[:, None]) % length
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


def _turned_back(steps: Array, slope: Array) -> tuple[Array, None]:
    return turned(slope, -steps), None


turned.defvjp(lambda x, steps: (turned(x, steps), steps), _turned_back)
