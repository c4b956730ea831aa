"""Checks that fail at trace time, or before, with one clear line."""

import difflib
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
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
    """Raise ``ValueError`` unless ``value`` is an int of at least ``at_least`` that fits in 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{field} must be an integer of at least {at_least}; got {value!r}")
    if value >= 2**63:
        raise ValueError(f"{field} must be below 2**63; got {value}")


def function(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` can be called and answers at once, which a coroutine does not."""
    if not callable(value) or inspect.iscoroutinefunction(value):
        kind = f"a coroutine, {value!r}: write def without async" if callable(value) else repr(value)
        raise ValueError(f"{name} must be a function; got {kind}")


def instances(function: str, **arguments: tuple[Any, type]) -> None:
    """Raise ``ValueError`` naming the function unless each argument, given as ``name=(value, type)``, is of its type."""
    for name, (value, kind) in arguments.items():
        if not isinstance(value, kind):
            wanted = f"{kind.__module__}.{kind.__qualname__}"
            given = type(value)
            raise ValueError(
                f"{function}: {name} must be a {wanted}; got {repr(value)[:40]}, a {given.__module__}.{given.__qualname__}"
            )


def suggestion(name: str, known: Sequence[str], prefix: str = "") -> str:
    """What a user who wrote a name that is not known may have meant, each with the prefix; or else all known names."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(prefix + x for x in near)}?" if near else f"known: {', '.join(known)}"


def fields(name: str, value: Any, *wanted: str) -> None:
    """Raise ``ValueError`` unless ``value`` has all these fields."""
    missing = [field for field in wanted if not hasattr(value, field)]
    if missing:
        raise ValueError(f"{name} must have {', '.join(wanted)}; got {repr(value)[:40]}, a {type(value).__name__}")


def traced(owner: str, name: str, function: Callable, *args: Any) -> Any:
    """Shapes of what a user's function returns. Raises ``ValueError`` naming its owner and its name for whatever it raises."""
    try:
        return jax.eval_shape(function, *args)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's function may raise SystemExit, too
        kind = type(error).__name__
        line = (str(error).strip() or kind).splitlines()[0]
        said = line if isinstance(error, ValueError) or line == kind else f"{kind}: {line}"
        raise ValueError(f"{_place(error)}{owner}: {name} cannot be traced: {said}") from error


def _place(error: BaseException) -> str:
    """The file and line of a user's code at which an error was raised, the innermost."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}: " if frames else ""


def _is_library(file: str) -> bool:
    return file.startswith("<") or "site-packages" in file or Path(file).is_relative_to(Path(__file__).parents[1])


def not_empty(**fields: Sized) -> None:
    """Raise ``ValueError`` for a field that holds nothing."""
    for name, value in fields.items():
        if not len(value):
            raise ValueError(f"{name} must name at least one")


def apart(what: str, names: Iterable[str], taken: Iterable[str]) -> None:
    """Raise ``ValueError`` for names that are taken by metrics."""
    if both := sorted(set(names) & set(taken)):
        raise ValueError(f"{what} may not have the name of a metric: {', '.join(both)}")


def within(field: str, value: Any, low: float, high: float) -> None:
    """Raise ``ValueError`` unless a concrete number is finite and lies in ``[low, high]``; traced values pass unchecked."""
    bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
    _all(field, value, _finite, "finite in float32")
    _all(field, value, lambda x: low <= x <= high, bounds)


def below_one(field: str, value: Any) -> None:
    """Raise ``ValueError`` unless a concrete number is in ``[0, 1)``, in float32 too; traced values pass unchecked."""
    _all(field, value, lambda x: x >= 0 and float(np.float32(x)) < 1, "at least 0 and below 1")


def above_zero(field: str, value: Any) -> None:
    """Raise ``ValueError`` unless a concrete number is finite and above 0, as a normal float32; traced values pass unchecked."""
    _all(field, value, _finite, "finite in float32")
    _all(field, value, lambda x: float(np.finfo(np.float32).tiny) <= x, "above 0")


def _finite(x: float) -> bool:
    return abs(x) <= float(np.finfo(np.float32).max) or math.isnan(x)  # what is no number fails the check that follows


def _all(field: str, value: Any, good: Callable[[float], bool], bounds: str) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    for x in np.ravel(np.asarray(value, float)).tolist():
        if not good(x):
            raise ValueError(f"{field} must be {bounds}; got {x:g}")
