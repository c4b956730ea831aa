"""Metrics on disk as they come: a CSV of all members for people, TensorBoard events of the aggregates for the viewer."""

import csv
import time
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np

from jrl.run.checkpoint import disk_errors
from jrl.run.stats import iqm


class Log:
    """Appends rows to ``metrics.csv`` and to event files; the columns are fixed by the first rows.

    ``labels`` are the constant columns of each member: its seed, and in a sweep the values of its cell.
    """

    def __init__(
        self, folder: Path, labels: list[dict[str, Any]], resume_at: int | None, env_steps_per_update: int
    ) -> None:
        self._path = folder / "metrics.csv"
        self._labels = labels
        if resume_at is not None:
            truncate(self._path, resume_at)
        self._file = self._path.open("a", newline="")
        purge = None if resume_at is None else resume_at * env_steps_per_update + 1
        self._events = Events(folder / "events", purge)

    def write(
        self, updates: np.ndarray, env_steps: np.ndarray, metrics: dict[str, np.ndarray], bad: Container[int]
    ) -> None:
        """Rows of several updates: ``updates`` and ``env_steps`` ``[rows]``, metrics ``[members, rows]``.

        The CSV takes all members, the events aggregate those that are not ``bad``.
        """
        with disk_errors(self._path):
            writer = csv.writer(self._file)
            if self._file.tell() == 0:
                writer.writerow(["update", "env_steps", *self._labels[0], *metrics])
            columns = [np.char.mod("%.9g", x).tolist() for x in metrics.values()]
            for row, (update, steps) in enumerate(zip(updates.tolist(), env_steps.tolist(), strict=True)):
                for member, label in enumerate(self._labels):
                    writer.writerow([update, steps, *label.values(), *(c[member][row] for c in columns)])
            self._file.flush()
            self._write_events(env_steps, metrics, bad)

    def write_evaluation(self, env_steps: int, summaries: dict[str, dict[str, Any]]) -> None:
        """IQMs of an evaluation, by label, as events."""
        with disk_errors(self._path):
            for label, summary in summaries.items():
                if summary["iqm"] is not None:
                    self._events.write(f"evaluation/{label}", summary["iqm"], env_steps)
            self._events.flush()

    def close(self) -> None:
        """Flush and close; a full disk was reported when it happened."""
        for stream in (self._file, self._events):
            try:
                stream.close()
            except OSError:
                pass

    def _write_events(self, env_steps: np.ndarray, metrics: dict[str, np.ndarray], bad: Container[int]) -> None:
        cells: dict[str, list[int]] = {}
        for member, label in enumerate(self._labels):
            if member not in bad:
                cells.setdefault(label.get("cell", ""), []).append(member)
        for cell, members in cells.items():
            for name, values in metrics.items():
                for steps, x in zip(env_steps.tolist(), values[members].T, strict=True):
                    if np.isfinite(x).any():
                        self._events.write(f"training/{name} {cell}".strip(), float(iqm(x[np.isfinite(x)])), steps)
        self._events.flush()


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

    def flush(self) -> None:
        """Until all of it is on disk; raises ``OSError`` if it does not fit."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def truncate(path: Path, updates: int) -> None:
    """Drop the rows after ``updates``, and a half-written last row: they are about to be made again."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    kept = [row for row in rows[1:] if len(row) == len(rows[0]) and row[0].isdecimal() and int(row[0]) <= updates]
    fresh = path.with_suffix(".tmp")
    with fresh.open("w", newline="") as file:
        csv.writer(file).writerows([*rows[:1], *kept])
    fresh.replace(path)


def read(path: Path, num_members: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """``metrics.csv`` as ``(env_steps [rows], metrics {name: [members, rows]})``."""
    with path.open(newline="") as file:
        header = next(csv.reader(file))
        skip = header.index("seed") + 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty file is an empty array
            table = np.loadtxt(file, delimiter=",", quotechar='"', usecols=[1, *range(skip, len(header))], ndmin=2)
    table = table.reshape(-1, num_members, len(header) - skip + 1)
    return table[:, 0, 0].astype(int), {name: table[:, :, i + 1].T for i, name in enumerate(header[skip:])}
