"""Parity, with a chain of thought: the running parity at each bit, of which the last is the answer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.lm.tasks import parts
from jrl.lm.tasks.types import MARKS, Problem, Task
from jrl.numerics import checks

Array = jax.Array
ZERO, EQUALS = 2, 4


class Parities(NamedTuple):
    """The running parities as an answer int32 ``[T]``, how many bits there are, and whether a demonstration writes them all."""

    chain: Array
    bits: Array
    chained: Array


def parity(length: int = 8, shortest: int | None = None, chained: float = 1.0) -> Task:
    """``0110=`` is to be answered ``0100``: the parities of ``0``, ``01``, ``011`` and ``0110``, of which the last is the parity.

    Prompts have ``shortest`` (default ``length``) to ``length`` bits. A demonstration writes the chain with probability
    ``chained``, else the last parity alone, so that a supervised start may make chains as rare as one likes. Parts: "correct",
    the last token before the end is the parity, whatever stands before it (a guess is right half the time); "format", as many
    bits as the prompt has, and the end; "close", the share of the whole chain's tokens that stand in their places.
    """
    bounds = parts.lengths("length", length, shortest)
    checks.within("chained", chained, 0, 1)

    def draw(key: Array) -> Problem:
        key_length, key_bits, key_chained = jax.random.split(key, 3)
        keep = parts.draw_length(key_length, bounds)
        drawn = jax.random.bernoulli(key_bits, shape=(length,)).astype(jnp.int32)
        prompt = parts.prompt(jnp.append(ZERO + drawn, EQUALS), jnp.append(keep, True))
        chain = parts.answer(ZERO + jnp.cumsum(drawn) % 2, keep)
        return Problem(
            *prompt, Parities(chain, jnp.sum(keep, dtype=jnp.int32), jax.random.bernoulli(key_chained, chained))
        )

    def demonstrate(problem: Problem) -> Array:
        chain, bits, chained = problem.answer
        return jnp.where(chained, chain, parts.answer(chain[bits - 1][None].repeat(length), jnp.arange(length) == 0))

    def verify(problem: Problem, tokens: Array, mask: Array) -> dict[str, Array]:
        chain, bits, _ = problem.answer
        said, spoken, ended = parts.read(tokens, mask)
        right = ended & (spoken > 0) & (said[spoken - 1] == chain[bits - 1])
        form = parts.consists_of(tokens, mask, ZERO, EQUALS) * (spoken == bits)
        return {
            "correct": right.astype(jnp.float32),
            "format": form,
            "close": parts.compare(tokens, mask, chain)["close"],
        }

    return Task(f"parity-{length}", (*MARKS, *"01="), length + 1, length + 1, draw, verify, demonstrate)
