"""Learning curves: IQM over seeds with its 95% band, the seeds faint behind it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jrl.run.stats import interval, iqm, seeds

POINTS = 100
FAINT = 200  # seeds that are drawn one by one
STYLES = ("-", "--", "-.", ":")
MARKERS = "os^Dv<>P*X"  # for lines of a few points
FEW = 12  # points, which are marked, and whose places on a logarithmic axis are labelled


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
    """One plot: lines ``(label, x [points], y [seeds, points])``; ``log`` names the logarithmic axes, as in "xy"; ``bands`` are the bounds ``(low, high)``
    of each line, where they are not the 95% interval of its IQM."""

    title: str
    xlabel: str
    ylabel: str
    lines: list[tuple[str, np.ndarray, np.ndarray]]
    log: str = ""
    bands: Sequence[tuple[np.ndarray, np.ndarray]] = ()


def learning_curves(path: Path, title: str, cells: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Draw one curve for each cell ``(label, env_steps [spans], returns [seeds, spans])``: see ``draw``."""
    draw(path, [Panel(title, "environment steps per seed", "episode return in training", cells)])


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Write a picture of panels, two in a row: IQM over seeds with its 95% band; a line that stands alone shows its seeds too.

    The suffix of ``path`` chooses the format: ``.png``, ``.svg`` or ``.pdf``. A PNG gets an SVG beside it, for papers. Points whose
    IQM is not finite are left out.
    """
    plt = pyplot()
    rows, columns = -(-len(panels) // 2), min(len(panels), 2)
    figure, grid = plt.subplots(rows, columns, figsize=(8 * columns, 4.2 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid.flat, panels, strict=False):
        for i, line in enumerate(panel.lines):
            _draw_line(axes, i, *line, len(panel.lines) == 1, panel.bands[i] if panel.bands else None)
        _draw_axes(axes, panel)
    # Always in the same order: drawing once more moves the layout by fractions of a pixel.
    for file in [path, path.with_suffix(".svg")] if path.suffix == ".png" else [path]:
        figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def _draw_line(
    axes: Any,
    number: int,
    label: str,
    x: np.ndarray,
    y: np.ndarray,
    alone: bool,
    band: tuple[np.ndarray, np.ndarray] | None,
) -> None:
    """A line of its own colour, dashes and marks; the later ones are thinner, so that one that lies beneath another is seen."""
    y = np.where(np.isnan(y), np.inf, y)
    shown = np.isfinite(iqm(y))
    x, y = x[shown], y[:, shown]
    if not len(x):
        return
    color = f"C{number % 10}"
    if alone:
        axes.plot(x, y[:FAINT].T, color=color, alpha=0.15, linewidth=0.8)
    bounds = interval(y, samples=300 if len(y) <= FAINT else 100) if band is None else [x[shown] for x in band]
    low, high = (np.where(np.isfinite(bound), bound, iqm(y)) for bound in bounds)
    axes.plot(
        x,
        iqm(y),
        color=color,
        linestyle=STYLES[number % len(STYLES)],
        marker=MARKERS[number % len(MARKERS)] if len(x) <= FEW else None,
        markersize=5,
        linewidth=max(1.2, 2.4 - 0.2 * number),
        label=f"{label}{', ' if label else ''}{'IQM of ' if len(y) > 1 else ''}{seeds(len(y))}" if alone else label,
    )
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _draw_axes(axes: Any, panel: Panel) -> None:
    """Titles, scales and a legend: of several lines outside, where it hides none."""
    axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.has_data():
        return
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if name in panel.log:
            getattr(axes, f"set_{name}scale")("log")
            _label_plainly(axis)
    places = sorted({float(value) for _, x, _ in panel.lines for value in x})
    if "x" in panel.log and len(places) <= FEW:
        axes.set_xticks(places, [f"{value:,g}" for value in places], minor=False)
        axes.set_xticks([], minor=True)
    if "x" not in panel.log and places and places[-1] >= 10_000:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(panel.lines) > 1 else {}
    axes.legend(fontsize="small", frameon=False, **beside)


def _label_plainly(axis: Any) -> None:
    """Numbers such as 2 and 0.05 on a logarithmic axis, with those between the powers of ten where there are few of these."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high < 1000 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}" if 1e-4 < abs(x) < 1e6 else f"{x:.0e}"))
    axis.set_minor_formatter(NullFormatter())


def pyplot() -> Any:
    """matplotlib.pyplot, set up to write files without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "jrl"  # the same picture is the same file
    import matplotlib.pyplot as plt

    return plt
