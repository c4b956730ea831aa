"""Functional reinforcement learning in JAX: many seeds and settings in one compiled program."""

import importlib
from typing import Any

from jrl.numerics.host import use_cpu_cores

__version__ = "0.2.0"
__all__ = [
    "algorithm",
    "algos",
    "attention",
    "envs",
    "equations",
    "experience",
    "intrinsic",
    "lm",
    "nets",
    "numerics",
    "run",
]

use_cpu_cores()


def __getattr__(name: str) -> Any:
    """The rooms of the house, each imported when it is first used: ``jrl.envs``, ``jrl.run``."""
    if name in __all__:
        return importlib.import_module(f"jrl.{name}")
    raise AttributeError(f"module 'jrl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
