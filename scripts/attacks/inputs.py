"""Bad inputs: command lines, environment variables, a user's Python files, and models' folders that are wrong.

Each must be refused with one line and status 1, or by the parser of command lines with status 2. Few may work, and are tiny.
"""

import dataclasses
import json
import os
import random
import resource
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
import safetensors.numpy

from attacks import bad_files, language_model
from attacks.processes import ROOT, Process, command, script
from jrl.lm import layout, settings

COUNT = 1000
SECONDS, MEMORY = 60, 12 << 30  # of a case that is refused
LONGEST = 2000  # characters of a line that can be read


class Case(NamedTuple):
    """A command line, and what it finds.

    Attributes:
        script: file name of the experiment.
        words: the words of its command line.
        files: names and texts in the working folder; a name that ends with ``/`` is a folder.
        environment: variables besides.
        model: files of the folder ``model`` that take the place of the ones that a tiny model has, None for one that is missing.
        may_work: whether status 0 is right as well.
    """

    script: str
    words: tuple[str, ...]
    files: tuple[tuple[str, str], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    model: tuple[tuple[str, str | None], ...] | None = None
    may_work: bool = False

    def __str__(self) -> str:
        """Long words cut short."""
        return repr(tuple(self))[:1000]


# What is small enough to end soon if it is not refused.
TINY = ("--env-steps", "512", "--num-seeds", "1", "--eval-episodes", "1", "--run-dir", "out")
SMALL: dict[str, tuple[str, ...]] = {
    "ppo.py": TINY,
    "dqn.py": TINY,
    "pqn.py": TINY,
    "r2d2.py": TINY,
    "td_random_walk.py": ("--runs", "1", "--run-dir", "out"),
    "q_learning.py": ("--runs", "2", "--episodes", "20", "--run-dir", "out"),
    "grpo.py": ("--updates", "1", "--num-seeds", "1", "--eval-episodes", "1", "--config.supervised", "0", "--run-dir", "out"),
    "memory.py": ("--lengths", "5", "--kinds", "gru", "--env-steps", "8192", "--num-seeds", "1", "--run-dir", "out"),
    "language.py": ("--kinds", "dense", "--steps", "2", "--length", "32", "--batch-size", "1", "--run-dir", "out"),
    "optimizers.py": ("--optimizers", "sgd", "--learning-rates", "0.1", "--env-steps", "512", "--toy-steps", "50", "--run-dir", "out"),
    "estimators.py": ("--methods", "rloo", "--samples", "2", "--group-sizes", "2", "--run-dir", "out"),
    "precision.py": ("--env-steps", "512", "--num-seeds", "1", "--variants", "float32", "--run-dir", "out"),
    "rainbow.py": ("--env-steps", "512", "--num-seeds", "1", "--parts", "plain", "--run-dir", "out"),
    "lm.py": ("grpo", "--model", "model", "--dataset", "say.py", "--steps", "1", "--answer-length", "2", "--run-dir", "out"),
}  # fmt: skip
HELD: dict[str, dict[str, Any]] = {"lm.py": {"files": (("say.py", bad_files.SAY),), "model": ()}}
LONG = "a" * 20_000
TEXTS = ("nope", "", "Ünï-çödé ☃", LONG, "../..", "None", "-", "a\nb", "%s%n{0}", "0")
NO_NUMBERS = ("x", "", "1,5", "--", "½", "0x10", "1e", "None", "1 2", "true", "a" * 5000)
KINDS_OF_VALUES: dict[Any, tuple[str, ...]] = {
    int: (*NO_NUMBERS, "1.5", "nan", "inf", "1e400", "1e-3", "-1", "-1e18"),
    float: (*NO_NUMBERS, "nan", "inf", "-inf", "1e39", "-1e39", "1e400"),
    bool: ("maybe", "2", "nan"),
}
HUGE = ("1e12", "1e18", "2147483648", "9223372036854775808", "99999999999999999999999", "1e300")
# Flags whose values are sizes of what must be held in memory, so that huge ones cannot work.
SIZES = (
    "num_seeds", "runs", "num_envs", "num_steps", "capacity", "batch_size", "eval_episodes", "group_size", "num_prompts",
    "rank", "dim", "num_layers", "gru", "network.hidden", "samples", "vocabulary", "toy_steps", "devices", "model_devices",
    "prompt_length", "num_sequences",
)  # fmt: skip
# Right whatever the number: not tried with one.
ANY = {"seed": ("-1", "-1e18"), "v_min": ("-1e18",)}


def cases(seed: int, count: int) -> list[Case]:
    """Cases written by hand, in random order, among wrong values of single flags and of several."""
    rng = random.Random(seed)
    written, drawn = [*_written()], [*_single_values()]
    rng.shuffle(written)
    rng.shuffle(drawn)
    chosen: list[Case] = []
    for number in range(count):  # of twenty, sixteen are written by hand
        chosen.append(_several(rng) if number % 20 == 0 else drawn.pop() if number % 20 < 4 else written.pop())
    return chosen


def some(step: int) -> list[Case]:
    """Every ``step``-th of the cases with files, which are refused before an algorithm is made: for the tests."""
    return [case for case in (*_user_files(), *_models(), *_environments()) if not case.may_work][::step]


def attempt(case: Case, folder: Path) -> tuple[str | None, dict[str, int]]:
    """Run the case; how it broke, and what happened."""
    home = folder / "work"
    _lay_out(case, home)
    ended = Process(_body(case), home, folder / "log", dict(case.environment)).wait(
        5 * SECONDS if case.may_work else SECONDS
    )
    return _judged(case, ended.code, ended.output), {"worked" if ended.code == 0 else "refused": 1}


def _lay_out(case: Case, home: Path) -> None:
    home.mkdir()
    if case.model is not None:
        (home / "model").mkdir()
        changed = {name: None if text is None else text.encode() for name, text in case.model}
        for name, data in (_model() | changed).items():
            if data is not None:
                (home / "model" / name).write_bytes(data)
    for name, text in case.files:
        if name.endswith("/"):
            (home / name).mkdir(parents=True, exist_ok=True)
        else:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)


def _body(case: Case) -> Any:
    """The fork's; where variables matter that are read at import, another Python in its place."""
    run = None if case.environment else command(case.script, list(case.words))

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if run is None:
            os.execve(
                sys.executable,
                [sys.executable, str(ROOT / "experiments" / case.script), *case.words],
                os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
            )
        else:
            run()

    return body


def _judged(case: Case, code: int | None, output: str) -> str | None:
    """What is wrong with how a case ended, or None."""
    last = output.strip().splitlines()[-1:]
    if code == -9 or code is None:
        return f"no end within {SECONDS} s"
    if "Traceback (most recent call last)" in output:
        return f"a traceback: {last}"
    if code == 0:
        return None if case.may_work else "it was accepted"
    if code == 2:
        return None if "╭" in output else f"status 2 without a word of the parser: {last}"
    if code != 1:
        return f"status {code}: {last}"
    said = [line for line in output.splitlines() if line.startswith("error:")]
    if len(said) != 1 or said != last:
        return f"not one line of error at the end: {output[-500:]!r}"
    return None if 20 <= len(said[0]) <= LONGEST else f"a line of {len(said[0])} characters"


# Single flags with a wrong value, by the types of all flags of all experiments


def _flags(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and types of all fields, nested ones with dots."""
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else cls._fields
    for name in names:
        kind = _plain_type(hints[name])
        if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
            yield from _flags(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _plain_type(hint: Any) -> Any:
    """Without None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(x for x in get_args(hint) if x is not type(None))
    return hint


def _wrong(flag: str, kind: Any) -> tuple[str, ...]:
    name = flag.rpartition(".")[2]
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return TEXTS
    values = KINDS_OF_VALUES.get(kind, ())
    if kind is int and (name in SIZES or flag.endswith(SIZES)):
        values += HUGE
    return tuple(x for x in values if x not in ANY.get(name, ()))


def _single_values() -> Iterator[Case]:
    """All flags with all values that none of their type may have."""
    for name, small in SMALL.items():
        for flag, kind in _flags(_args(name)):
            if (
                "network.attention" in flag
                or "network.vit" in flag
                or flag.startswith(("config.model.", "hyper.optimizer."))
            ):
                continue
            word = "--" + flag.replace("_", "-")
            for value in _wrong(flag, kind):
                # With "=", so that a value like "--" or "-1" is one.
                yield Case(name, (*small, f"{word}={value}"), **HELD.get(name, {}))


def _several(rng: random.Random) -> Case:
    """Several wrong values at once."""
    name = rng.choice(list(SMALL))
    flags = [(flag, kind) for flag, kind in _flags(_args(name)) if _wrong(flag, kind)]
    picked = rng.sample(flags, min(3, len(flags)))
    words = [f"--{flag.replace('_', '-')}={rng.choice(_wrong(flag, kind))}" for flag, kind in picked]
    return Case(name, (*SMALL[name], *words), **HELD.get(name, {}))


def _args(name: str) -> Any:
    """The settings of an experiment."""
    return script("lm_answers.py").GRPO if name == "lm.py" else script(name).Args


# Cases written by hand


def _written() -> Iterator[Case]:
    yield from _words()
    yield from _environments()
    yield from _folders()
    yield from _variables()
    yield from _user_files()
    yield from _models()


def _words() -> Iterator[Case]:
    """Names and combinations that cannot work."""
    for name in SMALL:
        for words in (("--nope",), ("--nope", "1"), ("word",), ("--seed",), ("",), ("☃",), (LONG,)):
            yield Case(name, (*SMALL[name], *words), **HELD.get(name, {}))
    for name in ("ppo.py", "dqn.py", "pqn.py", "r2d2.py"):
        for words in bad_files.OPTIONS:
            yield Case(name, (*TINY, *words))
    for name, lines in bad_files.COMBINATIONS.items():
        for line in lines:
            yield Case(name, (*SMALL[name], *line.split()), **HELD.get(name, {}))
    for name, lines in bad_files.MAY_WORK.items():
        for line in lines:
            yield Case(name, (*SMALL[name], *line.split()), **HELD.get(name, {}), may_work=True)


def _environments() -> Iterator[Case]:
    """Names and parameters of environments and tasks."""
    for text in TEXTS:
        for name in ("ppo.py", "rainbow.py", "precision.py", "optimizers.py"):
            yield Case(name, (*SMALL[name], f"--env={text}"))
        yield Case("grpo.py", (*SMALL["grpo.py"], f"--task={text}"))
        yield Case("lm.py", (*SMALL["lm.py"], f"--dataset={text}"), **HELD["lm.py"])
    for env, params in bad_files.PARAMETERS:
        for param in params:
            yield Case("ppo.py", (*TINY, "--env", env, "--env-params", *param.split()))
    for task, params in bad_files.TASK_PARAMETERS:
        for param in params:
            yield Case("grpo.py", (*SMALL["grpo.py"], "--task", task, "--task-params", *param.split()))


def _folders() -> Iterator[Case]:
    """Run folders that are none."""
    there = (
        ("file", "text"),
        ("foreign/notes.txt", "mine"),
        ("damaged/config.json", "{"),
        ("damaged2/config.json", '{"settings": []}'),
        ("damaged3/config.json", "[]"),
        ("damaged4/config.json", '{"settings": {"env": 5}}'),
    )
    names = (
        "file", "file/x", "foreign", "damaged", "damaged2", "damaged3", "damaged4", "/dev/null", "/dev/null/x", "/proc/nope",
        "/proc/self/x", "a" * 300, "/sys/x", "x/" * 3000, "nul\0".replace("\0", "\t") + "/" + "b" * 256,
    )  # fmt: skip
    for name in ("ppo.py", "dqn.py"):
        for folder in names:
            for more in ((), ("--resume",)):
                yield Case(name, (*TINY[:-2], "--run-dir", folder, *more), there)
    for name in (
        "td_random_walk.py",
        "q_learning.py",
        "estimators.py",
        "language.py",
        "rainbow.py",
        "grpo.py",
        "optimizers.py",
    ):
        for folder in ("file", "file/x", "/dev/null", "/dev/null/x", "/proc/nope", "a" * 300):
            yield Case(name, (*SMALL[name][:-2], "--run-dir", folder), there)
    for folder in ("file", "/dev/null/x", "/proc/nope", "a" * 300):
        given = (*SMALL["lm.py"][:-2], "--run-dir", folder)
        yield Case("lm.py", given, (*there, ("say.py", bad_files.SAY)), model=())


def _variables() -> Iterator[Case]:
    """Environment variables."""
    for variable, values in {
        "JAX_PLATFORMS": ("nope", "tpu", "cuda", "cpu,nope", "☃"),
        "JRL_CPU_DEVICES": ("0", "x", "-1", "1.5", "99999999999999999999", " ", "²", "1e9"),
        "JRL_ACCEL": ("cuda12", "cuda13", "tpu", "nope"),
    }.items():
        for value in values:
            yield Case("ppo.py", TINY, environment=((variable, value),))
    yield Case("q_learning.py", SMALL["q_learning.py"], environment=(("JRL_CPU_DEVICES", "x"),))


def _user_files() -> Iterator[Case]:
    """A user's Python file as environment, task or problems."""
    for text, params, may_work in bad_files.environments():
        words = (*TINY, "--env", "mine.py", *(("--env-params", *params.split()) if params else ()))
        yield Case("ppo.py", words, (("mine.py", text), ("helper.py", bad_files.HELPER)), may_work=may_work)
    for text in bad_files.tasks():
        yield Case("grpo.py", (*SMALL["grpo.py"], "--task", "mine.py"), (("mine.py", text),))
    for text, setting in bad_files.problems():
        words = (*SMALL["lm.py"], "--dataset", "mine.py", *(("--setting", *setting.split()) if setting else ()))
        yield Case("lm.py", words, (("mine.py", text),), model=())
    for name in ("nope.py", "folder.py", ".py", "☃.py", LONG + ".py", "/dev/null/x.py", "a/../b.py"):
        for flag, program in (("--env", "ppo.py"), ("--task", "grpo.py"), ("--dataset", "lm.py")):
            yield Case(
                program, (*SMALL[program], flag, name), (("folder.py/", ""),), model=HELD.get(program, {}).get("model")
            )


def _models() -> Iterator[Case]:
    """A model's folder that is wrong."""
    words, files = SMALL["lm.py"], (("say.py", bad_files.SAY),)
    for template, may_work in bad_files.TEMPLATES:
        said = json.dumps({"eos_token": "<end>", "chat_template": template})
        yield Case("lm.py", words, files, model=(("tokenizer_config.json", said),), may_work=may_work)
    whole = json.loads(_model()["config.json"])
    for name, values in bad_files.MODEL_SETTINGS.items():
        for value in values:
            yield Case("lm.py", words, files, model=(("config.json", json.dumps(whole | {name: value})),))
    for name, texts in bad_files.MODEL_FILES.items():
        for text in texts:
            yield Case("lm.py", words, files, model=((name, text),))
    for path in ("nope", "say.py", "nope.gguf", "say.gguf", "", "☃", "/dev/null", "/proc", LONG):
        given = ("grpo", "--model", path, *words[3:])
        yield Case("lm.py", given, (*files, ("say.gguf", "GGUF" + "\1" * 100)), model=())


@cache
def _model() -> dict[str, bytes]:
    """The files of a tiny model in Hugging Face's layout."""
    rng = np.random.default_rng(0)
    shape = language_model.SHAPE
    weights = {x.name: 0.1 * rng.standard_normal(x.shape).astype(np.float32) for x in layout.tensors(shape)}
    return {
        "config.json": json.dumps(settings.write(shape)).encode(),
        "model.safetensors": safetensors.numpy.save(weights, {"format": "pt"}),
        "tokenizer.json": language_model.words().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "<end>"}).encode(),
    }
