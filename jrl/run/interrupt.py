"""Signals that ask a run to end: Ctrl-C, termination, and a terminal that closes.

Within ``StopOnSignal`` the first one asks: the loop there saves and leaves. Anywhere else it raises ``KeyboardInterrupt``. Python can
raise only between two of its own steps, and a compiler or an evaluation may take minutes; therefore a command line
(``leaving_in_time``) has a thread that ends the process if it is still there after a moment. A second Ctrl-C ends it at once.
"""

import _thread
import contextlib
import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, TimeoutError
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130  # the exit status
PATIENCE = 2.0  # seconds in which a process that was asked to end does so by itself
AGAIN = 0.3  # seconds after which a Ctrl-C is not the same one any more, passed on by another process


class StopOnSignal:
    """A loop that ends by itself, with everything saved, once ``requested`` is true.

    Outside of the main thread, where Python delivers no signals, nothing is ever requested.
    """

    requested = False
    under_way = 0  # loops that are not to be ended from outside
    _at = 0.0

    def __enter__(self) -> "StopOnSignal":
        self._old = _answer_with(self._request)
        StopOnSignal.under_way += 1
        return self

    def __exit__(self, *error: object) -> None:
        StopOnSignal.under_way -= 1
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT and time.monotonic() - self._at > AGAIN:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._at = True, time.monotonic()

    @contextlib.contextmanager
    def nothing_to_lose(self) -> Iterator[None]:
        """Meanwhile a signal raises ``KeyboardInterrupt``: everything is saved, and the loop would not look for long."""
        self.__exit__()
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self.__enter__()

    def result(self, future: Future) -> Any:
        """Its result. Raises ``KeyboardInterrupt`` if the loop is asked to end and the result is not there soon."""
        asked: float | None = None
        while True:
            try:
                return future.result(0.1)
            except TimeoutError:
                if future.done():  # it is the future's own error
                    raise
            asked = time.monotonic() if self.requested and asked is None else asked
            if asked is not None and time.monotonic() - asked > PATIENCE:
                raise KeyboardInterrupt


@contextlib.contextmanager
def leaving_in_time() -> Iterator[None]:
    """For a whole command line: signals raise ``KeyboardInterrupt``, and what cannot be interrupted is ended all the same."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised = threading.Event()

    def interrupt(number: int, frame: Any) -> None:
        raised.set()
        raise KeyboardInterrupt

    old = _answer_with(interrupt)
    received, written = os.pipe()
    os.set_blocking(written, False)
    wakeup = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    hook = sys.unraisablehook
    ours = sys.unraisablehook = functools.partial(_raise_again, hook)
    asked = threading.Event()
    threading.Thread(target=_watch, args=(received, asked), daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        asked.set()
        raise
    except Exception as error:
        if raised.is_set():  # an interrupt that a library turned into an error of its own
            asked.set()
            raise KeyboardInterrupt from error
        raise
    finally:
        if not asked.is_set():  # else the process is about to end, and may hang in doing so: it stays watched
            signal.set_wakeup_fd(wakeup)
            os.close(written)
            if sys.unraisablehook is ours:  # else checkpoints have put one before it
                sys.unraisablehook = hook
            for number, handler in old.items():
                signal.signal(number, handler)


def _raise_again(hook: Any, unraisable: Any) -> None:
    """Python drops what is raised in a callback of its memory, of which JAX has some: an interrupt is raised again, outside of it."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        hook(unraisable)


def _watch(received: int, asked: threading.Event) -> None:
    """End the process ``PATIENCE`` seconds after the first signal, not counting the loops under way, or at the second Ctrl-C."""
    first = since = 0.0
    while True:
        readable, _, _ = select.select([received], [], [], 0.1 if asked.is_set() else None)
        numbers, now = os.read(received, 64) if readable else b"", time.monotonic()
        if readable and not numbers:  # the command line has ended
            os.close(received)
            return
        if first and signal.SIGINT in numbers and now - first > AGAIN:
            _end_at_once()
        if not first and set(numbers) & set(SIGNALS):
            asked.set()
            first = since = now
        if StopOnSignal.under_way:
            since = now
        if first and now - since > PATIENCE:
            _end_at_once()


def _end_at_once() -> NoReturn:
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    os.write(2, f"\n{last_words}\n".encode())
    os._exit(INTERRUPTED)


last_words = "interrupted"  # said when the process ends: how to go on


def on_leaving(text: str) -> None:
    """What to say if the process is interrupted from now on."""
    global last_words
    last_words = text


def _answer_with(handler: Any) -> dict[int, Any]:
    """Handle the signals by a function, but those that the process was started to ignore; the handlers before it."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}
