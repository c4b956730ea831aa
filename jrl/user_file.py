"""A user's Python file in place of something named: an environment, a task, problems with a verifier."""

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def load(path: Path, what: str) -> ModuleType:
    """The module. Raises ``ValueError`` if there is no such file, which the message calls ``what``, or it is no Python file."""
    if not path.is_file():
        raise ValueError(f"no such {what}: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} must be a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(name: str, factory: Callable[..., T], settings: Mapping[str, Any]) -> T:
    """``factory(**settings)``. Raises ``ValueError`` for a setting that it does not take."""
    known = inspect.signature(factory).parameters
    unknown = [setting for setting in settings if setting not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        raise ValueError(f"{name} has no setting {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
    return factory(**settings)
