"""Answers of a language model judged where they can do no harm.

Checkers of mathematics evaluate what a model wrote: ``__import__('os').system(...)`` runs, ``9**9**9`` never ends, and a policy
under optimization finds whatever raises its reward. Three walls stand between an answer and the program that learns from it:

1. An answer that a scorer would evaluate is handed on only if it consists of what such an answer may contain
   (``grading_server.EVALUATED``); any other is wrong.
2. Answers are judged in forks of a server that never judges one itself, so nothing that an answer changes outlives its fork: one
   answer each where a scorer evaluates names, ``TOGETHER`` where it evaluates numbers or none. (A fork costs some milliseconds.)
   The server (``lm.grading_server``) imports neither jrl nor JAX and inherits no environment. It has a session of its own, so an
   interrupt of the program does not reach it, and it ends with the program.
3. A fork has limits of CPU time, memory, open files, processes and the size of a file; its working folder is gone already. Where
   Linux allows it, it has no network and sees no other processes (namespaces); it may neither write, run nor remove a file nor
   send a signal to others (Landlock); and it is the user nobody if the program is root's. What the system does not allow is left
   out silently.

Not prevented: an answer that passes the first wall and runs code nevertheless may read files and forge the scores of its fork.
"""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jrl.lm import grading_server
from jrl.lm.grading_server import PATIENCE, TOGETHER, readable

SERVERS, FEW = 8, 32  # servers at most, and answers of each at least
START_SECONDS = 120.0  # importing sympy on a busy machine


def graders(kind: str, settings: Any, seconds: float) -> Callable[[Sequence[tuple[Any, str]]], list[float]]:
    """``grader`` in as many servers as there are cores, at most ``SERVERS``, for many answers; few are judged by the first alone, and the others need
    not start."""
    number = max(1, min(SERVERS, os.cpu_count() or 1))
    each = [grader(kind, settings, seconds) for _ in range(number)]

    def score(pairs: Sequence[tuple[Any, str]]) -> list[float]:
        used = max(1, min(number, len(pairs) // FEW))
        parts = [pairs[i::used] for i in range(used)]
        with ThreadPoolExecutor(used) as pool:
            found = list(pool.map(lambda judge, part: judge(part), each, parts))
        scores = [0.0] * len(pairs)
        for i, part in enumerate(found):
            scores[i::used] = part
        return scores

    return score


def grader(kind: str, settings: Any, seconds: float) -> Callable[[Sequence[tuple[Any, str]]], list[float]]:
    """A function from pairs of (what is known, answer) to scores.

    The score is 0 for an answer that takes more than ``seconds`` of CPU time, or ``PATIENCE`` times as many by the clock. A process
    that dies says nothing about its answer, which is judged once more; the score is 0 if it dies again. ``kind`` names one of
    ``grading_server.KINDS``. The server starts with the first call. Calls from several threads wait for each other. Raises
    ``ValueError`` where what is known is at fault.
    """
    process: subprocess.Popen | None = None
    lock = threading.Lock()

    def started() -> subprocess.Popen:
        nonlocal process
        if process is None or process.poll() is not None:
            kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
            process = subprocess.Popen(
                [sys.executable, "-P", "-X", "utf8", grading_server.__file__, *map(os.path.abspath, sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env={"OMP_NUM_THREADS": "1", **kept},
                start_new_session=True,
            )
            if ask(process, (kind, settings, seconds), 1, START_SECONDS) != ["ready"]:
                raise ValueError(f"{kind}: the process that judges answers did not start")
        return process

    def ask(server: subprocess.Popen, message: Any, count: int, limit: float) -> list[str]:
        """``count`` lines, each within ``limit`` seconds of the one before. If one is missing, the server is no more."""
        assert server.stdin is not None and server.stdout is not None
        sent = pickle.dumps(message)
        lines: list[str] = []
        try:
            while sent:
                sent = sent[server.stdin.write(sent) :]
            while len(lines) < count and readable(limit, server.stdout) and (line := server.stdout.readline()):
                lines.append(line.decode().strip())
        except OSError:
            pass
        finally:
            if len(lines) < count:  # an interrupt, too, may not leave replies behind that the next question would get
                end(server)
        return lines

    def end(server: subprocess.Popen) -> None:
        assert server.stdin is not None and server.stdout is not None
        server.kill()
        server.wait()
        server.stdin.close()
        server.stdout.close()

    def score(pairs: Sequence[tuple[Any, str]]) -> list[float]:
        scores: list[float] = []
        died = -1
        with lock:
            while len(scores) < len(pairs):
                rest = pairs[len(scores) :]
                lines = ask(started(), rest, len(rest), PATIENCE * seconds * TOGETHER + START_SECONDS)
                if lines and lines[-1].startswith("!"):
                    raise ValueError(f"{kind}: {lines[-1][1:]}")
                scores += map(float, lines)
                if len(scores) == died:
                    scores.append(0.0)
                died = len(scores)
        return scores

    return score
