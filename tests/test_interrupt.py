"""Signals that ask a run to end are answered within seconds, wherever it is."""

import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest

from jrl.run import interrupt
from jrl.run.interrupt import StopOnSignal

# The module alone, which needs nothing but Python. Deriving a key takes minutes, in which Python cannot interrupt it.
SCRIPT = f"""
import hashlib, importlib.util, sys, time
spec = importlib.util.spec_from_file_location("interrupt", {interrupt.__file__!r})
interrupt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interrupt)
interrupt.on_leaving("how to go on")
long = lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
try:
    with interrupt.leaving_in_time():
        print("ready", flush=True)
        exec(sys.argv[1])
except KeyboardInterrupt:
    print(interrupt.last_words, file=sys.stderr)
    sys.exit(interrupt.INTERRUPTED)
"""
CALLBACK = """
class Slow:
    def __del__(self):
        time.sleep(1)
Slow()
time.sleep(60)
"""
LIBRARY = """
try:
    time.sleep(60)
except KeyboardInterrupt:
    raise RuntimeError("of a library")
"""
LOOP = """
with interrupt.StopOnSignal() as stop:
    while not stop.requested:
        time.sleep(0.01)
    time.sleep(3)
    print("saved", flush=True)
"""


def heed_signals():
    """A process that was started in the background, or by nohup, passes on that it ignores some."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(body, *signals, apart=0.5):
    """What a process printed after it was ready, its status, and the seconds it took to leave."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    begin = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(apart)
    out, err = process.communicate(timeout=30)
    return out + err, process.returncode, time.monotonic() - begin


@pytest.mark.thorough(4)
@pytest.mark.parametrize("body", ["long()", "time.sleep(60)", CALLBACK, LIBRARY])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_cannot_be_interrupted_is_ended(body, number):
    said, status, seconds = run(body, number)
    assert said.strip() == "how to go on" and status == 130
    assert seconds < 5


def test_a_loop_that_saves_is_waited_for():
    said, status, seconds = run(LOOP, signal.SIGTERM)
    assert said == "saved\n" and status == 0 and 3 < seconds < 6


def test_a_second_ctrl_c_leaves_at_once():
    said, status, seconds = run(LOOP, signal.SIGINT, signal.SIGINT)
    assert "saved" not in said and status == 130 and seconds < 2.5
    assert run(LOOP, signal.SIGINT, signal.SIGINT, apart=0.0)[0] == "saved\n"  # one that was passed on twice


def test_what_a_process_was_started_to_ignore_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_where_nothing_is_to_be_lost_a_signal_interrupts():
    with StopOnSignal() as stop:
        with pytest.raises(KeyboardInterrupt), stop.nothing_to_lose():
            signal.raise_signal(signal.SIGINT)
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), stop.nothing_to_lose():
            pytest.fail("it had been asked to end")


def test_a_long_step_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(interrupt, "PATIENCE", 0.2)
    done, late = Future(), Future()
    done.set_result(3)
    with StopOnSignal() as stop:
        assert stop.result(done) == 3
        signal.raise_signal(signal.SIGTERM)
        assert stop.result(done) == 3
        with pytest.raises(KeyboardInterrupt):
            stop.result(late)
    late.set_exception(TimeoutError("its own"))
    with StopOnSignal() as stop, pytest.raises(TimeoutError, match="its own"):
        stop.result(late)
