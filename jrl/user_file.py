"""A user's Python file in place of something named: an environment, a task, problems with a verifier."""

import importlib.util
import inspect
import math
import symtable
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

T = TypeVar("T")


def load(path: Path, what: str) -> SimpleNamespace:
    """What the file itself defines: the names that it binds by ``def``, ``class`` or ``=``. Imported names do not count.

    Raises ``ValueError`` if there is no such file, which the message calls ``what``, or it cannot be run.
    """
    if not path.is_file():
        raise ValueError(f"no such {what}: {path}")
    spec = importlib.util.spec_from_file_location(f"user_file:{path.resolve()}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} must be a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
        names = symtable.symtable(path.read_text(), str(path), "exec").get_symbols()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be run: {_where(error, path)}{type(error).__name__}: {error}") from error
    return SimpleNamespace(**{s.get_name(): getattr(module, s.get_name()) for s in names if _is_own(s, module)})


def _is_own(symbol: symtable.Symbol, module: Any) -> bool:
    return symbol.is_assigned() and hasattr(module, symbol.get_name())


def _where(error: BaseException, path: Path) -> str:
    """The line of the file at which an error was raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"line {lines[-1]}: " if lines else ""


def text_of(path: Path) -> dict[str, str]:
    """A file for the record: its name and its text."""
    return {"file": path.name, "text": path.read_text()}


def settings_of(factory: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call, those at their defaults too."""
    bound = inspect.signature(factory).bind(**given)
    bound.apply_defaults()
    return dict(bound.arguments)


def call(name: str, factory: Callable[..., T], settings: Mapping[str, Any]) -> T:
    """``factory(**settings)``. Raises ``ValueError`` for a setting that it does not take, or one that it needs."""
    known = inspect.signature(factory).parameters
    unknown = [setting for setting in settings if setting not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        raise ValueError(f"{name} has no setting {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
    missing = [p.name for p in known.values() if _is_needed(p) and p.name not in settings]
    if missing:
        raise ValueError(f"{name} needs the settings {', '.join(missing)}")
    for setting, value in settings.items():
        if setting in known:
            same_kind(f"{name}: {setting}", value, known[setting].default)
    return factory(**settings)


def same_kind(setting: str, value: Any, default: Any) -> None:
    """Raise ``ValueError`` where a default is a number, a truth value or a text, and a plain value is none."""
    if not isinstance(value, bool | int | float | str):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{setting} must be finite; got {value}")
    for kind, what in ((bool, "true or false"), (int, "an integer"), (float, "a number"), (str, "text")):
        if isinstance(default, kind):
            fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
            if not fits or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{setting} must be {what}, such as {default}; got {value!r}")
            return


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_KEYWORD,
        parameter.VAR_POSITIONAL,
    )
