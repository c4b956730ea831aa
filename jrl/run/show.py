"""What a folder holds, on the terminal: one run, or all runs in a folder of folders; and a run as it goes on."""

import importlib
import time
from pathlib import Path
from typing import Any

from jrl.run import folders, log, plot, stats
from jrl.run.checkpoint import RunError
from jrl.run.compare import text
from jrl.run.load import KNOWN

RETURN = "episode_return"


def show(folder: Path) -> str:
    """A run's settings that are not the defaults, and its result; of a folder of runs a table with a line for each.

    Raises ``RunError`` for a folder that holds neither, or a damaged run.
    """
    if (folder / "config.json").is_file():
        return _one(folder)
    if not folder.is_dir():
        raise RunError(f"no such folder: {folder}")
    runs = sorted(path.parent for path in folder.glob("*/config.json"))
    if not runs:
        raise RunError(f"{folder} is not the folder of a run, and holds none")
    return text([_line(run) for run in runs])


def _line(folder: Path) -> dict[str, str]:
    settings, summary = folders.saved_settings(folder), folders.read_json(folder / "summary.json", {})
    state = "" if summary.get("finished") else "unfinished"
    return {
        "run": folder.name,
        "algorithm": str(settings.get("algorithm")),
        "environment": str(settings.get("env")),
        "seeds": str(settings.get("num_seeds")),
        "steps": f"{summary['env_steps']:,}" if "env_steps" in summary else "",
        "return (greedy)": stats.text(summary["eval"]) if summary.get("eval") else state,
    }


def _one(folder: Path) -> str:
    config = folders.read_json(folder / "config.json", {})
    settings, summary = folders.saved_settings(folder), folders.read_json(folder / "summary.json", {})
    cells, seeds = settings.get("cells", [""]), settings.get("num_seeds", 1)
    lines = [f"{settings.get('algorithm')} on {settings.get('env')}: {stats.seeds(seeds)}"]
    if cells != [""]:
        lines[0] += f" of {len(cells)} cells"
    versions = config.get("versions", {})
    lines.append(
        f"  on {config.get('platform')}, jax {versions.get('jax')}, commit {config.get('commit') or 'unknown'}"
    )
    lines.append("settings that are not the defaults:")
    usual = _defaults(settings, cells)
    changed = {name: x for name, x in settings.items() if x != usual.get(name, x)}
    lines += [f"  {name.replace('..', '.')} = {_shown(x)}" for name, x in changed.items()] or ["  none"]
    if not summary:
        return "\n".join([*lines, "it has not ended yet"])
    steps = f"{summary['env_steps']:,} steps a seed"
    lines.append(f"{'finished' if summary['finished'] else 'interrupted'} after {steps}")
    for cell, scores in summary.get("cells", {"": summary["eval"]}).items():
        if scores:
            lines.append(
                f"  {cell}{': ' if cell else ''}return, greedy {stats.text(scores)}, sampled {stats.text(scores['sampled'])}"
            )
    lines += [f"  left out: seed {nan['seed']} turned NaN at update {nan['update']}" for nan in summary["nan_seeds"]]
    lines.append("files: " + ", ".join(sorted(path.name for path in folder.iterdir())))
    return "\n".join(lines)


def _defaults(settings: dict[str, Any], cells: list[str]) -> dict[str, Any]:
    """The settings of an algorithm of jrl that says nothing of its own; of others none are known."""
    if settings.get("algorithm") not in KNOWN:
        return {}
    module = importlib.import_module(f"jrl.algos.{settings['algorithm']}")
    config = {"config": folders.as_dict(module.Config())}
    return folders.plain(config | {"hyper": {cell: folders.as_dict(module.Hyper()) for cell in cells}})


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def progress(folder: Path) -> str:
    """How far a run is: its steps, and the return in training of its newest row."""
    settings = folders.saved_settings(folder)
    members = settings["num_seeds"] * len(settings["cells"])
    kind: dict[str, Any] = {"seed": 0} if settings["cells"] == [""] else {"cell": "", "seed": 0}
    env_steps, metrics = log.table(folder, [kind] * members).read()
    if not len(env_steps):
        return "no row of metrics yet"
    total = f" of {settings['env_steps']:,}" if "env_steps" in settings else ""
    said = f"{env_steps[-1]:,}{total} steps a seed"
    if RETURN in metrics:
        _, curves = plot.curve(metrics[RETURN], metrics["episodes"], env_steps)
        said += f", return in training {stats.text(stats.summarize(curves[:, -1]))}"
    return said


def watch(folder: Path, every: float) -> None:
    """Print how far a run is, each time that it has gone further, until it has ended; then what ``show`` says."""
    said = ""
    while True:
        ended = folders.read_json(folder / "summary.json", {}).get("finished", False)
        now = progress(folder)
        if now != said:
            print(time.strftime("%H:%M:%S"), now, flush=True)
        said = now
        if ended:
            print(show(folder))
            return
        time.sleep(every)
