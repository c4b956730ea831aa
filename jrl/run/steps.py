"""A run whose updates need the host between them: texts from files, answers that are judged by a verifier, a search.

    plan = Plan(folder, settings, updates=100, per_update=64)
    with folders.opened(folder, True, settings):
        state, done, rows = train(plan, state, step)

``step(state, done)`` gives the state after one more update, its metrics, and samples. Metrics, samples and checkpoints lie in the folder, and a run
that was interrupted goes on bit for bit: what an update does may depend on its number and the state alone.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.run import disk, folders, log, plot
from jrl.run.checkpoint import BEST, Checkpoints, Reader, RunError, disk_errors
from jrl.run.interrupt import StopOnSignal
from jrl.run.loggers import Sink

Row = dict[str, float]
Sample = dict[str, Any]
Step = Callable[[Any, int], tuple[Any, Row, list[Sample]]]
SAMPLES = "samples.csv"
FINITE = ("loss", "grad_norm")


class Plan(NamedTuple):
    """What a run of steps is.

    Attributes:
        folder: The run's folder, opened.
        settings: What must be equal for a run to go on, flat JSON values.
        updates: Number of updates.
        per_update: what ``env_steps`` in the table counts: answers or rows of an update.
        seed: shown in the table.
        save_every: updates between checkpoints.
        dropped: fields of the state that a checkpoint does not hold, since ``state`` has them from the start.
        evaluate: ``state -> metrics`` on what is held out, or None.
        evaluated: names of these metrics.
        evaluate_every: updates between evaluations.
        best: name of the metric of an evaluation whose best checkpoint is kept, and whether larger is better.
        shown: names of the metrics that are printed at each update.
        sinks: loggers besides the folder's.
        where: shardings of the state, or None.
    """

    folder: Path
    settings: dict[str, Any]
    updates: int
    per_update: int
    seed: int = 0
    save_every: int = 10
    dropped: tuple[str, ...] = ("frozen", "key", "key_order")
    evaluate: Callable[[Any], Row] | None = None
    evaluated: tuple[str, ...] = ()
    evaluate_every: int = 0
    best: tuple[str, bool] = ("loss", False)
    shown: tuple[str, ...] = FINITE
    sinks: Sequence[Sink] = ()
    where: Any = None


def train(plan: Plan, state: Any, step: Step) -> tuple[Any, int, list[Row]]:
    """Updates from the newest checkpoint to the last, or until a signal comes: the state, how many are done, and all their metrics.

    Raises ``RunError`` after an update that broke the model: the one before it is kept.
    """
    labels, folder = [{"seed": plan.seed}], plan.folder
    checkpoints = Checkpoints(folder / "checkpoints", plan.settings, log.TABLES)
    done, best = checkpoints.latest() or 0, None
    rows: list[Row] = []
    if done:
        state, best = _restored(plan, checkpoints, done, state)
        print(f"{folder}: resumed at step {done}", flush=True)
    record = log.Log(folder, labels, done, plan.per_update, plan.sinks)
    if done:
        rows = _rows(log.read_whole(log.table(folder, labels), done, 1, plan.per_update)[1])
    samples = Samples(folder / SAMPLES, done)

    def save() -> None:
        record.sync()
        checkpoints.save(done, without(state, plan.dropped), best)

    pool = ThreadPoolExecutor(1)  # for the main thread hears signals, and may leave a long step
    with StopOnSignal() as stop:
        try:
            while done < plan.updates and not stop.requested:
                after, row, said = stop.result(pool.submit(step, state, done))
                state = after
                refuse_nan(row, done)
                done += 1
                seen = stop.result(pool.submit(_evaluated, plan, state, done))
                rows.append(row | seen)
                print(f"step {done}  " + "  ".join(_said(rows[-1], plan.shown)), flush=True)
                _write(record, done, plan.per_update, rows[-1])
                samples.write(done, said)
                better = _is_better(plan, seen, best)
                if better:
                    best = seen[f"eval_{plan.best[0]}"]
                if better or done % plan.save_every == 0:
                    save()
                if better:
                    checkpoints.wait()
                    checkpoints.keep_best(done)
        finally:  # a step that raises costs no update
            if done:
                save()
                _summarize(plan, done, rows, best)
            checkpoints.wait()
            record.close()
            pool.shutdown(wait=False)
            print(f"{folder}: saved at step {done}" if done else f"{folder}: nothing to save", flush=True)
    return state, done, rows


def _summarize(plan: Plan, done: int, rows: Sequence[Row], best: Any) -> None:
    """Write ``summary.json``: how far the run is, its last metrics but speeds, and its best evaluation."""
    last = {name: x for name, x in rows[-1].items() if math.isfinite(x) and not name.endswith("_per_s")}
    found = {"best": {f"eval_{plan.best[0]}": best}} if best is not None else {}
    steps = {"env_steps": done * plan.per_update, "finished": done >= plan.updates}
    folders.write_json(plan.folder / "summary.json", steps | {"last": last} | found)


def unless_broken(learn: Callable[..., tuple[Any, dict[str, Any]]]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """``learn(state, ...) -> (state, metrics)`` whose state is the one before where the loss or the gradient is not finite, so that it may be donated."""

    def safe(state: Any, *more: Any) -> tuple[Any, dict[str, Any]]:
        new, metrics = learn(state, *more)
        fine = jnp.all(jnp.stack([jnp.isfinite(metrics[name]) for name in FINITE if name in metrics]))
        names = [name for name in ("params", "opt_state", "updates", "kl_weight") if hasattr(state, name)]
        old, now = ({name: getattr(x, name) for name in names} for x in (state, new))
        kept = jax.tree.map(lambda a, b: jnp.where(fine, a, b), now, old)
        return new._replace(**kept), metrics

    return safe


def best_of(plan: Plan, state: Any) -> Any:
    """The state of the best checkpoint in the folder of the plan; the one given if there is none."""
    folder = plan.folder / BEST
    if not folder.is_dir():
        return state
    reader = Reader(folder)
    try:
        number = reader.latest()
        if number is None:
            return state
        print(f"what is left is the model of step {number}, the best by eval_{plan.best[0]}", flush=True)
        saved = reader.read(reader.manifest(number), without(state, plan.dropped))
        return with_kept(saved, state, plan.dropped)
    finally:
        reader.close()


def without(state: Any, dropped: Sequence[str]) -> Any:
    """What a checkpoint holds, host arrays."""
    return jax.tree.map(np.asarray, state._replace(**{name: () for name in dropped if hasattr(state, name)}))


def with_kept(saved: Any, state: Any, dropped: Sequence[str]) -> Any:
    """What a checkpoint held, with the fields of ``state`` that it did not hold."""
    return saved._replace(**{name: getattr(state, name) for name in dropped if hasattr(state, name)})


def _restored(plan: Plan, checkpoints: Checkpoints, done: int, state: Any) -> tuple[Any, Any]:
    saved, best = checkpoints.restore(done, without(state, plan.dropped))
    whole = with_kept(saved, state, plan.dropped)
    return (jax.device_put(whole, plan.where) if plan.where is not None else jax.device_put(whole)), best


def _evaluated(plan: Plan, state: Any, done: int) -> Row:
    """Metrics of an evaluation, NaN where none is due."""
    if plan.evaluate is None or not plan.evaluate_every:
        return {}
    due = done % plan.evaluate_every == 0 or done == plan.updates
    found = plan.evaluate(state) if due else dict.fromkeys(plan.evaluated, math.nan)
    return {f"eval_{name}": float(found[name]) for name in plan.evaluated}


def _is_better(plan: Plan, seen: Row, best: Any) -> bool:
    name, larger = plan.best
    now = seen.get(f"eval_{name}", math.nan)
    if math.isnan(now):
        return False
    return best is None or (now > best if larger else now < best)


def refuse_nan(row: Row, done: int) -> None:
    """Raise ``RunError`` after an update that broke the model: the one before it is kept."""
    broken = [name for name in FINITE if name in row and not math.isfinite(row[name])]
    if broken:
        raise RunError(f"{' and '.join(broken)} turned NaN at update {done + 1}; the model of update {done} is kept")


class Samples:
    """A table of what was said, a line a sample: ``samples.csv``. The columns are fixed by the first rows; line breaks in texts are written ``\\n``."""

    def __init__(self, path: Path, done: int) -> None:
        self._path = path
        if path.exists():  # leave what was said up to the update that is resumed
            head, *rest = path.read_bytes().splitlines(keepends=True) or [b""]
            disk.replace(path, b"".join([head, *(line for line in rest if _update_of(line) <= done)]))

    def write(self, done: int, said: Sequence[Sample]) -> None:
        if not said:
            return
        lines = [",".join(map(_cell, ("update", *said[0])))] if not self._path.exists() else []
        lines += [",".join(map(_cell, (done, *sample.values()))) for sample in said]
        with disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write("\n".join([*lines, ""]))


def _update_of(line: bytes) -> float:
    number = line.partition(b",")[0]
    return int(number) if number.isdigit() else math.inf


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value).replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return '"' + text.replace('"', '""') + '"' if isinstance(value, str) else text


def _said(row: Row, names: Sequence[str]) -> list[str]:
    return [
        f"{x} {row[x]:.3g}"
        for x in (*names, *(n for n in row if n.startswith("eval_")))
        if x in row and not math.isnan(row[x])
    ]


def _rows(metrics: dict[str, np.ndarray]) -> list[Row]:
    """Metrics ``{name: [1, rows]}``, row by row."""
    return [dict(zip(metrics, row, strict=True)) for row in np.concatenate(list(metrics.values())).T.tolist()]


def _write(record: log.Log, done: int, per_update: int, row: Row) -> None:
    record.write(np.array([done]), np.array([done * per_update]), {k: np.array([[x]]) for k, x in row.items()}, ())


def draw_curve(path: Path, title: str, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Means of ten updates of the metrics that there are, and evaluations, over updates."""
    lines = [(name, *_smooth(rows, name)) for name in names if rows and name in rows[0]]
    plot.draw(path, [plot.Panel(title, "update", "mean of ten updates", [x for x in lines if len(x[1])])])


def _smooth(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([row[name] for row in rows])
    there = np.flatnonzero(np.isfinite(values))
    if name.startswith("eval_"):
        return there + 1, values[None, there]
    width = max(1, min(10, len(values)))
    return np.arange(width, len(values) + 1), np.convolve(values, np.ones(width) / width, "valid")[None]
