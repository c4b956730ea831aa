"""What a finished run shows: its summary, its curves, its table, its picture."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from jrl.run import plot

Cells = dict[str, dict[str, Any]]


def add_evaluation(summary: dict[str, Any], cells: Cells, episodes: int) -> dict[str, Any]:
    """The summary with the evaluation of the best cell, and of all cells if there are several."""
    scored = {cell: scores["iqm"] for cell, scores in cells.items() if scores["iqm"] is not None}
    best = max(scored, key=scored.__getitem__) if scored else next(iter(cells))
    summary = summary | {"eval": cells[best] | {"episodes": episodes}}
    return summary | {"best_cell": best, "cells": cells} if len(cells) > 1 else summary


def best_member(cells: Cells | None) -> int:
    """The member with the highest greedy return, counted through all cells; 0 if nothing is known."""
    scores = np.concatenate([np.array(s["per_seed"], float) for s in cells.values()]) if cells else np.array([np.nan])
    return 0 if np.isnan(scores).all() else int(np.nanargmax(scores))


def write_curves(path: Path, title: str, cells: list[str], metrics: dict[str, np.ndarray], bad: set[int]) -> None:
    """One learning curve a cell, of the members ``[cells x seeds]`` that are not in ``bad``."""
    if "episode_return" not in metrics:
        return
    num_seeds = len(metrics["episode_return"]) // len(cells)
    curves = []
    for i, cell in enumerate(cells):
        good = [m for m in range(i * num_seeds, (i + 1) * num_seeds) if m not in bad]
        if good:
            parts = (metrics["episode_return"][good], metrics["episodes"][good], metrics["env_steps"])
            curves.append((cell, *plot.curve(*parts)))
    plot.learning_curves(path, title, curves)


def write_table(path: Path, cells: Cells) -> None:
    """A CSV with a row for each cell of a sweep."""
    lines = ["cell,iqm,ci_low,ci_high,sampled_iqm"]
    for cell, s in cells.items():
        numbers = (s["iqm"], s["ci_low"], s["ci_high"], s["sampled"]["iqm"])
        lines.append(f'"{cell}",' + ",".join("" if x is None else f"{x:.6g}" for x in numbers))
    path.write_text("\n".join(lines) + "\n")


def print_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a Markdown table, and write them to a CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
