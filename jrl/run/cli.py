"""Command lines of experiments: typed dataclasses in, one clear line on an error."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import jax
import tyro

from jrl import envs
from jrl.algorithm import Algorithm
from jrl.numerics import host
from jrl.run import folders, interrupt, loggers
from jrl.run import sweep as sweeps
from jrl.run.checkpoint import RunError
from jrl.run.evaluate import MAX_STEPS
from jrl.run.load import load
from jrl.run.loop import Result, train
from jrl.run.stats import seeds

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What every experiment can be told."""

    env: str = "CartPole-v1"  # Environment id, or a Python file that defines reset, step and action_space.
    env_params: tuple[str, ...] = ()  # Parameters of the environment, as NAME=VALUE ...
    # Wrappers around it, the first innermost, such as previous, time_limit=200 or sticky_actions=0.25.
    wrap: tuple[str, ...] = ()
    preset: str = "auto"  # auto (the environment's preset, else the default), none, or the name of a preset.
    env_steps: int = 500_000  # Environment steps of each seed; default: the preset's.
    num_seeds: int = 16  # Seeds trained together.
    seed: int = 0  # Seed from whose key every seed's key is split.
    run_dir: Path | None = None  # Folder of the run; default: runs/ALGORITHM-ENV-TIME.
    resume: bool = False  # Continue the run in run_dir, bit for bit.
    sweep: tuple[str, ...] = ()  # Train a grid of hyperparameters in one program, as hyper.NAME=NUMBER,NUMBER ...
    # Short for config.precision: float32, bfloat16, float16, pure_bfloat16, or like params=float32,compute=bfloat16,output=float32.
    precision: str | None = None
    eval_every: int | None = None  # Environment steps between evaluations; default: evaluate only at the end.
    eval_episodes: int = 32  # Whole episodes in each evaluation of each seed; 0 for none.
    checkpoint_every: float = 60.0  # Seconds between checkpoints.
    log_every: int | None = None  # Updates averaged into a row of metrics; default: at most about 1,000 rows.
    seeds_at_once: int | None = None  # Seeds computed at once; default: as many as are fast and fit the memory.
    devices: int | None = None  # Number of devices to use; default: all.
    gif: bool = False  # Draw the best seed's final policy.
    log: tuple[Literal["wandb"], ...] = ()  # Loggers besides the folder's table and TensorBoard events.
    start: Path | None = None  # Folder of a run: every seed starts from the parameters and statistics of its best one.


# A folder by the name that it has everywhere; --folder, which experiments of several runs once called it, is taken, too.
RunDir = Annotated[Path | None, tyro.conf.arg(aliases=["--folder"])]
NamedFolder = Annotated[Path, tyro.conf.arg(aliases=["--folder"])]


def folder_of_runs(run_dir: Path | None, resume: bool, name: str) -> Path:
    """The folder of an experiment of several runs, each of which may be trained with ``resume=True``: ``run_dir``, or a new one of that name.

    Raises ``ValueError`` for ``resume`` without a folder, ``RunError`` for a folder that holds something already, unless it is resumed.
    """
    if resume and run_dir is None:
        raise ValueError("--resume needs --run-dir")
    folder = run_dir or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (folder / "config.json").exists():
        raise RunError(f"{folder} contains a single run; choose another folder")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{folder} already contains runs or other files: resume it (--resume), or choose another folder")
    interrupt.on_leaving(f"interrupted; go on with --resume --run-dir {folder}")
    return folder


def preset_of(argv: list[str], options: type[Options] = Options) -> tuple[str, str]:
    """``--preset`` and ``--env`` of a command line, read ahead since they decide the other defaults."""
    known = read_ahead(argv, preset=options.preset, env=options.env)
    return known["preset"], known["env"]


def read_ahead(argv: list[str], **defaults: str) -> dict[str, str]:
    """The values of some flags of a command line, which ``parse`` refuses later where it is wrong."""
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, default in defaults.items():
        ahead.add_argument(f"--{name}", default=default)
    try:
        return vars(ahead.parse_known_args(argv)[0])
    except argparse.ArgumentError:
        return defaults


def paragraphs(doc: str | None) -> str:
    """A docstring whose examples, one a line, stay apart in ``--help``."""
    return "\n\n".join(line.strip() for line in (doc or "").splitlines() if line.strip())


def parse(options: type[T], argv: list[str], default: T | None = None, doc: str | None = None) -> T:
    """A command line as a dataclass; whole numbers may be written 1e6. ``doc`` is a docstring with examples, one a line.

    Raises ``ValueError`` for words that are wrong.
    """
    shown: Any = {} if default is None else {"default": default}
    refused = io.StringIO()
    try:
        with contextlib.redirect_stderr(refused):
            return tyro.cli(options, args=argv, description=paragraphs(doc), registry=_numbers, **shown)
    except SystemExit as end:
        if not end.code:  # after --help
            raise
        raise ValueError(_unboxed(refused.getvalue())) from None


def _unboxed(text: str) -> str:
    """What tyro writes into a box, in a line, without what --help says again."""
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    parts = re.split("─{3,}", " ".join(lines))
    said = [part.strip() for part in parts if not part.strip().startswith(("For full help", "Argument help"))]
    return f"{'; '.join(part.rstrip('.') for part in said)}; see --help"


def without(options: type[T], field: str, *names: str) -> type[T]:
    """``options`` whose settings in ``field`` a command line does not have: what is said elsewhere, or read from a file."""
    outer = {f.name: f for f in fields(options)}[field]  # type: ignore[arg-type]
    inner: Any = outer.type
    hidden = [(f.name, _unseen(f.type), _default(f)) for f in fields(inner) if f.name in names]
    narrow = _as_its_base(make_dataclass(inner.__name__, hidden, bases=(inner,), frozen=True))
    usual = outer.default_factory() if callable(outer.default_factory) else outer.default
    made = dataclasses.field(default_factory=lambda: narrow(**vars(usual)))
    return _as_its_base(make_dataclass(options.__name__, [(field, narrow, made)], bases=(options,), frozen=True))


def _as_its_base(made: Any) -> Any:
    """A class in whose place the source of its base is found, whose comments are the help."""
    base = made.__base__
    made.__module__, made.__qualname__ = base.__module__, base.__qualname__
    return made


def _unseen(kind: Any) -> Any:
    conf: Any = tyro.conf
    return conf.Suppress[conf.Fixed[kind]]


def _default(of: Any) -> Any:
    return dataclasses.field(default=of.default, default_factory=of.default_factory)


_numbers = tyro.constructors.ConstructorRegistry()


@_numbers.primitive_rule
def _whole_number(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[int] | None:
    if info.type is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda x: isinstance(x, int) and not isinstance(x, bool),
        str_from_instance=lambda x: [str(x)],
    )


def whole_number(text: str) -> int:
    """``"500_000"``, ``"5e5"`` or ``"500000.0"`` as an integer. Raises ``ValueError`` for what is none."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if float(text).is_integer():
            return int(float(text))
    raise ValueError(f"{text} is not a whole number")


def parse_params(texts: tuple[str, ...]) -> dict[str, Any]:
    """``("memory_length=10", "slippery=false")`` as ``{"memory_length": 10, "slippery": False}``; other words stay text.

    Raises ``ValueError`` with the form that is wanted.
    """
    params: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ValueError(f"parameters are written NAME=VALUE; got {text!r}")
        params[name] = _value(value)
    return params


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and "." not in text else number


def experiment(
    argv: list[str],
    options: type[Options],
    preset: Callable[[str, str], Any],
    make: Callable[..., Algorithm],
    doc: str | None,
) -> Result:
    """Train as a command line says: ``options`` has the fields ``config`` and ``hyper`` besides, whose defaults are the preset's."""
    chosen = preset(*preset_of(argv, options))
    defaults: Any = options(env_steps=chosen.env_steps, config=chosen.config, hyper=chosen.hyper)  # type: ignore[call-arg]
    args = parse(options, argv, defaults, doc)
    config = args.config if args.precision is None else replace(args.config, precision=args.precision)  # type: ignore[attr-defined]
    env = environment(args)
    trained = {} if args.start is None else {"start": trained_state(args.start, env, config)}
    return run(args, make(env, config, args.hyper, **trained))  # type: ignore[attr-defined]


def trained_state(folder: Path, env: envs.Environment, config: Any) -> Any:
    """The state of the best seed of the run in a folder. ``env`` is its environment where that is a file, which is not run unasked.

    Raises ``RunError`` where its network is another than that of ``config``, for parameters alone do not tell.
    """
    saved = folders.saved_settings(folder)
    wanted = folders.plain({"config": folders.as_dict(config)})
    for name, value in wanted.items():
        if name.startswith("config.network.") and name in saved and saved[name] != value:
            raise RunError(f"--start {folder}: its {name} is {saved[name]}, this run's {value}")
    return load(folder, env=env if "env_params.file" in saved else None).member()


def run(options: Options, algo: Algorithm) -> Result:
    """Train as the options say, and print the result."""
    if options.run_dir is None and options.resume:
        raise ValueError("--resume needs --run-dir")
    hypers = sweeps.cells(algo.hyper, options.sweep)
    name = f"{algo.name}-{options.env.removesuffix('.py').replace('/', '-')}"
    fresh = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = options.run_dir or fresh_folder(fresh)
    interrupt.on_leaving(f"interrupted; go on with --resume --run-dir {folder}")
    try:
        result = train(
            algo,
            jax.random.key(options.seed),
            options.env_steps,
            num_seeds=options.num_seeds,
            hypers=hypers,
            run_dir=folder,
            resume=options.resume,
            eval_every=options.eval_every,
            eval_episodes=options.eval_episodes,
            checkpoint_every=options.checkpoint_every,
            log_every=options.log_every,
            seeds_at_once=options.seeds_at_once,
            devices=options.devices,
            gif=options.gif,
            loggers=[loggers.NAMED[name]() for name in options.log],
        )
    finally:
        if options.run_dir is None:
            with contextlib.suppress(OSError):  # they are empty only where the run was refused
                folder.rmdir()
                folder.parent.rmdir()
    report(result)
    return result


def fresh_folder(path: Path) -> Path:
    """A new folder at ``path``, or beside it where another run has just made that one."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError


def report(result: Result) -> None:
    """Print what a run reached, and where it lies."""
    s = result.summary
    speed = f", {s['env_steps_per_second']:,} steps/s" if s["env_steps_per_second"] else ""
    print(f"{s['algorithm']} on {s['env']}: {seeds(s['num_seeds'])} x {s['env_steps']:,} steps{speed}")
    for nan in s["nan_seeds"]:
        print(f"  left out: seed {nan['seed']} turned NaN at update {nan['update']}")
    if s["eval"] is not None:
        for cell, summary in s.get("cells", {"": s["eval"]}).items():
            for mode, scores in (("greedy", summary), ("sampled", summary["sampled"])):
                print(f"  {cell}{': ' if cell else ''}return, {mode}: {_score(scores)}")
                if scores["unfinished"]:
                    print(
                        f"    {scores['unfinished']} episodes were cut off at {MAX_STEPS:,} steps; they count with what they had"
                    )
        if "best_cell" in s:
            print(f"  best: {s['best_cell']}; on other episodes: {_score(s['eval'])}")
    if result.run_dir is not None:
        if not result.finished:
            print(f"  interrupted and saved; go on with --resume --run-dir {result.run_dir}")
        metrics = (
            "metrics" if (result.run_dir / "metrics").is_dir() else "metrics.csv"
        )  # of thousands of seeds a folder
        print(f"  {result.run_dir}/curve.png  summary.json  {metrics}")


def _score(scores: dict[str, Any]) -> str:
    if scores["iqm"] is None:
        return "no seed with finite numbers"
    if scores["ci_low"] is None:
        return f"{scores['iqm']:.1f} (one seed)"
    return f"IQM {scores['iqm']:.1f}, 95% interval {scores['ci_low']:.1f} to {scores['ci_high']:.1f}"


def main(experiment: Callable[[list[str]], Result | None]) -> NoReturn:
    """Run an experiment on the command line's words; an error a user can mend is one line and exit code 1.

    An interrupted run exits with 130, within seconds of Ctrl-C, SIGTERM or SIGHUP.
    """
    # JAX would show a user's error with its own frames.
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)
    try:
        with interrupt.leaving_in_time():
            host.check_environment()
            result = experiment(sys.argv[1:])
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os._exit(0)
    except OverflowError as error:
        sys.exit(_line(f"a number, such as --seed, is too large: {error}"))
    except (MemoryError, RuntimeError) as error:
        sys.exit(_line(_runtime_error(error)))
    except (ValueError, RunError, OSError) as error:
        sys.exit(_line(str(error)))
    except KeyboardInterrupt:
        print(interrupt.last_words, file=sys.stderr)
        sys.exit(interrupt.INTERRUPTED)
    sys.exit(0 if result is None or result.finished else interrupt.INTERRUPTED)


def _line(error: str, longest: int = 1000) -> str:
    """An error as one line. Of a long one, which has somebody's long words in it, the beginning and the end."""
    error = " ".join(error.split())
    half = longest // 2
    return f"error: {error if len(error) <= longest else f'{error[:half]} [...] {error[-half:]}'}"


def _runtime_error(error: MemoryError | RuntimeError) -> str:
    """What a user can do about memory that is short, or a platform that is not there. Raises any other error again."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in first or "Out of memory" in first:
        said = first.rstrip(".")
        return f"out of memory: {said}; fewer seeds, environments or episodes of evaluation, or a smaller replay or batch, take less"
    if "allback" in first and "Traceback" in first:  # of an environment or a task: there are none in jrl
        return _callback_error(str(error))
    if "nable to initialize backend" in first or "nknown backend" in first:
        return f"{first}; JAX_PLATFORMS names the platforms to use, such as cpu"
    raise error


def _callback_error(text: str) -> str:
    """What a callback raised, and where, from the traceback within an error of XLA."""
    places = [
        (Path(file).name, line)
        for file, line in re.findall(r'File "(.+)", line (\d+)', text)
        if "site-packages" not in file
    ]
    where = "{}, line {}: ".format(*places[-1]) if places else ""
    return f"{where}a callback raised {text.strip().splitlines()[-1]}"


def environment(options: Options) -> envs.Environment:
    """The environment that the options name, in its wrappers."""
    made = envs.make(options.env, **parse_params(options.env_params))
    return envs.strict(envs.wrappers.wrapped(made, options.wrap)) if options.wrap else made
