"""Modular addition: two residues are given and their sum's residue is the answer, in one token."""

import jax
import jax.numpy as jnp

from jrl.lm.tasks import parts
from jrl.lm.tasks.types import MARKS, Problem, Task
from jrl.numerics import checks

Array = jax.Array


def modular_addition(modulus: int = 11) -> Task:
    """``a+b=`` with a and b drawn from 0 to ``modulus - 1``; each residue is a symbol. A guess is right 1 time in ``modulus``.

    Parts: "correct"; "format", one residue and the end; "close", the share of right tokens.
    """
    checks.positive_int("modulus", modulus, at_least=2)
    checks.within("modulus", modulus, 2, parts.MOST)
    zero, plus, equals = 2, 2 + modulus, 3 + modulus

    def draw(key: Array) -> Problem:
        a, b = jax.random.randint(key, (2,), 0, modulus, jnp.int32)
        prompt = jnp.stack([zero + a, jnp.int32(plus), zero + b, jnp.int32(equals)])
        return Problem(prompt, jnp.ones(4, bool), (a + b) % modulus)

    def demonstrate(problem: Problem) -> Array:
        return parts.answer((zero + problem.answer)[None], jnp.ones(1, bool))

    def verify(problem: Problem, tokens: Array, mask: Array) -> dict[str, Array]:
        form = parts.consists_of(tokens, mask, zero, plus)
        return parts.compare(tokens, mask, demonstrate(problem)) | {"format": form}

    symbols = (*MARKS, *map(str, range(modulus)), "+", "=")
    return Task(f"modular_addition-{modulus}", symbols, 4, 2, draw, verify, demonstrate)
