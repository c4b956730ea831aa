"""Metrics on disk as they come: a table of all members, and TensorBoard events of the aggregates for the viewer.

The table of up to CSV_MEMBERS members is ``metrics.csv``, for people; that of more is the folder ``metrics`` of Parquet files, a file for
each time that metrics were written, which pandas, polars and DuckDB read as one table. Both hold what was written when the process
is killed.
"""

import csv
import json
import time
import warnings
from collections.abc import Container, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from jrl.run import disk
from jrl.run.checkpoint import RunError, disk_errors
from jrl.run.loggers import Sink
from jrl.run.stats import iqm

CSV_MEMBERS = 256
TABLES = ("metrics.csv", "metrics/*.parquet")
EVALUATED = "return"  # the label of evaluations
Labels = list[dict[str, Any]]


class Log:
    """Appends rows to the table of metrics and to event files; the columns are fixed by the first rows.

    ``labels`` are the constant columns of each member: its seed, and in a sweep the values of its cell.
    """

    def __init__(
        self,
        folder: Path,
        labels: Labels,
        resume_at: int | None,
        env_steps_per_update: int,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._table = table(folder, labels)
        self._labels = labels
        if resume_at is not None:
            self._table.truncate(resume_at)
        purge = None if resume_at is None else resume_at * env_steps_per_update + 1
        self._events, self._sinks = Events(folder / "events", purge), sinks

    def write(
        self, updates: np.ndarray, env_steps: np.ndarray, metrics: dict[str, np.ndarray], bad: Container[int]
    ) -> None:
        """Rows of several updates: ``updates`` and ``env_steps`` ``[rows]``, metrics ``[members, rows]``.

        The table takes all members, the events aggregate those that are not ``bad``.
        """
        with disk_errors(self._table.path):
            self._table.write(updates, env_steps, metrics)
            self._write_events(env_steps, metrics, bad)

    def write_settings(self, settings: dict[str, Any]) -> None:
        """The settings of the run, as TensorBoard's hyperparameters."""
        with disk_errors(self._table.path):
            self._events.write_settings(settings, [f"evaluation/{EVALUATED}"])

    def write_evaluation(self, env_steps: int, summaries: dict[str, dict[str, Any]]) -> None:
        """IQMs of an evaluation, by label, as events."""
        with disk_errors(self._table.path):
            found = {f"evaluation/{label}": s["iqm"] for label, s in summaries.items() if s["iqm"] is not None}
            self._tell(env_steps, found)
            self._events.flush()

    def sync(self) -> None:
        """Until the table is on disk, even if the machine stops."""
        with disk_errors(self._table.path):
            disk.sync(self._table.path)

    def close(self) -> None:
        """Flush and close; a full disk was reported when it happened."""
        try:
            self._events.close()
        except OSError:
            pass
        for sink in self._sinks:
            sink.close()

    def _tell(self, env_steps: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._events.write(tag, value, env_steps)
        for sink in self._sinks:
            sink.write(env_steps, values)

    def _write_events(self, env_steps: np.ndarray, metrics: dict[str, np.ndarray], bad: Container[int]) -> None:
        cells: dict[str, list[int]] = {}
        for member, label in enumerate(self._labels):
            if member not in bad:
                cells.setdefault(label.get("cell", ""), []).append(member)
        aggregates = {
            f"training/{name} {cell}".strip(): _iqm_of_finite(values[members])
            for cell, members in cells.items()
            for name, values in metrics.items()
        }
        for i, steps in enumerate(env_steps.tolist()):
            self._tell(steps, {tag: float(x[i]) for tag, x in aggregates.items() if np.isfinite(x[i])})
        self._events.flush()


def _iqm_of_finite(values: np.ndarray) -> np.ndarray:
    """The IQM over the members whose number is finite, of ``[members, rows]``; NaN where there is none."""
    if np.isfinite(values).all():
        return iqm(values)
    return np.array([iqm(x[np.isfinite(x)]) if np.isfinite(x).any() else np.nan for x in values.T])


class Events:
    """Scalars in a TensorBoard event file, written as they come.

    tensorboardX's own ``SummaryWriter`` writes from a thread behind a queue of ten: on a full disk the thread dies, and the
    caller waits for it for ever.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        folder.mkdir(exist_ok=True)
        self._event, self._scalar = Event, scalar
        self._writer = EventsWriter(str(folder / "events"))
        if purge_step is not None:  # the viewer hides what an interrupted process wrote from this step on
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=purge_step, wall_time=time.time(), session_log=start))

    def write(self, tag: str, value: float, step: int) -> None:
        """One scalar."""
        summary = self._scalar(tag, value)
        self._writer.write_event(self._event(step=step, wall_time=time.time(), summary=summary))

    def write_settings(self, settings: dict[str, Any], results: list[str]) -> None:
        """Settings by name, and the tags of the scalars that they lead to."""
        from tensorboardX.summary import hparams

        numbers = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in settings.items()}
        for summary in hparams(numbers, dict.fromkeys(results)):
            self._writer.write_event(self._event(step=0, wall_time=time.time(), summary=summary))
        self._writer.flush()

    def flush(self) -> None:
        """Until all of it is on disk; raises ``OSError`` if it does not fit."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def table(folder: Path, labels: Labels) -> "CsvTable | ParquetTable":
    """The table of a run's metrics, whose members have these labels."""
    few = len(labels) <= CSV_MEMBERS
    return CsvTable(folder / "metrics.csv", labels) if few else ParquetTable(folder / "metrics", labels)


def metrics_of(folder: Path, cells: Sequence[str], num_seeds: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """``table.read()`` of the run in a folder, which may be in progress. Raises ``RunError`` for a table that cannot be read."""
    columns: dict[str, Any] = {"seed": 0} if list(cells) == [""] else {"cell": "", "seed": 0}
    try:
        return table(folder, [columns] * (num_seeds * len(cells))).read()
    except (LookupError, TypeError, ValueError, OSError) as error:
        raise RunError(f"{folder} is damaged: its metrics cannot be read ({error})") from None


def read_whole(
    table: "CsvTable | ParquetTable", updates: int, log_every: int, env_steps_per_update: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """``table.read()`` of a run that has done so many updates, a row for each ``log_every`` or fewer.

    Raises ``RunError`` for a table that cannot be read or lacks rows.
    """
    try:
        env_steps, metrics = table.read()
    except Exception as error:
        raise RunError(f"{table.path} is damaged: it cannot be read ({error})") from error
    done = np.concatenate([[0], env_steps // env_steps_per_update])
    gap = np.flatnonzero((np.diff(done) > log_every) | (np.diff(done) <= 0))
    if len(gap) or done[-1] != updates:
        last = done[gap[0]] if len(gap) else done[-1]
        raise RunError(
            f"{table.path} is damaged: rows are missing after update {last}, and the checkpoint is of {updates}"
        )
    return env_steps, metrics


class CsvTable:
    """A row for each update and member in one text file."""

    def __init__(self, path: Path, labels: Labels) -> None:
        self.path, self._labels = path, labels

    def write(self, updates: np.ndarray, env_steps: np.ndarray, metrics: dict[str, np.ndarray]) -> None:
        """Append the rows of several updates, in one write."""
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(["update", "env_steps", *self._labels[0], *metrics])
            columns = [np.char.mod("%.9g", x).tolist() for x in metrics.values()]
            for row, (update, steps) in enumerate(zip(updates.tolist(), env_steps.tolist(), strict=True)):
                for member, label in enumerate(self._labels):
                    writer.writerow([update, steps, *label.values(), *(c[member][row] for c in columns)])

    def truncate(self, updates: int) -> None:
        """Drop the rows after ``updates``, and a half-written last row: they are about to be made again."""
        if not updates:
            self.path.unlink(missing_ok=True)
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            header, *rows = file.readlines() or [b""]
        disk.replace(self.path, b"".join([header, *takewhile(lambda row: _is_of(row, updates), rows)]))

    def read(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """``(env_steps [rows], metrics {name: [members, rows]})``, of the rows that are whole."""
        if not self.path.exists():  # no row is whole yet
            return np.zeros(0, int), {}
        with self.path.open(newline="") as file:
            lines = [line for line in file if line.endswith("\n")]
        if not lines:
            return np.zeros(0, int), {}
        header = next(csv.reader(lines[:1]))
        skip, members = header.index("seed") + 1, len(self._labels)
        whole = lines[1 : 1 + (len(lines) - 1) // members * members]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of nothing the array is empty
            rows = np.loadtxt(whole, delimiter=",", quotechar='"', usecols=[1, *range(skip, len(header))], ndmin=2)
        rows = rows.reshape(-1, members, len(header) - skip + 1)
        return rows[:, 0, 0].astype(int), {name: rows[:, :, i + 1].T for i, name in enumerate(header[skip:])}


def _is_of(row: bytes, updates: int) -> bool:
    """Whether a line is whole, and of one of the first ``updates``."""
    update = row.partition(b",")[0]
    return row.endswith(b"\n") and update.isdigit() and len(update) < 20 and int(update) <= updates


class ParquetTable:
    """The same rows in a folder of Parquet files, each named by its first update."""

    def __init__(self, path: Path, labels: Labels) -> None:
        import pyarrow  # takes a while to import
        import pyarrow.compute
        import pyarrow.parquet

        self.path, self._labels, self._arrow = path, labels, pyarrow

    def write(self, updates: np.ndarray, env_steps: np.ndarray, metrics: dict[str, np.ndarray]) -> None:
        """One more file, whole or not at all."""
        self.path.mkdir(exist_ok=True)
        members = len(self._labels)
        columns = {"update": np.repeat(updates, members), "env_steps": np.repeat(env_steps, members)}
        for name in self._labels[0]:
            columns[name] = np.tile([label[name] for label in self._labels], len(updates))
        columns |= {name: values.T.ravel().astype(np.float32) for name, values in metrics.items()}
        self._replace(self.path / f"{int(updates[0]):09d}.parquet", self._arrow.table(columns))

    def truncate(self, updates: int) -> None:
        """Drop the rows after ``updates``, and a half-written file: they are about to be made again."""
        for path in self.path.glob("*.tmp"):
            path.unlink()
        for path in self._files():
            if int(path.stem) > updates:
                path.unlink()
                continue
            try:
                rows = self._arrow.parquet.read_table(path)
                kept = rows.filter(self._arrow.compute.field("update") <= updates)
            except Exception as error:
                raise RunError(f"{path} is damaged: it cannot be read ({error})") from None
            if len(kept) < len(rows):
                self._replace(path, kept)

    def read(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """``(env_steps [rows], metrics {name: [members, rows]})``."""
        files = [self._arrow.parquet.read_table(path) for path in self._files()]
        if not files:
            return np.zeros(0, int), {}
        rows = self._arrow.concat_tables(files)
        names = [name for name in rows.column_names if name not in ("update", "env_steps", *self._labels[0])]
        members = len(self._labels)
        env_steps = rows["env_steps"].to_numpy()[::members]
        return env_steps, {name: rows[name].to_numpy().reshape(-1, members).T for name in names}

    def _files(self) -> list[Path]:
        return sorted(path for path in self.path.glob("*.parquet") if path.stem.isdecimal())

    def _replace(self, path: Path, rows: Any) -> None:
        fresh = path.with_suffix(".tmp")
        self._arrow.parquet.write_table(rows, fresh)
        fresh.replace(path)
