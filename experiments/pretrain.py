"""A language model from nothing: a tokenizer, pre-training on texts, fine-tuning on answers, and what each is worth.

python experiments/pretrain.py                                       on the texts that come with Python
python experiments/pretrain.py --text mine.txt more.jsonl --qa answers.jsonl --vocab-sizes 4096 --updates 2000 --num-seeds 1
python experiments/pretrain.py --resume --run-dir runs/mine          goes on; what is finished is not repeated

Trains a byte-level BPE tokenizer of each size and a decoder on each: more tokens make texts shorter, and each token harder. Then a decoder that was
pre-trained and one that was not are fine-tuned on questions and answers for equally long. All seeds are one program. By default the texts are Python's
language reference, and the questions are functions of its library, the answers what their documentation says first. Leaves pretrain.csv, pretrain.png,
and the first seed's fine-tuned model in Hugging Face's layout, for experiments/lm.py.
"""

import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import lm
from jrl.algos import sft
from jrl.lm import data, examples, texts, tokenizer
from jrl.lm.model import Model, decoder
from jrl.lm.texts import Texts
from jrl.nets import transformer
from jrl.numerics import checks
from jrl.run import cli, folders, plot, report, stats

Array = jax.Array
SHAPE = transformer.Config(dim=96, num_layers=3, num_heads=4, num_kv_heads=2)
MODULES = (
    "argparse", "array", "ast", "asyncio", "base64", "bisect", "builtins", "calendar", "codecs", "collections", "configparser", "contextlib",
    "csv", "datetime", "decimal", "difflib", "email.message", "enum", "fractions", "functools", "glob", "hashlib", "heapq", "html", "http.client",
    "inspect", "io", "ipaddress", "itertools", "json", "locale", "logging", "math", "operator", "os", "os.path", "pathlib", "pickle", "platform",
    "pprint", "queue", "random", "re", "sched", "shutil", "signal", "socket", "sqlite3", "statistics", "string", "struct", "subprocess", "sys",
    "tarfile", "tempfile", "textwrap", "threading", "time", "tokenize", "traceback", "types", "unicodedata", "urllib.parse", "uuid", "zipfile",
)  # fmt: skip
POINTS = 10  # of a curve of fine-tuning


@dataclass(frozen=True)
class Args:
    """Train tokenizers and language models from nothing."""

    text: tuple[
        Path, ...
    ] = ()  # Texts: .txt files, or JSON lines with text or messages. Default: Python's language reference.
    # Questions and answers: JSON lines with prompt and completion, or messages. Default: functions of Python's library and what they do.
    qa: tuple[Path, ...] = ()
    vocab_sizes: tuple[int, ...] = (259, 512, 1024, 2048, 4096)  # Tokens of each tokenizer; 259 are bytes alone.
    tuned_vocab: int | None = (
        None  # Tokens of the tokenizer that is fine-tuned with; default: the one with the fewest bits per byte.
    )
    model: transformer.Config = field(
        default_factory=lambda: SHAPE
    )  # Shape of the decoder; the vocabulary is the tokenizer's.
    updates: int = 400  # Updates of pre-training.
    tune_updates: int = 200  # Updates of fine-tuning.
    batch_size: int = 8  # Rows of an update.
    length: int = 128  # Tokens of a row.
    learning_rate: float = 3e-3  # Learning rate of pre-training.
    tune_learning_rate: float = 1e-3  # Learning rate of fine-tuning.
    share: float = 0.1  # Share of the texts, and of the questions, that is held out.
    num_seeds: int = 4  # Seeds, trained together.
    seed: int = 0  # Seed from whose key every seed's key is split.
    run_dir: cli.RunDir = None  # Folder of the results; default: a new one in runs/.
    resume: bool = False  # Continue in run_dir; what is finished is not repeated.


class Rows(NamedTuple):
    """Texts as rows, those that are learned from and those that are held out, and how many bytes a held-out token stands for."""

    seen: Texts
    unseen: Texts
    bytes_per_token: float


# The texts


def language_reference() -> list[str]:
    """What Python says of its own language."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return [part for name in sorted(topics) for part in _parts(topics[name])]


def _parts(text: str, most: int = 4000) -> Iterator[str]:
    """A text in parts of up to about so many characters, cut between paragraphs."""
    part = ""
    for paragraph in text.split("\n\n"):
        if part and len(part) + len(paragraph) > most:
            yield part
            part = ""
        part += paragraph + "\n\n"
    if part.strip():
        yield part


def library_questions() -> list[dict[str, str]]:
    """Functions and classes of Python's library, and the first sentence of their documentation."""
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in map(importlib.import_module, MODULES):
            for name, x in sorted(vars(module).items()):
                inner = sorted(vars(x).items()) if inspect.isclass(x) else []
                for path, y in [(name, x), *((f"{name}.{n}", z) for n, z in inner)]:
                    said = " ".join((inspect.getdoc(y) or "").split("\n\n")[0].split()) if callable(y) else ""
                    if 15 < len(said) < 160 and "_" not in (path[0], path.rpartition(".")[2][0]):
                        found.setdefault(said, f"{module.__name__}.{path}")
    return [{"prompt": f"What does {name} do?", "completion": said} for said, name in found.items()]


def texts_of(args: Args) -> list[str]:
    if not args.text:
        return language_reference()
    found: list[str] = []
    for path in args.text:
        if path.suffix in (".jsonl", ".json"):
            found += [row.get("text") or json.dumps(row, ensure_ascii=False) for row in data.read(path, "texts")]
            continue
        try:
            found += list(_parts(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    return found


def split(rows: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Rows that are learned from, and those that are held out, always the same."""
    order = np.random.default_rng(0).permutation(len(rows))
    held_out = max(1, int(len(rows) * share))
    if held_out >= len(rows):
        raise ValueError(f"share = {share:g} leaves none of the {len(rows)} rows to learn from")
    return [rows[i] for i in order[:-held_out]], [rows[i] for i in order[-held_out:]]


def rows_of(words: lm.Tokenizer, both: Sequence[Sequence[dict[str, Any]]], args: Args) -> Rows:
    """Rows of texts that are learned from, and of those that are held out."""
    corpora = [examples.tokenized(words, rows) for rows in both]
    plans = [texts.pack(corpus.lengths, args.length, "bfd_split") for corpus in corpora]
    made = [texts.rows_of(plan, x, args.length, words.ends[0]) for plan, x in zip(plans, corpora, strict=True)]
    size = len(words.decode(corpora[1].tokens[corpora[1].learned].tolist()).encode())
    return Rows(made[0], made[1], size / int(made[1].learned.sum()))


# Learning


def learner_of(words: lm.Tokenizer, args: Args) -> tuple[Model, sft.Learner]:
    shape = replace(args.model, vocab_size=words.vocab_size)
    model = decoder(shape)
    return model, sft.learner(model, sft.Config(shape, batch_size=args.batch_size), packed=True)


def trained(
    key: Array, start: Any, learning: sft.Learner, rows: Rows, args: Args, updates: int, rate: float
) -> tuple[Any, Array]:
    """Parameters after so many updates, and the loss of a held-out token at the beginning and along the way, ``[POINTS + 1]``. Pure: vmap it."""
    key_state, key_order = jax.random.split(key)
    state = learning.init(key_state, start, sft.Hyper(learning_rate=rate), updates)
    number, every = len(rows.seen.tokens), max(1, updates // POINTS)
    seen, unseen = (jax.tree.map(jnp.asarray, x) for x in (rows.seen, rows.unseen))

    def step(state: Any, key: Array) -> tuple[Any, None]:
        chosen = jax.random.randint(key, (args.batch_size,), 0, number)
        return learning.learn(state, key, jax.tree.map(lambda x: x[chosen], seen))[0], None

    def some(state: Any, keys: Array) -> tuple[Any, Array]:
        state, _ = jax.lax.scan(step, state, keys)
        return state, learning.evaluate(state, unseen)["loss"]

    keys = jax.random.split(key_order, POINTS * every).reshape(POINTS, every)
    first = learning.evaluate(state, unseen)["loss"]
    state, losses = jax.lax.scan(some, state, keys)
    return learning.policy(state), jnp.concatenate([first[None], losses])


def pretrained(args: Args, keys: Array, words: lm.Tokenizer, rows: Rows) -> tuple[Any, np.ndarray]:
    """Parameters of all seeds, and held-out losses ``[seeds, POINTS + 1]``."""
    model, learning = learner_of(words, args)

    def one(key: Array) -> tuple[Any, Array]:
        key_start, key_train = jax.random.split(key)
        return trained(key_train, model.init(key_start), learning, rows, args, args.updates, args.learning_rate)

    params, losses = jax.jit(jax.vmap(one))(keys)
    return params, np.asarray(losses)


def tuned(args: Args, keys: Array, words: lm.Tokenizer, rows: Rows, start: Any) -> tuple[Any, np.ndarray]:
    """Fine-tuned parameters of all seeds, and held-out losses; ``start`` are pre-trained ones, or None for random ones."""
    model, learning = learner_of(words, args)

    def one(key: Array, params: Any) -> tuple[Any, Array]:
        key_start, key_train = jax.random.split(key)
        begin = model.init(key_start) if params is None else params
        return trained(key_train, begin, learning, rows, args, args.tune_updates, args.tune_learning_rate)

    params, losses = jax.jit(jax.vmap(one, in_axes=(0, None if start is None else 0)))(keys, start)
    return params, np.asarray(losses)


# The results


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    for name in ("updates", "tune_updates", "batch_size", "length", "num_seeds"):
        checks.positive_int(name, getattr(args, name))
    checks.not_empty(vocab_sizes=args.vocab_sizes)
    for size in args.vocab_sizes:
        checks.positive_int("vocab_sizes", size, at_least=259)
    if args.tuned_vocab is not None:
        checks.one_of("tuned_vocab", args.tuned_vocab, args.vocab_sizes)
    checks.within("share", args.share, 0, 0.9)
    folder = cli.folder_of_runs(args.run_dir, args.resume, "pretrain")
    found = texts_of(args)
    questions = [dict(row) for row in data.read(args.qa, "texts")] if args.qa else library_questions()
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"{len(found)} texts, {sum(map(len, found)):,} characters; {len(questions)} questions",
        file=sys.stderr,
        flush=True,
    )
    key_texts, key_qa = jax.random.split(jax.random.key(args.seed))
    keys, qa_keys = (jax.random.split(key, args.num_seeds) for key in (key_texts, key_qa))

    rows, lines = [], []
    kept: dict[int, lm.Tokenizer] = {}
    starts: dict[int, Any] = {}  # pre-trained parameters, for those that are fine-tuned
    both = tuple([{"text": text} for text in part] for part in split(found, args.share))
    for size in args.vocab_sizes:
        words = tokenizer.train((row["text"] for row in both[0]), size)
        kept[size] = words
        result = remembered(folder, f"vocab-{size}", args, partial(pretraining, args, keys, words, both, starts))
        losses, per_token = np.array(result["losses"]), result["bytes_per_token"]
        bits = losses / np.log(2) / per_token
        rows.append(row_of(words.vocab_size, per_token, losses[:, -1], bits[:, -1], args))
        at = np.arange(POINTS + 1) * max(1, args.updates // POINTS)
        lines.append((f"{words.vocab_size} tokens", at, bits))
        print(
            f"{words.vocab_size} tokens: {stats.brief(bits[:, -1], '.3f')} bits per byte", file=sys.stderr, flush=True
        )
    report.print_table(folder / "pretrain.csv", rows)
    best = args.vocab_sizes[int(np.argmin([np.mean(bits[:, -1]) for _, _, bits in lines]))]
    size = args.tuned_vocab or best
    words = kept[size]

    def tune() -> dict[str, Any]:
        if words.vocab_size not in starts:  # its losses were remembered, and its parameters were not
            pretraining(args, keys, words, both, starts)
        return tuning(args, qa_keys, words, questions, starts[words.vocab_size], folder)

    result = remembered(folder, f"tuned-{size}", args, tune)
    at = np.arange(POINTS + 1) * max(1, args.tune_updates // POINTS)
    curves = [(name, at, np.array(result[name])) for name in ("pre-trained", "from nothing")]
    table = [
        {"fine-tuned": name, "loss, start": stats.brief(x[:, 0], ".3f"), "loss, half way": stats.brief(x[:, POINTS // 2], ".3f"),
         "loss, end": stats.brief(x[:, -1], ".3f")}
        for name, _, x in curves
    ]  # fmt: skip
    print(f"\nfine-tuning on {len(questions)} questions with {size} tokens, {args.tune_updates} updates:")
    report.print_table(folder / "tuned.csv", table)
    panels = [
        plot.Panel("Pre-training", "update", "bits per held-out byte", lines),
        plot.Panel("Fine-tuning", "update", "loss of a held-out token", curves),
    ]
    plot.draw(folder / "pretrain.png", panels)
    print(f"{folder}/pretrain.png  {folder}/model")


def remembered(folder: Path, name: str, args: Args, make: Any) -> dict[str, Any]:
    """What ``make`` gives, kept in the folder."""
    free = ("run_dir", "resume", "vocab_sizes", "tuned_vocab")
    settings = folders.plain({key: x for key, x in asdict(args).items() if key not in free})
    return folders.remembered(folder / f"{name}.json", settings, make)


def pretraining(args: Args, keys: Array, words: lm.Tokenizer, both: Any, starts: dict[int, Any]) -> dict[str, Any]:
    """Held-out losses of pre-training with a tokenizer; the parameters go into ``starts``."""
    rows = rows_of(words, both, args)
    starts[words.vocab_size], losses = pretrained(args, keys, words, rows)
    return {"losses": losses.tolist(), "bytes_per_token": rows.bytes_per_token}


def tuning(
    args: Args, qa_keys: Array, words: lm.Tokenizer, questions: Any, params: Any, folder: Path
) -> dict[str, Any]:
    """Held-out losses of fine-tuning after pre-training, which gave ``params``, and without it; the first seed's model is left in the folder."""
    rows = rows_of(words, split(questions, args.share), args)
    after, losses = tuned(args, qa_keys, words, rows, params)
    _, alone = tuned(args, qa_keys, words, rows, None)
    lm.save(
        folder / "model", replace(args.model, vocab_size=words.vocab_size), jax.tree.map(lambda x: x[0], after), words
    )
    return {"pre-trained": losses.tolist(), "from nothing": alone.tolist()}


def row_of(size: int, per_token: float, loss: np.ndarray, bits: np.ndarray, args: Args) -> dict[str, Any]:
    shape = replace(args.model, vocab_size=size)
    count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: transformer.init(jax.random.key(0), shape))))
    return {
        "tokens": size,
        "parameters": f"{count:,}",
        "bytes a token": f"{per_token:.2f}",
        "loss of a token": stats.brief(loss, ".3f"),
        "bits per byte": stats.brief(bits, ".3f"),
    }


if __name__ == "__main__":
    cli.main(main)
