"""A run read back from its folder: the algorithm, its trained state, its settings. Nothing in the folder changes."""

from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jrl import algos, envs
from jrl.algorithm import Algorithm, State, check
from jrl.envs.types import Environment
from jrl.numerics import checks, optim
from jrl.run import folders, memory, report
from jrl.run.checkpoint import BEST, Reader, RunError, disk_errors, named_leaves, restore_keys, same_config
from jrl.run.program import LoopState

T = TypeVar("T")
MADE_OF = ("algorithm", "own", "env", "env_params", "config")  # settings of an algorithm, not of a run
# Algorithms that can be made again from a folder's settings alone.
KNOWN = ("ppo", "dqn", "ebu", "fbrl", "option_critic", "ppo_cma", "pqn", "r2d2", "rudder", "sac", "td", "td3")


class Loaded(NamedTuple):
    """What a run's newest checkpoint and the files beside it hold.

    Attributes:
        algo: Algorithm for a single seed, with the hyperparameters of the first cell.
        state: Host arrays ``[seeds, ...]``, or ``[cells, seeds, ...]`` in a sweep.
        settings: All settings by name, as in ``config.json``.
        cells: Labels of the cells; ``[""]`` unless the run is a sweep.
        env_steps: Environment steps that each seed has done.
        best_cell: Cell with the highest IQM in the last evaluation until then; the first if there was none.
        best_seeds: Seed with the highest return in the last evaluation, for each cell; 0 if there was none.
    """

    algo: Algorithm
    state: State
    settings: dict[str, Any]
    cells: list[str]
    env_steps: int
    best_cell: str
    best_seeds: dict[str, int]

    def member(self, seed: int | None = None, cell: str | None = None) -> State:
        """The state of one seed, on the device; by default of the best seed of the best cell, or of ``cell``.

        Raises ``ValueError`` for a seed or a cell that is not there.
        """
        if cell is not None and cell not in self.cells:
            raise ValueError(f"cell must be one of {', '.join(self.cells)}; got {cell!r}")
        cell = self.best_cell if cell is None else cell
        seed = self.best_seeds[cell] if seed is None else seed
        num_seeds = self.settings["num_seeds"]
        if type(seed) is not int or seed not in range(num_seeds):
            raise ValueError(f"seed must be an integer between 0 and {num_seeds - 1}; got {seed}")
        place = (seed,) if self.cells == [""] else (self.cells.index(cell), seed)
        return jax.tree.map(lambda x: jnp.asarray(x[place]), self.state)


def load(
    folder: str | Path, *, env: Environment | None = None, algo: Algorithm | None = None, best: bool = False
) -> Loaded:
    """The run in a folder, at its newest checkpoint. It may still be in progress.

    Args:
        folder: Folder of a run of ``run.train`` or of an experiment.
        env: Environment, if it cannot be made from its name: from a file (which is never executed by itself), wrapped, or unregistered.
        algo: Algorithm, if the settings do not say it all: one of a language model, one of your own, or one with a network or an
            optimizer of your own.
        best: Take the checkpoint of the best evaluation instead, which a run with ``eval_every`` keeps.

    Raises ``ValueError`` if both are given, ``RunError`` for a folder without a checkpoint, a damaged one, or one of another algorithm or environment.
    """
    folder = Path(folder)
    if env is not None and algo is not None:
        raise ValueError("env or algo: the algorithm has its environment; give one of them")
    for name, given, kind in (("env", env, Environment), ("algo", algo, Algorithm)):
        if given is not None:
            checks.instances("run.load", **{name: (given, kind)})
    settings = folders.saved_settings(folder)
    cells, num_seeds = folders.members_in(settings, folder)
    try:
        algo = algo or _remade(settings, env or _environment(settings, folder))
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise RunError(
            f"{folder / 'config.json'} does not say how to make its run again (give env= or algo=): {error}"
        ) from error
    saved = {name: x for name, x in settings.items() if name.partition(".")[0] in MADE_OF}
    same_config(saved, folders.made_of(algo), folder)
    state, metrics = check(algo)
    memory.refuse_states(state, num_seeds * len(cells), 1)
    shape = (num_seeds,) if cells == [""] else (len(cells), num_seeds)
    checkpoints = folder / (BEST if best else "checkpoints")
    arrays, updates = _newest(checkpoints, settings, state, len(metrics), num_seeds * len(cells))
    arrays = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), arrays)
    env_steps = updates * algo.env_steps_per_update
    return Loaded(
        algo, restore_keys(arrays, state), settings, cells, env_steps, *_best(folder, cells, num_seeds, env_steps)
    )


def export_parameters(state: State, path: str | Path) -> None:
    """Write the parameters that a state acts with as safetensors, each by its path in the tree, such as ``policy.kernel``. With an optimizer
    that averages they are the average.

    Raises ``ValueError`` for a state without parameters (of a table), ``RunError`` for a path that cannot be written.
    """
    checks.fields("export_parameters: state", state, "params", "opt_state")
    params = optim.eval_params(state.opt_state, state.params)
    arrays = {name: np.ascontiguousarray(x) for name, x in named_leaves(params).items()}
    with disk_errors(Path(path)):
        Path(path).write_bytes(safetensors.numpy.save(arrays))


def _newest(folder: Path, settings: dict[str, Any], state: State, metrics: int, members: int) -> tuple[Any, int]:
    """The arrays ``[members, ...]`` of the newest checkpoint, keys as their data, and the updates done."""
    row: Any = np.empty((members, metrics), np.float32)
    template = LoopState(jax.tree.map(lambda x: _empty(x, members), state), row)
    updates = None
    while True:
        reader = _reader(folder)
        try:
            before, updates = updates, reader.latest()
            if updates is None:
                raise RunError(f"{folder.parent} has no checkpoint yet")
            manifest = reader.manifest(updates)
            same_config(manifest["config"], settings, reader.folder / str(updates))
            return reader.read(manifest, template).states, updates
        except RunError:
            if updates == before or updates is None:
                raise
            # A run in progress keeps two checkpoints: this one may have gone while it was read. Look once more.
        finally:
            reader.close()


def _reader(folder: Path) -> Reader:
    if not folder.is_dir():
        said = "best evaluation: a run keeps one with eval_every" if folder.name == BEST else "checkpoint yet"
        raise RunError(f"{folder.parent} has no {said}")
    return Reader(folder)


def _empty(x: Any, members: int) -> np.ndarray:
    """Room for a leaf of every member; of a key for its data."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.eval_shape(jax.random.key_data, x)
    return np.empty((members, *x.shape), x.dtype)


def _best(folder: Path, cells: list[str], num_seeds: int, env_steps: int) -> tuple[str, dict[str, int]]:
    """The best cell, and the best seed of each, in the last evaluation until ``env_steps``."""
    evaluations = folders.read_json(folder / "evaluations.json", [])
    try:
        evaluations = [e for e in evaluations if e["env_steps"] <= env_steps]
        found = {cell: evaluations[-1]["cells"][cell] for cell in cells} if evaluations else {}
        seeds = {cell: report.best_member({cell: found[cell]}) if found else 0 for cell in cells}
        if not all(seed in range(num_seeds) for seed in seeds.values()):
            raise ValueError
        return report.best_cell(found) if found else cells[0], seeds
    except (LookupError, TypeError, ValueError, AttributeError):
        raise RunError(f"{folder / 'evaluations.json'} is damaged: it is not of this run") from None


def _environment(settings: dict[str, Any], folder: Path) -> Environment:
    params = _part(settings, "env_params.")
    if "env_params.file" in settings:
        raise RunError(
            f"{folder} is a run of {settings['env_params.file']}, which is not run unasked: give the environment, "
            f'as in run.load(..., env=envs.make("{settings["env_params.file"]}"))'
        )
    name = settings["env"].partition("(")[0]  # of gymnax, parameters that were given are a part of the name
    plain = envs.make(name)
    usual = folders.made_of_env(plain) | {"env_params.wrappers": params.get("env_params.wrappers")}
    changed = {path.partition(".")[2]: _as_python(x) for path, x in params.items() if x != usual.get(path)}
    made = (envs.make(name, **changed) if changed else plain)._replace(name=settings["env"])
    wrappers = params.get("env_params.wrappers") or []
    if settings.get("config.num_frames", 1) > 1:
        wrappers = wrappers[:-1]  # the last are DQN's own stacked frames, which it puts on again
    return envs.wrappers.wrapped(made, wrappers)


def _remade(settings: dict[str, Any], env: Environment) -> Algorithm:
    name = settings["algorithm"]
    if name not in KNOWN:
        raise ValueError(f"{name!r} is none of {', '.join(KNOWN)}; give the algorithm, as in run.load(..., algo=mine)")
    if settings.get("own"):
        raise ValueError(
            f"its {' and '.join(settings['own'])} is of its author's; give the algorithm, as in run.load(..., algo=mine)"
        )
    module = getattr(algos, name)
    cell = settings["cells"][0]
    config = _filled(module.Config(), settings, "config.")
    return module.make(env, config, _filled(module.Hyper(), settings, f"hyper.{cell}."))


def _filled(example: T, settings: dict[str, Any], prefix: str) -> T:
    """Settings of the kind of ``example``, with the values that are listed flat."""
    names = example._fields if hasattr(example, "_fields") else vars(example)
    found = {}
    for name in names:
        value, path = getattr(example, name), prefix + name
        if is_dataclass(value) or hasattr(value, "_fields"):
            found[name] = _filled(value, settings, path + ".")
        else:
            found[name] = _of_kind(path, settings[path], value)
    return example._replace(**found) if hasattr(example, "_fields") else replace(example, **found)  # type: ignore[attr-defined, type-var]


def _of_kind(name: str, value: Any, example: Any) -> Any:
    """A value of JSON as Python has it. Raises ``ValueError`` unless it is of the kind of ``example``."""
    value = _as_python(value)
    numbers = isinstance(value, int | float) and isinstance(example, float) and not isinstance(value, bool)
    if example is not None and type(value) is not type(example) and not numbers:
        raise ValueError(f"{name} is {type(value).__name__}, not {type(example).__name__}")
    return value


def _as_python(value: Any) -> Any:
    return tuple(_as_python(x) for x in value) if isinstance(value, list) else value


def _part(settings: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name: x for name, x in settings.items() if name.startswith(prefix)}
