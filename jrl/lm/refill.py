"""Sampling where answers differ in length: as many are decoded at once as there are slots, and the slots of those that have ended take the next prompts.

    rollout = sample(key, model, params, prompt, slots=16, length=256, end=2)

The steps are about the number of all tokens over that of slots, where ``sampling.sample`` goes on until the longest answer of a batch has ended. Tokens are
the same: a row's key is folded from its number and the token's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.lm.model import Model
from jrl.lm.sampling import Rollout, Support, check_support, of_tokens, supported
from jrl.numerics import checks, sharding
from jrl.numerics.types import Params

Array = jax.Array


class _Slots(NamedTuple):
    """What is being decoded, ``[slots]``, and all answers."""

    cache: Any
    answer: Array  # which answer a slot holds
    t: Array  # place of its next token
    start: Array  # padding before its prompt
    token: Array  # its newest token
    alive: Array
    following: Array  # the next prompt that was not read yet
    out: Rollout
    steps: Array


def sample(
    key: Array,
    model: Model,
    params: Params,
    prompt: Array,
    *,
    slots: int,
    length: int,
    end: int | Sequence[int],
    together: int | None = None,
    valid: Array | None = None,
    pad: int = 0,
    support: Support = Support(),
) -> tuple[Rollout, Array]:
    """Answers of up to ``length`` tokens to prompts int ``[N, P]``, as those of ``sampling.sample``, and the number of steps that they took, int32.

    Args:
        key: One key, from which each row's is folded.
        model: A model whose cache takes rows (``model.insert``).
        params: Parameters of the model.
        prompt: Prompts, padded on the left where ``valid`` is false.
        slots: Number of answers that are decoded at once, at most N.
        length: Number of tokens of an answer at most.
        end: The token that ends an answer, or several.
        together: Number of prompts that are read at once, when so many slots are free; an eighth of the slots if not given.
        valid: bool ``[N, P]``, false for padding.
        pad: The token that fills rows.
        support: The distribution that tokens are drawn from, made of the model's.

    Under vmap prompts are read whenever one of the members has room. Raises ``ValueError`` for wrong settings, for a model
    without ``insert``, and on several devices.
    """
    number, width = prompt.shape
    for name, value in (("slots", slots), ("length", length)):
        checks.positive_int(name, value)
    slots = min(slots, number)
    together = max(1, slots // 8) if together is None else together
    checks.within("together", together, 1, slots)
    check_support(support, model.vocab_size)
    if model.insert is None:
        raise ValueError("this model's cache takes no rows (model.insert): leave slots out")
    if (sharding.data_devices() or 1) > 1:
        raise ValueError("slots that are filled again are of one device; leave them out on several")
    insert, ends = model.insert, jnp.atleast_1d(jnp.asarray(end, jnp.int32))
    valid = jnp.ones(prompt.shape, bool) if valid is None else valid
    # As many rows as are read together stand behind the last prompt, which nobody answers.
    prompt, valid = (jnp.pad(x, [(0, together), (0, 0)]) for x in (prompt, valid))
    valid = valid.at[number:, -1].set(True)

    def say(out: Rollout, logits: Array, answer: Array, t: Array, alive: Array) -> tuple[Rollout, Array, Array]:
        """The answers with one token more in each row that is alive, that token, and which rows go on."""
        logits, keep = supported(logits, support)
        keys = jax.vmap(lambda i, t: jax.random.fold_in(jax.random.fold_in(key, i), t))(answer, t)
        drawn = jax.vmap(jax.random.categorical)(keys, logits)
        token = jnp.where(alive, drawn, pad).astype(jnp.int32)
        log_prob = of_tokens(jax.nn.log_softmax(logits), drawn)
        new = Rollout(token, alive, log_prob, None if keep is None else jnp.packbits(keep, axis=-1))
        row = jnp.where(alive, answer, number)  # out of range, and dropped
        out = jax.tree.map(lambda rows, x: rows.at[row, t].set(x, mode="drop"), out, new)
        return out, token, alive & ~jnp.isin(token, ends) & (t + 1 < length)

    def read(now: _Slots) -> _Slots:
        """The next prompts into slots that are free."""
        at = jnp.argsort(now.alive, stable=True)[:together]
        rows = [jax.lax.dynamic_slice_in_dim(x, now.following, together) for x in (prompt, valid)]
        answer = now.following + jnp.arange(together, dtype=jnp.int32)
        logits, cache = model.prefill(params, rows[0], rows[1], width + length)
        out, token, alive = say(now.out, logits, answer, jnp.zeros_like(answer), answer < number)
        return now._replace(
            cache=insert(now.cache, cache, at),
            answer=now.answer.at[at].set(answer),
            t=now.t.at[at].set(1),
            start=now.start.at[at].set((width - rows[1].sum(1)).astype(jnp.int32)),
            token=now.token.at[at].set(token),
            alive=now.alive.at[at].set(alive),
            following=now.following + together,
            out=out,
        )

    def has_room(now: _Slots) -> Array:
        return (slots - now.alive.sum() >= together) & (now.following < number)

    def go(now: _Slots) -> _Slots:
        now = jax.lax.while_loop(has_room, read, now)
        logits, cache = model.step(params, now.token, now.cache, width + now.t - 1, now.start)
        out, token, alive = say(now.out, logits, now.answer, now.t, now.alive)
        return now._replace(cache=cache, t=now.t + now.alive, token=token, alive=alive, out=out, steps=now.steps + 1)

    shape = (number, length)
    bits = jnp.zeros((*shape, -(-model.vocab_size // 8)), jnp.uint8) if support.truncates else None
    out = Rollout(jnp.full(shape, pad, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32), bits)
    shapes = jax.eval_shape(lambda: model.prefill(params, prompt[:1], valid[:1], width + length)[1])
    cache = jax.tree.map(lambda x: jnp.zeros((x.shape[0], slots, *x.shape[2:]), x.dtype), shapes)
    none = jnp.zeros(slots, jnp.int32)
    begin = _Slots(cache, none, none, none, none, none > 0, jnp.int32(0), out, jnp.int32(0))
    found = jax.lax.while_loop(lambda now: jnp.any(now.alive) | (now.following < number), go, begin)
    return found.out, found.steps
