"""Seconds of programs, side by side."""

import time
from collections.abc import Callable
from typing import Any

import jax

LONG = 10.0  # seconds of a call that is repeated once only


def fastest(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each call, the best of several in alternating order: see ``spread``."""
    return {name: low for name, (low, _) in spread(calls, repeats).items()}


def spread(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Least and most seconds of each call over ``repeats``, or one where a call takes over ten seconds, in alternating order.

    They are compiled already; a first call of each does not count.
    """
    first = {name: seconds(call) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats):
        for name in calls if i % 2 == 0 else reversed(calls):
            if i == 0 or first[name] <= LONG:
                taken[name].append(seconds(calls[name]))
    return {name: (min(each), max(each)) for name, each in taken.items()}


def seconds(call: Callable[[], Any]) -> float:
    """Of one call, with what it computes."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin
