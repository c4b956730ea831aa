"""Data files: one JSON object a line, under the field names of TRL's formats.

    texts     {"text": "..."}                                                    or {"messages": [{"role": ..., "content": ...}, ...]}
              {"prompt": "...", "completion": "..."}                             each a text or messages; the completion is learned
    pairs     {"prompt": "...", "chosen": "...", "rejected": "..."}              each a text or messages; without a prompt, what both begin with
    judged    {"prompt": "...", "completion": "...", "label": true}              single answers, liked or not
    steps     {"prompt": "...", "completions": ["...", ...], "labels": [true, ...]}
    prompts   {"prompt": "..."}                                                  a text or messages

    rows = read("chats.jsonl", "texts")             a sequence; rows are parsed when they are asked for

``lm.examples`` makes tokens of them. A file is read through once, when every line is checked: a bad one is named with its number. After that only the places of lines are held.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jrl.numerics import checks

Format = Literal["texts", "pairs", "judged", "steps", "prompts"]
Fields = dict[str, Any]


class Rows(Sequence):
    """The rows of files, each as a dictionary, in the order of the files' lines."""

    def __init__(self, paths: Sequence[Path], places: Sequence[np.ndarray]) -> None:
        self.paths, self._places = paths, places
        self._ends = np.cumsum([len(x) for x in places])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def kept(self, which: np.ndarray) -> "Rows":
        """Those that ``which`` says, bool ``[rows]``."""
        return Rows(self.paths, [x[y] for x, y in zip(self._places, np.split(which, self._ends[:-1]), strict=True)])

    def where(self, i: int) -> str:
        """The file and the line of a row."""
        number, place = self._place(i)
        with self.paths[number].open("rb") as file:
            return f"{self.paths[number]}:{1 + file.read(place).count(10)}"

    def _place(self, i: int) -> tuple[int, int]:
        """Which file a row is in, and where it begins there."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        return number, int(self._places[number][i - (self._ends[number - 1] if number else 0)])

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        number, place = self._place(i)
        with self.paths[number].open("rb") as file:
            file.seek(place)
            return json.loads(file.readline())


def read(paths: str | Path | Sequence[str | Path], kind: Format) -> Rows:
    """All rows of a file, or of several. Raises ``ValueError`` naming the file and the line of the first that is not of this kind."""
    checks.one_of("format", kind, _CHECKS)
    files = [Path(x) for x in ([paths] if isinstance(paths, str | Path) else paths)]
    found = Rows(files, [_places(file, _CHECKS[kind]) for file in files])
    if not len(found):
        raise ValueError(f"{', '.join(map(str, files))}: no rows")
    return found


def _places(path: Path, check: Callable[[Fields], None]) -> np.ndarray:
    """Where the lines of a file begin, blank ones apart."""
    places, at = [], 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    _checked(line, check, f"{path}:{number}")
                    places.append(at)
                at += len(line)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return np.array(places, np.int64)


def _checked(line: bytes, check: Callable[[Fields], None], where: str) -> None:
    try:
        row = json.loads(line.decode())
        if not isinstance(row, dict):
            raise ValueError(f"a row must be an object; got {type(row).__name__}")
        check(row)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: the line is not UTF-8, from byte {error.start + 1} on") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: the line is no JSON: {error.msg}, at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None


# What a row of each kind must hold


def _texts(row: Fields) -> None:
    if "text" in row:
        _is_text("text", row["text"])
    elif "messages" in row:
        _is_conversation("messages", row["messages"])
        if not any(x["role"] == "assistant" for x in row["messages"]):
            raise ValueError("messages: none is the assistant's, whose are learned from")
    elif {"prompt", "completion"} <= row.keys():
        _alike(row, "prompt", "completion")
    else:
        raise ValueError(f"a row must have text, messages, or prompt and completion; got {_names(row)}")


def _pairs(row: Fields) -> None:
    _has(row, "chosen", "rejected")
    if "prompt" in row:
        _alike(row, "prompt", "chosen", "rejected")
    else:
        _alike(row, "chosen", "rejected")
        if not shared(row):
            raise ValueError("chosen and rejected have no beginning in common, and there is no prompt")
    if row["chosen"] == row["rejected"]:
        raise ValueError("chosen and rejected are the same")


def _judged(row: Fields) -> None:
    _has(row, "prompt", "completion", "label")
    _alike(row, "prompt", "completion")
    if not isinstance(row["label"], bool):
        raise ValueError(f"label must be true or false; got {row['label']!r}")


def _steps(row: Fields) -> None:
    _has(row, "prompt", "completions", "labels")
    _is_text("prompt", row["prompt"])
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not steps:
        raise ValueError(f"completions must be a list of texts; got {steps!r}")
    for step in steps:
        _is_text("completions", step)
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise ValueError(f"labels must be as many as completions, {len(steps)}; got {labels!r}")
    for label in labels:
        if not isinstance(label, bool):
            raise ValueError(f"labels must be true or false; got {label!r}")


def _prompts(row: Fields) -> None:
    _has(row, "prompt")
    _alike(row, "prompt")


_CHECKS: dict[str, Callable[[Fields], None]] = {
    "texts": _texts, "pairs": _pairs, "judged": _judged, "steps": _steps, "prompts": _prompts
}  # fmt: skip


def _has(row: Fields, *names: str) -> None:
    if missing := [name for name in names if name not in row]:
        raise ValueError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; there are {_names(row)}"
        )


def _names(row: Fields) -> str:
    return ", ".join(row) or "no fields"


def _alike(row: Fields, *names: str) -> None:
    """All are texts, or all are messages."""
    talks = isinstance(row[names[0]], list)
    for name in names:
        (_is_conversation if talks else _is_text)(name, row[name])


def _is_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text; got {type(value).__name__}")
    value.encode()  # half of a character can be written as \\ud800, and is no text


def _is_conversation(name: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of messages; got {type(value).__name__ if value else 'none'}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{name}: each message must have a role and a content; got {message!r}")
        if message.get("content") is None:
            raise ValueError(f"{name}: a message of role {message['role']} has no content; calls of tools are not read")
        _is_text(f"{name}: content", message.get("content"))


def shared(row: Fields) -> int:
    """How many messages, or characters, both answers of a row of pairs begin with: the prompt that is in both. A blank before the answers is theirs."""
    chosen, rejected = row["chosen"], row["rejected"]
    apart = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    number = next(apart, min(len(chosen), len(rejected)))
    return number - 1 if isinstance(chosen, str) and number and chosen[number - 1] == " " else number
