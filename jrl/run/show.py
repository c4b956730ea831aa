"""What a folder holds, on the terminal: one run, or all runs in a folder of folders; and a run as it goes on."""

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from jrl import algos, envs
from jrl.run import folders, log, plot, report, stats
from jrl.run.checkpoint import RunError
from jrl.run.load import KNOWN

RETURN = "episode_return"
LANGUAGE = ("sft", "reward_model", "process_reward", "dpo", "ppo_lm", "grpo")  # trained by experiments/lm.py
RUNS = (
    "algorithm",
    "env_steps",
    "num_seeds",
    "key",
    "log_every",
    "cells",
    "env_params.text",
    "env_params.file",
)  # said elsewhere


def show(folder: Path) -> str:
    """A run's settings that are not the defaults, and its result; of a folder of runs a table with a line for each.

    Raises ``RunError`` for a folder that holds neither, or a damaged run.
    """
    if (folder / "config.json").is_file():
        return _one(folder)
    if not folder.is_dir():
        raise RunError(f"no such folder: {folder}")
    runs = sorted(path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/config.json"))
    runs = [run for run in runs if run.parent not in runs]  # what a run left of a language model has a config.json, too
    if not runs:
        raise RunError(f"{folder} is not the folder of a run, and holds none")
    return report.table([_line(run, str(run.relative_to(folder))) for run in runs])


def _line(folder: Path, name: str) -> dict[str, str]:
    try:
        settings, summary = folders.saved_settings(folder), folders.read_json(folder / "summary.json", {})
    except RunError:
        return {"run": name, "algorithm": "damaged, or not a run"}
    state = "" if summary.get("finished") else "unfinished"
    return {
        "run": name,
        "algorithm": str(settings.get("algorithm")),
        "environment": str(settings.get("env")),
        "seeds": str(settings.get("num_seeds")),
        "steps": f"{summary['env_steps']:,}" if "env_steps" in summary else "",
        "return (greedy)": stats.text(summary["eval"]) if summary.get("eval") else state or _best(summary),
    }


def _best(summary: dict[str, Any]) -> str:
    """The best evaluation of a run without a return."""
    return ", ".join(f"{name} {x:.4g}" for name, x in summary.get("best", {}).items())


def _one(folder: Path) -> str:
    config = folders.read_json(folder / "config.json", {})
    settings, summary = folders.saved_settings(folder), folders.read_json(folder / "summary.json", {})
    cells, seeds = folders.members_in(settings, folder) if "cells" in settings else ([""], 1)
    lines = [f"{settings.get('algorithm')} on {settings.get('env')}: {stats.seeds(seeds)}"]
    if cells != [""]:
        lines[0] += f" of {len(cells)} cells"
    versions = config.get("versions")
    jax = versions.get("jax") if isinstance(versions, dict) else None
    lines.append(f"  on {config.get('platform')}, jax {jax}, commit {config.get('commit') or 'unknown'}")
    usual = _defaults(settings, cells)
    if usual:
        lines.append("settings that are not the defaults:")
    else:
        lines.append("settings:")  # whose defaults only their author knows
    said = (*RUNS, "config.model.", "env") if "model" in settings else RUNS  # of a model's shape its files tell
    changed = {name: x for name, x in settings.items() if x != usual.get(name) and not name.startswith(said)}
    lines += [f"  {_readable(name, cells)} = {_shown(x)}" for name, x in changed.items()] or ["  none"]
    if not summary:
        return "\n".join([*lines, "it has not ended yet"])
    steps = f"{summary.get('env_steps', 0):,} steps a seed"
    lines.append(f"{'finished' if summary.get('finished') else 'interrupted'} after {steps}")
    for cell, scores in summary.get("cells", {"": summary.get("eval")}).items():
        if scores:
            lines.append(
                f"  {cell}{': ' if cell else ''}return, greedy {stats.text(scores)}, sampled {stats.text(scores['sampled'])}"
            )
    for what, name in (("in the end", "last"), ("best evaluation", "best")):
        if found := summary.get(name):
            lines.append(f"  {what}: " + ", ".join(f"{metric} {x:.4g}" for metric, x in found.items()))
    lines += [
        f"  left out: seed {nan['seed']} turned NaN at update {nan['update']}" for nan in summary.get("nan_seeds", [])
    ]
    lines.append("files: " + ", ".join(sorted(path.name for path in folder.iterdir())))
    return "\n".join(lines)


def _defaults(settings: dict[str, Any], cells: list[str]) -> dict[str, Any]:
    """Default settings of an algorithm of jrl, and of its environment where ``run.load`` knows it; empty for any other."""
    name = settings.get("algorithm")
    if name not in (*KNOWN, *LANGUAGE):
        return {}
    module = getattr(algos, name)
    config, hyper = {"config": folders.as_dict(module.Config())}, folders.as_dict(module.Hyper())
    found = folders.plain(
        config | {"hyper": hyper | dict.fromkeys(cells, hyper)}
    )  # those of experiments/lm.py are of no cell
    with contextlib.suppress(ValueError):  # an environment that is not known by its name
        name = str(settings.get("env")).partition("(")[0]
        found |= {} if "/" in name or name.endswith(".py") else folders.made_of_env(envs.make(name))
    return found


def _readable(name: str, cells: list[str]) -> str:
    """The name of a setting; of a cell's hyperparameter as ``hyper[CELL].NAME``."""
    for cell in cells:
        if name.startswith(f"hyper.{cell}."):
            return f"hyper{f'[{cell}]' if cell else ''}.{name.removeprefix(f'hyper.{cell}.')}"
    return name


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def progress(folder: Path) -> str:
    """How far a run is: its steps, and the return in training of its newest row."""
    settings = folders.saved_settings(folder)
    cells, num_seeds = folders.members_in(settings, folder)
    env_steps, metrics = log.metrics_of(folder, cells, num_seeds)
    if not len(env_steps):
        return "no row of metrics yet"
    total = f" of {settings['env_steps']:,}" if "env_steps" in settings else ""
    said = f"{env_steps[-1]:,}{total} steps a seed"
    if {RETURN, "episodes"} <= metrics.keys():
        _, curves = plot.curve(metrics[RETURN], metrics["episodes"], env_steps)
        known = np.isfinite(curves[:, -1]).any()
        said += (
            f", return in training {stats.text(stats.summarize(curves[:, -1]))}" if known else ", no episode has ended"
        )
    return said


def watch(folder: Path, every: float) -> None:
    """Print how far a run is, each time that it has gone further, until it has finished or was interrupted; then what ``show`` says."""
    said = ""
    while True:
        ended = _has_ended(folder)
        now = progress(folder)
        if now != said:
            print(time.strftime("%H:%M:%S"), now, flush=True)
        said = now
        if ended:
            print(show(folder))
            return
        time.sleep(every)


def _has_ended(folder: Path) -> bool:
    """Whether the summary, which a run writes last, is newer than its metrics."""
    rows = [folder / "metrics.csv", *(folder / "metrics").glob("*.parquet")]
    written = max((path.stat().st_mtime for path in rows if path.exists()), default=0.0)
    summary = folder / "summary.json"
    return summary.exists() and summary.stat().st_mtime >= written
