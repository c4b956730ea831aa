"""A user's Python file in place of something named: an environment, a task, problems with a verifier."""

import contextlib
import importlib.util
import inspect
import math
import os
import symtable
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from jrl.numerics import checks

T = TypeVar("T")


def load(path: Path, what: str) -> SimpleNamespace:
    """What the file itself defines: the names that it binds by ``def``, ``class`` or ``=``. Imported names do not count.

    The file may import others beside it, now and whenever its functions are called. Raises ``ValueError`` if there is no such
    file, which the message calls ``what``, or it cannot be run.
    """
    if not path.is_file():
        raise ValueError(f"no such {what}: {path}")
    spec = importlib.util.spec_from_file_location(f"user_file:{path.resolve()}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} must be a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    BESIDE.look_in(path.resolve().parent)
    try:
        spec.loader.exec_module(module)
        names = symtable.symtable(_source(path), str(path), "exec").get_symbols()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        line = _line(error, path)
        where = f"line {line}: " if line else ""
        raise ValueError(f"{path} cannot be run: {where}{_said(error)}") from error
    return SimpleNamespace(**{s.get_name(): getattr(module, s.get_name()) for s in names if _is_own(s, module)})


class _Beside:
    """Finds modules in the folder of the file that was loaded last, if Python finds them nowhere else: nothing is shadowed."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._found: set[str] = set()

    def look_in(self, folder: Path) -> None:
        """Modules of another folder are forgotten: they may have the names of those in this one."""
        if self not in sys.meta_path:
            sys.meta_path.append(self)
        if folder != self._folder:
            for name in [name for name in sys.modules if name.partition(".")[0] in self._found]:
                del sys.modules[name]
            self._folder, self._found = folder, set()
        importlib.invalidate_caches()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As ``sys.meta_path`` asks for it."""
        if path is not None or self._folder is None:
            return None
        spec = PathFinder.find_spec(name, [str(self._folder)])
        if spec is not None:
            self._found.add(name)
        return spec

    def texts(self) -> dict[str, str]:
        """Names and texts of the modules that were found."""
        found = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in self._found}
        files = {name: getattr(module, "__file__", None) for name, module in sorted(found.items())}
        return {name: _source(Path(file)) for name, file in files.items() if file and file.endswith(".py")}


BESIDE = _Beside()


def _source(path: Path) -> str:
    return importlib.util.decode_source(path.read_bytes())


def _is_own(symbol: symtable.Symbol, module: Any) -> bool:
    return symbol.is_assigned() and hasattr(module, symbol.get_name())


def _line(error: BaseException, path: Path) -> int | None:
    """The line of the file at which an error was raised."""
    file = os.path.abspath(path)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == file]
    return lines[-1] if lines else None


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


@contextlib.contextmanager
def blamed(path: Path) -> Iterator[None]:
    """Raise ``ValueError`` that names the file, and its line if there is one, for whatever is raised within but an interrupt."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, ValueError) and path.name in str(error):
            raise
        line = _line(error, path)
        said = (
            f", line {line}: {_said(error)}"
            if line
            else f": {error if isinstance(error, ValueError) else _said(error)}"
        )
        raise ValueError(f"{path}{said}") from error


def make(path: Path, module: SimpleNamespace, settings: Mapping[str, Any]) -> Any:
    """``make(**settings)`` of the file. Raises ``ValueError`` as ``call`` does, and for whatever goes wrong in the file."""
    checks.function(f"{path}: make", module.make)
    with blamed(path):
        return call(str(path), module.make, settings)


def text_of(path: Path) -> dict[str, str]:
    """A file for the record: its name and its text, and the texts of the files beside it that it imported."""
    return {"file": path.name, "text": _source(path)} | {
        f"text of {name}": text for name, text in BESIDE.texts().items()
    }


def settings_of(factory: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call, those at their defaults too."""
    bound = inspect.signature(factory).bind(**given)
    bound.apply_defaults()
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    named = {name: x for name, x in bound.arguments.items() if kinds[name] is not inspect.Parameter.VAR_KEYWORD}
    return named | bound.kwargs


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
