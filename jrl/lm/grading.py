"""Answers judged in a process of their own, with a deadline for each.

Checkers of mathematics evaluate what a model wrote, and ``9**9**9`` never ends. Their own timeouts are signals, which work in a
program's main thread alone and do not stop a big number's power; a process can be killed. The process runs this file as a script,
so it imports neither jrl nor JAX, nor the program that started it.
"""

import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

START_SECONDS = 120.0  # importing sympy on a busy machine


def grader(kind: str, settings: Any, seconds: float) -> Callable[[Sequence[tuple[Any, str]]], list[float]]:
    """A function from pairs of (what is known, answer) to scores; 0 for an answer that takes more than ``seconds``.

    ``kind`` names one of ``_KINDS``. The process starts with the first call, and again after an answer that took too long. Calls
    from several threads wait for each other. Raises ``ValueError`` where what is known is at fault.
    """
    process: subprocess.Popen | None = None
    lock, reader = threading.Lock(), ThreadPoolExecutor(1)

    def started() -> subprocess.Popen:
        nonlocal process
        if process is None or process.poll() is not None:
            command = [sys.executable, "-P", __file__]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if ask(process, (kind, settings), START_SECONDS) != "ready":
                raise ValueError(f"{kind}: the process that judges answers did not start")
        return process

    def ask(child: subprocess.Popen, message: Any, limit: float) -> str | None:
        """The reply's line; None if there is none in time, and then the process is no more."""
        assert child.stdin is not None and child.stdout is not None
        sent, line = pickle.dumps(message), b""
        try:
            child.stdin.write(sent)
            child.stdin.flush()
            line = reader.submit(child.stdout.readline).result(limit)
        except OSError:  # a TimeoutError is one
            pass
        finally:
            if not line:  # an interrupt, too, may not leave a reply behind that the next question would get
                child.kill()
                child.wait()
        return line.decode().strip() or None

    def score(pairs: Sequence[tuple[Any, str]]) -> list[float]:
        scores = []
        with lock:
            for pair in pairs:
                child = started()
                reply = ask(child, pair, seconds) or "0"
                if reply.startswith("!"):
                    child.kill()
                    child.wait()
                    raise ValueError(f"{kind}: {reply[1:]}")
                scores.append(float(reply))
        return scores

    return score


class _Unreadable(Exception):
    """What is known cannot be read."""


GROUPED = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:[ \u00a0\u2007\u2009\u202f][0-9]{3})+(?![0-9])")  # 1 000 000
SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]+)(?![A-Za-z0-9.])")  # 1.5e-3
# A word before another or a number, such as "answer is 5": of a sentence its last number is read, of an expression all.
PROSE = re.compile(
    r"(?<![A-Za-z\\])(?!(?:or|and|pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|mod)\b)[A-Za-z]{2,}:?\s+[-+$]?[A-Za-z0-9]"
)


def _math_verify(settings: Any) -> Callable[[Any, str], float]:
    import logging

    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def read(text: str) -> list:
        text = GROUPED.sub(lambda number: re.sub(r"\s", "", number[0]), text.replace("\N{MINUS SIGN}", "-"))
        if not ("$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text):
            text = SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", text)
            text = text if PROSE.search(text) else f"${text}$"
        return math_verify.parse(text, parsing_timeout=None)

    def judge(known: str, answer: str) -> float:
        gold = read(known)
        if not gold:
            raise _Unreadable(f"the known answer {known!r} cannot be read as mathematics")
        return float(math_verify.verify(gold, read(answer), timeout_seconds=None))

    return judge


def _reasoning_gym(settings: Any) -> Callable[[Any, str], float]:
    import reasoning_gym

    name, params = settings
    dataset = reasoning_gym.create_dataset(name, **params)
    return lambda known, answer: float(dataset.score_answer(answer, known))


def _python(settings: Any) -> Callable[[Any, str], float]:
    """For tests: the answer is an expression of Python, to be equal to what is known."""
    return lambda known, answer: float(eval(answer) == known)


_KINDS = {"math_verify": _math_verify, "reasoning_gym": _reasoning_gym, "python": _python}


def _serve() -> None:
    """Read pickled requests, answer each with a line: a score, or ``!`` and what is wrong with what is known."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a checker prints is no reply
    kind, settings = pickle.load(sys.stdin.buffer)
    judge = _KINDS[kind](settings)
    print("ready", file=replies, flush=True)
    while True:
        try:
            known, answer = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        except Exception as error:
            print(f"!what is known cannot be read: {error}".replace("\n", " "), file=replies, flush=True)
            return  # the rest of its bytes would be taken for the next question
        try:
            reply = str(judge(known, answer))
        except _Unreadable as error:
            reply = f"!{error}"
        except Exception:  # a checker that stumbles over an answer does not accept it
            reply = "0"
        print(reply.replace("\n", " "), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
