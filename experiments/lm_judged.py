"""The command ``answer`` of lm.py: answers of a model, judged, as data for reward models and DPO, and what choosing among them is worth."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from lm_problems import LEARNED, Asking, Drawn, asked, judge_of, prepared, problems, said_by, with_defaults

from jrl.lm import judging, verifiers
from jrl.lm.sampling import Support, check_support, sample
from jrl.numerics import checks
from jrl.run import cli, stats
from jrl.run.checkpoint import disk_errors

Array = jax.Array


@dataclass(frozen=True)
class Answer(Asking):
    """Answer problems several times, judge the answers, and write them as data."""

    number: int = 64  # Number of problems.
    copies: int = 8  # Answers to each.
    together: int = 8  # Problems that are answered at once.
    temperature: float = 1.0  # Temperature at which answers are sampled.
    # Continuations behind each step of an answer, whose share of right ones labels it (Math-Shepherd); 0 for none.
    continuations: int = 0
    separator: str = "\\n"  # Text behind each step; \\n is a line break.
    precision: str = "float32"  # float32, bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    out: Path = Path("runs/lm-answers")  # Folder for judged.jsonl, pairs.jsonl and steps.jsonl, which are written anew.


class Judged(NamedTuple):
    """A problem, its answers as texts, and their parts."""

    item: verifiers.Item
    texts: list[str]
    parts: dict[str, np.ndarray]


def answer(argv: list[str]) -> None:
    args = with_defaults(cli.parse(Answer, argv, doc=Answer.__doc__))
    for name in ("number", "copies", "together"):
        checks.positive_int(name, getattr(args, name))
    checks.positive_int("continuations", args.continuations, at_least=0)
    if not args.separator:
        raise ValueError("separator: the text behind a step must not be empty")
    rows = args.together * args.copies
    checks.within("continuations", args.continuations, 0, rows)
    it, source, args = prepared(args, args.precision, rows, "together * copies")
    if args.continuations and source.score is None:
        raise ValueError("continuations: nothing verifies the answers to these prompts")
    support = Support(args.temperature)
    check_support(support, it.model.vocab_size)
    judge = judge_of(args, args.precision, it, source)

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
        return [Judged(item, texts[at], {name: x[at] for name, x in parts.items()}) for item, at in both]

    def share(key: Array, item: verifiers.Item, prompt: list[int], begun: str) -> float:
        """How many continuations of an answer that begins so are right."""
        longer = replace(args, prompt_length=args.prompt_length + args.answer_length)
        tokens, valid = asked(longer, it, [(prompt + it.words.encode(begun))[-longer.prompt_length :]], rows)
        texts = judging.texts_of(it.words, said_by(it, args, say(it.params, key, tokens, valid)))[: args.continuations]
        right = verifiers.judge(source, [item] * len(texts), [begun + text for text in texts])["correct"]
        return float(np.nanmean(right))

    found: list[Judged] = []
    steps: list[dict[str, Any]] = []
    key = jax.random.key(args.seed)
    with jax.set_mesh(it.mesh):
        for i in range(-(-args.number // args.together)):
            drawn = problems(source, it.words, args, i, args.together, args.seed)
            new = judged(jax.random.fold_in(key, 2 * i), drawn)
            found += new
            print(f"{min(len(found), args.number)} of {args.number} problems", flush=True)
            if args.continuations:
                for n, (one, prompt) in enumerate(zip(new, drawn.prompts, strict=True)):
                    own = jax.random.fold_in(jax.random.fold_in(key, 2 * i + 1), n)
                    steps += labelled(args.separator.replace("\\n", "\n"), own, one, prompt, share)
    found = found[: args.number]
    write(args.out, found, steps)
    report(found)


def labelled(
    separator: str, key: Array, one: Judged, prompt: list[int], share: Callable[..., float]
) -> list[dict[str, Any]]:
    """The first answer to a problem in steps, each labelled by whether at least half of the continuations behind it are right (2312.08935, section 3.3)."""
    parts = [x for x in one.texts[0].split(separator) if x.strip()]
    begun = ["".join(x + separator for x in parts[:n]) for n in range(1, len(parts))]
    labels = [share(jax.random.fold_in(key, n), one.item, prompt, x) >= 0.5 for n, x in enumerate(begun)]
    labels.append(bool(one.parts["correct"][0] >= 0.5))
    return [{"prompt": one.item.prompt, "completions": parts, "labels": labels}] if parts else []


def write(folder: Path, found: list[Judged], steps: list[dict[str, Any]]) -> None:
    """Data for reward models and DPO: every answer with its label, and a pair of each problem that has a right and a wrong one."""
    judged, pairs = [], []
    for item, texts, parts in found:
        worth = parts.get("correct", parts.get(LEARNED))
        assert worth is not None
        known = [(text, float(x)) for text, x in zip(texts, worth, strict=True) if np.isfinite(x)]
        if "correct" in parts:
            judged += [{"prompt": item.prompt, "completion": text, "label": x >= 0.5} for text, x in known]
        best, worst = (max(known, key=lambda x: sign * x[1], default=None) for sign in (1, -1))
        if best and worst and best[1] > worst[1] and best[0] != worst[0]:
            pairs.append({"prompt": item.prompt, "chosen": best[0], "rejected": worst[0]})
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("judged", judged), ("pairs", pairs), ("steps", steps)):
        if rows or name != "steps":
            write_lines(folder / f"{name}.jsonl", rows)
            print(f"{folder / name}.jsonl: {len(rows)} rows")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with disk_errors(path):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def report(found: list[Judged]) -> None:
    """What one answer, the most frequent one, the best by the reward model, and any of them are worth: means over problems with a 95% interval."""
    names = [name for name in ("correct", LEARNED) if name in found[0].parts]
    count = len(found[0].texts)
    for name in names:
        scores = np.stack([x.parts[name] for x in found])
        rows = {"one answer": np.nanmean(scores, axis=1), f"any of {count}": np.nanmax(scores, axis=1)}
        rows[f"majority of {count}"] = np.array([x.parts[name][most_frequent(x.texts)] for x in found])
        if LEARNED in names:
            rows[f"best of {count} by the reward model"] = np.array(
                [x.parts[name][int(np.nanargmax(x.parts[LEARNED]))] for x in found]
            )
        for how, values in rows.items():
            print(f"{name}, {how}: {mean_of(values)}")


def most_frequent(texts: list[str]) -> int:
    """The place of the first of the texts that occur most often."""
    return max(range(len(texts)), key=lambda i: (texts.count(texts[i]), -i))


def mean_of(values: np.ndarray) -> str:
    """The mean over problems, with a bootstrap interval."""
    values = values[np.isfinite(values)]
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f}), {stats.seeds(len(values)).replace('seed', 'problem')}"
