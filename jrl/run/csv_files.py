"""Learning curves in CSV files of other tools: Stable-Baselines3's progress and monitor files, tables of Weights & Biases, TensorBoard and CleanRL,
and any table with a column of steps and one of values."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jrl.run import plot
from jrl.run.checkpoint import RunError

STEPS = ("env_steps", "global_step", "timesteps", "total_timesteps", "_step", "step", "steps")
VALUES = (
    *("episode_return", "episodic_return", "return", "episode_reward", "ep_rew_mean", "mean_reward", "value", "r"),
    *("eval/mean_reward", "mean_return"),
)
APART = ("cell", "seed", "run", "run_id", "name")  # columns that tell the seeds of a run apart
TASKS = ("env", "env_id", "env_name", "task")


class Series(NamedTuple):
    """The curves of one task in a file: ``steps [points]`` and ``curves [seeds, points]``. The task is empty where the file does not say it."""

    task: str
    steps: np.ndarray
    curves: np.ndarray


class _Table(NamedTuple):
    names: list[str]
    rows: list[list[str]]
    task: str  # of all rows; empty where a column may tell it


def read(path: Path, metric: str | None = None, steps: str | None = None) -> list[Series]:
    """The curves in a file, those of each task apart. ``metric`` and ``steps`` name the columns of values and of steps, which are found by their
    usual names if not given.

    A seed is told by a column (``seed``, ``run``, ...); without one another begins where the steps go back. Raises ``RunError`` for a table without such columns
    or with something that is not a number.
    """
    table = _table(path)
    told = any(name.lower() in APART for name in table.names)
    found: dict[str, dict[tuple[str, ...], list[tuple[float, float]]]] = {}
    begun, before = 0, -np.inf
    for task, seed, step, value in _points(path, table, metric, steps):
        begun += not told and seed == ("",) and step < before
        before = step
        found.setdefault(task, {}).setdefault((*seed, str(begun)), []).append((step, value))
    if not found:
        raise RunError(f"{path} has no value of {metric}" if metric else f"{path} has no rows with a value")
    return [Series(task, *_aligned(path, list(series.values()))) for task, series in found.items()]


def _table(path: Path) -> _Table:
    """Names of the columns, and rows of text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    task = ""
    if lines and lines[0].startswith("#"):  # a monitor file, whose first line is about the environment
        try:
            task = str(json.loads(lines[0][1:]).get("env_id") or "")
        except (ValueError, AttributeError):
            pass
        lines = lines[1:]
    separator = max(",;\t", key=lambda sign: lines[0].count(sign)) if lines else ","
    try:
        names, *rows = ([cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator) if row)
    except (ValueError, csv.Error):
        names, rows = [], []
    if not rows:
        raise RunError(f"{path} has no rows")
    return _Table(names, rows, task)


def _points(
    path: Path, table: _Table, metric: str | None, steps: str | None
) -> list[tuple[str, tuple[str, ...], float, float]]:
    """``(task, seed, step, value)`` of each row with a finite value."""
    columns = _columns(path, table, metric)
    apart = [i for i, name in enumerate(table.names) if name.lower() in APART]
    tasks = [i for i, name in enumerate(table.names) if name.lower() in TASKS]
    lengths = [i for i, name in enumerate(table.names) if name == "l"] if table.names[:3] == ["r", "l", "t"] else []
    at = None if lengths and steps is None else _column(path, table.names, STEPS, steps)
    found, total = [], 0.0
    for number, row in enumerate(table.rows, 2):
        if len(row) != len(table.names):
            raise RunError(f"{path}, row {number}, has {len(row)} of {len(table.names)} columns")
        try:
            if lengths:  # a monitor file: the length of each episode
                total += float(row[lengths[0]])
            for i, seed in columns:
                value = float(row[i] or "nan")
                if np.isfinite(value):
                    task = table.task or "".join(row[j] for j in tasks[:1])
                    step = total if at is None else float(row[at])
                    if not 0 <= step < np.inf:
                        raise RunError(
                            f"{path}, row {number}: a step must be a finite number of at least 0; got {step:g}"
                        )
                    found.append((task, (*(row[j] for j in apart), seed), step, value))
        except ValueError as error:
            raise RunError(f"{path}, row {number}, holds something that is not a number: {error}") from None
    return found


def _columns(path: Path, table: _Table, metric: str | None) -> list[tuple[int, str]]:
    """The columns of values, each with the seed that it belongs to: one, or one for each run of a table of Weights & Biases."""
    by_run = [(i, *name.rpartition(" - ")) for i, name in enumerate(table.names)]
    bounds = ("__MIN", "__MAX")  # of the values of a span
    wide = [(i, run, name) for i, run, sign, name in by_run if run and sign and not name.endswith(bounds)]
    if metric is not None and metric in table.names:
        return [(table.names.index(metric), "")]
    metrics = list(dict.fromkeys(name for _, _, name in wide))
    if wide and (metric in metrics or (metric is None and len(metrics) == 1)):
        return [(i, run) for i, run, name in wide if name == (metric or metrics[0])]
    if wide and metric is None:
        raise RunError(f"{path} has several metrics: choose one by --metric: {', '.join(metrics)}")
    return [(_column(path, table.names, VALUES, metric), "")]


def _column(path: Path, names: list[str], known: Sequence[str], wanted: str | None) -> int:
    """The column that is wanted, or whose name, or the last part of it, as in ``time/total_timesteps``, is known."""
    if wanted is not None:
        if names.count(wanted) != 1:
            raise RunError(f"{path} has {names.count(wanted) or 'no'} column {wanted!r}; it has: {', '.join(names)}")
        return names.index(wanted)
    whole = [name.lower() for name in names]
    last = [name.rpartition("/")[2] for name in whole]
    for name in known:
        for spelled in (whole, last):
            if name in spelled:
                return spelled.index(name)
    raise RunError(
        f"{path} must have one of the columns {', '.join(known)} (or name them by --metric and --steps); it has: {', '.join(names)}"
    )


def _aligned(path: Path, series: list[list[tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """All seeds at the same steps, between those that they have in common."""
    ordered = [np.array(sorted(points)) for points in series]
    return common(path, [points[:, 0] for points in ordered], [points[:, 1] for points in ordered])


def common(what: object, steps: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Curves with steps of their own, interpolated at the steps that all of them have: ``(steps [points], curves [seeds, points])``.

    Raises ``RunError``, which begins with ``what``, where they have none in common.
    """
    low, high = max(x[0] for x in steps), min(x[-1] for x in steps)
    if high < low:
        raise RunError(f"{what}: its seeds have no steps in common")
    points = np.linspace(low, high, plot.POINTS) if high > low else np.array([low])
    return points, np.stack([np.interp(points, x, y) for x, y in zip(steps, values, strict=True)])
