"""Learning curves: IQM over seeds with its 95% band, the seeds faint behind it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jrl.run.stats import interval, iqm, seeds

POINTS = 100
FAINT = 200  # seeds that are drawn one by one


def curve(returns: np.ndarray, episodes: np.ndarray, env_steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``[seeds, rows]`` averaged over at most POINTS equal spans, weighted by episodes: ``(env_steps, [seeds, spans])``.

    A span in which no episode of a seed ended repeats the one before it.
    """
    spans = np.array_split(np.arange(len(env_steps)), min(POINTS, len(env_steps)))
    weight = np.nan_to_num(episodes)
    totals = np.nan_to_num(returns) * weight
    count = np.stack([weight[:, s].sum(1) for s in spans], axis=1)
    means = np.stack([totals[:, s].sum(1) for s in spans], axis=1) / np.where(count > 0, count, np.nan)
    for i in range(1, means.shape[1]):
        means[:, i] = np.where(np.isnan(means[:, i]), means[:, i - 1], means[:, i])
    return np.array([env_steps[s[-1]] for s in spans]), means


class Panel(NamedTuple):
    """One plot: lines ``(label, x [points], y [seeds, points])``; ``log`` names the logarithmic axes, as in "xy"."""

    title: str
    xlabel: str
    ylabel: str
    lines: list[tuple[str, np.ndarray, np.ndarray]]
    log: str = ""


def learning_curves(path: Path, title: str, cells: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Write a PNG with one curve for each cell ``(label, env_steps [spans], returns [seeds, spans])``."""
    draw(path, [Panel(title, "environment steps per seed", "episode return in training", cells)])


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Write a PNG of panels, two in a row: IQM over seeds with its 95% band; a line that stands alone shows its seeds too.

    Points whose IQM is not finite are left out.
    """
    plt = _pyplot()
    rows, columns = -(-len(panels) // 2), min(len(panels), 2)
    figure, grid = plt.subplots(rows, columns, figsize=(7 * columns, 4.2 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid.flat, panels, strict=False):
        for i, line in enumerate(panel.lines):
            _draw_line(axes, f"C{i % 10}", *line, alone=len(panel.lines) == 1)
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        axes.set_xscale("log" if "x" in panel.log else "linear")
        axes.set_yscale("log" if "y" in panel.log else "linear")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.has_data():
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_line(axes: Any, color: str, label: str, x: np.ndarray, y: np.ndarray, alone: bool) -> None:
    y = np.where(np.isnan(y), np.inf, y)
    shown = np.isfinite(iqm(y))
    x, y = x[shown], y[:, shown]
    if not len(x):
        return
    if alone:
        axes.plot(x, y[:FAINT].T, color=color, alpha=0.15, linewidth=0.8)
    low, high = (
        np.where(np.isfinite(bound), bound, iqm(y)) for bound in interval(y, samples=300 if len(y) <= FAINT else 100)
    )
    axes.plot(
        x,
        iqm(y),
        color=color,
        linewidth=2,
        label=f"{label}{', ' if label else ''}{'IQM of ' if len(y) > 1 else ''}{seeds(len(y))}" if alone else label,
    )
    axes.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
