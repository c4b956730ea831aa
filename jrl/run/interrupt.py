"""Stopping a loop from outside without losing anything."""

import signal
import threading
from typing import Any


class StopOnSignal:
    """Ctrl-C and termination ask the loop to stop after its chunk; a second Ctrl-C interrupts at once."""

    requested = False

    def __enter__(self) -> "StopOnSignal":
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
