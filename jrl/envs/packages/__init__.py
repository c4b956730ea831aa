"""Environments of other packages, by ids such as ``brax/ant``: each adapter is a file with ``names()`` and ``make(name, **params)``.

The packages are extras: ``pip install 'jrl[brax]'``. ``make`` gives terminated and truncated apart, and no auto-reset.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
from typing import Any

from jrl import user_file
from jrl.envs.types import Environment, with_settings
from jrl.numerics import checks

EXTRAS = ("brax", "craftax", "gymnasium", "jumanji", "navix", "pgx", "playground", "xminigrid")
IMPORTED_AS = {"playground": "mujoco_playground"}  # where a package's module has another name


def make(package: str, name: str, params: dict[str, Any]) -> Environment:
    """The environment ``name`` of a package of ``EXTRAS``. Raises ``ValueError`` if the package is not installed, or has none of that
    name or no such parameter."""
    known = _names(package)
    if name not in known:
        raise ValueError(f"unknown environment {package}/{name}; {checks.suggestion(name, known, f'{package}/')}")
    factory = functools.partial(_adapter(package).make, name)
    made = user_file.call(f"{package}/{name}", factory, params)
    settings = {key: getattr(x, "__name__", x) for key, x in user_file.settings_of(factory, params).items()}
    return with_settings(made._replace(name=f"{package}/{name}"), settings)


def installed() -> dict[str, list[str]]:
    """The ids of the packages that are installed, by package."""
    found = {}
    for package in EXTRAS:
        if importlib.util.find_spec(IMPORTED_AS.get(package, package)) is not None:
            with contextlib.suppress(ValueError):  # one that cannot be imported gives none
                found[package] = [f"{package}/{name}" for name in _names(package)]
    return found


def _names(package: str) -> list[str]:
    try:
        return _adapter(package).names()
    except ImportError as error:
        if error.name == IMPORTED_AS.get(package, package):
            said = f"it needs the package {package}, which is an extra: pip install 'jrl[{package}]'"
        else:
            said = f"the package cannot be imported: {error}"
        raise ValueError(f"{package}/...: {said}") from None


def _adapter(package: str) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):  # some say what else could be installed
        return importlib.import_module(f"jrl.envs.packages.{package}")
