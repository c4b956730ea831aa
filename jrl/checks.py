"""Checks that fail at trace time, or before, with one clear line."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np


def same_shape(function: str, **arrays: jax.Array) -> None:
    """Raise ``ValueError`` naming the arrays unless all of them have one shape."""
    shapes = {name: tuple(x.shape) for name, x in arrays.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{function}: arguments must have one shape, got {listed}")


def one_of(field: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ``ValueError`` unless ``value`` is among ``allowed``."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def positive_int(field: str, value: Any, at_least: int = 1) -> None:
    """Raise ``ValueError`` unless ``value`` is an int of at least ``at_least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{field} must be an integer of at least {at_least}; got {value!r}")


def within(field: str, value: Any, low: float, high: float) -> None:
    """Raise ``ValueError`` unless a concrete number lies in ``[low, high]``; traced values pass unchecked."""
    if isinstance(value, jax.core.Tracer):
        return
    for x in np.ravel(np.asarray(value, float)).tolist():
        if not (low <= x <= high) or math.isnan(x):
            bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise ValueError(f"{field} must be {bounds}; got {x:g}")
