"""The folder of a run: what a run is made of, opened once and refused to any other."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jrl.algorithm import Algorithm
from jrl.envs.types import Environment
from jrl.numerics import checks
from jrl.run import disk
from jrl.run.checkpoint import BEST, RunError, disk_errors, flat, same_config, sealed, size_and_sum, unsealed

OWN = ("network", "optimizer", "bonus", "model")
# What a run leaves that another must not write over; what is not whole yet has tmp in its name.
SAVED = ("summary.json", "evaluations.json", "answers.jsonl", "metrics/*", "checkpoints/[0-9]*", f"{BEST}/[0-9]*")


def settings(
    algo: Algorithm, key: jax.Array, env_steps: int, num_seeds: int, cells: Mapping[str, Any], every: int
) -> dict[str, Any]:
    """What must be equal for a run to be resumed, as flat JSON values."""
    run = {
        "num_seeds": num_seeds,
        "key": jax.random.key_data(key).tolist(),
        "log_every": every,
        "cells": list(cells),
        "hyper": {cell: as_dict(hyper) for cell, hyper in cells.items()},
    }
    if algo.uses_length:
        run["env_steps"] = env_steps
    return made_of(algo) | plain(run)


def made_of(algo: Algorithm) -> dict[str, Any]:
    """What an algorithm is made of, as flat JSON values; ``own`` are the arguments of ``make`` that settings do not describe."""
    given = getattr(algo.remake, "keywords", {})
    own = [name for name in OWN if given.get(name) is not None]
    parts = plain({"algorithm": algo.name} | ({"own": own} if own else {}))
    return parts | made_of_env(algo.env) | plain({"config": as_dict(algo.config)})


def made_of_env(env: Environment) -> dict[str, Any]:
    """What an environment is made of, as flat JSON values."""
    return plain({"env": env.name, "env_params": dict(env.settings)})


def plain(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested settings as flat JSON values."""
    return json.loads(json.dumps(flat(tree), default=_plain))


def as_dict(tree: Any) -> Any:
    """Dataclasses and NamedTuples as dictionaries."""
    if dataclasses.is_dataclass(tree):
        tree = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    elif hasattr(tree, "_asdict"):
        tree = tree._asdict()
    return {k: as_dict(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _plain(value: Any) -> Any:
    """What JSON has no word for: arrays as lists, other objects as they print."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def fingerprint(path: Path) -> str:
    """The name, the size and the checksum of a file's content."""
    size, checksum = size_and_sum(path)
    return f"{path.name} ({size:,} bytes, {checksum:08x})"


def saved_setting(folder: Path, name: str) -> Any:
    """One setting of the run in a folder, or None where there is none. Raises ``RunError`` if its ``config.json`` is damaged."""
    return _settings_in(folder / "config.json").get(name)


def saved_settings(folder: Path) -> dict[str, Any]:
    """All settings of the run in a folder, flat. Raises ``RunError`` where there is no run, or its ``config.json`` is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(f"{folder} is not the folder of a run: it has no config.json")
    return _settings_in(path)


def members_in(settings: dict[str, Any], folder: Path) -> tuple[list[str], int]:
    """The labels of the cells and the number of seeds. Raises ``RunError`` for settings that are not those of ``run.train``."""
    try:
        for name in ("algorithm", "env"):
            if not isinstance(settings[name], str):
                raise ValueError(f"{name} is {type(settings[name]).__name__}, not text")
        checks.positive_int("num_seeds", settings["num_seeds"])
        cells = settings["cells"]
        if not isinstance(cells, list) or not cells or not all(isinstance(cell, str) for cell in cells):
            raise ValueError("cells must be a list of labels")
    except KeyError as error:
        raise RunError(f"{folder / 'config.json'} is not of a run of run.train: it has no {error}") from None
    except ValueError as error:
        raise RunError(f"{folder / 'config.json'} is damaged: {error}") from None
    return cells, settings["num_seeds"]


def _settings_in(path: Path) -> dict[str, Any]:
    settings = read_json(path, {"settings": {}}).get("settings")
    if not isinstance(settings, dict):
        raise RunError(f"{path} is damaged: it is not the configuration of a run")
    return settings


@contextlib.contextmanager
def opened(folder: Path, resume: bool, settings: dict[str, Any]) -> Iterator[Path]:
    """The folder of a run, made with its ``config.json`` if it is new, and held against other processes.

    Raises ``RunError`` for one that holds another run, or that another process writes to.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} exists and is not the folder of a run; choose another")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder} is in use by another process") from None
        except OSError:
            pass  # some network file systems have no locks
        _make_or_compare(folder, resume, settings)
        yield folder
    finally:
        os.close(handle)


def _make_or_compare(folder: Path, resume: bool, settings: dict[str, Any]) -> None:
    path = folder / "config.json"
    if path.exists() and _has_saved(folder):
        if not resume:
            raise RunError(f"{folder} already contains a run: resume it (--resume), or choose another folder")
        same_config(_settings_in(path), settings, folder)
        return
    # A run that ended in its first moment leaves a part of its configuration.
    if not path.exists() and any(item.name != path.with_suffix(".tmp").name for item in folder.iterdir()):
        raise RunError(f"{folder} exists and is not the folder of a run; choose another")
    with disk_errors(folder):
        (folder / "metrics.csv").unlink(missing_ok=True)  # the heading alone, of a run that failed at its start
        write_json(path, {"settings": settings} | _surroundings())


def _has_saved(folder: Path) -> bool:
    """Whether the run got so far that it has something to lose: a checkpoint, a row of metrics, or a result."""
    if any("tmp" not in path.name for pattern in SAVED for path in folder.glob(pattern)):
        return True
    table = folder / "metrics.csv"
    if not table.is_file():
        return False
    with table.open("rb") as file:
        return len(list(itertools.islice(file, 2))) == 2  # a row behind the heading


def _surroundings() -> dict[str, Any]:
    """Versions, devices and commit, for the record."""
    packages = ("jrl", "jax", "jaxlib", "flax", "optax", "gymnax", "orbax-checkpoint", "numpy")
    try:
        here = Path(__file__).parent
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "versions": {p: _version(p) for p in packages},
        "devices": [str(d) for d in jax.devices()],
        "platform": jax.default_backend(),
        "commit": commit or None,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_json(path: Path, default: Any) -> Any:
    """What ``write_json`` wrote, or the default if nothing did. Raises ``RunError`` for a damaged file."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return default
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: it is no JSON ({error})") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    try:
        if not isinstance(found, type(default)):
            raise ValueError(f"it is {type(found).__name__}, not {type(default).__name__}")
        return [unsealed(part) for part in found] if isinstance(found, list) else unsealed(found)
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from None


def remembered(path: Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make()`` gives, JSON values by their names: read from the file if it holds that of the same settings, else made, and written there."""
    found = read_json(path, {})
    if found.get("settings") != settings:
        found = {"settings": settings} | make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return found


def write_json(path: Path, data: dict[str, Any] | list[dict[str, Any]]) -> None:
    """An object, or several, each with its checksum; whole or not at all."""
    with_sums = [sealed(part) for part in data] if isinstance(data, list) else sealed(data)
    disk.replace(path, (json.dumps(with_sums, indent=2) + "\n").encode())
