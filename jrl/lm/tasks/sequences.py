"""Sequences of letters to be written in another order: reversed, or sorted."""

import string
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jrl.lm.tasks import parts
from jrl.lm.tasks.types import MARKS, Problem, Task
from jrl.numerics import checks

Array = jax.Array
FIRST = 2


def reverse(length: int = 6, letters: int = 10, shortest: int | None = None) -> Task:
    """``cab=`` is to be answered ``bac``: ``shortest`` (default ``length``) to ``length`` of the first ``letters`` letters.

    Parts: "correct"; "format", letters and the end; "close", the share of right tokens. A guess is right 1 time in
    ``letters ** length``.
    """
    return _arranged("reverse", lambda said, keep: (said[::-1], keep[::-1]), length, letters, shortest)


def sort(length: int = 6, letters: int = 10, shortest: int | None = None) -> Task:
    """``cabb=`` is to be answered ``abbc``; settings and parts are those of ``reverse``."""
    last = FIRST + letters
    return _arranged(
        "sort", lambda said, keep: (jnp.sort(jnp.where(keep, said, last)), keep), length, letters, shortest
    )


def _arranged(
    name: str,
    arrange: Callable[[Array, Array], tuple[Array, Array]],
    length: int,
    letters: int,
    shortest: int | None,
) -> Task:
    """``arrange`` maps tokens ``[length]`` and which of them are there to the answer's, likewise."""
    bounds = parts.lengths("length", length, shortest)
    checks.positive_int("letters", letters)
    if letters > 26:
        raise ValueError(f"letters must be at most 26; got {letters}")
    equals = FIRST + letters

    def draw(key: Array) -> Problem:
        key_length, key_letters = jax.random.split(key)
        keep = parts.draw_length(key_length, bounds)
        tokens = jax.random.randint(key_letters, (length,), FIRST, equals, jnp.int32)
        prompt = parts.prompt(jnp.append(tokens, equals), jnp.append(keep, True))
        return Problem(*prompt, parts.answer(*arrange(tokens, keep)))

    def verify(problem: Problem, tokens: Array, mask: Array) -> dict[str, Array]:
        form = parts.consists_of(tokens, mask, FIRST, equals)
        return parts.compare(tokens, mask, problem.answer) | {"format": form}

    symbols = (*MARKS, *string.ascii_lowercase[:letters], "=")
    return Task(f"{name}-{length}", symbols, length + 1, length + 1, draw, verify, lambda problem: problem.answer)
