"""Checkpoints of a whole run with orbax, checked on the way in and on the way out.

A checkpoint holds the state of every member as NumPy arrays (keys as their data), so it does not depend on devices, and
a manifest: the run's configuration, the path, shape, dtype and checksum of every array, the size and checksum of the tables
of metrics beside it, and the checksum of all this.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.run import disk

BEST = "best"  # folder of the checkpoint of the best evaluation
BLOCK = 1 << 24  # bytes of a file that are read at once


class RunError(Exception):
    """Something about a run that its user can put right; its text is one clear line."""


class Reader:
    """The checkpoints in a folder, named by the number of updates done. Reading changes nothing there."""

    def __init__(self, folder: Path, **options: Any) -> None:
        import orbax.checkpoint as ocp  # takes seconds to import

        _raise_without_logging()
        self._ocp, self.folder = ocp, folder.absolute()
        options = options or {"create": False}
        self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(**options))

    def latest(self) -> int | None:
        """Updates done at the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def manifest(self, updates: int) -> dict[str, Any]:
        """What a checkpoint says of itself: ``updates``, ``config``, ``arrays``, ``notes`` and ``files``. Raises ``RunError`` if it is damaged."""
        path = self.folder / str(updates)
        try:
            args = self._ocp.args.Composite(manifest=self._ocp.args.JsonRestore())
            manifest = unsealed(self._manager.restore(updates, args=args)["manifest"])
            for name, kind in (
                ("updates", int),
                ("config", dict),
                ("arrays", dict),
                ("notes", object),
                ("files", dict),
            ):
                if not isinstance(manifest[name], kind):
                    raise TypeError(f"{name} is {type(manifest[name]).__name__}")
        except Exception as error:
            raise RunError(f"checkpoint {path} is damaged: its manifest cannot be read ({_line(error)})") from error
        if manifest["updates"] != updates:
            raise RunError(f"checkpoint {path} is of update {manifest['updates']}: its folder was renamed")
        return manifest

    def read(self, manifest: dict[str, Any], template: Any) -> Any:
        """The state of a manifest's checkpoint in the structure of ``template``, host arrays.

        Raises ``RunError`` naming the checkpoint and the difference: missing or foreign arrays, other shapes or dtypes, damaged data.
        """
        wanted, arrays, updates = named_leaves(template), manifest["arrays"], manifest["updates"]
        path = self.folder / str(updates)
        _same_arrays(arrays, wanted, path)
        try:
            args = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(wanted))
            leaves = self._manager.restore(updates, args=args)["state"]
        except Exception as error:
            raise RunError(f"checkpoint {path} is damaged: its arrays cannot be read ({_line(error)})") from error
        for name in wanted:
            if name not in leaves or _describe(np.asarray(leaves[name])) != arrays[name]:
                raise RunError(f"checkpoint {path} is damaged: the data of {name} do not match their checksum")
        return jax.tree.unflatten(jax.tree.structure(template), [np.asarray(leaves[name]) for name in wanted])

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._manager.close()


class Checkpoints(Reader):
    """The checkpoints of a run that is in progress. Saves run in the background, one at a time.

    ``tables`` are patterns of files beside the folder, to which a run only appends: what they held at a save, they have to begin with
    when that checkpoint is restored.
    """

    def __init__(self, folder: Path, config: dict[str, Any], tables: Sequence[str] = ()) -> None:
        self._config = json.loads(json.dumps(config))  # as a checkpoint gives it back
        self._tables = tables
        self._files: dict[str, list[int]] = {}  # size and checksum of the tables' files at the last save
        for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        super().__init__(folder, max_to_keep=2)

    def save(self, updates: int, state: Any, notes: Any = None) -> None:
        """Begin to save host arrays (of ``layout.fetch``), which the caller leaves alone, and notes, which are JSON; waits for the
        save before it.

        Raises ``RunError`` if that one met a full disk.
        """
        self.wait()
        beside = self.folder.parent
        for path in sorted(path for pattern in self._tables for path in beside.glob(pattern)):
            name = str(path.relative_to(beside))
            self._files[name] = size_and_sum(path, self._files.get(name, (0, 0)))
        self._pending = self._thread.submit(self._save, updates, state, {"notes": notes, "files": dict(self._files)})

    def _save(self, updates: int, state: Any, more: dict[str, Any]) -> None:
        if self._manager.latest_step() == updates:
            return
        leaves = named_leaves(state)
        arrays = {name: _describe(x) for name, x in leaves.items()}
        manifest = sealed({"updates": updates, "config": self._config, "arrays": arrays} | more)
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(leaves), manifest=self._ocp.args.JsonSave(manifest)
        )
        self._manager.save(updates, args=args)
        self._manager.wait_until_finished()
        disk.sync(self.folder / str(updates))

    def keep_best(self, updates: int) -> None:
        """Keep a checkpoint that is on disk also in the folder ``best`` beside this one, in the place of the one that is there."""
        kept = self.folder.with_name(BEST)
        fresh, place = kept / f"{updates}.tmp", kept / str(updates)
        kept.mkdir(exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(self.folder / str(updates), fresh, copy_function=_link)
        disk.sync(fresh)
        shutil.rmtree(place, ignore_errors=True)
        fresh.rename(place)
        for other in kept.iterdir():
            if other != place:
                shutil.rmtree(other, ignore_errors=True)

    def restore(self, updates: int, template: Any) -> tuple[Any, Any]:
        """The state at ``updates`` in the structure of ``template``, host arrays, and the notes saved with it.

        Raises ``RunError`` for what ``read`` refuses, for another configuration, and for tables of metrics that are not those of the save.
        """
        path = self.folder / str(updates)
        try:
            manifest = self.manifest(updates)
            same_config(manifest["config"], self._config, path)
            for name, saved in manifest["files"].items():
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise RunError(f"checkpoint {path} is damaged: {name} does not lie beside it")
                _same_beginning(self.folder.parent / name, saved, updates)
            return self.read(manifest, template), manifest["notes"]
        except RunError as error:
            older = [number for number in self._manager.all_steps() if number < updates]
            if not older or f"checkpoint {path} is damaged" not in str(error):
                raise
            raise RunError(f"{error}; without that folder the run goes on from update {max(older)}") from error

    def wait(self) -> None:
        """Until what was begun is on disk. Raises ``RunError`` on a full disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with disk_errors(self.folder):
                pending.result()

    def close(self) -> None:
        """End its threads; a save that failed was reported when it was waited for."""
        self._thread.shutdown()
        super().close()


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their path in the tree, in the tree's order."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(tree)}


# Settings that change memory, speed and rounding alone: a run may go on with others.
FREE = ("micro_batches", "slots", "remat", "implementation", "prompt_length")


def same_config(saved: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Raise ``RunError`` naming every setting, but those of ``FREE``, in which a saved run differs from this one."""
    saved, wanted = flat(saved), flat(wanted)
    names = sorted(name for name in saved.keys() | wanted.keys() if name.rpartition(".")[2] not in FREE)
    differing = [n for n in names if saved.get(n) != wanted.get(n)]
    if "algorithm" in differing and saved.get("algorithm"):
        raise RunError(f"{path} is a run of {saved['algorithm']}, not of {wanted.get('algorithm')}")
    if "env_params.text" in differing and saved.get("env_params.file") == wanted.get("env_params.file"):
        raise RunError(f"{path} is a run of {saved['env_params.file']} as it was: the file has changed since")
    if differing == ["env_steps"]:
        raise RunError(
            f"{path} cannot go on: env_steps was {saved['env_steps']}, is {wanted['env_steps']}, and its schedules (of the learning "
            f"rate or of exploration) run over the whole of it; resume it with {saved['env_steps']}, or train anew with "
            "config.optimizer.schedule=constant where nothing else has a schedule"
        )
    if differing:
        listed = "; ".join(f"{n} was {_short(saved.get(n))}, is {_short(wanted.get(n))}" for n in differing[:5])
        raise RunError(f"checkpoint {path} is of another configuration: {listed}")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their path."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def restore_keys(host: Any, live: Any) -> Any:
    """Host arrays with key data wrapped into typed keys wherever ``live``, arrays or their shapes, has them."""

    def leaf(x: np.ndarray, like: Any) -> Any:
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(x), impl=jax.random.key_impl(jnp.empty((), like.dtype)))
        return x

    return jax.tree.map(leaf, host, live)


class disk_errors:
    """Turn a full or unwritable disk into one clear line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, RunError):
            return
        full = getattr(error, "errno", None) == errno.ENOSPC
        if full or any(text in str(error) for text in ("No space left", "ENOSPC", "RESOURCE_EXHAUSTED")):
            raise RunError(f"disk full while writing {self._path}; what was saved before is kept") from error
        if isinstance(error, OSError):
            raise RunError(f"cannot write {self._path}: {error.strerror or error}") from error


@functools.cache
def _raise_without_logging() -> None:
    """What fails in a save, its manager raises here; the threads that saved need not print a traceback each as well."""
    logging.getLogger("absl").addFilter(_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_not_of_an_array)
    sys.unraisablehook = functools.partial(_not_of_a_closed_loop, sys.unraisablehook)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _not_of_an_array(record: logging.LogRecord) -> bool:
    """Of the arrays of a damaged checkpoint the first that cannot be read is told; the reads beside it fail as well."""
    return not any(name in record.getMessage() for name in ("tensorstore", "OCDBT"))


def _not_of_a_closed_loop(default: Any, unraisable: Any) -> None:
    """A write that failed closes the event loop; the writes beside it can then not report their own end."""
    if str(unraisable.exc_value) != "Event loop is closed":
        default(unraisable)


def _describe(x: np.ndarray) -> dict[str, Any]:
    return _describe_abstract(x) | {"crc32": zlib.crc32(np.ascontiguousarray(x).tobytes())}


def _same_arrays(saved: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    for name in sorted(saved.keys() ^ wanted.keys()):
        where = "the checkpoint" if name in saved else "this run"
        raise RunError(f"checkpoint {path} does not fit: only {where} has {name}")
    for name, x in wanted.items():
        for field, needed in _describe_abstract(x).items():
            given = saved[name].get(field) if isinstance(saved[name], dict) else None
            if given != needed:
                raise RunError(f"checkpoint {path} does not fit: {name} has {field} {given}, this run needs {needed}")


def size_and_sum(path: Path, known: Sequence[int] = (0, 0), most: float = float("inf")) -> list[int]:
    """Size and checksum of a file whose beginning has these ``known``, after at most ``most`` bytes more."""
    size, checksum = known
    end = size + most
    with path.open("rb") as file:
        file.seek(size)
        while block := file.read(int(min(BLOCK, end - size))):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _same_beginning(path: Path, saved: Any, updates: int) -> None:
    """Raise ``RunError`` unless a table begins with what it held at a save."""
    try:
        same = size_and_sum(path, most=saved[0]) == saved
    except FileNotFoundError:
        raise RunError(f"{path} is missing, which the checkpoint of update {updates} was saved with") from None
    except Exception as error:
        raise RunError(f"{path} is damaged: it cannot be read ({_line(error)})") from None
    if not same:
        raise RunError(f"{path} is damaged: it is not what it was at update {updates}, when the checkpoint was saved")


SEAL = "crc32"


def sealed(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of JSON with the checksum of its text."""
    return tree | {SEAL: _sum_of(tree)}


def unsealed(tree: Any) -> dict[str, Any]:
    """A tree without its checksum. Raises ``ValueError`` if they do not match."""
    if not isinstance(tree, dict):
        raise ValueError(f"it is {type(tree).__name__}, not an object")
    content = {name: value for name, value in tree.items() if name != SEAL}
    if SEAL not in tree:
        raise ValueError("it has no checksum, or is of an older version")
    if tree.get(SEAL) != _sum_of(content):
        raise ValueError("it does not match its checksum")
    return content


def _sum_of(tree: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(json.loads(json.dumps(tree)), sort_keys=True).encode())


def _describe_abstract(x: Any) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
