"""What a finished run shows: its summary, its curves, its table, its picture."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jrl.run import plot

Cells = dict[str, dict[str, Any]]


def best_cell(cells: Cells) -> str:
    """The cell with the highest greedy IQM; the first if none has a number."""
    return max(cells, key=lambda cell: best_score({cell: cells[cell]}))


def best_score(cells: Cells) -> float:
    """The highest greedy IQM of a cell, minus infinity if none has a number."""
    return max(-np.inf if scores["iqm"] is None else scores["iqm"] for scores in cells.values())


def best_member(cells: Cells | None) -> int:
    """The member with the highest greedy return, counted through all cells; 0 if nothing is known."""
    scores = np.concatenate([np.array(s["per_seed"], float) for s in cells.values()]) if cells else np.array([np.nan])
    return 0 if np.isnan(scores).all() else int(np.nanargmax(scores))


def write_curves(path: Path, title: str, cells: list[str], metrics: dict[str, np.ndarray], bad: set[int]) -> None:
    """One learning curve a cell, of the members ``[cells x seeds]`` that are not in ``bad``."""
    if not {"episodes", "episode_return"} <= metrics.keys():
        return
    num_seeds = len(metrics["episode_return"]) // len(cells)
    curves = []
    for i, cell in enumerate(cells):
        good = [m for m in range(i * num_seeds, (i + 1) * num_seeds) if m not in bad]
        if good:
            parts = (metrics["episode_return"][good], metrics["episodes"][good], metrics["env_steps"])
            curves.append((cell, *plot.curve(*parts)))
    plot.learning_curves(path, title, curves)


def write_table(path: Path, cells: Cells, columns: dict[str, dict[str, float]]) -> None:
    """A CSV with a row for each cell of a sweep: its label, its hyperparameters, its scores, and how many episodes were cut off."""
    rows = []
    for cell, s in cells.items():
        scores = {name: s[name] for name in ("iqm", "ci_low", "ci_high")} | {"sampled_iqm": s["sampled"]["iqm"]}
        numbers = {name: "" if x is None else f"{x:.6g}" for name, x in scores.items()}
        rows.append(
            {"cell": cell} | columns[cell] | numbers | {"unfinished": s["unfinished"] + s["sampled"]["unfinished"]}
        )
    write_csv(path, rows)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows under the names of their columns, of which a row may leave some empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)


def print_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a Markdown table, and write them to a CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, rows)
    print(table(rows, "markdown"))


def table(rows: Sequence[Mapping[str, Any]], style: str = "text") -> str:
    """A table as aligned ``text``, ``markdown`` or ``latex`` (with booktabs)."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    if style == "latex":
        body = [" & ".join(_latex(cell) for cell in line) + r" \\" for line in cells]
        begin = rf"\begin{{tabular}}{{{'l' * len(names)}}}"
        return "\n".join([begin, r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}"])
    if style == "markdown":
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
        return "\n".join([lines[0], "|" + " --- |" * len(names), *lines[1:]])
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _latex(cell: str) -> str:
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(words.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in cell)
