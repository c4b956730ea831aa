"""Chat templates, rendered where they can do no harm.

A template is a foreign file's program. Jinja's sandbox keeps it from Python's objects, but not from a loop without end or a text of
``'a' * 10**10``, in which no check of ours would be reached. So a template is rendered by a process of its own
(``lm.template_server``) that has limits of CPU time and memory. It keeps the template compiled: a text takes no longer than by a
template that is compiled for each.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from typing import Any

from jrl.lm import template_server
from jrl.lm.grading_server import PATIENCE, readable

SECONDS = 5.0  # of CPU time for a text
START_SECONDS = 60.0  # importing Jinja on a busy machine


def render(template: str, given: dict[str, Any]) -> str:
    """The text that the template makes of what it is given, which is of JSON's kinds.

    Raises ``ValueError`` with one line for a template that cannot be read, that refuses or fails, or that takes too much time or memory.
    """
    return _renderer(template).render(given)


@lru_cache(maxsize=8)
def _renderer(template: str) -> "_Renderer":
    return _Renderer(template)


class _Renderer:
    """A process for one template, which starts with the first text. Calls from several threads wait for each other."""

    def __init__(self, template: str):
        self._template, self._lock = template, threading.Lock()
        self._process: subprocess.Popen | None = None

    def render(self, given: dict[str, Any]) -> str:
        try:
            message = json.dumps(given)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"a chat template is given what JSON can write: {error}") from None
        with self._lock:
            if self._process is None:
                self._start()
            return self._ask(message, PATIENCE * SECONDS)

    def _start(self) -> None:
        self._process = _started()
        try:
            self._ask(json.dumps(self._template), START_SECONDS)
        except ValueError:
            self._end()
            raise

    def _ask(self, message: str, limit: float) -> str:
        process, reply = self._process, b""  # a whole line; one comes for each message, so none waits in a buffer
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(message.encode() + b"\n")
            process.stdin.flush()
            if readable(limit, process.stdout):
                reply = process.stdout.readline()
        except OSError:
            pass
        finally:
            # An interrupt, too, may not leave a reply behind that the next question would get.
            if not reply.endswith(b"\n"):
                self._end()
        if not reply.endswith(b"\n"):
            if process.returncode in (-signal.SIGPROF, -signal.SIGKILL):
                raise ValueError(f"the chat template fails: it is not done after {SECONDS:g} s")
            raise ValueError(f"the chat template fails: its process ended with status {process.returncode}")
        answer = json.loads(reply)
        if "error" in answer:
            raise ValueError(f"the chat template {answer['error']}")
        return answer["text"]

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()  # which ends it, unless it is at work
        try:
            process.wait(1.0)  # it may have ended by itself, with a status that tells why
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _started() -> subprocess.Popen:
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME", "TZ") if name in os.environ}
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    return subprocess.Popen(
        [sys.executable, "-P", "-X", "utf8", template_server.__file__, str(SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONPATH": paths, **kept},
        start_new_session=True,
    )
