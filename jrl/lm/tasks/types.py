"""The task protocol: a record of pure functions that draw a problem, verify an answer and demonstrate a correct one.

Tokens are int32 ids of ``Task.symbols``. A prompt is padded on the left, so that an answer always starts behind position
``P - 1``. An answer is what is said up to and including the first end token; an answer without one is never correct, and what
lies behind it never matters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.numerics import checks

Array = jax.Array
Key = jax.Array
PAD, END = 0, 1
MARKS = ("<pad>", "<end>")  # the first two symbols of every task


class Problem(NamedTuple):
    """One problem: ``prompt`` int32 ``[P]``, padded on the left, ``valid`` bool ``[P]``, ``answer`` what the verifier needs."""

    prompt: Array
    valid: Array
    answer: Any


class Task(NamedTuple):
    """A task; every function is on one problem, unbatched: vmap it.

    Attributes:
        name: shown to people.
        symbols: what each token id stands for; id 0 is padding, id 1 ends an answer.
        prompt_length: P.
        answer_length: T, the end token included.
        draw: ``key -> Problem``.
        verify: ``(problem, tokens [T] int32, mask [T] bool) -> parts``, float32 scalars in [0, 1]: "correct", "format", and,
            where there is partial credit, "close". ``mask`` is true up to and including the end token. A reward is a weighted
            sum of these; other parts are shown.
        demonstrate: ``problem -> tokens [T] int32``, a correct answer with its end token, then padding.
        settings: what it was made of, as pairs of a name and a value, which a run records and compares.
    """

    name: str
    symbols: tuple[str, ...]
    prompt_length: int
    answer_length: int
    draw: Callable[[Key], Problem]
    verify: Callable[[Problem, Array, Array], dict[str, Array]]
    demonstrate: Callable[[Problem], Array]
    settings: tuple[tuple[str, Any], ...] = ()


def answer_mask(tokens: Array) -> Array:
    """Bool ``[T]``, true up to and including the first end token of ``tokens [T]``; all true if there is none."""
    ends = (tokens == END).astype(jnp.int32)
    return jnp.cumsum(ends, axis=-1) - ends == 0


def encode(task: Task, text: str) -> np.ndarray:
    """Token ids int32 ``[n]`` of a text: the longest symbol that fits, again and again; blanks only part symbols.

    Raises ``ValueError`` where no symbol fits.
    """
    ids = {symbol: i for i, symbol in enumerate(task.symbols)}
    longest = max(map(len, ids))
    tokens = []
    for word in text.split():
        while word:
            symbol = next((word[:n] for n in range(longest, 0, -1) if word[:n] in ids), None)
            if symbol is None:
                raise ValueError(f"{task.name}: no symbol for {word!r}; symbols: {' '.join(task.symbols)}")
            tokens.append(ids[symbol])
            word = word[len(symbol) :]
    return np.array(tokens, np.int32)


def decode(task: Task, tokens: Any) -> str:
    """The text of ``tokens [n]`` without the padding before it, up to the end token.

    Symbols stand side by side if each is one character, else blanks part them, so that no two answers read alike.
    """
    said = np.asarray(tokens).tolist()
    while said and said[0] == PAD:
        said = said[1:]
    if END in said:
        said = said[: said.index(END)]
    blank = " " if any(len(symbol) > 1 for symbol in task.symbols[2:]) else ""
    return blank.join(task.symbols[token] for token in said)


def strict(task: Task) -> Task:
    """The task itself, if abstract evaluation finds the shapes and dtypes the protocol asks for.

    Raises ``ValueError`` naming the function and the mismatch.
    """
    if not isinstance(task, Task):
        raise ValueError(f"a task must be a jrl.lm.tasks.Task; got {type(task).__name__}")
    if not isinstance(task.symbols, tuple | list) or not all(isinstance(symbol, str) for symbol in task.symbols):
        raise ValueError(f"{task.name}: symbols must be a tuple of texts; got {task.symbols!r}")
    for name in ("prompt_length", "answer_length"):
        checks.positive_int(f"{task.name}: {name}", getattr(task, name))
    for name in ("draw", "verify", "demonstrate"):
        checks.function(f"{task.name}: {name}", getattr(task, name))
    if tuple(task.symbols[:2]) != MARKS:
        raise ValueError(f"{task.name}: the first two symbols must be {MARKS}; got {tuple(task.symbols[:2])}")
    if len(set(task.symbols)) < len(task.symbols):
        raise ValueError(f"{task.name}: symbols must differ; got {' '.join(task.symbols)}")
    prompt, answer = (task.prompt_length,), (task.answer_length,)
    problem = checks.traced(task.name, "draw", task.draw, jax.eval_shape(jax.random.key, 0))
    if not isinstance(problem, Problem):
        raise ValueError(f"{task.name}: draw must return a Problem, got {type(problem).__name__}")
    _leaf(task, "draw's prompt", problem.prompt, prompt, jnp.int32)
    _leaf(task, "draw's valid", problem.valid, prompt, jnp.bool_)
    shown = checks.traced(task.name, "demonstrate", task.demonstrate, problem)
    _leaf(task, "demonstrate's answer", shown, answer, jnp.int32)
    mask = jax.ShapeDtypeStruct(answer, jnp.bool_)
    parts = checks.traced(task.name, "verify", task.verify, problem, jax.ShapeDtypeStruct(answer, jnp.int32), mask)
    if not isinstance(parts, dict) or not {"correct", "format"} <= set(parts):
        raise ValueError(f'{task.name}: verify must return a dict with "correct" and "format", got {parts}')
    for name, part in parts.items():
        if not isinstance(name, str):
            raise ValueError(f"{task.name}: the names of verify's parts must be texts; got {name!r}")
        _leaf(task, f"verify's {name!r}", part, (), jnp.float32)
    return task


def _leaf(task: Task, name: str, given: Any, shape: tuple[int, ...], dtype: Any) -> None:
    wanted = f"{jnp.dtype(dtype).name} {list(shape)}"
    if not isinstance(given, jax.ShapeDtypeStruct):
        raise ValueError(f"{task.name}: {name} must be {wanted}, got {given}")
    if given.shape != shape or given.dtype != dtype:
        raise ValueError(f"{task.name}: {name} must be {wanted}, got {given.dtype.name} {list(given.shape)}")
