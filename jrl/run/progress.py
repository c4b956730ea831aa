"""A progress bar on a terminal; a line every few seconds elsewhere."""

import math
import sys
import time
from typing import Any


class Progress:
    """Progress over ``total`` environment steps, summed over all members."""

    def __init__(self, description: str, total: int, done: int, enabled: bool) -> None:
        self._description, self._total, self._done = description, total, done
        self._start, self._first, self._printed = time.monotonic(), done, 0.0
        self._shown = "-"
        self._bar: Any = None
        self._enabled = enabled
        if enabled and sys.stderr.isatty():
            self._bar, self._task = _rich_bar(description, total, done)
            self._bar.start()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def advance(self, done: int, episode_return: float) -> None:
        """``done`` environment steps so far."""
        now = time.monotonic()
        if not math.isnan(episode_return):  # where episodes are long, none may have ended since
            self._shown = f"{episode_return:.1f}"
        speed = (done - self._first) / max(now - self._start, 1e-9)
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, speed=f"{speed:,.0f}", result=self._shown)
        elif self._enabled and now - self._printed > 10:
            self._printed = now
            left = (self._total - done) / max(speed, 1e-9)
            self.say(
                f"{self._description}: {100 * done / self._total:.0f}%, {speed:,.0f} steps/s, "
                f"return {self._shown}, {left:.0f} s left"
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _rich_bar(description: str, total: int, done: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[speed]} steps/s  return {task.fields[result]}  left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    return bar, bar.add_task(description, total=total, completed=done, speed="-", result="-")
