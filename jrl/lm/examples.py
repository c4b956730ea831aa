"""Rows of data files as tokens: what supervised learning, reward models and DPO take.

corpus = tokenized(words, data.read("chats.jsonl", "texts"))         tokens, and which of them are learned from
pairs, dropped = paired(words, data.read("pairs.jsonl", "pairs"), ...)
labelled, dropped = stepped(words, data.read("steps.jsonl", "steps"), ...)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from jrl.lm import data
from jrl.lm.pairs import Pairs
from jrl.lm.texts import Corpus
from jrl.lm.tokenizer import Tokenizer

T = TypeVar("T")
Overlong = Literal["drop", "cut"]
Progress = Callable[[Sequence[data.Fields]], Iterator[data.Fields]]


class Learned(NamedTuple):
    """Tokens of a text, and which of them are learned from."""

    tokens: list[int]
    learned: list[bool]


def tokenized(words: Tokenizer, rows: Sequence[data.Fields], progress: Progress = iter) -> Corpus:
    """The tokens of all texts: of a text all are learned from, of chats those of the assistant, of a prompt and its completion those of the
    completion; the end token, too. ``progress`` goes through the rows and may show how far it is."""
    tokens, learned, ends = [], [], [0]
    for text in each(rows, lambda row: learned_from(words, row), progress):
        tokens.append(np.array(text.tokens, np.int32))
        learned.append(np.array(text.learned, bool))
        ends.append(ends[-1] + len(text.tokens))
    return Corpus(np.concatenate(tokens), np.concatenate(learned), np.array(ends, np.int64))


def each(rows: Sequence[data.Fields], function: Callable[[data.Fields], T], progress: Progress = iter) -> Iterator[T]:
    """``function`` of each row. Raises its ``ValueError`` with the file and the line of the row, where it is of a file."""
    for i, row in enumerate(progress(rows)):
        try:
            found = function(row)
        except ValueError as error:
            where = rows.where(i) if isinstance(rows, data.Rows) else f"row {i}"
            raise ValueError(f"{where}: {error}") from None
        yield found


def learned_from(words: Tokenizer, row: data.Fields) -> Learned:
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
            ended_at = max((i + 1 for i, x in enumerate(more) if x in words.ends), default=len(more))
            tokens += more
            # What a template writes behind the end is not said.
            learned += [is_learned and place < ended_at for place in range(len(more))]
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


def pair_of(words: Tokenizer, row: data.Fields) -> tuple[list[int], list[int], list[int]]:
    """Tokens of the prompt, the chosen and the rejected answer of a row of pairs."""
    if "prompt" in row:
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    else:
        n = data.shared(row)
        prompt, chosen, rejected = row["chosen"][:n], row["chosen"][n:], row["rejected"][n:]
    begin, liked, disliked = prompt_and_answers(words, prompt, chosen, rejected)
    return begin, liked, disliked


class Fit(NamedTuple):
    """Tokens of the longest prompt and of the longest answer, None for all that there are, and what becomes of longer rows: they are dropped, or prompts are
    cut at their beginning and answers at their end."""

    prompt: int | None = None
    answer: int | None = None
    overlong: Overlong = "drop"


class _Fitted(NamedTuple):
    """Rows that remain, by their places, their prompts and their answers, and the lengths of both."""

    rows: list[int]
    prompts: list[list[int]]
    answers: list[tuple[list[int], ...]]
    lengths: tuple[int, int]


def _fitted(what: str, prompts: Sequence[list[int]], answers: Sequence[tuple[list[int], ...]], fit: Fit) -> _Fitted:
    """Raises ``ValueError`` that says ``what`` is missing if nothing remains."""
    of_prompt = fit.prompt or max(map(len, prompts))
    of_answer = fit.answer or max(len(x) for row in answers for x in row)
    rows = [
        i
        for i, (prompt, said) in enumerate(zip(prompts, answers, strict=True))
        if fit.overlong == "cut" or (len(prompt) <= of_prompt and max(map(len, said)) <= of_answer)
    ]
    if not rows:
        raise ValueError(f"no {what} has a prompt of up to {of_prompt} and answers of up to {of_answer} tokens")
    kept = [tuple(x[:of_answer] for x in answers[i]) for i in rows]
    return _Fitted(rows, [prompts[i][-of_prompt:] for i in rows], kept, (of_prompt, of_answer))


def paired(
    words: Tokenizer, rows: Sequence[data.Fields], fit: Fit, pad: int, progress: Progress = iter
) -> tuple[Pairs, int]:
    """Rows of pairs as arrays of numpy, and how many were dropped."""
    found = list(each(rows, lambda row: pair_of(words, row), progress))
    kept = _fitted("pair", [x[0] for x in found], [x[1:] for x in found], fit)
    chosen, rejected = zip(*kept.answers, strict=True)
    (liked, liked_mask), (disliked, disliked_mask) = (right_padded(x, kept.lengths[1], pad) for x in (chosen, rejected))
    prompt, valid = left_padded(kept.prompts, kept.lengths[0], pad)
    weight = np.ones(len(kept.rows), np.float32)
    pairs = Pairs(prompt, valid, liked, disliked, weight, liked_mask, disliked_mask)  # type: ignore[arg-type]
    return pairs, len(found) - len(kept.rows)


class Stepped(NamedTuple):
    """Answers whose tokens have labels, arrays of numpy ``[N, ...]``: prompt int32 and valid ``[N, P]``; tokens int32, mask, label float32 and weight
    float32 ``[N, T]``, as in ``process_reward.Labelled``."""

    prompt: np.ndarray
    valid: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    label: np.ndarray
    weight: np.ndarray


def stepped(
    words: Tokenizer, rows: Sequence[data.Fields], separator: str, fit: Fit, pad: int, progress: Progress = iter
) -> tuple[Stepped, int]:
    """Rows of steps, or of judged answers, and how many were dropped.

    Behind each step stand the tokens of ``separator``, the last of which has the step's label (as in TRL); a judged answer has its label at its last
    token.
    """
    ends = words.encode(separator)
    found = list(each(rows, lambda row: steps_of(words, row, ends), progress))
    kept = _fitted("row", [x[0] for x in found], [(x[1],) for x in found], fit)
    tokens, mask = right_padded([x for (x,) in kept.answers], kept.lengths[1], pad)
    label, weight = np.zeros(tokens.shape, np.float32), np.zeros(tokens.shape, np.float32)
    for i, row in enumerate(kept.rows):
        for place, value in found[row][2].items():
            if place < kept.lengths[1]:
                label[i, place], weight[i, place] = value, 1
    prompt, valid = left_padded(kept.prompts, kept.lengths[0], pad)
    return Stepped(prompt, valid, tokens, mask, label, weight), len(found) - len(kept.rows)


def steps_of(
    words: Tokenizer, row: data.Fields, separator: Sequence[int]
) -> tuple[list[int], list[int], dict[int, float]]:
    """Tokens of a prompt and of its answer, and the labels by their places in the answer."""
    if "label" in row:
        prompt, answer = prompt_and_answers(words, row["prompt"], row["completion"])
        return prompt, answer, {len(answer) - 1: float(row["label"])}
    steps = [words.encode(step) for step in row["completions"]]
    return prompt_tokens(words, row["prompt"]), *joined(steps, row["labels"], separator)


def joined(
    steps: Sequence[Sequence[int]], labels: Sequence[bool], separator: Sequence[int]
) -> tuple[list[int], dict[int, float]]:
    """Steps one after the other, each with the separator behind it, and where their labels stand."""
    answer: list[int] = []
    places: dict[int, float] = {}
    for step, label in zip(steps, labels, strict=True):
        answer += [*step, *separator]
        places[len(answer) - 1] = float(label)
    return answer, places


def steps_in(text: str, separator: str) -> list[str]:
    """The steps of an answer, each of which ``separator`` stands behind or could."""
    return [x for x in text.split(separator) if x.strip()]


def in_steps(
    words: Tokenizer, texts: Sequence[str], separator: str, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int32 of answers as ``stepped`` writes them, which of them are none, and which end a step, bool, all ``[N, T]`` with T a multiple of 32."""
    behind, rows, ends = words.encode(separator), [], []
    for text in texts:
        steps = [words.encode(step) for step in steps_in(text, separator) or [""]]
        tokens, labels = joined(steps, [True] * len(steps), behind)
        rows.append(tokens)
        ends.append(sorted(labels))
    tokens, mask = right_padded(rows, -(-max(map(len, rows)) // 32) * 32, pad)
    at_end = np.zeros(mask.shape, bool)
    for i, places in enumerate(ends):
        at_end[i, places] = True
    return tokens, mask, at_end


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
