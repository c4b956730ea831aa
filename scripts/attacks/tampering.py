"""Damaged files of runs, which are then resumed, and of language models, which are then loaded.

A run of each kind is made once, stopped after five of its seven updates. A case damages one thing in a copy of its folder and resumes the
copy by the experiment's command. Either the command ends with exit status 1 and one line that names the path, or what the run then
holds is what the undamaged copy holds when it is resumed.
"""

import functools
import os
import random
import shutil
from pathlib import Path
from typing import Any

from attacks import processes
from attacks.damage import FILE, JSON, ROWS, Case, damage
from attacks.held import held
from attacks.resuming import SERVER
from jrl.run import log

COUNT = 2000
UPDATES, STOPPED = 7, 5

COMMON = ("--env", "Probe-action", "--preset", "none", "--log-every", "1", "--eval-every", "16", "--eval-episodes", "1")
ON_POLICY = ("--config.num-envs", "2", "--config.num-steps", "4", "--config.num-epochs", "1", "--config.num-minibatches", "1",)  # fmt: skip
OFF_POLICY = ("--config.num-envs", "2", "--config.num-steps", "4", "--config.batch-size", "4", "--config.capacity", "32",
              "--config.learning-starts", "8", "--config.num-gradient-steps", "1")  # fmt: skip
TRAINED = {
    "ppo": ("ppo.py", (*COMMON, *ON_POLICY, "--num-seeds", "2")),
    "dqn": ("dqn.py", (*COMMON, *OFF_POLICY, "--num-seeds", "2")),
    "pqn": ("pqn.py", (*COMMON, *ON_POLICY, "--num-seeds", "2")),
    "sweep": ("ppo.py", (*COMMON, *ON_POLICY, "--num-seeds", "2", "--sweep", "hyper.learning_rate=0.001,0.01")),
    "parquet": ("ppo.py", (*COMMON, *ON_POLICY, "--num-seeds", str(log.CSV_MEMBERS + 1))),
    "finished": ("ppo.py", (*COMMON, *ON_POLICY, "--num-seeds", "1")),
}
GRPO = ("--prompt-length", "4", "--answer-length", "3", "--config.adapter.rank", "4", "--save-every", "2", "--steps", str(UPDATES),)  # fmt: skip
RUNS = (*TRAINED, "grpo_llm")
MODELS = ("folder", "shards", "experts", "saved", "gguf")

PARTS = {
    "state": FILE, "older state": FILE, "marks": FILE, "manifest": FILE + JSON, "sealed manifest": JSON,
    "config.json": FILE + JSON, "metrics": FILE + ROWS, "evaluations.json": FILE + JSON, "summary.json": FILE + JSON,
    "events": FILE, "checkpoints": ("renamed", "swapped", "newest removed", "all removed", "a file", "another run's", "a name"),
    "folders": ("state removed", "manifest removed", "state of the other", "manifest of the other", "a link to nowhere"),
}  # fmt: skip
WEIGHTS = {"state": 5, "manifest": 3, "metrics": 4, "config.json": 2, "checkpoints": 2}
GRPO_PARTS = {
    name: PARTS[name] for name in ("state", "marks", "manifest", "sealed manifest", "metrics", "checkpoints", "folders")
}
MODEL_PARTS = {
    "config.json": FILE + JSON * 4, "weights": FILE, "header": JSON, "index": (*FILE, *JSON, "a path"), "tokenizer.json": FILE + JSON * 2,
    "tokenizer_config.json": FILE + JSON * 2, "generation_config.json": FILE + JSON * 2, "chat_template.jinja": FILE,
}  # fmt: skip


def parts_of(kind: str) -> dict[str, tuple[str, ...]]:
    """What of a kind can be damaged, and how."""
    if kind == "grpo_llm":
        return GRPO_PARTS | {"samples.csv": FILE + ROWS[:3]}
    if kind in TRAINED:
        return PARTS
    if kind == "gguf":
        return {"file": FILE, "metadata": ("a wrong value",)}
    return {name: damages for name, damages in MODEL_PARTS.items() if name != "index" or kind == "shards"}


def cases(seed: int, count: int) -> list[Case]:
    """Three of four are runs, the fourth a model."""
    rng, found = random.Random(f"tampering {seed}"), []
    for number in range(count):
        kind = rng.choice(MODELS if number % 4 == 3 else RUNS)
        parts = parts_of(kind)
        (part,) = rng.choices([*parts], [WEIGHTS.get(name, 1) for name in parts])
        found.append(Case(kind, part, rng.choice(parts[part]), rng.randrange(10**9)))
    return found


@functools.cache
def bases(root: Path) -> Path:
    """The folder of all that is damaged in copies: of each kind one, and another one beside it."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    return root


@functools.cache
def base(root: Path, kind: str, other: bool = False) -> Path:
    """A run that was stopped, or a model."""
    path = bases(root) / (f"{kind}-other" if other else kind)
    if kind in MODELS:
        ended = SERVER.run("make", [kind, str(path), str(int(other))], root, root / "log", STOPPED)
    else:
        if kind == "grpo_llm":
            base(root, "folder")
        stop = UPDATES if kind == "finished" else STOPPED
        ended = SERVER.run(*command(root, kind, path, "--seed", str(int(other))), root, root / "log", stop)
    if ended.code not in (0, 130):
        raise RuntimeError(f"{path} could not be made: {ended.output}")
    return path


def command(root: Path, kind: str, folder: Path, *more: str) -> tuple[str, list[str]]:
    """The experiment, and its words."""
    if kind == "grpo_llm":
        model = base(root, "folder")
        return "lm.py", [
            "grpo",
            "--model",
            str(model),
            "--dataset",
            str(model / "say.py"),
            "--run-dir",
            str(folder),
            *GRPO,
            *more,
        ]
    name, words = TRAINED[kind]
    return name, [*words, "--run-dir", str(folder), "--env-steps", str(8 * UPDATES), *more]


def attacked(root: Path, case: Case, folder: Path) -> tuple[str, list[str]]:
    """The command that is to refuse the folder, or to notice nothing."""
    if case.kind in MODELS:
        return "load", [str(folder / "model.gguf" if case.kind == "gguf" else folder)]
    return command(root, case.kind, folder, *([] if case.kind == "grpo_llm" else ["--resume"]))


@functools.cache
def undamaged(root: Path, kind: str) -> dict[str, Any]:
    """What an undamaged copy holds in the end."""
    case, copy = Case(kind, "", "", 0), bases(root) / f"{kind}-whole"
    shutil.copytree(base(root, kind), copy)
    ended = SERVER.run(*attacked(root, case, copy), root, root / "log")
    if ended.code != 0:
        raise RuntimeError(f"{copy} could not be read: {ended.output}")
    return held(copy)


def attempt(case: Case, folder: Path) -> tuple[str | None, dict[str, int]]:
    """Damage a copy, and use it."""
    root = folder.parent / "bases"
    original = base(root, case.kind)
    other = base(root, case.kind, other=True) if "another run's" in case.damage else Path(os.devnull)
    expected = undamaged(root, case.kind) if case.kind in RUNS else None
    copy, mark = folder / "copy", folder / "executed"
    shutil.copytree(original, copy)
    what = damage(case, copy, other, mark)
    if what is None:
        return None, {"nothing to damage": 1}
    ended = SERVER.run(*attacked(root, case, copy), folder, folder / "log")
    broke, count = judged(case, ended, copy, expected)
    if mark.exists():
        broke = "what a file held was executed"
    return (None if broke is None else f"{what}: {broke}"), {count: 1}


def judged(case: Case, ended: processes.Ended, folder: Path, expected: dict[str, Any] | None) -> tuple[str | None, str]:
    """What was wrong with the end, if anything, and what the end was."""
    lines = ended.output.strip().splitlines()
    if ended.code is None:
        return "did not end", "hung"
    if "Traceback" in ended.output:
        return f"a traceback: {lines[-1][:200]}", "traceback"
    if ended.code == 0 and expected is None:
        return None, "loaded"
    if ended.code == 0:
        found = held(folder)
        differing = [
            name
            for name in expected
            if found.get(name) != expected[name] and not less(found.get(name), expected[name], name)
        ]
        return (f"different data accepted: {', '.join(differing)}" if differing else None), "changed nothing"
    errors = [line for line in lines if line.startswith("error: ")]
    if ended.code != 1:
        return f"exit status {ended.code}: {lines[-1:]}", "died"
    if len(errors) != 1 or lines[-1] != errors[0]:
        return f"{len(errors)} lines of error: {lines[-3:]}", "refused"
    if str(folder) not in errors[0] and "the chat template refuses" not in errors[0]:
        return f"the path is not named: {errors[0][:300]}", "refused"
    return None, "refused"


def less(found: Any, expected: Any, name: str) -> bool:
    """Whether all that is found is right: a record that was removed says less, but nothing wrong."""
    if name == "evaluations.json":
        return all(entry in expected for entry in found or [])
    return False
