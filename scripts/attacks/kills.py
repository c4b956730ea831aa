"""Runs that are killed, and asked to end, at moments of every kind; then they go on, and must be the run that nobody disturbed."""

import functools
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from attacks import language_model
from attacks.held import held
from attacks.processes import Ended, Process, command, no_device_used

COUNT = 80
LIMIT = 240.0  # seconds, for a start of a run
LEAVES_WITHIN = 5.0 + 1.0  # seconds after a signal; the last one for a machine that is busy


class Run(NamedTuple):
    """An experiment and its words; ``goes_on`` where the same words continue it, without --resume."""

    script: str
    words: tuple[str, ...]
    goes_on: bool = False


NET = ("--config.network.hidden", "8")
ENVS = ("--config.num-envs", "2", "--config.num-steps", "16")
COMMON = ("--num-seeds", "2", "--checkpoint-every", "0.2", "--eval-episodes", "2", *NET)
REPLAY = ("--config.replay.capacity", "256", "--config.learning-starts", "64")
RUNS = {
    "ppo": Run("ppo.py", (*COMMON, *ENVS, "--env-steps", "200000", "--eval-every", "50000")),
    "ppo, evaluating": Run(
        "ppo.py", (*COMMON, *ENVS, "--env-steps", "3200", "--eval-every", "160", "--log-every", "7")
    ),
    "ppo, memory": Run(
        "ppo.py",
        (
            *COMMON,
            *ENVS,
            "--env",
            "MemoryChain-bsuite",
            "--config.network.gru",
            "4",
            "--config.num-minibatches",
            "1",
            "--env-steps",
            "60000",
        ),
    ),
    "ppo, a sweep": Run("ppo.py", (*COMMON, *ENVS, "--env-steps", "40000", "--sweep", "hyper.learning_rate=1e-3,1e-4")),
    "dqn": Run("dqn.py", (*COMMON, "--preset", "none", "--env-steps", "40000", "--eval-every", "10000")),
    "pqn": Run("pqn.py", (*COMMON, "--preset", "none", *ENVS, "--env-steps", "100000")),
    "r2d2": Run("r2d2.py", (*COMMON, "--preset", "none", "--env", "MemoryChain-bsuite", "--env-steps", "20000")),
    "grpo": Run(
        "grpo.py",
        (
            *("--methods", "grpo", "rloo", "--updates", "200", "--num-seeds", "2", "--eval-episodes", "4"),
            *("--checkpoint-every", "0.2", "--config.model.dim", "16", "--config.model.num-layers", "1"),
            *("--config.num-prompts", "4", "--config.group-size", "4"),
        ),
    ),
    "grpo_llm": Run("lm.py", ("grpo", *language_model.WORDS, "--steps", "12", "--save-every", "2"), goes_on=True),
}


class Case(NamedTuple):
    """A run, and what happens to it: pairs of a moment and a signal, one for each start.

    A moment is a share of the time that the undisturbed run takes, or the name of a file: as soon as that appears or changes.
    """

    run: str
    blows: tuple[tuple[float | str, int], ...]


SAME = ("sweep.csv", "samples.csv", "curve.png", "curve.svg", "grpo.csv", "grpo.png", "grpo.svg")  # to the last byte
FILES = (
    "config.json",
    "config.tmp",
    "metrics.csv",
    "checkpoints/*",
    "checkpoints/*tmp*",
    "evaluations.json",
    "summary.json",
    "curve.png",
)


def cases(seed: int, count: int) -> list[Case]:
    """The runs in turn, each with two to five blows."""
    drawn = random.Random(seed)
    names = list(RUNS)

    def moment() -> float | str:
        kind = drawn.random()
        if kind < 0.35:
            return drawn.choice(FILES)
        return round(drawn.random() * (0.15 if kind < 0.5 else 1.0), 3)  # the first seconds, or any

    def blow() -> tuple[float | str, int]:
        softly = drawn.random() < 0.2
        return moment(), drawn.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]) if softly else signal.SIGKILL

    return [Case(names[i % len(names)], tuple(blow() for _ in range(drawn.randint(2, 5)))) for i in range(count)]


def attempt(case: Case, folder: Path) -> tuple[str | None, dict[str, int]]:
    """Strike as the case says, let the run come to its end, and compare it with the undisturbed one."""
    assert no_device_used()
    counts: Counter[str] = Counter()
    whole, seconds = undisturbed(case.run)
    target = folder / "run"
    for moment, number in case.blows:
        process = start(case.run, target, folder / "log")
        wait_for(moment, seconds, process, target)
        if process.poll() is not None:
            break
        begin = time.monotonic()
        process.send(number)
        ended = process.wait(LIMIT)
        counts[signal.Signals(number).name] += 1
        if number != signal.SIGKILL and (broke := left_badly(ended, time.monotonic() - begin)):
            return f"{signal.Signals(number).name} at {moment}: {broke}", counts
    ended = start(case.run, target, folder / "log").wait(LIMIT)
    if ended.code != 0:
        return f"does not go on: exit {ended.code}: {ended.output.strip()[-500:]}", counts
    return difference(whole, target), counts


def left_badly(ended: Ended, seconds: float) -> str | None:
    """What is wrong about how a run left that was asked to."""
    at_once = (-signal.SIGTERM, -signal.SIGHUP)  # before its first line
    if ended.code not in (0, 130, *at_once):  # 0 if it was about to end anyhow
        return f"exit {ended.code}: {ended.output.strip()[-500:]}"
    if "Traceback" in ended.output:
        return f"a traceback: {ended.output.strip()[-500:]}"
    return f"left after {seconds:.1f} seconds" if seconds > LEAVES_WITHIN else None


def start(name: str, folder: Path, log: Path) -> Process:
    """Begin the run, or go on with it."""
    run = RUNS[name]
    words = [*run.words, "--run-dir", str(folder)]
    if not run.goes_on and folder.is_dir() and any(folder.iterdir()):
        words.append("--resume")
    return Process(command(run.script, words), log.parent, log)


def wait_for(moment: float | str, seconds: float, process: Process, folder: Path) -> None:
    """Until the moment has come, or the process has ended."""
    begin = time.monotonic()
    before = _state(folder, moment) if isinstance(moment, str) else None
    while process.poll() is None:
        if isinstance(moment, str):
            if _state(folder, moment) != before or time.monotonic() - begin > 2 * seconds:
                return
        elif time.monotonic() - begin > moment * seconds:
            return
        time.sleep(0.002)


def _state(folder: Path, pattern: str) -> Any:
    while True:
        try:
            return [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob(pattern))]
        except FileNotFoundError:  # it was renamed or removed while it was listed
            continue


@functools.cache
def undisturbed(name: str) -> tuple[Path, float]:
    """The folder of a run that nobody disturbed, and how long it took when all was compiled."""
    folder = Path(tempfile.gettempdir()) / "jrl-undisturbed" / name
    if name == "grpo_llm":
        Process(language_model.make, Path(tempfile.gettempdir()), Path(os.devnull)).wait(LIMIT)
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        ended = start(name, folder / "run", folder / "log").wait(LIMIT)
        assert ended.code == 0, ended.output
    return folder / "run", ended.seconds


def difference(whole: Path, other: Path) -> str | None:
    """What is not equal in two folders of a run, or of several: results, or files that are too many or missing."""
    names = [
        {str(p.relative_to(f)) for p in f.rglob("*") if not {"events", "checkpoints"} & set(p.relative_to(f).parts)}
        for f in (whole, other)
    ]
    litter = [str(p.relative_to(other)) for p in other.rglob("checkpoints/*") if not p.name.isdecimal()]
    if names[0] != names[1] or litter:
        return f"files: {sorted(names[0] ^ names[1])}, in checkpoints: {litter}"
    differing = [name for name in names[0] if Path(name).name in SAME and not _same(whole / name, other / name)]
    for config in whole.rglob("config.json"):
        home = config.parent.relative_to(whole)
        wanted, found = held(whole / home), held(other / home)
        differing += [str(home / name) for name in wanted if found.get(name) != wanted[name]]
    return f"not those of the undisturbed run: {', '.join(differing)}" if differing else None


def _same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()
