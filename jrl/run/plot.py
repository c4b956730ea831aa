"""Learning curves: IQM over seeds with its 95% band, every seed faint behind it."""

from pathlib import Path
from typing import Any

import numpy as np

from jrl.run.stats import interval, iqm

POINTS = 100


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


def learning_curves(path: Path, title: str, cells: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Write a PNG with one curve for each cell ``(label, env_steps [spans], returns [seeds, spans])``."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for i, (label, steps, returns) in enumerate(cells):
        shown = ~np.isnan(returns).any(0)
        steps, returns = steps[shown], returns[:, shown]
        if not len(steps):
            continue
        color = f"C{i % 10}"
        if len(cells) == 1:
            axes.plot(steps, returns.T, color=color, alpha=0.15, linewidth=0.8)
        low, high = interval(returns, samples=300)
        name = f"{label}IQM of {len(returns)} seeds" if len(cells) == 1 else label
        axes.plot(steps, iqm(returns), color=color, linewidth=2, label=name)
        axes.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
    axes.set(title=title, xlabel="environment steps per seed", ylabel="episode return in training")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.has_data():
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
