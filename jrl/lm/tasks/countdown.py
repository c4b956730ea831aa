"""Countdown: make the target from the given numbers, each used exactly once, with ``+``, ``-`` and ``*``.

A number is one token, so that an answer is short and "each exactly once" compares tokens. Expressions are infix with the usual
precedence and without parentheses: what people write, and one pass with a running sum and a running product gives the exact value,
where parentheses need a stack. Every problem is drawn from such an expression, so it has an answer. There is no division, since
most quotients are not whole.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.lm.tasks import parts
from jrl.lm.tasks.types import MARKS, Problem, Task
from jrl.numerics import checks

Array = jax.Array
ZERO = 2


class Expression(NamedTuple):
    """``numbers`` int32 ``[n]`` with ``signs`` int32 ``[n - 1]`` (0 +, 1 -, 2 *) between them; the first ``size`` numbers count."""

    numbers: Array
    signs: Array
    size: Array


def value(e: Expression) -> Array:
    """An expression's value, int32 ``[]``; it wraps around beyond int32."""
    total, term = jnp.int32(0), e.numbers[0]
    for i in range(1, e.numbers.shape[0]):
        x, sign, there = e.numbers[i], e.signs[i - 1], i < e.size
        total = jnp.where(there & (sign != 2), total + term, total)
        term = jnp.where(there, jnp.where(sign == 2, term * x, jnp.where(sign == 1, -x, x)), term)
    return total + term


def countdown(numbers: int = 3, shortest: int | None = None, largest: int = 20, target: int = 99) -> Task:
    """``3 7 5 = 26``, the numbers and the target, is to be answered ``3 * 7 + 5``, or with any other expression that is right.

    A problem has ``shortest`` (default ``numbers``) to ``numbers`` numbers (2 to 6) from 1 to ``largest``, and a target from 1 to
    ``target``, which is at least ``numbers * largest``. Parts: "correct"; "format", an expression and the end; "close", how many
    of the given numbers are used, as a share of all that are given or all that are used, whichever are more.
    """
    bounds = parts.lengths("numbers", numbers, shortest, at_least=2)
    checks.within("numbers", numbers, 2, 6)
    checks.positive_int("largest", largest)
    checks.positive_int("target", target, at_least=numbers * largest)  # then the sum of all is always in reach
    checks.within("target", target, 1, parts.MOST)
    if largest**numbers >= 2**31:
        raise ValueError(f"largest ** numbers must be below 2 ** 31, to be exact; got {largest} ** {numbers}")
    plus = ZERO + target + 1
    equals = plus + 3
    ways = np.array(list(itertools.product(range(3), repeat=numbers - 1)), np.int32)

    def draw(key: Array) -> Problem:
        key_size, key_numbers, key_signs, key_order = jax.random.split(key, 4)
        keep = parts.draw_length(key_size, bounds)
        size = jnp.sum(keep, dtype=jnp.int32)
        chosen = jax.random.randint(key_numbers, (numbers,), 1, largest + 1, jnp.int32)
        values = jax.vmap(lambda signs: value(Expression(chosen, signs, size)))(ways)
        way = jax.random.categorical(key_signs, jnp.where((values >= 1) & (values <= target), 0.0, -jnp.inf))
        order = jax.random.permutation(key_order, numbers)  # else the prompt would tell the order of an answer
        tail = jnp.stack([jnp.int32(equals), ZERO + values[way]])
        tokens = jnp.concatenate([ZERO + chosen[order], tail])
        prompt = parts.prompt(tokens, jnp.concatenate([keep[order], np.ones(2, bool)]))
        return Problem(*prompt, (Expression(chosen, jnp.asarray(ways)[way], size), values[way]))

    def demonstrate(problem: Problem) -> Array:
        chosen, signs, size = problem.answer[0]
        tokens = jnp.stack([ZERO + chosen, plus + jnp.append(signs, 0)], axis=1).reshape(-1)[:-1]
        return parts.answer(tokens, np.arange(2 * numbers - 1) < 2 * size - 1)

    def verify(problem: Problem, tokens: Array, mask: Array) -> dict[str, Array]:
        given, wanted = problem.answer
        said, length, ended = parts.read(tokens, mask)
        place = np.arange(2 * numbers)
        number, sign = (said >= ZERO) & (said < plus), (said >= plus) & (said < equals)
        form = ended & (length % 2 == 1) & jnp.all(jnp.where(place % 2 == 0, number, sign) | (place >= length))
        used = Expression(said[::2] - ZERO, said[1:-1:2] - plus, (length + 1) // 2)
        shared = jnp.sum(jnp.minimum(tally(given.numbers, np.arange(numbers) < given.size), tally(said - ZERO, number)))
        share = shared / jnp.maximum(given.size, jnp.sum(number))
        right = form & (share == 1) & (value(used) == wanted)
        scores = {"correct": right, "format": form, "close": share}
        return {name: score.astype(jnp.float32) for name, score in scores.items()}

    def tally(values: Array, counts: Array) -> Array:
        """How often each number from 0 to ``target`` is among the ``values [n]`` that count."""
        return jnp.sum(counts[:, None] & (values[:, None] == np.arange(target + 1)[None]), axis=0)

    symbols = (*MARKS, *map(str, range(target + 1)), *"+-*=")
    return Task(f"countdown-{numbers}", symbols, numbers + 2, 2 * numbers, draw, verify, demonstrate)
