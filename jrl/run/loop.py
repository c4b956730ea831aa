"""The run loop: chunks of compiled updates, with everything that has to happen on the host between them."""

import contextlib
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.algorithm import Algorithm, check, check_act, to_means
from jrl.numerics import checks, host
from jrl.run import checkpoint, compiled, folders, layout, log, memory, program, report, stats
from jrl.run.checkpoint import Checkpoints, RunError, disk_errors
from jrl.run.evaluate import record
from jrl.run.interrupt import StopOnSignal
from jrl.run.loggers import Logger
from jrl.run.members import Members, NanWatch, members_of
from jrl.run.progress import Progress
from jrl.run.scores import EVAL_SEED, Cells

CHUNK_SECONDS = 1.0
SLOW_IMPORTS = ("tensorboardX.event_file_writer", "orbax.checkpoint", "matplotlib.figure")  # for the files in a folder


class Result(NamedTuple):
    """What a run leaves. Leading axes are ``[seeds]``, or ``[cells, seeds]`` in a sweep.

    Attributes:
        state: the final training state, on the device.
        metrics: ``{name: [..., rows]}`` NumPy arrays; ``env_steps`` is ``[rows]``, steps per seed.
        summary: what ``summary.json`` holds.
        run_dir: the run's folder, or None.
        finished: false if it was interrupted; resume to go on.
    """

    state: Any
    metrics: dict[str, np.ndarray]
    summary: dict[str, Any]
    run_dir: Path | None
    finished: bool


class Chunk(NamedTuple):
    """What ``run.train(..., on_chunk=...)`` is called with, on the host, after each chunk of about a second.

    Attributes:
        env_steps: ``[rows]``, steps of each seed at the rows of metrics that the chunk completed; there may be none.
        metrics: ``{name: [..., rows]}``, with the leading axes of ``Result``.
        state: ``() -> state``, the newest there is, on the host with the leading axes of ``Result``. It waits for the device, which is at work on
            the next chunk already, and copies: call it seldom.
    """

    env_steps: np.ndarray
    metrics: dict[str, np.ndarray]
    state: Callable[[], Any]


def train(
    algo: Algorithm,
    key: jax.Array,
    env_steps: int,
    *,
    num_seeds: int = 1,
    hypers: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    eval_every: int | None = None,
    eval_episodes: int = 32,
    seeds_at_once: int | None = None,
    devices: int | None = None,
    checkpoint_every: float = 60.0,
    log_every: int | None = None,
    progress: bool = True,
    gif: bool = False,
    on_chunk: Callable[[Chunk], bool | None] | None = None,
    loggers: Sequence[Logger] = (),
) -> Result:
    """Train ``num_seeds`` seeds, of each cell of ``hypers`` if given, in one compiled program.

    The state is that of ``jax.vmap(train_fn(algo, env_steps))(jax.random.split(key, num_seeds))``, up to float rounding.

    Args:
        algo: Algorithm for a single seed.
        key: every seed's key is split from it.
        env_steps: budget of each seed, rounded down to whole updates.
        num_seeds: seeds trained together.
        hypers: hyperparameters by label (``sweep.grid`` makes them); every cell trains the same seeds.
        run_dir: folder for configuration, metrics, checkpoints, plot and summary; None writes nothing.
        resume: continue from the newest checkpoint in ``run_dir``, bit for bit; starts anew if there is none yet.
        eval_every: environment steps between evaluations, rounded down to whole updates; None evaluates only at the end.
        eval_episodes: whole episodes in each evaluation of each seed; 0 skips evaluation.
        seeds_at_once: members computed at once, over all devices; None picks what is fast and fits.
        devices: how many devices to use; None takes all.
        checkpoint_every: seconds between checkpoints.
        log_every: updates averaged into one row of metrics; None keeps at most about 1,000 rows.
        progress: show a progress bar.
        gif: draw the best seed's greedy policy into ``run_dir``: ``policy.gif``, of games of pgx ``policy.svg``.
        on_chunk: called with each ``Chunk``; if it returns True, the run is saved and left after the chunk that is in progress, and can
            be resumed. What it raises ends the run.
        loggers: where aggregates go besides ``run_dir``, such as ``run.loggers.wandb()``.

    Raises:
        ValueError: for an argument out of range, before anything compiles.
        RunError: for a folder or checkpoint that does not fit, or a full disk.
    """
    checks.positive_int("env_steps", env_steps)
    checks.positive_int("num_seeds", num_seeds)
    checks.positive_int("eval_episodes", eval_episodes, at_least=0)
    for name, value in (
        ("seeds_at_once", seeds_at_once),
        ("devices", devices),
        ("eval_every", eval_every),
        ("log_every", log_every),
    ):
        if value is not None:
            checks.positive_int(name, value)
    checks.within("checkpoint_every", checkpoint_every, 0, float("inf"))
    if hypers is not None and not hypers:
        raise ValueError("hypers must hold at least one set of hyperparameters")
    for name, value in (("resume", resume), ("gif", gif), ("loggers", loggers)):
        if value and run_dir is None:
            raise ValueError(f"{name} needs a run_dir")
    if on_chunk is not None:
        checks.function("on_chunk", on_chunk)
    for logger in loggers:
        checks.function("loggers", logger)
    if gif and algo.env.draw is None:
        raise ValueError(f"gif: {algo.env.name} cannot be drawn")
    if devices is not None and devices > len(jax.devices()):
        raise ValueError(f"devices must be at most {len(jax.devices())}, the number of this machine; got {devices}")
    if algo.env.host:  # one call steps all simulators: several devices would wait for each other
        devices, seeds_at_once = devices or 1, seeds_at_once or num_seeds * len(hypers or [""])
    total = program.num_updates(algo, env_steps)
    state, metrics = check(algo)
    num_members = num_seeds * len(hypers or [""])
    memory.refuse_states(state, num_members, min(num_members, len(jax.devices()[:devices])))
    chosen = layout.choose(num_members, jax.devices()[:devices], seeds_at_once)
    if eval_episodes:
        check_act(algo, state)
        memory.refuse_episodes(algo.env, eval_episodes, chosen.group_size, len(chosen.devices))
    members = members_of(algo, key, num_seeds, hypers)
    saved = folders.saved_setting(Path(run_dir), "log_every") if resume and run_dir is not None else None
    every = log_every or saved or -(-total // 1000)
    cells = {"": algo.hyper} if hypers is None else hypers
    settings = folders.settings(algo, key, env_steps, num_seeds, cells, every)
    opened = contextlib.nullcontext() if run_dir is None else folders.opened(Path(run_dir), resume, settings)
    if eval_every is not None:
        eval_every = max(1, eval_every // algo.env_steps_per_update) if eval_episodes else None
    with opened as folder:
        if progress:
            where = f"{stats.seeds(num_seeds)} on {'the host and one device' if algo.env.host else host.description()}"
            print(f"{algo.name} on {algo.env.name}: {where}", file=sys.stderr, flush=True)
            if getattr(algo.config, "learning_starts", 0) >= env_steps:
                print("  nothing is learned: learning_starts is not below env_steps", file=sys.stderr, flush=True)
        if folder is not None:  # import what the files need while the compiler works
            threading.Thread(target=_import, args=(SLOW_IMPORTS,), daemon=True).start()
        names = list(metrics)
        automatic = seeds_at_once is None
        built = compiled.build(algo, members, names, total, every, eval_episodes, chosen, automatic)
        run = _Run(algo, members, names, total, every, built, progress, on_chunk)
        try:
            if folder is not None:
                run.open(folder, settings, resume, loggers)
            return run.finish(run.loop(eval_every, checkpoint_every), gif)
        finally:
            run.close()


def _import(names: Iterable[str]) -> None:
    """Import modules before they are needed; what cannot be imported raises there."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


class _Pending(NamedTuple):
    """A chunk whose metrics are still on the device: ``n`` updates after ``start``; ``before`` updates already belonged to its first row."""

    start: int
    n: int
    before: int
    rows: program.Rows


class _Run:
    """A run in progress: the state on the device, and what is on disk."""

    def __init__(
        self,
        algo: Algorithm,
        members: Members,
        names: list[str],
        total: int,
        every: int,
        built: compiled.Compiled,
        show: bool,
        on_chunk: Callable[[Chunk], bool | None] | None,
    ) -> None:
        self.algo, self.members, self.names, self.total, self.every = algo, members, names, total, every
        self.built, self.layout, (self.state, self.row) = built, built.layout, built.start
        self.watch = NanWatch(algo, members.labels, built.layout)
        self.scorer = built.scorer
        self.folder: Path | None = None
        self.log: log.Log | None = None
        self.checkpoints: Checkpoints | None = None
        self.done = self.first = 0
        self.in_row = 0  # updates since the last whole row of metrics
        self.pending: _Pending | None = None
        self.history: list[dict[str, np.ndarray]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.seconds = self.seconds_per_update = 0.0
        self.show, self.on_chunk, self.told_to_stop = show, on_chunk, False
        self.keeps_best = False  # as it is where a run is evaluated only at its end
        self.progress = self._progress()

    # The folder

    def open(self, folder: Path, settings: dict[str, Any], resume: bool, loggers: Sequence[Logger]) -> None:
        """Open the folder's files, and go on from its newest checkpoint if asked to."""
        self.folder, self.checkpoints = folder, Checkpoints(folder / "checkpoints", settings, log.TABLES)
        latest = self.checkpoints.latest() if resume else None
        if latest is not None:
            self._restore(self.checkpoints, latest)
        with disk_errors(folder):
            resume_at = self.done if resume else None
            sinks = [logger(settings, folder) for logger in loggers]
            self.log = log.Log(folder, self.members.labels, resume_at, self.algo.env_steps_per_update, sinks)
        if latest is None:
            self.log.write_settings(settings)
        else:
            self._reread(folder)
        self.progress = self._progress()
        if resume:
            where = f"resumed at {self._steps():,} steps a seed" if latest else "no checkpoint yet: beginning anew"
            self.progress.say(f"{folder}: {where}")

    def _restore(self, checkpoints: Checkpoints, latest: int) -> None:
        """Restore the state of a checkpoint, and what ``_save`` noted beside it."""
        held = program.LoopState(self.state, self.row)
        arrays, notes = checkpoints.restore(latest, layout.fetch(self.layout, held))
        live = checkpoint.restore_keys(arrays, held)
        self.state, self.row = layout.put(self.layout, layout.pad(self.layout, live))
        self.done = self.first = latest
        try:
            self.in_row = range(self.every).index(notes["in_row"])
            self.watch.found = {int(member): int(update) for member, update in notes["nan"].items()}
            self.watch.report()
        except (AttributeError, LookupError, TypeError, ValueError):
            path = checkpoints.folder / str(latest)
            raise RunError(f"checkpoint {path} is damaged: its notes do not belong to this run") from None
        if self.done > self.total:
            raise RunError(
                f"{self.folder} has done {latest} updates already, more than the {self.total} of this budget"
            )

    def _reread(self, folder: Path) -> None:
        """Reload what was written before: the table of metrics, the evaluations."""
        table, per_update = log.table(folder, self.members.labels), self.algo.env_steps_per_update
        env_steps, metrics = log.read_whole(table, self.done - self.in_row, self.every, per_update)
        if len(env_steps):
            self.history.append({k: v.astype(np.float32) for k, v in metrics.items()} | {"env_steps": env_steps})
        saved = folders.read_json(folder / "evaluations.json", [])
        self.evaluations = [e for e in saved if e["env_steps"] <= self._steps()]

    def _save(self) -> None:
        self.saved_at = time.perf_counter()
        if self.checkpoints is not None and self.log is not None:
            self.log.sync()
            held = layout.fetch(self.layout, program.LoopState(self.state, self.row))
            self.checkpoints.save(self.done, held, {"in_row": self.in_row, "nan": dict(self.watch.found)})

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        if self.checkpoints is not None:
            self.checkpoints.close()

    # Training

    def loop(self, eval_every: int | None, checkpoint_every: float) -> bool:
        """Train to the end; returns false if a signal stopped it, with everything saved."""
        self.saved_at, self.keeps_best = time.perf_counter(), eval_every is not None
        with StopOnSignal() as stop:
            try:
                while not (stop.requested or self.told_to_stop):
                    if self._evaluation_is_due(eval_every):
                        self._take_in()
                        self._save()
                        self._wait()
                        with contextlib.nullcontext() if self.folder is None else stop.nothing_to_lose():
                            self._evaluate()
                    if self.done == self.total:
                        break
                    self._advance(eval_every)
                    if self.done < self.total and time.perf_counter() - self.saved_at > checkpoint_every:
                        self._take_in()
                        self._save()
                self._take_in()
                if self.done == self.total:
                    self._close_row()
                self._save()
                self._wait()
            finally:
                self.progress.close()
        return self.done == self.total

    def _advance(self, eval_every: int | None) -> None:
        """Run one chunk; the metrics of the one before it are collected while the device works."""
        n = self._chunk_length(eval_every)
        begin = time.perf_counter()
        members = program.LoopState(self.state, self.row)
        (self.state, self.row), rows = self.built.chunk(members, jnp.int32(n), jnp.int32(self.in_row))
        self._take_in()
        jax.block_until_ready(rows)
        took = time.perf_counter() - begin
        self.seconds, self.seconds_per_update = self.seconds + took, took / n
        self.pending = _Pending(self.done, n, self.in_row, rows)
        self.done, self.in_row = self.done + n, (self.in_row + n) % self.every

    def _chunk_length(self, eval_every: int | None) -> int:
        """Updates that take about a second, not past the next evaluation, the end, or the rows that a chunk can hold."""
        n = max(1, int(CHUNK_SECONDS / self.seconds_per_update)) if self.seconds_per_update else 1
        ends = [self.total - self.done, self.every * self.built.max_rows - self.in_row]
        return min(n, *ends, *([] if eval_every is None else [eval_every - self.done % eval_every]))

    def _take_in(self) -> None:
        """Collect the metrics of the last chunk: report NaNs, record complete rows, move the progress bar."""
        if self.pending is None:
            return
        (start, n, before, rows), self.pending = self.pending, None
        whole = (before + n) // self.every
        rows = layout.fetch(self.layout, rows)
        self.watch.look_at_rows(rows, start, self.progress.say)
        sums = {k: v[:, :whole] for k, v in rows.sums.items()}
        updates, metrics = start - before + self.every * (1 + np.arange(whole)), to_means(sums, np.float32(self.every))
        self._write(updates, metrics)
        if self.on_chunk is not None:
            env_steps = updates * self.algo.env_steps_per_update
            self.told_to_stop |= self.on_chunk(Chunk(env_steps, self._shaped(metrics), self._host_state)) is True
        steps = (start + n) * self.algo.env_steps_per_update * len(self.members.labels)
        self.progress.advance(steps, self._recent_return())

    def _close_row(self) -> None:
        """Record the updates since the last complete row as a row of their own."""
        if self.in_row:
            sums = {name: x[:, None] for name, x in zip(self.names, layout.fetch(self.layout, self.row).T, strict=True)}
            self._write(np.array([self.done]), to_means(sums, np.float32(self.in_row)))
            self.row, self.in_row = jnp.zeros_like(self.row), 0

    def _write(self, updates: np.ndarray, metrics: dict[str, Any]) -> None:
        """Record rows of metrics; ``updates`` holds the last update of each."""
        if len(updates):
            env_steps = updates * self.algo.env_steps_per_update
            self.history.append(metrics | {"env_steps": env_steps})
            if self.log is not None:
                self.log.write(updates, env_steps, metrics, self.watch.found)

    def _wait(self) -> None:
        """Wait until the pending checkpoint is on disk."""
        if self.checkpoints is not None:
            self.checkpoints.wait()

    # Evaluating

    def _evaluation_is_due(self, eval_every: int | None) -> bool:
        """Whether an evaluation is due now and not recorded yet; a run that was interrupted during one repeats it."""
        if eval_every is None or self.done % eval_every or not 0 < self.done < self.total:
            return False
        return self._steps() not in [e["env_steps"] for e in self.evaluations]

    def _evaluate(self) -> Cells:
        """Evaluate the current state, and record the scores."""
        assert self.scorer is not None
        cells = self.scorer(self.state, EVAL_SEED, self.watch.broken(self.state))
        steps = self._steps()
        if self.keeps_best and self.folder is not None and self.checkpoints is not None:
            before = [report.best_score(e["cells"]) for e in self.evaluations if e["env_steps"] < steps]
            if report.best_score(cells) > max(before, default=-np.inf):
                with disk_errors(self.folder):
                    self.checkpoints.keep_best(self.done)
        self.evaluations = [e for e in self.evaluations if e["env_steps"] != steps]  # a finished run that is resumed
        self.evaluations.append({"env_steps": steps, "episodes": self.scorer.episodes, "cells": cells})
        if self.folder is not None and self.log is not None:
            with disk_errors(self.folder):
                folders.write_json(self.folder / "evaluations.json", self.evaluations)
            self.log.write_evaluation(steps, {f"{log.EVALUATED} {c}".strip(): s for c, s in cells.items()})
        return cells

    # Finishing

    def finish(self, finished: bool, gif: bool) -> Result:
        """Evaluate if the run is finished, and write down what it reached."""
        self.watch.look_at_state(self.state, self.done, self.progress.say)
        metrics = self._metrics()
        cells = self._evaluate() if finished and self.scorer is not None else None
        summary = self._summary(finished) | ({} if cells is None else self._reached(cells))
        if self.folder is not None:
            with disk_errors(self.folder):
                folders.write_json(self.folder / "summary.json", summary)
                title = f"{self.algo.name.upper()} on {self.algo.env.name}"
                bad = set(self.watch.found)
                report.write_curves(self.folder / "curve.png", title, self.members.cells, metrics, bad)
                if cells is not None and len(cells) > 1:
                    report.write_table(self.folder / "sweep.csv", cells, self.members.columns)
                if gif and finished:
                    best = report.best_member(cells)
                    state = jax.device_put(jax.tree.map(lambda x: x[best], self.state), self.layout.devices[0])
                    record(self.algo, state, jax.random.key(EVAL_SEED), self.folder / f"policy{self.algo.env.drawn_as}")
        real = jax.tree.map(lambda x: x[: len(self.members.labels)], self.state)
        state = self._shaped(real)
        shaped = self._shaped({k: v for k, v in metrics.items() if k != "env_steps"})
        return Result(state, shaped | {"env_steps": metrics["env_steps"]}, summary, self.folder, finished)

    def _shaped(self, tree: Any) -> Any:
        """Leaves ``[members, ...]`` with the axes of a result: seeds, or cells and seeds."""
        return jax.tree.map(lambda x: x.reshape(*self.members.shape, *x.shape[1:]), tree)

    def _host_state(self) -> Any:
        """The newest state, on the host."""
        return self._shaped(checkpoint.restore_keys(layout.fetch(self.layout, self.state), self.state))

    def _reached(self, cells: Cells) -> dict[str, Any]:
        """The summary's final scores."""
        assert self.scorer is not None
        best = report.best_cell(cells)
        scores = cells[best]
        if len(cells) > 1:  # the best of many was also lucky: score it on other episodes
            scores = self.scorer(self.state, EVAL_SEED + 1, self.watch.broken(self.state))[best]
        reached = {"eval": scores | {"episodes": self.scorer.episodes, "env_steps": self._steps()}}
        return reached | ({"best_cell": best, "cells": cells} if len(cells) > 1 else {})

    def _summary(self, finished: bool) -> dict[str, Any]:
        """The result, and the speed of this process; a finished run that is resumed keeps the speed it had."""
        trained = (self.done - self.first) * self.algo.env_steps_per_update * len(self.members.labels)
        speed = {
            "compile_seconds": round(self.built.seconds, 3),
            "run_seconds": round(self.seconds, 3),
            "env_steps_per_second": round(trained / self.seconds) if trained else None,
        }
        before: dict[str, Any] = {}
        if self.first and self.folder is not None:
            before = folders.read_json(self.folder / "summary.json", {})
        if not trained:
            speed = {name: before.get(name, value) for name, value in speed.items()}
        return {
            "algorithm": self.algo.name,
            "env": self.algo.env.name,
            "env_steps": self._steps(),
            "num_seeds": self.members.shape[-1],
            "finished": finished,
            "eval": before.get("eval"),  # the last one there is; its env_steps say when it was
            **{name: before[name] for name in ("best_cell", "cells") if name in before},
            **speed,
            "nan_seeds": self.watch.report(),
        }

    # What is shown

    def _steps(self) -> int:
        return self.done * self.algo.env_steps_per_update

    def _metrics(self) -> dict[str, np.ndarray]:
        names = self.history[0] if self.history else {}
        metrics = {name: np.concatenate([part[name] for part in self.history], axis=-1) for name in names}
        return {"env_steps": np.zeros(0, int)} | metrics

    def _progress(self) -> Progress:
        count = len(self.members.labels)
        name = f"{self.algo.name} {self.algo.env.name} x{count}"
        per_update = self.algo.env_steps_per_update * count
        return Progress(name, self.total * per_update, self.done * per_update, self.show)

    def _recent_return(self) -> float:
        newest = self.history[-1] if self.history else {}
        if not {"episodes", "episode_return"} <= newest.keys():
            return float("nan")
        good = self.watch.among(range(len(self.members.labels)))
        weight = newest["episodes"][good].sum()
        total = np.nansum(newest["episode_return"][good] * newest["episodes"][good])
        return float(total / weight) if weight else float("nan")
