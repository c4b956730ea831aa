"""Problems and verifiers in plain Python on the host: your own functions, reasoning-gym, math-verify.

A ``Source`` draws prompts and scores texts; nothing here runs under jit. Scores come in parts, as those of ``lm.tasks`` do, so
that a reward weighs correctness and format apart.

A verifier that cannot tell abstains from an answer: its function returns None for it, which is NaN in a part's array. Such an answer
takes no part in learning: it has no gradient, and the mean and the deviation of its group are those of the others.

What a model writes is never run by this program: the two packages judge it in processes of their own (``lm.grading``). A function of
your own runs here and is trusted; what it gets are texts, which it must not evaluate.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jrl import user_file
from jrl.lm.grading import graders
from jrl.numerics import checks

INSTRUCTION = "\n\nFirst think between <think> and </think>, then write the final answer, and nothing else, between <answer> and </answer>."


class Item(NamedTuple):
    """A prompt and what its verifier needs."""

    prompt: str
    data: Any


Extract = Callable[[str], tuple[str | None, bool]]  # a completion's answer, and whether it has the wanted form


def tagged(text: str) -> tuple[str | None, bool]:
    """What stands between the last ``<answer>`` and ``</answer>``, as R1-Zero is asked to write (arXiv 2501.12948, section 2.2).

    The form is ``<think>...</think> <answer>...</answer>`` and nothing else, each tag once; ``<think>`` may be missing, since a
    prompt may end with it.
    """
    answers = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    # One expression for all of the form would go back and forth over a text of blanks: its time is quadratic.
    thought, closed, said = text.strip().removeprefix("<think>").partition("</think>")
    said = said.lstrip()
    formed = bool(closed) and said.startswith("<answer>") and said.endswith("</answer>")
    tags = re.compile("</?(think|answer)>")
    plain = formed and not tags.search(thought) and not tags.search(said[len("<answer>") : -len("</answer>")])
    return (answers[-1].strip() if answers else None), plain


def boxed(text: str) -> tuple[str | None, bool]:
    """What the last ``\\boxed{...}`` holds, with its braces paired; the form is to have one."""
    start = text.rfind("\\boxed{")
    depth = 0
    for end in range(start + 6, len(text)) if start >= 0 else ():
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start + 7 : end].strip(), True
    return None, False


NUMBER = re.compile(
    r"""
    (?<![^\W_])                                          # not within a word, as in H2O
    (?P<sign>(?<![)\]}%])[-+])?[$\u20ac\u00a3]?    # of the number itself: 10-4 ends with 4
    (?P<digits>
        [0-9]{1,3}(?P<mark>,|[ \u00a0\u2007\u2009\u202f]|['\u2019]|\\,|\{,\})[0-9]{3}(?:(?P=mark)[0-9]{3})*(?![0-9])(?:\.[0-9]+)?
        | [0-9]{1,3}(?:\.[0-9]{3}){2,}(?![0-9])
        | [0-9]+(?:\.[0-9]+)? | \.[0-9]+
    )
    (?P<exponent>[eE][-+]?[0-9]{1,3}(?![A-Za-z0-9]))?
    (?P<divisor>/[0-9]+(?![0-9]*[./][0-9]))?
    """,
    re.VERBOSE,
)


def last_number(text: str) -> tuple[str | None, bool]:
    """The last number, as a decimal or a fraction of two whole numbers; the form is to have one.

    It is written as ``-1234.5`` or ``3/4``: without the marks between thousands (a comma, an apostrophe or a space of any width
    before each three digits, or points if there are several), without a plus, an exponent worked out (``1.5E-3`` is 0.0015), and
    with ``-`` for a minus sign (U+2212). What follows a number, such as ``%``, a unit or a full stop, is left out; digits behind a letter
    (``H2O``) are no number, and a comma is no decimal point.
    """
    found = list(NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")))
    if not found:
        return None, False
    sign, digits, mark, exponent, divisor = (
        found[-1][part] or "" for part in ("sign", "digits", "mark", "exponent", "divisor")
    )
    digits = digits.replace(mark or "," if digits.count(".") < 2 else ".", "")
    if exponent:
        digits = f"{Decimal(digits + exponent):f}"
    return ("-" if sign == "-" else "") + digits + divisor, True


def whole(text: str) -> tuple[str | None, bool]:
    """The whole text, whose form is always good."""
    return text.strip(), True


class Source(NamedTuple):
    """Problems with a verifier.

    Attributes:
        name: shown to people.
        draw: ``(seed, n) -> n Items``, the same for the same seed.
        score: ``(items, texts) -> parts``, float32 arrays ``[n]``, "correct" among them, NaN where it abstains; ``texts`` are
            completions. None where nothing verifies them, and a reward model judges.
        extract: ``text -> (answer, well formed)``: what counts of a completion; the majority of several is that of their answers.
        split: ``(most, seed) -> (rest, some)``: a tenth of the problems apart, at most so many, where they are a list; None where another seed draws others.
    """

    name: str
    draw: Callable[[int, int], list[Item]]
    score: Callable[[Sequence[Item], Sequence[str]], dict[str, np.ndarray]] | None
    extract: Extract = whole
    split: Callable[[int, int], tuple["Source", "Source"]] | None = None


def listed(name: str, items: list[Item], score: Any, extract: Extract = whole) -> Source:
    """A source of the problems in a list. They come in random order, and none twice before all came."""

    def split(most: int, seed: int) -> tuple[Source, Source]:
        if len(items) < 2:
            raise ValueError(f"{name}: one problem cannot be held out of one; give others to evaluate on")
        number = min(most, max(1, len(items) // 10))
        order = np.random.default_rng(seed).permutation(len(items))
        rest, some = ([items[i] for i in sorted(part)] for part in (order[number:], order[:number]))
        return listed(name, rest, score, extract), listed(name, some, score, extract)

    return Source(name, _shuffled(items), score, extract, split)


def from_function(
    prompts: Sequence[str | Item],
    function: Callable[[Sequence[Item], Sequence[str]], Any],
    name: str = "own",
    extract: Extract = whole,
) -> Source:
    """Your own verifier: ``function(items, texts)`` returns n floats, "correct", or a dict of parts with n floats each; None in
    place of a float abstains. The function is trusted and runs in this process; ``texts`` are data, which it must never evaluate.
    ``extract`` finds the answer in a text, such as ``last_number``, where several are to be counted.

    Prompts are texts, or ``Item``s that carry data for the function. They come in random order, and none twice before all came.
    """
    if not isinstance(prompts, Sequence) or isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of texts or Items; got {type(prompts).__name__}")
    checks.not_empty(prompts=prompts)
    checks.function("a verifier", function)
    items = [prompt if isinstance(prompt, Item) else Item(prompt, None) for prompt in prompts]
    items = _items("prompts", items, len(items))

    def score(items: Sequence[Item], texts: Sequence[str]) -> dict[str, np.ndarray]:
        given = function(items, texts)
        return _parts(name, given if isinstance(given, dict) else {"correct": given}, items)

    return listed(name, items, score, extract)


def from_prompts(prompts: Sequence[Any], name: str) -> Source:
    """Prompts without a verifier, texts or messages. They come in random order, and none twice before all came."""
    checks.not_empty(prompts=prompts)
    return listed(name, [Item(prompt, None) for prompt in prompts], None)


class VerifierError(ValueError):
    """A verifier that raises or returns what it may not; its text is one clear line."""


def judge(source: Source, items: Sequence[Item], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """``source.score(items, texts)``, checked; no parts where nothing verifies them. Raises ``VerifierError`` for a verifier that raises, with the first problem that it
    raises for by itself, and for scores of another form."""
    if source.score is None:
        return {}
    try:
        return _parts(source.name, source.score(items, texts), items, lambda x: x is None or np.isnan(x))
    except VerifierError:
        raise
    except Exception as error:
        where, cause = _culprit(source, items, texts) or ("", error)
        raise VerifierError(f"{source.name}: the verifier raised {type(cause).__name__}: {cause}{where}") from error


def _culprit(source: Source, items: Sequence[Item], texts: Sequence[str]) -> tuple[str, Exception] | None:
    for item, text in zip(items, texts, strict=True):
        try:
            assert source.score is not None
            source.score([item], [text])
        except Exception as error:
            return f" (problem {item.prompt!r}, answer {text!r})", error
    return None


def from_file(path: str | Path, seed: int = 0, **settings: Any) -> Source:
    """What ``make(seed, **settings)`` of a Python file returns. Raises ``ValueError`` for a file without it, or wrong settings."""
    path = Path(path)
    module = user_file.load(path, "file of problems")
    if not hasattr(module, "make"):
        raise ValueError(f"{path} must define make(seed) -> jrl.lm.verifiers.Source")
    source = user_file.make(path, module, {"seed": seed, **settings})
    if not isinstance(source, Source):
        raise ValueError(f"{path}: make must return a jrl.lm.verifiers.Source; got {type(source).__name__}")
    for name in ("draw", "score"):
        checks.function(f"{path}: {name}", getattr(source, name))

    def draw(seed: int, n: int) -> list[Item]:
        with user_file.blamed(path):
            return _items("draw", source.draw(seed, n), n)

    return source._replace(name=str(source.name), draw=draw)


def _items(name: str, given: Any, n: int) -> list[Item]:
    """Raise ``ValueError`` for what is no list of ``n`` items, each with a text for its prompt."""
    if not isinstance(given, list | tuple) or len(given) != n:
        got = f"{len(given)} items" if isinstance(given, list | tuple) else type(given).__name__
        raise ValueError(f"{name} must give a list of {n} Items; got {got}")
    for item in given:
        if not isinstance(item, Item) or not isinstance(item.prompt, str):
            raise ValueError(f"{name}: a problem must be an Item with a text for its prompt; got {item!r}")
    return list(given)


def reasoning_gym(
    dataset: str,
    seed: int = 0,
    threshold: float = 1.0,
    extract: Extract = tagged,
    instruction: str = INSTRUCTION,
    seconds: float = 5.0,
    size: int = 100_000,
    **settings: Any,
) -> Source:
    """A generator of the package reasoning-gym, such as "countdown" or "chain_sum", with its own settings.

    There are ``size`` problems, and none of one ``seed`` is among those of another: train on one and evaluate on the other. Parts:
    "score", what the package gives, which for a wrong answer may be above 0; "correct", whether that is at least ``threshold``;
    "format", of ``extract``. An answer that takes more than ``seconds`` of CPU time to judge is wrong, as is one with anything but
    mathematics or literals where the package would evaluate it. Raises ``ValueError`` for a missing package, an unknown dataset or
    wrong settings.
    """
    _need("reasoning_gym", "reasoning-gym")
    checks.within("threshold", threshold, 0, 1)
    checks.above_zero("threshold", threshold)
    checks.positive_int("size", size)
    from reasoning_gym.factory import DATASETS, create_dataset

    checks.one_of("dataset", dataset, sorted(DATASETS))
    params = {"seed": seed * size, "size": size, **settings}
    try:
        made = create_dataset(dataset, **params)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning_gym {dataset}: {error}") from error
    grade = graders("reasoning_gym", (dataset, params), seconds)

    def draw(seed: int, n: int) -> list[Item]:
        entries = [made[int(i)] for i in np.random.default_rng(seed).integers(0, size, n)]
        return [Item(entry["question"] + instruction, entry) for entry in entries]

    def score(items: Sequence[Item], texts: Sequence[str]) -> dict[str, np.ndarray]:
        scores, forms = _judged(grade, extract, items, texts)
        correct = [float(x >= threshold - 1e-6) for x in scores]
        return _parts(source.name, {"correct": correct, "format": forms, "score": scores}, items)

    source = Source(f"reasoning_gym-{dataset}", draw, score, extract)
    return source


def math_verify(
    problems: Sequence[str],
    answers: Sequence[str],
    extract: Extract = tagged,
    instruction: str = INSTRUCTION,
    seconds: float = 5.0,
) -> Source:
    """Mathematical problems with known answers, compared by the package math-verify: ``1/2``, ``0.5`` and ``\\frac12`` are the same.

    Answers are LaTeX or plain, and of a sentence its last number is read; a model's one is what ``extract`` finds. Parts:
    "correct"; "format", of ``extract``. An answer that takes more than ``seconds`` of CPU time to judge is wrong. Raises
    ``ValueError`` for a missing package or lists of different lengths, and when it scores, for a known answer that cannot be read.
    """
    _need("math_verify", "math-verify[antlr4_13_2]")
    checks.not_empty(problems=problems)
    if len(problems) != len(answers):
        raise ValueError(f"problems and answers must be as many; got {len(problems)} and {len(answers)}")
    grade = graders("math_verify", None, seconds)
    items = [Item(problem + instruction, answer) for problem, answer in zip(problems, answers, strict=True)]

    def score(items: Sequence[Item], texts: Sequence[str]) -> dict[str, np.ndarray]:
        scores, forms = _judged(grade, extract, items, texts)
        return _parts("math_verify", {"correct": scores, "format": forms}, items)

    return listed("math_verify", items, score, extract)


def _shuffled(items: list[Item]) -> Callable[[int, int], list[Item]]:
    """Draws in random order, all items before any comes again."""

    def draw(seed: int, n: int) -> list[Item]:
        rng = np.random.default_rng(seed)
        rounds = [rng.permutation(len(items)) for _ in range(math.ceil(n / len(items)))]
        return [items[i] for i in np.concatenate([*rounds, np.zeros(0, int)])[:n]]

    return draw


def _judged(grade: Callable, extract: Extract, items: Sequence[Item], texts: Sequence[str]) -> tuple[list, list]:
    """Scores (0 where no answer is found) and forms."""
    if len(items) != len(texts):
        raise ValueError(f"items and texts must be as many; got {len(items)} and {len(texts)}")
    found = [extract(text) for text in texts]
    scores = iter(grade([(item.data, answer) for item, (answer, _) in zip(items, found, strict=True) if answer]))
    return [next(scores) if answer else 0.0 for answer, _ in found], [float(form) for _, form in found]


def _parts(
    name: str, parts: Any, items: Sequence[Item], abstains: Callable[[Any], Any] = lambda x: x is None
) -> dict[str, np.ndarray]:
    """Arrays of the parts, NaN where the verifier abstains."""
    if not isinstance(parts, dict) or "correct" not in parts:
        got = (", ".join(map(str, parts)) or "none") if isinstance(parts, dict) else type(parts).__name__
        raise VerifierError(f'{name}: parts must hold "correct"; got {got}')
    return {part: _numbers(f"{name}: {part!r}", values, items, abstains) for part, values in parts.items()}


def _numbers(name: str, values: Any, items: Sequence[Item], abstains: Callable[[Any], Any]) -> np.ndarray:
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        array = np.zeros(())
    if array.shape != (len(items),):
        raise VerifierError(f"{name} must be {len(items)} finite numbers, or None to abstain; got {values!r}")
    for item, given, number in zip(items, values, array, strict=True):
        if not np.isfinite(number) and not abstains(given):
            raise VerifierError(
                f"{name} must be finite, or None to abstain; got {given} for the problem {item.prompt!r}"
            )
    return array


def _need(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{module} is not installed; pip install {package!r}")
