"""Settings declared on one line each: what is allowed, the default, and a description.

    num_envs: Positive = 4  # Environments that each seed steps in parallel.

The annotation holds the check, and the comment is the description that ``--help`` and the documentation show. ``Literal`` fields
are checked against their choices.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from jrl.numerics import checks, precision

Positive = Annotated[int, checks.positive_int]
NonNegativeInt = Annotated[int, partial(checks.positive_int, at_least=0)]
Unit = Annotated[float, partial(checks.within, low=0, high=1)]
NonNegative = Annotated[float, partial(checks.within, low=0, high=math.inf)]
AtLeastOne = Annotated[float, partial(checks.within, low=1, high=math.inf)]
AboveZero = Annotated[float, checks.above_zero]
BelowOne = Annotated[float, checks.below_one]
Finite = Annotated[float, partial(checks.within, low=-1e30, high=1e30)]
Precision = Annotated[str, lambda field, value: precision.parse(value)]


class Settings:
    """A frozen dataclass whose fields are checked when it is made.

    ``prefix`` is what messages call it: ``class Config(Settings, prefix="network")``. A subclass that relates two fields extends
    ``__post_init__``.
    """

    def __init_subclass__(cls, prefix: str | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        if prefix is not None:
            cls._prefix = prefix

    _prefix = "config"

    def __post_init__(self) -> None:
        check(self._prefix, self)


def check(prefix: str, settings: Any) -> None:
    """Raise ``ValueError`` for the first field whose value its annotation does not allow; traced numbers pass."""
    kind: Any = type(settings)
    for name, allowed in _checks(kind).items():
        allowed(f"{prefix}.{name}", getattr(settings, name))


def check_hyper(hyper: Any) -> None:
    """Check an algorithm's hyperparameters."""
    check("hyper", hyper)


@functools.cache
def _checks(kind: type) -> dict[str, Callable[[str, Any], None]]:
    found = {name: _check_of(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    return {name: allowed for name, allowed in found.items() if allowed is not None}


def _check_of(hint: Any) -> Callable[[str, Any], None] | None:
    """The check that an annotation stands for, called with name and value; ``None`` if anything is allowed."""
    if get_origin(hint) is Annotated:
        return next((x for x in hint.__metadata__ if callable(x)), None)
    if get_origin(hint) is Literal:
        return partial(checks.one_of, allowed=get_args(hint))
    if get_origin(hint) is tuple and (each := _check_of(get_args(hint)[0])) is not None:
        return partial(_check_each, each)
    return None


def _check_each(each: Callable[[str, Any], None], name: str, values: Any) -> None:
    for value in values:
        each(name, value)
