"""The run loop: chunks of compiled updates, with everything that has to happen on the host between them."""

import contextlib
import functools
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import checks, host
from jrl.algorithm import Algorithm, check, check_act, over_members, to_means
from jrl.run import checkpoint, folders, layout, log, memory, program, report, stats, sweep
from jrl.run.checkpoint import Checkpoints, RunError, disk_errors
from jrl.run.evaluate import check_episodes, evaluate, record
from jrl.run.interrupt import StopOnSignal
from jrl.run.layout import Layout
from jrl.run.progress import Progress

CHUNK_SECONDS = 1.0
EVAL_SEED = 20_000_003  # evaluation keys: apart from training's, the same for every seed and run


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
) -> Result:
    """Train ``num_seeds`` seeds, of each cell of ``hypers`` if given, in one compiled program.

    The numbers are those of ``jax.vmap(train_fn(algo, env_steps))(jax.random.split(key, num_seeds))``, to float rounding.

    Args:
        algo: of one seed.
        key: every seed's key is split from it.
        env_steps: budget of each seed; whole updates within it are made, never more steps.
        num_seeds: seeds, trained side by side.
        hypers: hyperparameters by label (``sweep.grid`` makes them); every cell trains the same seeds.
        run_dir: folder for configuration, metrics, checkpoints, plot and summary; None writes nothing.
        resume: go on from the newest checkpoint in ``run_dir``, bit for bit; begins anew if there is none yet.
        eval_every: evaluate each time this many steps are done, besides at the end; None only at the end.
        eval_episodes: whole episodes in each evaluation of each seed; 0 skips evaluation.
        seeds_at_once: members computed at once, over all devices; None picks what is fast and fits.
        devices: how many devices to use; None takes all.
        checkpoint_every: seconds between checkpoints.
        log_every: updates averaged into one row of metrics; None keeps at most about 1,000 rows.
        progress: show a progress bar.
        gif: draw the best seed's greedy policy into ``run_dir``.

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
    if run_dir is None and (resume or gif):
        raise ValueError(f"{'resume' if resume else 'gif'} needs a run_dir")
    if gif and algo.env.draw is None:
        raise ValueError(f"gif: {algo.env.name} cannot be drawn")
    if devices is not None and devices > len(jax.devices()):
        raise ValueError(f"devices must be at most {len(jax.devices())}, the number of this machine; got {devices}")
    total = program.num_updates(algo, env_steps)
    state, metrics = check(algo)
    memory.refuse_if_too_many(state, num_seeds * len(hypers or [""]), len(jax.devices()[:devices]))
    if eval_episodes:
        check_act(algo, state)
        check_episodes(algo, eval_episodes)
    members = _Members.of(algo, key, num_seeds, hypers)
    saved = folders.saved_setting(Path(run_dir), "log_every") if resume and run_dir is not None else None
    every = log_every or saved or -(-total // 1000)
    cells = {"": algo.hyper} if hypers is None else hypers
    settings = folders.settings(algo, key, env_steps, num_seeds, cells, every)
    opened = contextlib.nullcontext() if run_dir is None else folders.opened(Path(run_dir), resume, settings)
    if eval_every is not None:
        eval_every = max(1, eval_every // algo.env_steps_per_update) if eval_episodes else None
    with opened as folder:
        if progress:
            where = f"{stats.seeds(num_seeds)} on {host.description()}"
            print(f"{algo.name} on {algo.env.name}: {where}", file=sys.stderr, flush=True)
        run = _Run(
            algo, members, list(metrics), total, every, folder, settings, progress, eval_episodes, checkpoint_every
        )
        chosen = layout.choose(len(members.labels), jax.devices()[:devices], seeds_at_once)
        run.compile(chosen, automatic=seeds_at_once is None)
        try:
            run.restore(resume)
            return run.finish(run.loop(eval_every), gif)
        finally:
            run.close()


class _Members(NamedTuple):
    """The cells x seeds of a run, flattened."""

    keys: jax.Array  # [members]
    hypers: Any  # leaves float32 [members]
    cells: list[str]
    columns: dict[str, dict[str, float]]  # of each cell, the hyperparameters in which cells differ
    labels: list[dict[str, Any]]  # CSV columns of each member
    shape: tuple[int, ...]

    @classmethod
    def of(cls, algo: Algorithm, key: jax.Array, num_seeds: int, hypers: Mapping[str, Any] | None) -> "_Members":
        keys = jax.random.split(key, num_seeds)
        cells = {"": algo.hyper} if hypers is None else dict(hypers)
        for cell, hyper in (hypers or {}).items():  # the algorithm's own were checked with it
            checks.instances("hypers", **{cell: (hyper, type(algo.hyper))})
            jax.eval_shape(lambda k, h=hyper: algo.init(k, h), key)  # refuses a number out of range
        rows = np.repeat(np.arange(len(cells)), num_seeds)
        stacked = jax.tree.map(lambda *xs: np.array(xs, np.float32)[rows], *cells.values())
        columns = sweep.columns(cells)
        labels: list[dict[str, Any]] = [
            ({} if hypers is None else {"cell": cell} | columns[cell]) | {"seed": seed}
            for cell in cells
            for seed in range(num_seeds)
        ]
        shape = (num_seeds,) if hypers is None else (len(cells), num_seeds)
        return cls(keys[np.tile(np.arange(num_seeds), len(cells))], stacked, list(cells), columns, labels, shape)


class _Run:
    """A run under way: compiled programs, the state on the device, and what is on disk."""

    def __init__(self, algo, members, names, total, every, folder, settings, progress, eval_episodes, checkpoint_every):
        self.algo, self.members, self.names, self.total, self.every = algo, members, names, total, every
        self.folder, self.settings, self.show = folder, settings, progress
        self.eval_episodes, self.checkpoint_every = eval_episodes, checkpoint_every
        self.done = self.first = 0
        self.in_row = 0  # updates since the last whole row of metrics
        self.history: list[dict[str, np.ndarray]] = []
        self.bad: dict[int, int] = {}  # member -> update at which it turned NaN
        self.evaluations: list[dict[str, Any]] = []
        self.log: log.Log | None = None
        self.checkpoints: Checkpoints | None = None
        self.seconds = 0.0

    # Setting up

    def compile(self, chosen: Layout, automatic: bool) -> None:
        """Initialize all members while the chunk compiles; where that does not fit the device, it is for smaller groups."""
        begin = time.perf_counter()
        self.layout = chosen
        self.max_rows = program.max_rows(chosen.num_members)
        init = over_members(self.algo).init

        def start(pair: Any) -> Any:
            return init(*pair, self.total)

        pairs = layout.put(chosen, layout.pad(chosen, (self.members.keys, self.members.hypers)))
        lowered = jax.jit(layout.over_members(chosen, start)).lower(pairs)
        with ThreadPoolExecutor(1) as pool:
            initialized = pool.submit(lambda: lowered.compile()(pairs))
            self._compile_chunk(lowered.out_info, automatic)
            self.state = initialized.result()
        if self.layout != chosen:
            real = jax.tree.map(lambda x: x[: chosen.num_members], self.state)
            self.state = layout.put(self.layout, layout.pad(self.layout, real))
        self.row = layout.put(self.layout, np.zeros((self.layout.num_slots, len(self.names)), np.float32))
        self.compile_seconds = time.perf_counter() - begin

    def _compile_chunk(self, shapes: Any, automatic: bool) -> None:
        """Compile the chunk for states of these shapes, in smaller groups until it fits."""
        while True:
            chunk = layout.over_members(self.layout, program.chunk(self.algo, self.names, self.every, self.max_rows))
            row: Any = jax.ShapeDtypeStruct((1, len(self.names)), jnp.float32)
            members = layout.shapes(self.layout, program.Members(shapes, row))
            smallest = not automatic or self.layout.group_size == 1
            try:
                lowered = jax.jit(chunk, donate_argnums=0).lower(members, jnp.int32(1), jnp.int32(0))
                self.chunk = lowered.compile(compiler_options=host.chunk_compiler_options())
                if smallest or self._fits():
                    return
            except jax.errors.JaxRuntimeError as error:  # a TPU's compiler refuses what does not fit
                if smallest or "RESOURCE_EXHAUSTED" not in str(error):
                    raise
            devices = list(self.layout.devices)
            smaller = max(1, self.layout.group_size // 2) * len(devices)
            self.layout = layout.choose(self.layout.num_members, devices, smaller)

    def _fits(self) -> bool:
        device = self.layout.devices[0]
        used = self.chunk.memory_analysis()
        limit = None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")
        if limit is None or used is None:
            return True
        return used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes <= 0.95 * limit

    def restore(self, resume: bool) -> None:
        """Open the folder's files, and go on from its newest checkpoint if asked to."""
        if self.folder is None:
            self.progress = self._progress()
            return
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.settings)
        latest = self.checkpoints.latest() if resume else None
        if latest is not None:
            held = program.Members(self.state, self.row)
            host, notes = self.checkpoints.restore(latest, layout.fetch(self.layout, held))
            live = checkpoint.restore_keys(host, held)
            self.state, self.row = layout.put(self.layout, layout.pad(self.layout, live))
            self.done = self.first = latest
            self.in_row = notes["in_row"]
            if self.done > self.total:
                raise RunError(
                    f"{self.folder} has done {latest} updates already, more than the {self.total} of this budget"
                )
        with disk_errors(self.folder):
            self.log = log.Log(
                self.folder, self.members.labels, self.done if resume else None, self.algo.env_steps_per_update
            )
        if latest is not None:
            self._reread(notes)
        else:
            self.log.write_settings(self.settings)
        self.progress = self._progress()
        if resume:
            steps = self.done * self.algo.env_steps_per_update
            where = f"resumed at {steps:,} steps a seed" if latest else "no checkpoint yet: beginning anew"
            self.progress.say(f"{self.folder}: {where}")

    def _reread(self, notes: dict[str, Any]) -> None:
        """Take up what was written before: the table of metrics, the seeds that turned NaN, the evaluations."""
        table, per_update = log.table(self.folder, self.members.labels), self.algo.env_steps_per_update
        env_steps, metrics = log.read_whole(table, self.done - self.in_row, self.every, per_update)
        self.history.append({k: v.astype(np.float32) for k, v in metrics.items()} | {"env_steps": env_steps})
        self.bad = {int(member): update for member, update in notes["nan"].items()}
        saved = folders.read_json(self.folder / "evaluations.json", [])
        self.evaluations = [e for e in saved if e["env_steps"] <= self.done * self.algo.env_steps_per_update]

    def _progress(self) -> Progress:
        per_update = self.algo.env_steps_per_update * len(self.members.labels)
        name = f"{self.algo.name} {self.algo.env.name} x{len(self.members.labels)}"
        return Progress(name, self.total * per_update, self.done * per_update, self.show)

    # Running

    def loop(self, eval_every: int | None) -> bool:
        """Train to the end; returns false if a signal stopped it, with everything saved."""
        if self.eval_episodes and self.layout.devices[0].platform != "cpu":
            self._evaluators  # noqa: B018  (a CPU is busy training: there they are compiled when they are needed)
        pending: tuple[int, int, int, Any] | None = None
        seconds_per_update, saved_at = 0.0, time.perf_counter()
        with StopOnSignal() as stop:
            try:
                while self.done < self.total and not stop.requested:
                    n = self._chunk_length(seconds_per_update, eval_every)
                    begin = time.perf_counter()
                    members = program.Members(self.state, self.row)
                    (self.state, self.row), rows = self.chunk(members, jnp.int32(n), jnp.int32(self.in_row))
                    # Cut now: the device would do it only after the next chunk, and the host wait for that.
                    rows = program.first_rows(rows, self._filled(n))
                    if pending is not None:
                        self._consume(*pending)  # while the device works
                    jax.block_until_ready(rows)
                    took = time.perf_counter() - begin
                    self.seconds += took
                    seconds_per_update = took / n
                    pending = (self.done, n, self.in_row, rows)
                    self.done, self.in_row = self.done + n, (self.in_row + n) % self.every
                    evaluates = eval_every is not None and self.done < self.total and self.done % eval_every == 0
                    if evaluates or time.perf_counter() - saved_at > self.checkpoint_every:
                        self._consume(*pending)
                        pending = None
                        if evaluates:
                            self._evaluate()
                        self._save()
                        saved_at = time.perf_counter()
                if pending is not None:
                    self._consume(*pending)
                if self.done == self.total:
                    self._close_row()
                self._save()
                if self.checkpoints is not None:
                    self.checkpoints.wait()
            finally:
                self.progress.close()
        return self.done == self.total

    def _chunk_length(self, seconds_per_update: float, eval_every: int | None) -> int:
        """Updates that take about a second, not past the next evaluation, the end, or the rows that a chunk can hold."""
        n = max(1, int(CHUNK_SECONDS / seconds_per_update)) if seconds_per_update else 1
        ends = [self.total - self.done, self.every * self.max_rows - self.in_row]
        return min(n, *ends, *([] if eval_every is None else [eval_every - self.done % eval_every]))

    def _filled(self, n: int) -> int:
        """How many rows to copy after ``n`` more updates: those that are whole, rounded up so that few programs do it."""
        return 1 << max(0, (self.in_row + n) // self.every - 1).bit_length()

    def _consume(self, start: int, n: int, before: int, rows: program.Rows) -> None:
        """Take in the metrics of a chunk: report NaNs, write down whole rows, move the progress bar."""
        whole = (before + n) // self.every
        rows = layout.fetch(self.layout, rows)
        for member in np.flatnonzero(rows.first_bad >= 0).tolist():
            if member not in self.bad:
                self._report_nan(member, start + int(rows.first_bad[member]) + 1)
        sums = {k: v[:, :whole] for k, v in rows.sums.items()}
        self._write(start - before + self.every * (1 + np.arange(whole)), to_means(sums, np.float32(self.every)))
        steps = (start + n) * self.algo.env_steps_per_update * len(self.members.labels)
        self.progress.advance(steps, self._recent_return())

    def _close_row(self) -> None:
        """Write down the updates since the last whole row as a row of their own."""
        if self.in_row:
            sums = {name: x[:, None] for name, x in zip(self.names, layout.fetch(self.layout, self.row).T, strict=True)}
            self._write(np.array([self.done]), to_means(sums, np.float32(self.in_row)))
            self.row, self.in_row = jnp.zeros_like(self.row), 0

    def _write(self, updates: np.ndarray, metrics: dict[str, Any]) -> None:
        """Rows of metrics that end with these updates."""
        if len(updates):
            env_steps = updates * self.algo.env_steps_per_update
            self.history.append(metrics | {"env_steps": env_steps})
            if self.log is not None:
                self.log.write(updates, env_steps, metrics, self.bad)

    def _recent_return(self) -> float:
        newest = self.history[-1] if self.history else {}
        if not {"episodes", "episode_return"} <= newest.keys():
            return float("nan")
        good = [m for m in range(len(self.members.labels)) if m not in self.bad]
        weight = newest["episodes"][good].sum()
        return (
            float(np.nansum(newest["episode_return"][good] * newest["episodes"][good]) / weight)
            if weight
            else float("nan")
        )

    def _save(self) -> None:
        if self.checkpoints is not None:
            held = layout.fetch(self.layout, program.Members(self.state, self.row))
            self.checkpoints.save(self.done, held, {"in_row": self.in_row, "nan": dict(self.bad)})

    # Evaluating and finishing

    @functools.cached_property
    def _evaluators(self) -> dict[str, Future]:
        """The programs of greedy and of sampled evaluation, compiled in the background from the first use of this on."""
        states = layout.shapes(self.layout, self.state)

        def compiled(greedy: bool) -> Any:
            def one(state: Any, key: jax.Array) -> Any:
                return evaluate(self.algo, state, key, self.eval_episodes, greedy)

            members = layout.over_members(self.layout, jax.vmap(one, in_axes=(0, None)))
            return jax.jit(members).lower(states, jax.random.key(EVAL_SEED)).compile()

        pool = ThreadPoolExecutor(2)
        return {"greedy": pool.submit(compiled, True), "sampled": pool.submit(compiled, False)}

    def _scores(self, seed: int) -> dict[str, dict[str, Any]]:
        """Greedy and sampled evaluation of every member on the episodes of ``seed``, as summaries by cell."""
        broken, by_mode = self._broken(), {}
        for mode, program_of in self._evaluators.items():
            out = layout.fetch(self.layout, program_of.result()(self.state, jax.random.key(seed)))
            means, cut = out.returns.mean(1).astype(float), (~out.finished).sum(1)
            means[broken] = np.nan
            num_cells = len(self.members.cells)
            by_mode[mode] = [
                stats.summarize(scores) | {"mode": mode, "unfinished": int(number)}
                for scores, number in zip(means.reshape(num_cells, -1), cut.reshape(num_cells, -1).sum(1), strict=True)
            ]
        pairs = zip(self.members.cells, by_mode["greedy"], by_mode["sampled"], strict=True)
        return {cell: greedy | {"sampled": sampled} for cell, greedy, sampled in pairs}

    def _evaluate(self) -> dict[str, dict[str, Any]]:
        """Scores of now, which are written down."""
        cells = self._scores(EVAL_SEED)
        steps = self.done * self.algo.env_steps_per_update
        self.evaluations = [e for e in self.evaluations if e["env_steps"] != steps]  # a finished run that is resumed
        self.evaluations.append({"env_steps": steps, "episodes": self.eval_episodes, "cells": cells})
        if self.folder is not None and self.log is not None:
            with disk_errors(self.folder):
                folders.write_json(self.folder / "evaluations.json", self.evaluations)
            self.log.write_evaluation(steps, {f"{log.EVALUATED} {c}".strip(): s for c, s in cells.items()})
        return cells

    def finish(self, finished: bool, gif: bool) -> Result:
        for member in self._broken():  # what the very last update broke shows in no metric yet
            if member not in self.bad:
                self._report_nan(member, self.done)
        metrics = self._metrics()
        cells = self._evaluate() if finished and self.eval_episodes else None
        summary = self._summary(finished)
        if cells is not None:
            best = report.best_cell(cells)
            # The best of many was lucky, too: what it is worth, episodes tell on which it was not chosen.
            scores = self._scores(EVAL_SEED + 1)[best] if len(cells) > 1 else cells[best]
            summary |= {"eval": scores | {"episodes": self.eval_episodes, "env_steps": summary["env_steps"]}}
            summary |= {"best_cell": best, "cells": cells} if len(cells) > 1 else {}
        if self.folder is not None:
            with disk_errors(self.folder):
                folders.write_json(self.folder / "summary.json", summary)
                title = f"{self.algo.name.upper()} on {self.algo.env.name}"
                report.write_curves(self.folder / "curve.png", title, self.members.cells, metrics, set(self.bad))
                if cells is not None and len(cells) > 1:
                    report.write_table(self.folder / "sweep.csv", cells, self.members.columns)
                if gif and finished:
                    best = report.best_member(cells)
                    state = jax.device_put(jax.tree.map(lambda x: x[best], self.state), self.layout.devices[0])
                    record(self.algo, state, jax.random.key(EVAL_SEED), str(self.folder / "policy.gif"))
        shape = self.members.shape
        real = jax.tree.map(lambda x: x[: len(self.members.labels)], self.state)
        state = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), real)
        shaped = {k: v.reshape(*shape, -1) for k, v in metrics.items() if k != "env_steps"}
        return Result(state, shaped | {"env_steps": metrics["env_steps"]}, summary, self.folder, finished)

    def _metrics(self) -> dict[str, np.ndarray]:
        names = self.history[0] if self.history else {}
        metrics = {name: np.concatenate([part[name] for part in self.history], axis=-1) for name in names}
        return {"env_steps": np.zeros(0, int)} | metrics

    def _summary(self, finished: bool) -> dict[str, Any]:
        """The result, and the speed of this process; a finished run that is resumed keeps the speed it had."""
        trained = (self.done - self.first) * self.algo.env_steps_per_update * len(self.members.labels)
        speed = {
            "compile_seconds": round(self.compile_seconds, 3),
            "run_seconds": round(self.seconds, 3),
            "env_steps_per_second": round(trained / self.seconds) if trained else None,
        }
        resumed = self.first and self.folder is not None
        before = folders.read_json(self.folder / "summary.json", {}) if resumed else {}
        if not trained:
            speed = {name: before.get(name, value) for name, value in speed.items()}
        return {
            "algorithm": self.algo.name,
            "env": self.algo.env.name,
            "env_steps": self.done * self.algo.env_steps_per_update,
            "num_seeds": self.members.shape[-1],
            "finished": finished,
            "eval": before.get("eval"),  # of the steps that it names, until there is another
            **{name: before[name] for name in ("best_cell", "cells") if name in before},
            **speed,
            "nan_seeds": [self.members.labels[m] | {"update": update} for m, update in sorted(self.bad.items())],
        }

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        if self.checkpoints is not None:
            self.checkpoints.close()

    def _broken(self) -> list[int]:
        """Members whose parameters, optimizer or statistics are not numbers any more."""
        return np.flatnonzero(layout.fetch(self.layout, self._is_broken(self.state))).tolist()

    @functools.cached_property
    def _is_broken(self) -> Any:
        def one(state: Any) -> jax.Array:
            floats = [x for x in jax.tree.leaves(self.algo.learned(state)) if jnp.issubdtype(x.dtype, jnp.floating)]
            return jnp.array([jnp.isnan(x).any() for x in floats]).any()

        return jax.jit(jax.vmap(one))

    def _report_nan(self, member: int, update: int) -> None:
        self.bad[member] = update
        label = self.members.labels[member]
        name = f"seed {label['seed']}" + (f" of {label['cell']}" if "cell" in label else "")
        self.progress.say(f"{name} turned NaN at update {update}; it is left out of the aggregates, the others go on")
