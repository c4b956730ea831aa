"""Grids of hyperparameters, trained with the seeds in one program."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

Hyper = Any
MOST_CELLS = 10_000  # each is checked before the run


def names(hyper: Hyper, prefix: str = "") -> list[str]:
    """Every number of a ``Hyper``, nested ones with dots."""
    found: list[str] = []
    for field in hyper._fields:
        value = getattr(hyper, field)
        found += names(value, f"{prefix}{field}.") if hasattr(value, "_fields") else [prefix + field]
    return found


def replace(hyper: Hyper, name: str, value: float) -> Hyper:
    """``hyper`` with one number replaced. Raises ``ValueError`` for an unknown name."""
    if name not in names(hyper):
        raise ValueError(f"unknown hyperparameter {name!r}; there are: {', '.join(names(hyper))}")
    head, _, rest = name.partition(".")
    return hyper._replace(**{head: replace(getattr(hyper, head), rest, value) if rest else value})


def grid(hyper: Hyper, values: Mapping[str, Sequence[float]]) -> dict[str, Hyper]:
    """All combinations, by label: ``grid(h, {"learning_rate": [1e-3, 1e-4]})`` has ``"learning_rate=0.001"`` and one more.

    Raises ``ValueError`` for an unknown name or an empty or repeated list of values.
    """
    for name, choices in values.items():
        replace(hyper, name, 0.0)
        if not choices or len(set(choices)) < len(choices):
            raise ValueError(f"sweep of {name} needs one or more different values; got {list(choices)}")
    cells = {}
    for combination in itertools.product(*values.values()):
        cell = hyper
        for name, value in zip(values, combination, strict=True):
            cell = replace(cell, name, value)
        cells[", ".join(f"{n}={v!r}" for n, v in zip(values, combination, strict=True))] = cell
    return cells


def cells(hyper: Hyper, texts: Sequence[str]) -> dict[str, Hyper] | None:
    """The grid of a command line's words, by label; None without any. Raises ``ValueError`` for more than ``MOST_CELLS``."""
    values = parse(texts)
    if (count := math.prod(map(len, values.values()))) > MOST_CELLS:
        raise ValueError(f"the sweep has {count:,} cells; at most {MOST_CELLS:,} may be")
    return grid(hyper, values) if values else None


def columns(cells: Mapping[str, Hyper]) -> dict[str, dict[str, float]]:
    """For each cell the numbers in which cells differ, by ``hyper.NAME``: the columns of a table."""
    first = next(iter(cells.values()))
    numbers = {
        cell: {f"hyper.{name}": float(_number(hyper, name)) for name in names(first)} for cell, hyper in cells.items()
    }
    varied = [name for name in numbers[next(iter(cells))] if len({n[name] for n in numbers.values()}) > 1]
    return {cell: {name: n[name] for name in varied} for cell, n in numbers.items()}


def _number(hyper: Hyper, name: str) -> float:
    return functools.reduce(getattr, name.split("."), hyper)


def parse(texts: Sequence[str]) -> dict[str, list[float]]:
    """``["hyper.clip_eps=0.1,0.2"]`` as ``{"clip_eps": [0.1, 0.2]}``; raises ``ValueError`` with the form that is wanted."""
    values: dict[str, list[float]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        name = name.replace("-", "_")
        if name.startswith("config."):
            raise ValueError(
                f"cannot sweep {name}: config fields are compiled in; sweep hyper fields, or run once for each"
            )
        try:
            numbers = [float(x) for x in listed.split(",")]
        except ValueError:
            raise ValueError(f"a sweep is written hyper.NAME=NUMBER,NUMBER,...; got {text!r}") from None
        name = name.removeprefix("hyper.")
        if name in values:
            raise ValueError(f"hyper.{name} is swept twice")
        values[name] = numbers
    return values
