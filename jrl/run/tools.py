"""The words of the command ``jrl`` that train nothing: ``show``, ``watch``, ``compare``, ``record``, ``envs``."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from jrl import envs
from jrl.envs import packages
from jrl.numerics import checks
from jrl.run import cli, compare, report, show
from jrl.run.checkpoint import disk_errors
from jrl.run.evaluate import check_drawn, record
from jrl.run.load import load


@dataclass(frozen=True)
class Show:
    """Print the settings and the result of a run, or a table of all runs in a folder."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")  # Folder of a run, or of runs.


@dataclass(frozen=True)
class Watch:
    """Follow a run that another process trains, until it has ended; Ctrl-C leaves it alone."""

    folder: tyro.conf.Positional[Path]  # Folder of the run.
    every: float = 2.0  # Seconds between two looks.


@dataclass(frozen=True)
class Compare:
    """Compare runs: a picture of their curves, and a table of scores, intervals and probabilities of improvement.

    jrl compare runs/a runs/b

    jrl compare ppo=runs/a dqn=runs/b other.csv --threshold 475 --table markdown

    Each word is a run's folder or another tool's CSV file, with LABEL= before it if you like.

    Runs of one label on one task count as the seeds of one; in several environments they are aggregated over them.
    """

    runs: tyro.conf.Positional[tuple[str, ...]]  # [LABEL=]FOLDER or [LABEL=]FILE.csv ...
    metric: str | None = None  # Column to compare; default: the return, scored by the last evaluation.
    steps: str | None = None  # Column of steps of a CSV file; default: found by its usual names.
    threshold: float | None = None  # Say after how many steps each run reaches this.
    table: Literal["text", "markdown", "latex"] = "text"  # How the table is printed.
    picture: Path = Path("compare.png")  # File of the picture: .png (with an .svg beside it), .svg or .pdf.
    # Scores mapped to 0 and 1 when averaging over tasks, as TASK=LOW,HIGH; default: the lowest and the highest seed.
    scale: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """Play an episode with a trained policy and write it as an animation.

    jrl record runs/mine

    jrl record runs/mine --out policy.mp4 --best
    """

    folder: tyro.conf.Positional[Path]  # Folder of the run.
    out: Path | None = None  # File: .gif or .mp4, of games of pgx .svg; default: policy.gif, or policy.svg.
    best: bool = False  # The policy at the best evaluation instead of the last one; needs a run with --eval-every.
    cell: str | None = None  # Cell of a sweep; default: the best.
    seed: int | None = None  # Seed; default: the best.
    episode: int = 0  # Which episode: another number begins and goes on differently.
    env: Path | None = None  # File of the environment, for a run that was trained in one: it is not run unasked.


@dataclass(frozen=True)
class Envs:
    """List the environments that --env knows, and the packages that would add more."""


def _show(args: Show) -> None:
    print(show.show(args.folder))


def _watch(args: Watch) -> None:
    checks.within("--every", args.every, 0.1, 3600)
    show.watch(args.folder, args.every)


def _compare(args: Compare) -> None:
    if not args.runs:
        raise ValueError("compare needs the folders of runs, or CSV files")
    if args.picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--picture must end in .png, .svg or .pdf; got {args.picture}")
    if args.threshold is not None and not math.isfinite(args.threshold):
        raise ValueError(f"--threshold must be a finite number; got {args.threshold}")
    labelled = [_labelled(word) for word in args.runs]
    for path, _ in labelled:
        if [Path(other).resolve() for other, _ in labelled].count(Path(path).resolve()) > 1:
            raise ValueError(f"{path} is given twice")
    names = [Path(path).stem if Path(path).is_file() else Path(path).name for path, _ in labelled]
    alike = {name for name in names if names.count(name) > 1}  # these are called by their whole path
    words = [
        (path, label or (path if name in alike else name)) for (path, label), name in zip(labelled, names, strict=True)
    ]
    runs = compare.joined([run for path, label in words for run in compare.read(path, label, args.metric, args.steps)])
    given = dict(map(_bounds, args.scale))
    grouped, scale = compare.by_label(runs), compare.observed_scale(runs) | given
    for task in given:
        checks.one_of("--scale", task, {run.task for run in runs})
    if given and not grouped:
        raise ValueError("--scale is for runs of each label in the same two or more environments, each once")
    print(report.table(compare.table(runs, args.threshold), args.table))
    if grouped:
        said = ", ".join(f"{task} {low:g} to {high:g}" for task, (low, high) in scale.items())
        print(f"\nOver all tasks, scores normalized from 0 to 1 ({said}):\n")
        print(report.table(compare.aggregates(grouped, scale), args.table))
    with disk_errors(args.picture):
        compare.draw(args.picture, runs, args.metric, scale)
    print(f"\n{args.picture}")


def _labelled(word: str) -> tuple[str, str | None]:
    """``LABEL=PATH`` or ``PATH`` as path and label."""
    label, sign, path = word.partition("=")
    return (path, label) if sign and not Path(word).exists() else (word, None)


def _bounds(word: str) -> tuple[str, tuple[float, float]]:
    task, _, numbers = word.partition("=")
    try:
        low, high = map(float, numbers.split(","))
    except ValueError:
        raise ValueError(f"--scale is written TASK=LOW,HIGH; got {word!r}") from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"--scale: LOW must be below HIGH, both finite; got {word!r}")
    return task, (low, high)


def _record(args: Record) -> None:
    loaded = load(args.folder, env=None if args.env is None else envs.make(args.env), best=args.best)
    out = args.out or Path(f"policy{loaded.algo.env.drawn_as}")
    check_drawn(loaded.algo.env, out.suffix)
    with disk_errors(out):
        length = record(loaded.algo, loaded.member(args.seed, args.cell), jax.random.key(args.episode), out)
    print(f"{out}: {length:,} steps")


def _envs(args: Envs) -> None:
    found = packages.installed()
    print("\n".join([*envs.names(), *(name for names in found.values() for name in names)]))
    if missing := [package for package in packages.EXTRAS if package not in found]:
        print(f"not installed: {', '.join(missing)} (pip install 'jrl[{','.join(missing)}]')", file=sys.stderr)


TOOLS: dict[str, tuple[type, Callable[..., None]]] = {
    "show": (Show, _show),
    "watch": (Watch, _watch),
    "compare": (Compare, _compare),
    "record": (Record, _record),
    "envs": (Envs, _envs),
}


def use(name: str, argv: list[str]) -> None:
    """Run one of the tools with the words after it."""
    options, function = TOOLS[name]
    function(cli.parse(options, argv, doc=options.__doc__))
