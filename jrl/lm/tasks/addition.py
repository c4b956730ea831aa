"""Addition of numbers of several digits, a token a digit."""

import jax
import jax.numpy as jnp
import numpy as np

from jrl.lm.tasks import parts
from jrl.lm.tasks.types import MARKS, Problem, Task

Array = jax.Array
ZERO, PLUS, EQUALS = 2, 12, 13


def addition(digits: int = 2, shortest: int | None = None, reverse: bool = False) -> Task:
    """``a+b=``, where each number has ``shortest`` (default ``digits``) to ``digits`` digits, at most 9; no leading zeros.

    The sum is written most significant digit first, or last with ``reverse``, where carries then go along with the writing.
    Parts: "correct"; "format", digits and the end; "close", the share of right tokens.
    """
    bounds = parts.lengths("digits", digits, shortest)
    if digits > 9:
        raise ValueError(f"digits must be at most 9, so that a sum fits in int32; got {digits}")

    def number(key: Array) -> Array:
        key_length, key_number = jax.random.split(key)
        top = jnp.array([10**i for i in range(digits + 1)], jnp.int32)
        length = jnp.sum(parts.draw_length(key_length, bounds))
        return jax.random.randint(key_number, (), jnp.where(length == 1, 0, top[length - 1]), top[length], jnp.int32)

    def draw(key: Array) -> Problem:
        a, b = jax.vmap(number)(jax.random.split(key))
        (left, keep_left), (right, keep_right) = parts.decimal(a, digits), parts.decimal(b, digits)
        mark, kept = jnp.array([PLUS, EQUALS], jnp.int32), np.ones(1, bool)
        tokens = jnp.concatenate([ZERO + left, mark[:1], ZERO + right, mark[1:]])
        return Problem(*parts.prompt(tokens, jnp.concatenate([keep_left, kept, keep_right, kept])), a + b)

    def demonstrate(problem: Problem) -> Array:
        total, keep = parts.decimal(problem.answer, digits + 1)
        return parts.answer(ZERO + total[::-1], keep[::-1]) if reverse else parts.answer(ZERO + total, keep)

    def verify(problem: Problem, tokens: Array, mask: Array) -> dict[str, Array]:
        form = parts.consists_of(tokens, mask, ZERO, PLUS)
        return parts.compare(tokens, mask, demonstrate(problem)) | {"format": form}

    name = f"addition-{digits}{'-reversed' if reverse else ''}"
    return Task(name, (*MARKS, *"0123456789+="), 2 * digits + 2, digits + 2, draw, verify, demonstrate)
