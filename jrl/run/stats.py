"""Aggregates over seeds, and over tasks (Agarwal et al. 2021, arXiv 2108.13264)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def iqm(x: Any, axis: int = 0) -> np.ndarray:
    """Interquartile mean along ``axis``: the mean of the middle half; NaN if any value is NaN.

    It is ``scipy.stats.trim_mean(x, 0.25)``, without its checks, which for thousands of seeds take ten times as long as the mean.
    """
    x = np.moveaxis(np.asarray(x, float), axis, 0)
    cut = len(x) // 4
    middle = np.partition(x, (cut, len(x) - cut - 1), axis=0)[cut : len(x) - cut].mean(0)
    return np.where(np.isnan(x).any(0), np.nan, middle)


def interval(x: Any, level: float = 0.95, samples: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap percentile interval of the IQM over seeds; ``x`` is ``[seeds, ...]``, the bounds ``[...]``.

    Seeds are drawn with replacement, as within a single stratum. The draws are fixed: the same data gives the same bounds.
    """
    x = np.asarray(x, float)
    rng = np.random.default_rng(0)
    draws = rng.integers(len(x), size=(samples, len(x)))
    means = np.stack([iqm(x[rows]) for rows in draws])
    tail = 100 * (1 - level) / 2
    # Between infinities there is nothing to interpolate.
    method: Any = "linear" if np.isfinite(means).all() else "nearest"
    low, high = np.percentile(means, [tail, 100 - tail], axis=0, method=method)
    return low, high


def summarize(per_seed: Any) -> dict[str, Any]:
    """IQM with its 95% interval over the seeds whose number is finite; nulls if there is none. One seed has no interval."""
    per_seed = np.asarray(per_seed, float)
    good = per_seed[np.isfinite(per_seed)]
    listed = [float(x) if np.isfinite(x) else None for x in per_seed]
    if not len(good):
        return {"iqm": None, "ci_low": None, "ci_high": None, "per_seed": listed}
    if len(good) == 1:
        return {"iqm": float(good[0]), "ci_low": None, "ci_high": None, "per_seed": listed}
    low, high = interval(good)
    return {"iqm": float(iqm(good)), "ci_low": float(low), "ci_high": float(high), "per_seed": listed}


def text(scores: dict[str, Any]) -> str:
    """What ``summarize`` gives, as ``"419.3 (401.5 to 430.8)"``, or ``"419.3 (one seed)"``."""
    if scores["iqm"] is None:
        return "no seed stayed finite"
    if scores["ci_low"] is None:
        return f"{scores['iqm']:.1f} (one seed)"
    return f"{scores['iqm']:.1f} ({scores['ci_low']:.1f} to {scores['ci_high']:.1f})"


def brief(x: Any, form: str) -> str:
    """IQM and 95% interval of one number a seed, each written as ``form`` says, like ``.2f``."""
    low, high = interval(x)
    return f"{iqm(x):{form}} ({low:{form}} to {high:{form}})"


def seeds(number: int) -> str:
    """A number of seeds in words: "1 seed", "8 seeds"."""
    return f"{number} seed" if number == 1 else f"{number} seeds"


# Several tasks: ``scores`` are normalized, an array of seeds for each task


def pooled_iqm(scores: Sequence[np.ndarray]) -> float:
    """IQM of the scores of all tasks together."""
    return float(iqm(np.concatenate(scores)))


def optimality_gap(scores: Sequence[np.ndarray], target: float = 1.0) -> float:
    """Mean shortfall below the target; scores above it count as the target."""
    return float(target - np.minimum(np.concatenate(scores), target).mean())


def improvement(scores: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Probability that a seed scores more than one of the others, averaged over tasks; a tie counts half."""
    return float(np.mean([_wins(x, y) for x, y in zip(scores, others, strict=True)]))


def profile(scores: Sequence[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """Performance profile: the share of all seeds and tasks whose score is above each threshold."""
    return (np.concatenate(scores)[:, None] > thresholds).mean(0)


def stratified_interval(
    statistic: Callable[..., Any], *scores: Sequence[np.ndarray], level: float = 0.95, samples: int = 2000
) -> tuple[Any, Any]:
    """Bootstrap percentile interval of ``statistic(*scores)``, which draws seeds within each task. The draws are fixed."""
    rng = np.random.default_rng(0)
    found = [
        statistic(*([x[rng.integers(len(x), size=len(x))] for x in tasks] for tasks in scores)) for _ in range(samples)
    ]
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(found, [tail, 100 - tail], axis=0)
    return low, high


def _wins(x: np.ndarray, y: np.ndarray) -> float:
    """The share of pairs in which x is larger, a tie as half a win: Mann and Whitney's U over the number of pairs."""
    ordered = np.sort(y)
    below, up_to = np.searchsorted(ordered, x, "left"), np.searchsorted(ordered, x, "right")
    return float((below + up_to).mean() / (2 * len(y)))
