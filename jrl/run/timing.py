"""Seconds of programs, side by side."""

import time
from collections.abc import Callable
from typing import Any

import jax

LONG = 10.0  # seconds of a call that is made once


def fastest(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each call, the best of several in alternating order.

    They are compiled already. A first one of each does not count, unless it takes over ten seconds: then it is the only one.
    """
    best = {name: seconds(call) for name, call in calls.items()}
    short = [name for name in calls if best[name] <= LONG]
    best |= dict.fromkeys(short, float("inf"))
    for i in range(repeats):
        for name in short if i % 2 == 0 else reversed(short):
            best[name] = min(best[name], seconds(calls[name]))
    return best


def seconds(call: Callable[[], Any]) -> float:
    """Of one call, with what it computes."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin
