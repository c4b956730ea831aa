"""Runs side by side: curves, scores with their intervals, and how likely one scores more than another (Agarwal et al. 2021, 2108.13264).

What is compared are run folders, and tables of other tools (``jrl.run.csv_files``).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jrl.run import csv_files, folders, log, plot, stats
from jrl.run.checkpoint import RunError

RETURN = "episode_return"
LAST = 0.1  # share of training at its end, which is averaged into a seed's score where there was no evaluation


class Run(NamedTuple):
    """What is compared of one run, or of one cell of a sweep.

    Attributes:
        label: Name of the run; runs of one name on several tasks belong together.
        task: Name of the environment.
        env_steps: Steps of each seed at the points of its curve, ``[points]``.
        curves: Return, or another metric, in training, ``[seeds, points]``.
        scores: Score of each seed, ``[seeds]``: the mean return of the last evaluation, or of the last tenth of training.
        settings: What is on record of the environment, as pairs of a name and a value.
    """

    label: str
    task: str
    env_steps: np.ndarray
    curves: np.ndarray
    scores: np.ndarray
    settings: tuple[tuple[str, Any], ...] = ()


def read(path: str | Path, label: str | None = None, metric: str | None = None, steps: str | None = None) -> list[Run]:
    """The run in a folder (of a sweep one for each cell), or in a CSV file of another tool.

    Args:
        path: Folder of a run, or a CSV file.
        label: Name of the run; that of the folder or file if not given.
        metric: Column to compare; the return if not given.
        steps: Column of steps of a CSV file; found by its usual names if not given.

    Raises ``RunError`` for what is neither, is damaged, or has no such column.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path, label or path.name, metric)
    if path.suffix.lower() in (".csv", ".tsv", ".txt") and path.is_file():
        found = csv_files.read(path, metric, steps)
        return [Run(label or path.stem, task, at, curves, _last(at, curves)) for task, at, curves in found]
    raise RunError(f"{path} is neither the folder of a run nor a CSV file")


def _of_folder(folder: Path, label: str, metric: str | None) -> list[Run]:
    settings = folders.saved_settings(folder)
    cells, num_seeds = folders.members_in(settings, folder)
    env_steps, metrics = log.metrics_of(folder, cells, num_seeds)
    name = metric or RETURN
    if not len(env_steps):
        raise RunError(f"{folder} has no row of metrics yet")
    if name not in metrics:
        raise RunError(f"{folder} has no metric {name!r}; it has: {', '.join(metrics)}")
    ended = metrics["episodes"] if name == RETURN and "episodes" in metrics else np.isfinite(metrics[name])
    points, curves = plot.curve(metrics[name], ended.astype(float), env_steps)
    broken = _broken(folder)
    evaluated = [] if metric else folders.read_json(folder / "evaluations.json", [])
    found = []
    for i, cell in enumerate(cells):
        well = [seed for seed in range(num_seeds) if (cell, seed) not in broken]
        mine = curves[i * num_seeds : (i + 1) * num_seeds][well]
        try:
            listed = evaluated[-1]["cells"][cell]["per_seed"] if evaluated else None
            scores = _last(points, mine) if listed is None else np.array(listed, float).reshape(num_seeds)[well]
        except (LookupError, TypeError, ValueError, AttributeError):
            raise RunError(f"{folder / 'evaluations.json'} is damaged: it is not of this run") from None
        if well:
            params = tuple((name, x) for name, x in settings.items() if name.startswith("env_params."))
            found.append(Run(f"{label} {cell}".strip(), settings["env"], points, mine, scores, params))
    return found


def _broken(folder: Path) -> set[tuple[str, int]]:
    """The members ``(cell, seed)`` that turned NaN, as the summary says."""
    listed = folders.read_json(folder / "summary.json", {}).get("nan_seeds", [])
    try:
        return {(nan.get("cell", ""), nan["seed"]) for nan in listed}
    except (LookupError, TypeError, AttributeError):
        raise RunError(f"{folder / 'summary.json'} is damaged: its nan_seeds cannot be read") from None


def _last(points: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """The mean of the last tenth of each curve ``[seeds]``; NaN where no episode of a seed has ended."""
    late = points >= points[-1] - LAST * (points[-1] - points[0])
    return curves[:, late].mean(1)


# What belongs together


def joined(runs: Sequence[Run]) -> list[Run]:
    """Runs ready to be compared: environments of one name with other parameters are told apart, what names no task is of the only one there is, and
    runs of one label on one task are the seeds of one.

    Raises ``RunError`` where the seeds of a run have no steps in common.
    """
    named = {run.task for run in runs if run.task}
    only = named.pop() if len(named) == 1 else ""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        task = (run.task or only) + _difference(
            run, [other for other in runs if other.task == run.task and other.settings]
        )
        found.setdefault((run.label, task), []).append(run._replace(task=task))
    return [_as_one(of_one) for of_one in found.values()]


def _difference(run: Run, others: Sequence[Run]) -> str:
    """The parameters of an environment that not all runs in it share, such as ``(slippery=False)``."""
    mine, theirs = dict(run.settings), [dict(other.settings) for other in others]
    names = [name for name in mine if any(other.get(name) != mine[name] for other in theirs)]
    listed = ", ".join(
        f"{name.removeprefix('env_params.')}={mine[name]}" for name in names if name != "env_params.text"
    )
    return f" ({listed})" if listed else ""


def _as_one(runs: list[Run]) -> Run:
    if len(runs) == 1:
        return runs[0]
    steps = [run.env_steps for run in runs for _ in run.curves]
    curves = [curve for run in runs for curve in run.curves]
    points, aligned = csv_files.common(f"{runs[0].label} on {runs[0].task}", steps, curves)
    return runs[0]._replace(env_steps=points, curves=aligned, scores=np.concatenate([run.scores for run in runs]))


# Tables and aggregates


def steps_to(run: Run, threshold: float) -> np.ndarray:
    """The steps ``[seeds]`` after which a curve is first at the threshold or above, infinity if it never is."""
    there = np.nan_to_num(run.curves, nan=-np.inf) >= threshold
    return np.where(there.any(1), run.env_steps[there.argmax(1)], np.inf)


def table(runs: Sequence[Run], threshold: float | None = None) -> list[dict[str, str]]:
    """A row for each run: its scores, its area under the curve, its steps to the threshold, and the probability that one of its
    seeds scores more than one of the first run on the same task."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.task, run)
    rows = []
    for run in runs:
        against = first[run.task]
        row = {
            "run": run.label,
            "task": run.task,
            "seeds": str(len(run.scores)),
            "steps": f"{run.env_steps[-1]:,.0f}",
            "IQM (95% interval)": stats.text(stats.summarize(run.scores)),
            "mean over training": stats.text(stats.summarize(_finite_mean(run.curves))),
        }
        if threshold is not None:
            row |= _reached(run, threshold)
        if len(first) < len(runs):
            row["P(more than the first)"] = "" if run is against else _improvement([run], [against])
        rows.append(row)
    return rows


def _finite_mean(curves: np.ndarray) -> np.ndarray:
    """The mean of each curve over the points where it has a number: the area under it, over its length."""
    known = np.isfinite(curves)
    return np.where(known, curves, 0.0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)


def _reached(run: Run, threshold: float) -> dict[str, str]:
    steps = steps_to(run, threshold)
    middle = np.sort(steps)[(len(steps) - 1) // 2]
    return {
        f"seeds that reach {threshold:g}": f"{np.isfinite(steps).sum()} of {len(steps)}",
        "median steps to it": f"{middle:,.0f}" if np.isfinite(middle) else "never",
    }


def _improvement(runs: Sequence[Run], others: Sequence[Run]) -> str:
    scores = [[x.scores[np.isfinite(x.scores)] for x in part] for part in (runs, others)]
    if not all(len(x) for part in scores for x in part):
        return ""
    low, high = stats.stratified_interval(stats.improvement, *scores)
    return f"{stats.improvement(*scores):.2f} ({low:.2f} to {high:.2f})"


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of one label, in the order of their tasks, if all labels have the same two or more tasks, each once; otherwise empty."""
    grouped: dict[str, dict[str, Run]] = {}
    for run in runs:
        if run.task in grouped.setdefault(run.label, {}):
            return {}
        grouped[run.label][run.task] = run
    tasks = {frozenset(of_task) for of_task in grouped.values()}
    if len(tasks) != 1 or len(next(iter(tasks))) < 2:
        return {}
    return {label: [of_task[task] for task in sorted(of_task)] for label, of_task in grouped.items()}


def normalized(runs: Sequence[Run], scale: dict[str, tuple[float, float]]) -> list[np.ndarray]:
    """Scores of each run, scaled so that the bounds of its task become 0 and 1; seeds without a score are left out.

    Raises ``RunError`` where no seed of a run has one.
    """
    bounds = [scale[run.task] for run in runs]
    scores = [run.scores[np.isfinite(run.scores)] for run in runs]
    for run, found in zip(runs, scores, strict=True):
        if not len(found):
            raise RunError(f"{run.label} on {run.task}: no seed has a score")
    return [(x - low) / (high - low) for x, (low, high) in zip(scores, bounds, strict=True)]


def observed_scale(runs: Sequence[Run]) -> dict[str, tuple[float, float]]:
    """The lowest and the highest score of any seed on each task."""
    found: dict[str, tuple[float, float]] = {}
    for run in runs:
        low, high = found.get(run.task, (np.inf, -np.inf))
        finite = run.scores[np.isfinite(run.scores)]
        if len(finite):
            found[run.task] = (finite.min(initial=low), finite.max(initial=high))
    return {task: (float(low), float(high) if high > low else float(low) + 1) for task, (low, high) in found.items()}


def aggregates(grouped: dict[str, list[Run]], scale: dict[str, tuple[float, float]]) -> list[dict[str, str]]:
    """A row for each label, over all tasks: IQM and optimality gap of normalized scores, and the probability of improvement on the first."""
    first, rows = next(iter(grouped.values())), []
    for label, runs in grouped.items():
        scores = normalized(runs, scale)
        row = {"run": label, "tasks": str(len(runs))}
        for name, statistic in (("IQM, normalized", stats.pooled_iqm), ("optimality gap", stats.optimality_gap)):
            low, high = stats.stratified_interval(statistic, scores)
            row[name] = f"{statistic(scores):.3f} ({low:.3f} to {high:.3f})"
        row["P(more than the first)"] = "" if runs is first else _improvement(runs, first)
        rows.append(row)
    return rows


def draw(path: Path, runs: Sequence[Run], metric: str | None, scale: dict[str, tuple[float, float]]) -> None:
    """The curves of each task in a panel, and, over several tasks, the performance profiles."""
    panels = []
    for task in dict.fromkeys(run.task for run in runs):
        lines = [(run.label, run.env_steps, run.curves) for run in runs if run.task == task]
        panels.append(plot.Panel(task, "environment steps per seed", metric or "episode return in training", lines))
    if grouped := by_label(runs):
        panels.append(_profiles(grouped, scale))
    plot.draw(path, panels)


def _profiles(grouped: dict[str, list[Run]], scale: dict[str, tuple[float, float]]) -> plot.Panel:
    """The performance profile of each label, with its 95% band by bootstrap within tasks."""
    thresholds = np.linspace(0, 1, 51)
    scores = {label: normalized(runs, scale) for label, runs in grouped.items()}

    def profile(scores: Sequence[np.ndarray]) -> np.ndarray:
        return stats.profile(scores, thresholds)

    return plot.Panel(
        "Performance profile",
        "normalized score",
        "share of seeds above it",
        [(label, thresholds, profile(found)[None]) for label, found in scores.items()],
        bands=[stats.stratified_interval(profile, found) for found in scores.values()],
    )
