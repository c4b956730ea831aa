"""Where a run's aggregates go besides its folder: Weights & Biases, or a logger of your own.

A logger is a function of the run's settings and its folder that opens a sink; ``run.train(..., loggers=[loggers.wandb("my-project")])``.
"""

import importlib.util
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Sink(NamedTuple):
    """An open logger.

    Attributes:
        write: ``(env_steps, {tag: number})``, in rising order of steps; tags are such as ``training/loss`` and ``evaluation/return``.
        close: called once, when the run ends or is interrupted.
    """

    write: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


Logger = Callable[[dict[str, Any], Path], Sink]


def wandb(project: str | None = None, **options: Any) -> Logger:
    """Weights & Biases. ``project`` is that of the environment variable WANDB_PROJECT, or jrl, if not given; ``options`` go to ``wandb.init``,
    such as ``mode="offline"``. A resumed run goes on in the same run there."""

    def start(settings: dict[str, Any], folder: Path) -> Sink:
        import wandb as package

        given = {
            "project": project or os.environ.get("WANDB_PROJECT") or "jrl",
            "name": folder.name,
            "dir": str(folder),
        }
        same = {"id": _name_of(folder), "resume": "allow"}
        opened = package.init(config=settings, **given | same | options)
        return Sink(lambda steps, values: opened.log(values, step=steps), opened.finish)

    return _needing("wandb", start)


NAMED = {"wandb": wandb}


def opened(names: Sequence[str], settings: dict[str, Any], folder: Path) -> list[Sink]:
    """The loggers of these names, opened. Raises ``ValueError`` where a package is missing."""
    return [NAMED[name]()(settings, folder) for name in names]


def _needing(package: str, start: Logger) -> Logger:
    """The logger, refused at once where its package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"the logger {package} needs the package {package}, which is an extra: pip install 'jrl[{package}]'"
        )
    return start


def _name_of(folder: Path) -> str:
    """A name that a folder has again when its run is resumed."""
    return f"{folder.name}-{zlib.crc32(str(folder.resolve()).encode()):08x}"
