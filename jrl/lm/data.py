"""Data files: one JSON object a line, under the field names of TRL's formats.

    texts     {"text": "..."}                                                    or {"messages": [{"role": ..., "content": ...}, ...]}
              {"prompt": "...", "completion": "..."}                             each a text or messages; the completion is learned
    pairs     {"prompt": "...", "chosen": "...", "rejected": "..."}              each a text or messages; without a prompt, the messages that both share
    judged    {"prompt": "...", "completion": "...", "label": true}              single answers, liked or not
    steps     {"prompt": "...", "completions": ["...", ...], "labels": [true, ...]}
    prompts   {"prompt": "..."}                                                  a text or messages

    rows = read("chats.jsonl", "texts")             a sequence; rows are parsed when they are asked for
    corpus = tokenized(words, rows)                 tokens, and which of them are learned from

A file is read through once, when every line is checked: a bad one is named with its number. After that only the places of lines are held.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jrl.lm.pairs import Pairs
from jrl.lm.texts import Corpus
from jrl.lm.tokenizer import Tokenizer
from jrl.numerics import checks

Format = Literal["texts", "pairs", "judged", "steps", "prompts"]
Overlong = Literal["drop", "cut"]
Fields = dict[str, Any]


class Rows(Sequence):
    """The rows of files, each as a dictionary, in the order of the files' lines."""

    def __init__(self, paths: Sequence[Path], places: Sequence[np.ndarray]) -> None:
        self.paths, self._places = paths, places
        self._ends = np.cumsum([len(x) for x in places])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def cut(self, begin: int, end: int) -> "Rows":
        """Those from ``begin`` to before ``end``."""
        first = self._ends - [len(x) for x in self._places]
        parts = [x[max(0, begin - n) : max(0, end - n)] for x, n in zip(self._places, first, strict=True)]
        return Rows(self.paths, parts)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = int(np.searchsorted(self._ends, i, side="right"))
        place = self._places[number][i - (self._ends[number - 1] if number else 0)]
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
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"a row must be an object; got {type(row).__name__}")
        check(row)
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
        for name in ("chosen", "rejected"):
            _is_conversation(name, row[name])
        if not _shared(row):
            raise ValueError("chosen and rejected share no message, and there is no prompt")
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
        raise ValueError(f"{name} must be a list of messages; got {type(value).__name__}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{name}: each message must have a role and a content; got {message!r}")
        _is_text(f"{name}: content", message.get("content"))


def _shared(row: Fields) -> int:
    """How many messages both conversations begin with."""
    both = zip(row["chosen"], row["rejected"], strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), 0)


# Tokens


class Learned(NamedTuple):
    """Tokens of a text, and which of them are learned from."""

    tokens: list[int]
    learned: list[bool]


def tokenized(
    words: Tokenizer, rows: Sequence[Fields], progress: Callable[[Sequence[Fields]], Iterator[Fields]] = iter
) -> Corpus:
    """The tokens of all texts: of a text all are learned from, of chats those of the assistant, of a prompt and its completion those of the
    completion; the end token, too. ``progress`` goes through the rows and may show how far it is."""
    tokens, learned, ends = [], [], [0]
    for row in progress(rows):
        text = learned_from(words, row)
        tokens.append(np.array(text.tokens, np.int32))
        learned.append(np.array(text.learned, bool))
        ends.append(ends[-1] + len(text.tokens))
    return Corpus(np.concatenate(tokens), np.concatenate(learned), np.array(ends, np.int64))


def learned_from(words: Tokenizer, row: Fields) -> Learned:
    """The tokens of one row of texts."""
    if "text" in row:
        tokens = ended(words, words.encode(row["text"], begin=True))
        return Learned(tokens, [True] * len(tokens))
    if "messages" in row:
        return _conversation(words, row["messages"])
    prompt, answer = prompt_and_answers(words, row["prompt"], row["completion"])
    return Learned(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def _conversation(words: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> Learned:
    """Turn by turn: a template adds to the text that it made of the messages before."""
    tokens: list[int] = []
    learned: list[bool] = []
    before = ""
    for i, message in enumerate(messages):
        mine = message["role"] == "assistant"
        for text, is_learned in (
            ((words.chat(messages[:i]), False), (words.chat(messages[: i + 1], answer=False), True)) if mine else ()
        ):
            if not text.startswith(before):
                raise ValueError(
                    f"the chat template rewrites what was said before message {i + 1}, so that its tokens cannot be told apart"
                )
            more = words.encode(text[len(before) :])
            tokens += more
            learned += [is_learned] * len(more)
            before = text
    return Learned(tokens, learned)


Said = str | Sequence[Mapping[str, Any]]


def prompt_and_answers(words: Tokenizer, prompt: Said, *answers: Said) -> tuple[list[int], ...]:
    """Tokens of a prompt and of each answer to it, ended; texts, or messages that a template writes."""
    if isinstance(prompt, str):
        begin = prompt_tokens(words, prompt)
        return begin, *(ended(words, words.encode(x)) for x in answers if isinstance(x, str))
    opened = words.chat(prompt)
    found = [words.encode(opened)]
    for answer in answers:
        whole = words.chat([*prompt, *answer], answer=False)  # type: ignore[misc, list-item]
        if not whole.startswith(opened):
            raise ValueError("the chat template rewrites the prompt when the answer is there")
        found.append(ended(words, words.encode(whole[len(opened) :].rstrip("\n"))))
    return tuple(found)


def pair_of(words: Tokenizer, row: Fields) -> tuple[list[int], list[int], list[int]]:
    """Tokens of the prompt, the chosen and the rejected answer of a row of pairs."""
    if "prompt" in row:
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    else:
        n = _shared(row)
        prompt, chosen, rejected = row["chosen"][:n], row["chosen"][n:], row["rejected"][n:]
    begin, liked, disliked = prompt_and_answers(words, prompt, chosen, rejected)
    return begin, liked, disliked


def paired(
    words: Tokenizer,
    rows: Sequence[Fields],
    prompt_length: int | None,
    answer_length: int | None,
    overlong: Overlong,
    pad: int,
    progress: Callable[[Sequence[Fields]], Iterator[Fields]] = iter,
) -> tuple[Pairs, int]:
    """Rows of pairs as arrays of numpy, and how many were dropped since they are longer than the lengths that are given; None is the longest there is.
    Cut are prompts at their beginning and answers at their end."""
    found = [pair_of(words, row) for row in progress(rows)]
    longest = (
        prompt_length or max(len(x[0]) for x in found),
        answer_length or max(len(x) for row in found for x in row[1:]),
    )
    fit = [row for row in found if len(row[0]) <= longest[0] and max(map(len, row[1:])) <= longest[1]]
    if overlong == "cut":
        fit = [(p[-longest[0] :], a[: longest[1]], b[: longest[1]]) for p, a, b in found]
    if not fit:
        raise ValueError(f"no pair has a prompt of up to {longest[0]} and answers of up to {longest[1]} tokens")
    prompts, chosen, rejected = zip(*fit, strict=True)
    (liked, liked_mask), (disliked, disliked_mask) = (right_padded(x, longest[1], pad) for x in (chosen, rejected))
    weight = np.ones(len(fit), np.float32)
    pairs = Pairs(*left_padded(prompts, longest[0], pad), liked, disliked, weight, liked_mask, disliked_mask)  # type: ignore[arg-type]
    return pairs, len(found) - len(fit)


def prompt_tokens(words: Tokenizer, prompt: str) -> list[int]:
    """As a user's message, or as it stands where the model knows no conversations."""
    if words.template is None:
        return words.encode(prompt, begin=True)
    return words.encode(words.chat([{"role": "user", "content": prompt}]))


def ended(words: Tokenizer, tokens: list[int]) -> list[int]:
    """With the end token, unless it is there. Raises ``ValueError`` where the model has none."""
    if not words.ends:
        raise ValueError("this model names no end token")
    return tokens if tokens and tokens[-1] in words.ends else [*tokens, words.ends[0]]


def left_padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 ``[N, length]``, padded on the left, and which of them are none."""
    tokens, valid = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :], valid[i, length - len(row) :] = row, True
    return tokens, valid


def right_padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 ``[N, length]``, padded on the right, and which of them are none."""
    tokens, valid = (x[:, ::-1] for x in left_padded([row[::-1] for row in rows], length, pad))
    return np.ascontiguousarray(tokens), np.ascontiguousarray(valid)
