"""The process that judges answers for ``lm.grading``; it is run as a script, and imports neither jrl nor JAX."""

import ast
import contextlib
import ctypes
import gc
import math
import os
import pickle
import re
import resource
import selectors
import signal
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

PATIENCE = 10  # wall-clock seconds for each second of CPU time: a busy machine makes no right answer wrong
MEMORY = 2 << 30  # bytes of address space
LONGEST = 100_000  # characters of an answer
NOBODY = 65534
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38  # linux/prctl.h
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1 << 1, 1 << 2  # linux/capability.h
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (1 << bit for bit in (27, 28, 29, 30))  # linux/sched.h


# --- The first wall: what an answer may contain ---


def _arithmetic(answer: str) -> bool:
    """Whole numbers with + - * / and parentheses; powers and floor division are none of these games' operators."""
    return re.fullmatch(r"[-+*/()0-9\s]*", answer, re.ASCII) is not None and not re.search(r"\*\*|//", answer)


FUNCTIONS = (
    "sin|cos|tan|cot|sec|csc|asin|acos|atan|acot|sinh|cosh|tanh|asinh|acosh|atanh|exp|log|ln|sqrt|abs|Abs|Rational"
)
WORDS = {*string.ascii_letters, *FUNCTIONS.split("|"), "pi"} - {*"NOQS"}  # those four letters are functions of sympy


def _formula(answer: str) -> bool:
    """Numbers, variables of one letter and ``WORDS``: no text, no attribute (a point before a letter) and no other name.

    ``Integral`` is not among them: it gives the question back, and the scorers of integrals take it for an answer.
    """
    plain = re.fullmatch(r"[-+*/(),.0-9A-Za-z\s]*", answer, re.ASCII) and not re.search(r"\.\s*[A-Za-z]", answer)
    return bool(plain) and set(re.findall("[A-Za-z][0-9A-Za-z]*", answer)) <= WORDS


def _literal(answer: str) -> bool:
    """Rows of digits, capitals and ``_``, which name no variable of a scorer, or a literal of Python, such as a list of lists."""
    if re.fullmatch(r"[A-Z0-9_\s]*", answer, re.ASCII):
        return True
    try:
        ast.literal_eval(answer.strip())
    except Exception:
        return False
    return True


# The datasets of reasoning-gym 0.1.25 whose scorers evaluate the answer: by sympy's parse_expr (the first five) or by eval. The
# others compare it with text or read it by json, float, int, Fraction, Decimal, numpy.loadtxt or an expression of their own.
EVALUATED: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("countdown", "puzzle24"), _arithmetic),
    **dict.fromkeys(("simple_integration", "intermediate_integration", "polynomial_multiplication"), _formula),
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), _literal),
}
NAN = re.compile(r"(?<![^\W\d_])nan(?=[ij]?(?![^\W\d_]))", re.IGNORECASE)  # is within any distance of any number


def admitted(dataset: str, known: dict, answer: str) -> bool:
    """Whether an answer may be handed to the scorer of ``dataset`` (for "composite", to that of its part)."""
    fits = EVALUATED.get(known["metadata"].get("source_dataset", dataset)) or EVALUATED.get(dataset)
    return (fits is None or fits(answer)) and not (NAN.search(answer) and not NAN.search(str(known["answer"])))


# --- Kinds of judges ---

# From what is known, which is trusted, to a function of an answer, which is not.
Judge = Callable[[Any], Callable[[str], Any]]
TOGETHER = 64  # answers that one fork judges; one where it evaluates names

GROUPED = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:[ \u00a0\u2007\u2009\u202f][0-9]{3})+(?![0-9])")  # 1 000 000
SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]+)(?![A-Za-z0-9.])")  # 1.5e-3
# A word before another or a number, such as "answer is 5": of a sentence its last number is read, of an expression all.
PROSE = re.compile(
    r"(?<![A-Za-z\\])(?!(?:or|and|pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|mod)\b)[A-Za-z]{2,}:?\s+[-+$]?[A-Za-z0-9]"
)


def _math_verify(settings: Any) -> tuple[Judge, int]:
    import logging

    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def read(text: str) -> list:
        text = GROUPED.sub(lambda number: re.sub(r"\s", "", number[0]), text.replace("\N{MINUS SIGN}", "-"))
        if not ("$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text):
            text = SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", text)
            text = text if PROSE.search(text) else f"${text}$"
        return math_verify.parse(text, parsing_timeout=None)

    def judge(known: str) -> Callable[[str], Any]:
        gold = read(known)
        if not gold:
            raise ValueError(f"{known!r} is no mathematics")
        return lambda answer: math_verify.verify(gold, read(answer), timeout_seconds=None)

    judge("1/2")("0.5")  # fills caches, which forks share
    return judge, TOGETHER  # it evaluates nothing but digits and operators


def _reasoning_gym(settings: Any) -> tuple[Judge, int]:
    import reasoning_gym

    name, params = settings
    dataset = reasoning_gym.create_dataset(name, **params)

    def judge(known: dict) -> Callable[[str], Any]:
        return lambda answer: dataset.score_answer(answer, known) if admitted(name, known, answer) else 0.0

    judge(dataset[0])(dataset[0]["answer"])  # imports what a scorer imports on first use
    return judge, 1 if name == "composite" or EVALUATED.get(name) == _formula else TOGETHER


def _python(settings: Any) -> tuple[Judge, int]:
    """For tests: an answer is an expression of Python, to be equal to what is known; ``settings`` of them are judged by a fork."""
    return lambda known: lambda answer: eval(answer) == known, settings


KINDS = {"math_verify": _math_verify, "reasoning_gym": _reasoning_gym, "python": _python}


# --- The server ---


def readable(limit: float, *files: Any) -> list:
    """Those of the files that have something to read, or end, within ``limit`` seconds."""
    with selectors.DefaultSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(limit)]


def _serve() -> None:
    """Reads pickled lists of (known, answer); writes a line a pair: a score, or ``!`` and what is wrong with what is known."""
    _isolate()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a checker prints is no reply
    sys.path += sys.argv[1:]
    kind, settings, seconds = pickle.load(sys.stdin.buffer)
    judge, together = KINDS[kind](settings)
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)
    gc.collect()
    gc.freeze()  # a fork need not copy what a collection would touch
    if [*_forked([(lambda answer: 1, "")], seconds)] != [1]:
        raise RuntimeError("forks cannot judge answers here")
    print("ready", file=replies, flush=True)
    while True:
        try:
            pairs = pickle.load(sys.stdin.buffer)
            for first in range(0, len(pairs), together):
                batch = [(judge(known), answer) for known, answer in pairs[first : first + together]]
                for score in _judged(batch, seconds):
                    print(score, file=replies, flush=True)
        except EOFError:
            return
        except Exception as error:
            print(f"!what is known cannot be read: {error}".replace("\n", " "), file=replies, flush=True)
            return


def _judged(batch: list, seconds: float) -> Iterator[float]:
    """Scores of pairs of a function and an answer. One at which a fork died is judged once more, alone."""
    done, died = 0, -1
    while done < len(batch):
        for score in _forked(batch[done : done + 1] if done == died else batch[done:], seconds):
            if score is None and done != died:
                died = done
                break
            yield score or 0.0
            done += 1


def _isolate() -> None:
    """Goes on in a fork without network and with a numbering of processes of its own, all of which end with it."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    spaces = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC
    if libc.unshare(spaces) and libc.unshare(spaces | CLONE_NEWUSER):
        return
    if server := os.fork():
        os.waitpid(server, 0)
        os._exit(0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _forked(batch: list, seconds: float) -> Iterator[float | None]:
    """Scores from one fork, with which all ends that it started.

    If they are fewer than the batch, the last is 0 for an answer that took too long, or None for one at which the fork died.
    """
    read, write = os.pipe()
    os.set_blocking(read, False)
    fork = os.fork()
    if not fork:
        _answer(batch, seconds, write)
    os.close(write)
    scores: list[float] = []
    ended = status = 0
    text = b"first"
    while text and len(scores) < len(batch):
        ready: list = []
        deadline = time.monotonic() + PATIENCE * seconds
        while not (ready or ended) and time.monotonic() < deadline:
            ready = readable(0.05, read, sys.stdin)
            ended, status = os.waitpid(fork, os.WNOHANG)  # others may hold the pipe, so its end is not that of the fork
        text = b""
        with contextlib.suppress(BlockingIOError, ValueError):
            written = os.read(read, 1 << 16)
            scores += [float(score) for score in written.split()]
            text = written
    os.close(read)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(fork, signal.SIGKILL)
    if os.getpid() == 1:  # in a namespace of its own: also those that have left the fork's group
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, code = os.waitpid(-1, 0)
            status = code if pid == fork else status
    if sys.stdin in ready:  # the program that asked is no more
        os._exit(0)
    late = not (ready or ended) or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF)
    yield from (score if math.isfinite(score) else 0.0 for score in scores[: len(batch)])
    if len(scores) < len(batch):
        yield 0.0 if late else None


def _answer(batch: list, seconds: float, reply: int) -> NoReturn:
    """In the fork: writes the scores."""
    with contextlib.suppress(BaseException):
        _confine(seconds, len(batch), reply)
        for judge, answer in batch:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            score = 0.0
            try:
                if len(answer) <= LONGEST:
                    score = float(judge(answer))
            except MemoryError:  # perhaps for what the answers before it have left behind: it is judged again, alone
                break
            except BaseException:  # a checker that stumbles over an answer does not accept it
                pass
            os.write(reply, f"{score} ".encode())
    os._exit(0)


def _confine(seconds: float, answers: int, reply: int) -> None:
    """Leaves a fork nothing but its limits, the reading of files, and ``reply``."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for file in range(3):
        os.dup2(null, file)
    os.closerange(3, reply)
    os.closerange(reply + 1, 4096)
    limits = {"CPU": math.ceil(seconds * answers) + 1, "AS": MEMORY, "FSIZE": 0, "CORE": 0, "NOFILE": 64, "NPROC": 0}
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if os.getuid() == 0:
            with contextlib.suppress(OSError):
                _become_nobody(libc)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        _landlock(libc)


def _become_nobody(libc: Any) -> None:
    """Root is bound by no limit. Of its rights, that to read everything is kept: packages may lie in root's home."""
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    for kept in (CAP_DAC_READ_SEARCH, CAP_DAC_OVERRIDE, 0):  # containers may have the second alone
        if libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(kept, kept)) == 0:
            return


def _landlock(libc: Any) -> None:
    """As far as the kernel can: no file is run, written, made or removed, no TCP, no signals to others (linux/landlock.h)."""
    create_ruleset, restrict_self = 444, 446
    version = libc.syscall(create_ruleset, None, ctypes.c_size_t(0), 1)
    files = 0x1FF3 | (0x4000 if version >= 3 else 0)  # all but reading; from the third version on also truncation
    denied = (ctypes.c_uint64 * 3)(files, 0x3 if version >= 4 else 0, 0x3 if version >= 6 else 0)
    size = 8 * (1 + (version >= 4) + (version >= 6))
    ruleset = libc.syscall(create_ruleset, denied, ctypes.c_size_t(size), 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.syscall(restrict_self, ruleset, 0)


if __name__ == "__main__":
    _serve()
