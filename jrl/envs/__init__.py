"""Environments behind one small protocol (``types``): gymnax, probes, other packages, and your own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jrl import user_file
from jrl.envs import gymnax, packages, probes, tabular, wrappers
from jrl.envs.host import on_host
from jrl.envs.recall import recall
from jrl.envs.spaces import Box, Discrete, MultiDiscrete, Space
from jrl.envs.strict import strict
from jrl.envs.types import Environment, MaskedObs, observation_spec, with_settings
from jrl.numerics import checks

__all__ = [
    "Box",
    "Discrete",
    "Environment",
    "MaskedObs",
    "MultiDiscrete",
    "Space",
    "make",
    "names",
    "observation_spec",
    "on_host",
    "register",
    "strict",
    "tabular",
    "wrappers",
]

_registered: dict[str, Callable[..., Environment]] = {**probes.PROBES, **tabular.NAMED, "Recall": recall}


def register(name: str, factory: Callable[..., Environment]) -> None:
    """Let ``make(name, **params)`` call ``factory(**params)``. Raises ``ValueError`` if the name is taken."""
    if name in names():
        raise ValueError(f"an environment named {name!r} is registered already")
    _registered[name] = factory


def names() -> list[str]:
    """All names that ``make`` knows, but those of other packages: see ``packages.installed``."""
    return [*gymnax.IDS, *_registered]


def make(name: str | Path, **params: Any) -> Environment:
    """An environment by name (of another package as in ``brax/ant``), or from a Python file that defines ``reset``, ``step`` and
    ``action_space``.

    ``params`` go to the environment (gymnax: fields of its ``EnvParams``). The result is checked by abstract evaluation.
    Raises ``ValueError`` for an unknown name, file or parameter, or for functions that break the protocol.
    """
    if not isinstance(name, str | Path):
        raise ValueError(f"an environment's name must be text; got {name!r}")
    name = str(name)
    if name.endswith(".py"):
        path = Path(name)
        with user_file.blamed(path):
            made = strict(_from_file(path, params))
        return with_settings(made, params | user_file.text_of(path))
    package, _, id = name.partition("/")
    if package in packages.EXTRAS and id:
        return strict(packages.make(package, id, params))
    if name in gymnax.IDS:
        return strict(gymnax.make(name, **params))
    if name not in _registered:
        raise ValueError(
            f"unknown environment {name!r}; {checks.suggestion(name, names())} (or PACKAGE/NAME of {', '.join(packages.EXTRAS)}, or a path to a .py file)"
        )
    made = strict(user_file.call(name, _registered[name], params))
    return with_settings(made, user_file.settings_of(_registered[name], params))


def _from_file(path: Path, params: dict[str, Any]) -> Environment:
    """``make(**params) -> Environment`` of the file if it has one, else its ``reset``, ``step`` and ``action_space``."""
    module = user_file.load(path, "environment file")
    if hasattr(module, "make"):
        return user_file.make(path, module, params)
    missing = [field for field in ("reset", "step", "action_space") if not hasattr(module, field)]
    if missing:
        raise ValueError(
            f"{path} must define {', '.join(missing)} (or make() -> Environment); imported names do not count"
        )
    if params:
        raise ValueError(f"{path} takes no parameters, since it has no make(); got {', '.join(params)}")
    limit = getattr(module, "time_limit", None)
    return Environment(path.stem, module.reset, module.step, module.action_space, limit)
