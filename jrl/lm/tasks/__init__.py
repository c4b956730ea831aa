"""Tasks with verifiers, as pure array functions: what a language model is trained on by reinforcement learning.

To add one, write a function of its settings that returns a ``Task``, in a file of its own (``modular_addition`` is a short
example), and name it in ``_registered`` below, or call ``register``. Outside this package a Python file will do: it defines
``make(**settings) -> Task``, or ``symbols``, ``prompt_length``, ``answer_length``, ``draw``, ``verify`` and ``demonstrate``, and
``make("my_task.py")`` loads it. ``parts`` holds what most tasks need.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jrl import user_file
from jrl.envs.types import with_settings
from jrl.lm.tasks.addition import addition
from jrl.lm.tasks.countdown import countdown
from jrl.lm.tasks.environment import as_environment
from jrl.lm.tasks.modular_addition import modular_addition
from jrl.lm.tasks.parity import parity
from jrl.lm.tasks.sequences import reverse, sort
from jrl.lm.tasks.types import END, MARKS, PAD, Problem, Task, answer_mask, decode, encode, strict
from jrl.numerics import checks

__all__ = [
    "END",
    "MARKS",
    "PAD",
    "Problem",
    "Task",
    "answer_mask",
    "as_environment",
    "decode",
    "encode",
    "make",
    "names",
    "register",
    "strict",
]

_registered: dict[str, Callable[..., Task]] = {
    "addition": addition,
    "countdown": countdown,
    "modular_addition": modular_addition,
    "parity": parity,
    "reverse": reverse,
    "sort": sort,
}


def register(name: str, factory: Callable[..., Task]) -> None:
    """Let ``make(name, **settings)`` call ``factory(**settings)``. Raises ``ValueError`` if the name is taken."""
    if name in _registered:
        raise ValueError(f"a task named {name!r} is registered already")
    _registered[name] = factory


def names() -> list[str]:
    """All names that ``make`` knows."""
    return list(_registered)


def make(name: str, **settings: Any) -> Task:
    """A task by name, or from a Python file; checked by abstract evaluation.

    Raises ``ValueError`` for an unknown name, file or setting, or for functions that break the protocol.
    """
    if name.endswith(".py"):
        path = Path(name)
        with user_file.blamed(path):
            made = strict(_from_file(path, settings))
        return with_settings(made, settings | user_file.text_of(path))
    if name not in _registered:
        raise ValueError(f"unknown task {name!r}; {checks.suggestion(name, names())} (or a path to a .py file)")
    made = strict(user_file.call(name, _registered[name], settings))
    return with_settings(made, user_file.settings_of(_registered[name], settings))


def _from_file(path: Path, settings: dict[str, Any]) -> Task:
    """``make(**settings) -> Task`` of the file if it has one, else its ``symbols``, lengths and functions."""
    module = user_file.load(path, "task file")
    if hasattr(module, "make"):
        return user_file.make(path, module, settings)
    fields = Task._fields[1:-1]
    missing = [field for field in fields if not hasattr(module, field)]
    if missing:
        raise ValueError(f"{path} must define {', '.join(missing)} (or make() -> Task); imported names do not count")
    if settings:
        raise ValueError(f"{path} takes no settings, since it has no make(); got {', '.join(settings)}")
    return Task(path.stem, *(getattr(module, field) for field in fields))
