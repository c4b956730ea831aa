"""The command ``answer`` of lm.py: answers of a model, judged, as data for reward models and DPO, and what choosing among them is worth."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from lm_problems import (
    LEARNED,
    Asking,
    Drawn,
    asked,
    judge_of,
    learned_reward,
    prepared,
    problems,
    read_by,
    said_by,
    with_defaults,
)

from jrl.lm import examples, judging, verifiers
from jrl.lm.sampling import Support, check_support, sample
from jrl.numerics import checks
from jrl.run import cli, disk, folders, interrupt, language, stats
from jrl.run.checkpoint import disk_errors
from jrl.run.language import Opened

Array = jax.Array
SAID = "answers.jsonl"  # what was answered so far, a line for all problems that were answered at once


@dataclass(frozen=True)
class Answer(Asking):
    """Answer problems several times, judge the answers, and write them as data."""

    number: int = 64  # Number of problems.
    copies: int = 8  # Answers to each.
    together: int = 8  # Problems that are answered at once.
    temperature: float = 1.0  # Temperature at which answers are sampled; at 0 each token is the likeliest one.
    # Continuations behind each step of an answer: a step is labelled right if one of them is (Math-Shepherd); 0 for none.
    continuations: int = 0
    separator: str = "\\n"  # Text behind each step, in which a line break is written as backslash and n.
    precision: str = "float32"  # float32, bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    # Folder for judged.jsonl, pairs.jsonl and steps.jsonl; the same command goes on there after an interruption.
    run_dir: cli.NamedFolder = Path("runs/lm-answers")


class Judged(NamedTuple):
    """A problem's prompt, its answers as texts, and their parts."""

    prompt: Any
    texts: list[str]
    parts: dict[str, list[float]]


class Batch(NamedTuple):
    """Problems that were answered at once, and the labels of steps."""

    judged: list[Judged]
    steps: list[dict[str, Any]]


def answer(argv: list[str]) -> None:
    args = checked(with_defaults(cli.parse(Answer, argv, doc=Answer.__doc__)))
    it, source, args = prepared(args, args.precision, args.together * args.copies, "together * copies")
    if args.continuations and source.score is None:
        raise ValueError("continuations: nothing verifies the answers to these prompts")
    answered = answering(args, it, source)
    number = -(-args.number // args.together)
    settings = language.settings_of("answer", args, it, read_by(args), env=Path(args.dataset).name)
    interrupt.on_leaving(f"interrupted; the same command goes on in {args.run_dir}")
    with folders.opened(args.run_dir, True, settings) as folder:
        found = said_before(folder / SAID)[:number]
        if found:
            print(f"{folder}: {min(args.number, len(found) * args.together)} problems were answered before", flush=True)
        for i in range(len(found), number):
            found.append(answered(i))
            append(folder / SAID, found[-1])
            print(f"{min(args.number, len(found) * args.together)} of {args.number} problems", flush=True)
        judged = [one for batch in found for one in batch.judged][: args.number]
        write(folder, judged, [row for batch in found for row in batch.steps])
        means = report(judged, source.extract)
        summary = {"env_steps": args.number * args.copies, "finished": True, "last": means}
        folders.write_json(folder / "summary.json", summary)


def checked(args: Answer) -> Answer:
    """Raises ``ValueError`` for words of the command line that are wrong."""
    for name in ("number", "copies", "together"):
        checks.positive_int(name, getattr(args, name))
    checks.positive_int("continuations", args.continuations, at_least=0)
    checks.within(
        "continuations, which are at most together * copies,", args.continuations, 0, args.together * args.copies
    )
    if not args.separator:
        raise ValueError("separator: the text behind a step must not be empty")
    if args.temperature == 0 and args.copies > 1:
        raise ValueError(f"copies must be 1 at temperature 0, where all answers are one; got {args.copies}")
    return args


def answering(args: Any, it: Opened, source: verifiers.Source) -> Callable[[int], Batch]:
    """``i ->`` the answers to the problems that are asked together in the i-th place."""
    rows, key = args.together * args.copies, jax.random.key(args.seed)
    support = Support(args.temperature) if args.temperature else Support(top_k=1)
    check_support(support, it.model.vocab_size)
    judge = judge_of(it, source, learned_reward(args, args.precision, it))
    separator = args.separator.replace("\\n", "\n")

    @jax.jit
    def say(params: Any, key: Array, prompt: Array, valid: Array) -> Any:
        more: dict[str, Any] = {"length": args.answer_length, "end": it.words.ends, "pad": it.pad, "support": support}
        return sample(key, it.model, params, prompt, valid=valid, **more)

    def judged(key: Array, drawn: Drawn) -> list[Judged]:
        tokens, valid = asked(args, it, drawn.prompts, args.copies)
        said = said_by(it, args, say(it.params, key, tokens, valid))
        parts, texts = judge([item for item in drawn.items for _ in range(args.copies)], tokens, valid, said)
        places = [slice(i * args.copies, (i + 1) * args.copies) for i in range(len(drawn.items))]
        both = zip(drawn.items, places, strict=True)
        return [
            Judged(item.prompt, texts[at], {name: x[at].tolist() for name, x in parts.items()}) for item, at in both
        ]

    def share(item: verifiers.Item, prompt: list[int], key: Array, begun: str) -> float:
        """How many continuations of an answer that begins so are right."""
        longer = replace(args, prompt_length=args.prompt_length + args.answer_length)
        tokens, valid = asked(longer, it, [(prompt + it.words.encode(begun))[-longer.prompt_length :]], rows)
        texts = judging.texts_of(it.words, said_by(it, args, say(it.params, key, tokens, valid)))[: args.continuations]
        right = verifiers.judge(source, [item] * len(texts), [begun + text for text in texts])["correct"]
        return float(np.nanmean(right))

    def batch(i: int) -> Batch:
        with jax.set_mesh(it.mesh):
            drawn = problems(source, it.words, args, i, args.together, args.seed)
            found = judged(jax.random.fold_in(key, 2 * i), drawn)
            steps: list[dict[str, Any]] = []
            for n in range(len(found) if args.continuations else 0):
                own = jax.random.fold_in(jax.random.fold_in(key, 2 * i + 1), n)
                steps += labelled(separator, own, found[n], partial(share, drawn.items[n], drawn.prompts[n]))
        return Batch(found, steps)

    return batch


def labelled(separator: str, key: Array, one: Judged, share: Callable[[Array, str], float]) -> list[dict[str, Any]]:
    """The first answer to a problem in steps, each right if a continuation behind it is (hard estimation of 2312.08935, section 3.3)."""
    parts = examples.steps_in(one.texts[0], separator)
    begun = ["".join(x + separator for x in parts[:n]) for n in range(1, len(parts))]
    labels = [share(jax.random.fold_in(key, n), x) > 0 for n, x in enumerate(begun)]
    labels.append(bool(one.parts["correct"][0] >= 0.5))
    return [{"prompt": one.prompt, "completions": parts, "labels": labels}] if parts else []


# Files


def said_before(path: Path) -> list[Batch]:
    """What an interrupted run has answered. A line that was not written to its end is taken away."""
    found: list[Batch] = []
    if not path.exists():
        return found
    whole = b""
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            found.append(Batch([Judged(*one) for one in row["judged"]], row["steps"]))
        except (LookupError, TypeError, ValueError):
            break
        whole += line
    disk.replace(path, whole)
    return found


def append(path: Path, batch: Batch) -> None:
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(batch._asdict(), ensure_ascii=False) + "\n")


def write(folder: Path, found: Sequence[Judged], steps: Sequence[dict[str, Any]]) -> None:
    """Data for reward models and DPO: every answer with its label, and a pair of each problem that has a right and a wrong one."""
    judged, pairs = [], []
    for prompt, texts, parts in found:
        worth = parts["correct"] if "correct" in parts else parts[LEARNED]
        known = [(text, x) for text, x in zip(texts, worth, strict=True) if np.isfinite(x)]
        if "correct" in parts:
            judged += [{"prompt": prompt, "completion": text, "label": x >= 0.5} for text, x in known]
        best, worst = (max(known, key=lambda x: sign * x[1], default=None) for sign in (1, -1))
        if best and worst and best[1] > worst[1] and best[0] != worst[0]:
            pairs.append({"prompt": prompt, "chosen": best[0], "rejected": worst[0]})
    for name, rows in (("judged", judged), ("pairs", pairs), ("steps", steps)):
        if rows or name != "steps":
            write_lines(folder / f"{name}.jsonl", rows)
            print(f"{folder / name}.jsonl: {len(rows)} rows")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with disk_errors(path):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# What choosing is worth


def report(found: Sequence[Judged], extract: verifiers.Extract) -> dict[str, float]:
    """What one answer, the most frequent one, the best by the reward model, and any of them are worth: prints means over problems with a 95% interval, and
    gives the means."""
    count, means = len(found[0].texts), {}
    for name in [name for name in ("correct", LEARNED) if name in found[0].parts]:
        scores = np.array([x.parts[name] for x in found])
        rows = {"one answer": np.nanmean(scores, axis=1)}
        if count > 1:
            rows[f"any of {count}"] = np.nanmax(scores, axis=1)
            rows |= {how: scores[np.arange(len(found)), places] for how, places in chosen(found, extract).items()}
        for how, values in rows.items():
            print(f"{name}, {how}: {mean_of(values)}")
            means[f"{name}, {how}"] = float(np.nanmean(values))
    return means


def chosen(found: Sequence[Judged], extract: verifiers.Extract) -> dict[str, list[int]]:
    """The place of the answer that is chosen of each problem's, by each way to choose."""
    count = len(found[0].texts)
    votes = [[extract(text)[0] for text in x.texts] for x in found]
    ways = {f"majority of {count}": [most_frequent(said, [1.0] * count) for said in votes]}
    if LEARNED in found[0].parts:
        worth = [np.array(x.parts[LEARNED]) for x in found]
        shares = [1 / (1 + np.exp(-x)) for x in worth]
        weighed = [most_frequent(said, x) for said, x in zip(votes, shares, strict=True)]
        ways[f"best of {count} by the reward model"] = [int(np.nanargmax(x)) for x in worth]
        ways[f"majority of {count} weighed by the reward model"] = weighed  # 2312.08935, eq. 8
    return ways


def most_frequent(answers: Sequence[str | None], weights: Iterable[float]) -> int:
    """The place of the first of the answers that weigh most together; None, which is no answer, weighs nothing."""
    total: defaultdict[str | None, float] = defaultdict(float)
    for said, weight in zip(answers, weights, strict=True):
        total[said] += 0 if said is None else weight
    return max(range(len(answers)), key=lambda i: (total[answers[i]], -i))


def mean_of(values: np.ndarray) -> str:
    """The mean over problems, with a bootstrap interval."""
    values = values[np.isfinite(values)]
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f}), {stats.seeds(len(values)).replace('seed', 'problem')}"
