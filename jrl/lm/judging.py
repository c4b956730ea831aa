"""Texts of answers, and rewards of several parts."""

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jrl.lm.sampling import Rollout
from jrl.lm.tokenizer import Tokenizer


def texts_of(words: Tokenizer, rollout: Rollout) -> list[str]:
    """The answers without their end tokens and special tokens."""
    tokens = np.asarray(rollout.tokens)
    mask = np.asarray(rollout.mask) & ~np.isin(tokens, words.ends)
    return [words.decode(row[kept].tolist(), special=False) for row, kept in zip(tokens, mask, strict=True)]


def stopped(words: Tokenizer, rollout: Rollout, stops: Sequence[str]) -> Rollout:
    """The answers cut behind the token with which the first of the texts ``stops`` is there."""
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask).copy()
    for row, there in zip(tokens, mask, strict=True):
        number = int(there.sum())

        def has_stopped(n: int, row: np.ndarray = row) -> bool:
            said = words.decode(row[:n].tolist(), special=False)
            return any(stop in said for stop in stops)

        if not has_stopped(number):
            continue
        low, high = 0, number  # not stopped, stopped
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if has_stopped(middle) else (middle, high)
        there[high:] = False
    return rollout._replace(mask=jnp.asarray(mask))


def weights_of(texts: Sequence[str]) -> dict[str, float]:
    """``("correct=1", "format=0.2")`` as numbers by the names of parts. Raises ``ValueError`` for what is none."""
    found = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"weight must be NAME=NUMBER; got {text!r}") from None
        if not name or not math.isfinite(found[name]):
            raise ValueError(f"weight must be NAME=NUMBER; got {text!r}")
    return found


def weighed(parts: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The reward ``[N]``: the sum of parts ``[N]`` by their weights. Raises ``ValueError`` for a weight of a part that there is not."""
    if missing := [name for name in weights if name not in parts]:
        raise ValueError(f"weight: there is no part {missing[0]!r}; there are {', '.join(parts)}")
    return np.sum([weight * np.asarray(parts[name], np.float32) for name, weight in weights.items()], axis=0)
