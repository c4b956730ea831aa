"""The processes that are attacked: forks of one that has imported everything and has used no device yet."""

import atexit
import importlib.util
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import orbax.checkpoint  # noqa: F401  (imported here, it need not be in each fork)

from jrl.run import cli

ROOT = Path(__file__).parents[2]
warnings.filterwarnings(
    "ignore", message="os.fork", category=RuntimeWarning
)  # no device is in use, so JAX has no threads


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        code: exit status; negative, the signal; None if it had to be killed since its time was over.
        output: what it printed.
        seconds: how long it ran.
    """

    code: int | None
    output: str
    seconds: float


class Process:
    """A fork that runs ``body()`` in a folder, in a session of its own, and writes what it prints to ``log``."""

    def __init__(self, body: Callable[[], Any], folder: Path, log: Path, environment: Mapping[str, str] | None = None):
        self._log, self._begin, self._ended = log, time.monotonic(), None
        log.write_bytes(b"")  # a process that is killed at once writes none
        self.pid = os.fork()
        if self.pid == 0:
            _become(body, folder, log, environment or {})

    def poll(self) -> int | None:
        """Exit status if it has ended, else None."""
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._ended = os.waitstatus_to_exitcode(status) if pid else None
        return self._ended

    def send(self, number: int) -> None:
        """A signal to the whole session, as a terminal would send it."""
        if self.poll() is None:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:  # its session has not begun yet
                os.kill(self.pid, number)

    def wait(self, seconds: float) -> Ended:
        """Wait for its end; after so many seconds, kill it."""
        while self.poll() is None and time.monotonic() - self._begin < seconds:
            time.sleep(0.005)
        ended = self.poll()
        if ended is None:
            self.send(signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._ended = -signal.SIGKILL
        return Ended(ended, self._log.read_text(errors="replace"), time.monotonic() - self._begin)


def _become(body: Callable[[], Any], folder: Path, log: Path, environment: Mapping[str, str]) -> NoReturn:
    """Run as the forked process, and end as Python ends one."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, source in ((0, nothing), (1, file), (2, file)):
            os.dup2(source, number)
        os.environ.update(environment)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # the attack may have been started to ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        body()
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@cache
def script(name: str) -> Any:
    """The module of an experiment."""
    path = ROOT / "experiments" / name
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for the files that it imports
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def command(name: str, words: list[str]) -> Callable[[], None]:
    """``python experiments/NAME WORDS`` as the body of a process."""
    module = script(name)

    def body() -> None:
        sys.argv = [name, *words]
        cli.main(module.main)

    return body


def no_device_used() -> bool:
    """Whether this process may still be forked."""
    return not jax._src.xla_bridge.backends_are_initialized()
