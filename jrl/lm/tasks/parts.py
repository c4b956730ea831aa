"""What tasks share: prompts and answers of varying length in arrays of fixed length, and the comparison with a known answer."""

import jax
import jax.numpy as jnp
import numpy as np

from jrl.lm.tasks.types import END, PAD, answer_mask
from jrl.numerics import checks

Array = jax.Array
MOST = 1_000_000  # symbols of a task, or tokens of a problem


def prompt(tokens: Array, keep: Array) -> tuple[Array, Array]:
    """The kept of ``tokens [P]``, in order, padded on the left: tokens int32 ``[P]`` and which are valid, bool ``[P]``."""
    order = jnp.argsort(keep, stable=True)
    return jnp.where(keep, tokens, PAD)[order].astype(jnp.int32), keep[order]


def answer(tokens: Array, keep: Array) -> Array:
    """The kept of ``tokens [T - 1]``, in order, then the end token and padding: int32 ``[T]``."""
    kept = jnp.where(keep, tokens, PAD)[jnp.argsort(~keep, stable=True)]
    return jnp.append(kept, PAD).astype(jnp.int32).at[jnp.sum(keep)].set(END)


def decimal(number: Array, places: int) -> tuple[Array, Array]:
    """Decimal digits of an int32 scalar, most significant first, int32 ``[places]``, and which are not leading zeros."""
    place = number // np.array([10**i for i in reversed(range(places))], np.int32)
    return place % 10, (place > 0) | (np.arange(places) == places - 1)


def read(tokens: Array, mask: Array) -> tuple[Array, Array, Array]:
    """An answer as it counts: ``tokens [T]`` with padding behind the end, its length without the end, and whether it ended."""
    live = mask & answer_mask(tokens)
    ended = jnp.any(live & (tokens == END))
    return jnp.where(live, tokens, PAD), jnp.sum(live, dtype=jnp.int32) - ended, ended


def compare(tokens: Array, mask: Array, wanted: Array) -> dict[str, Array]:
    """Parts of a task with one correct answer ``wanted [T]`` (ended and padded).

    "correct": the answer is ``wanted``, token for token. "close": the share of ``wanted``'s tokens, the end included, that stand
    in their places; it is 1 just where "correct" is.
    """
    said, _, _ = read(tokens, mask)
    counts = answer_mask(wanted)
    close = jnp.sum(counts & (said == wanted)) / jnp.sum(counts)
    return {"correct": jnp.all(said == wanted).astype(jnp.float32), "close": close.astype(jnp.float32)}


def consists_of(tokens: Array, mask: Array, low: int, high: int, least: int = 1, most: int | None = None) -> Array:
    """1 if an answer ended and is ``least`` to ``most`` tokens from ``low`` up to, without, ``high``; else 0; float32 ``[]``."""
    said, length, ended = read(tokens, mask)
    most = tokens.shape[0] - 1 if most is None else most
    inside = ((said >= low) & (said < high)) | (jnp.arange(tokens.shape[0]) >= length)
    return (ended & jnp.all(inside) & (length >= least) & (length <= most)).astype(jnp.float32)


def lengths(longest_name: str, longest: int, shortest: int | None, at_least: int = 1) -> tuple[int, int]:
    """The range that a problem's length is drawn from: ``shortest`` (None: ``longest``) to ``longest``, checked."""
    checks.positive_int(longest_name, longest, at_least)
    checks.within(longest_name, longest, at_least, MOST)
    if shortest is None:
        return longest, longest
    checks.positive_int("shortest", shortest, at_least)
    if shortest > longest:
        raise ValueError(f"shortest must be at most {longest_name}, {longest}; got {shortest}")
    return shortest, longest


def draw_length(key: Array, bounds: tuple[int, int]) -> Array:
    """Which of ``longest`` places a problem uses: the first so many, bool ``[longest]``, every length as likely as another."""
    shortest, longest = bounds
    return jnp.arange(longest) < jax.random.randint(key, (), shortest, longest + 1, jnp.int32)
