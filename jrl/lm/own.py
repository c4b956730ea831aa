"""A language model of a user's own in place of the decoder that settings describe: ``grpo.make(task, config, model=mine)``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jrl.lm.model import Model
from jrl.nets import moe
from jrl.numerics import checks, precision
from jrl.numerics.types import Params

Array = jax.Array


def language_model(
    init: Callable[[Array], Params], apply: Callable[[Params, Array, Array], Array], vocab_size: int
) -> Model:
    """A model of its whole forward pass, ``init: key -> params`` and ``apply: (params, tokens int32 [B, L], valid bool [B, L]) -> logits
    [B, L, vocab_size]``.

    It must be causal, and leave out tokens that are not valid: the padding before a prompt. It needs no cache: for each token of an answer
    all that stands before it is read again, which a small model can afford. Others fill in the record ``lm.model.Model`` themselves.
    """
    checks.positive_int("vocab_size", vocab_size)

    def logits(params: Params, tokens: Array, valid: Array) -> Array:
        return apply(params, tokens, valid).astype(jnp.float32)

    def prefill(params: Params, tokens: Array, valid: Array, capacity: int) -> tuple[Array, Array]:
        return logits(params, tokens, valid)[:, -1], jnp.pad(tokens, [(0, 0), (0, capacity - tokens.shape[1])])

    def step(params: Params, token: Array, read: Array, position: Array, start: Array) -> tuple[Array, Array]:
        read = read.at[:, position].set(token)
        at = jnp.arange(read.shape[1])[None]
        said = logits(params, read, (at >= start[:, None]) & (at <= position))
        return said[:, position], read

    return Model(
        init=init,
        hidden_and_load=lambda params, tokens, valid, counted: (logits(params, tokens, valid), moe.no_load()),
        head=lambda params, x: x,
        prefill=prefill,
        step=step,
        vocab_size=vocab_size,
    )


def checked(own: Model, length: int) -> Model:
    """The user's model. Raises ``ValueError`` unless it gives logits ``[B, vocab_size]`` behind a prompt of that length."""
    tokens, valid = jax.ShapeDtypeStruct((2, length), jnp.int32), jax.ShapeDtypeStruct((2, length), bool)

    def first(tokens: Array, valid: Array) -> Array:
        return own.prefill(own.init(jax.random.key(0)), tokens, valid, length + 1)[0]

    found = checks.traced("make", "model", first, tokens, valid)
    if getattr(found, "shape", None) != (2, own.vocab_size):
        raise ValueError(
            f"the model must give logits [batch, {own.vocab_size}] for the token after a prompt; got {found}"
        )
    return own


def computed_in(own: Model, policy: precision.Policy) -> Model:
    """The model, with parameters and products as a precision policy says."""

    def cast(params: Params) -> Any:
        return precision.cast_params(params, policy.compute)

    return own._replace(
        init=lambda key: precision.cast_params(own.init(key), policy.params),
        hidden_and_load=lambda params, *rest: own.hidden_and_load(cast(params), *rest),
        head=lambda params, x: own.head(cast(params), x),
        prefill=lambda params, *rest: own.prefill(cast(params), *rest),
        step=lambda params, *rest: own.step(cast(params), *rest),
    )
