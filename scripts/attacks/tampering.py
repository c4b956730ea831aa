"""Damaged files of runs, which are then resumed, and of language models, which are then loaded.

A run of each kind is made once, stopped after five of its seven updates. A case damages one thing in a copy of its folder and resumes the
copy by the experiment's command. Either the command ends with exit status 1 and one line that names the path, or what the run then
holds is what the undamaged copy holds when it is resumed.

One process resumes one copy after another, so that it compiles the programs of a kind but once. That, and the curve that it need not
draw, is all in which it differs from the command.
"""

import atexit
import csv
import functools
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf as gguf_package
import jax
import numpy as np
from pyarrow import parquet

from attacks import language_model, processes
from jrl import lm
from jrl.lm import gguf, hf, layout
from jrl.nets import moe, transformer
from jrl.run import checkpoint, cli, compiled, log, loop, scores

COUNT = 2000
SECONDS = 120.0  # until a case counts as hanging
MEMORY = 24 << 30  # bytes of address space
UPDATES, STOPPED = 7, 5

COMMON = ("--env", "Probe-action", "--preset", "none", "--log-every", "1", "--eval-every", "16", "--eval-episodes", "1")
ON_POLICY = ("--config.num-envs", "2", "--config.num-steps", "4", "--config.num-epochs", "1", "--config.num-minibatches", "1",)  # fmt: skip
OFF_POLICY = ("--config.num-envs", "2", "--config.num-steps", "4", "--config.batch-size", "4", "--config.capacity", "32",
              "--config.learning-starts", "8", "--config.num-gradient-steps", "1")  # fmt: skip
TRAINED = {
    "ppo": ("ppo.py", (*COMMON, *ON_POLICY, "--num-seeds", "2")),
    "dqn": ("dqn.py", (*COMMON, *OFF_POLICY, "--num-seeds", "2")),
    "pqn": ("pqn.py", (*COMMON, *ON_POLICY, "--num-seeds", "2")),
    "sweep": ("ppo.py", (*COMMON, *ON_POLICY, "--num-seeds", "2", "--sweep", "hyper.learning_rate=0.001,0.01")),
    "parquet": ("ppo.py", (*COMMON, *ON_POLICY, "--num-seeds", str(log.CSV_MEMBERS + 1))),
    "finished": ("ppo.py", (*COMMON, *ON_POLICY, "--num-seeds", "1")),
}
GRPO = ("--prompt-length", "4", "--answer-length", "3", "--config.lora-rank", "4", "--save-every", "2", "--steps", str(UPDATES),)  # fmt: skip
RUNS = (*TRAINED, "grpo_llm")
MODELS = ("folder", "shards", "experts", "saved", "gguf")


class Case(NamedTuple):
    """What is damaged, and how; the rest is drawn from the number."""

    kind: str
    part: str
    damage: str
    number: int


# --- Cases ---

FILE = (
    "flip a bit", "change a byte", "zero a part", "cut off", "empty", "append", "swap with a sibling", "take another run's", "remove",
    "a folder", "a link to nowhere", "a pickle",
)  # fmt: skip
JSON = ("a wrong value", "a wrong value", "a wrong value", "a key less", "a key more", "nested deeply")
ROWS = ("a row twice", "a row less", "shuffled rows", "another digit", "a column less")
PARTS = {
    "state": FILE, "older state": FILE, "marks": FILE, "manifest": FILE + JSON, "sealed manifest": JSON,
    "config.json": FILE + JSON, "metrics": FILE + ROWS, "evaluations.json": FILE + JSON, "summary.json": FILE + JSON,
    "events": FILE, "checkpoints": ("renamed", "swapped", "newest removed", "all removed", "a file", "another run's", "a name"),
    "folders": ("state removed", "manifest removed", "state of the other", "manifest of the other", "a link to nowhere"),
}  # fmt: skip
WEIGHTS = {"state": 5, "manifest": 3, "metrics": 4, "config.json": 2, "checkpoints": 2}
GRPO_PARTS = {
    name: PARTS[name] for name in ("state", "marks", "manifest", "sealed manifest", "metrics", "checkpoints", "folders")
}
MODEL_PARTS = {
    "config.json": FILE + JSON * 4, "weights": FILE, "header": JSON, "index": (*FILE, *JSON, "a path"), "tokenizer.json": FILE + JSON * 2,
    "tokenizer_config.json": FILE + JSON * 2, "generation_config.json": FILE + JSON * 2, "chat_template.jinja": FILE,
}  # fmt: skip


def parts_of(kind: str) -> dict[str, tuple[str, ...]]:
    """What of a kind can be damaged, and how."""
    if kind == "grpo_llm":
        return GRPO_PARTS | {"answers.txt": FILE + ROWS[:3]}
    if kind in TRAINED:
        return PARTS
    if kind == "gguf":
        return {"file": FILE, "metadata": ("a wrong value",)}
    return {name: damages for name, damages in MODEL_PARTS.items() if name != "index" or kind == "shards"}


def cases(seed: int, count: int) -> list[Case]:
    """Three of four are runs, the fourth a model."""
    rng, found = random.Random(f"tampering {seed}"), []
    for number in range(count):
        kind = rng.choice(MODELS if number % 4 == 3 else RUNS)
        parts = parts_of(kind)
        (part,) = rng.choices([*parts], [WEIGHTS.get(name, 1) for name in parts])
        found.append(Case(kind, part, rng.choice(parts[part]), rng.randrange(10**9)))
    return found


# --- The process that resumes and loads ---


def _load(argv: list[str]) -> None:
    """A model, and its tokenizer in use."""
    config, params, words = lm.load(argv[0])
    text = words.decode(words.encode("say 1 2"))
    if words.template is not None:
        text += words.chat([{"role": "user", "content": "say 1"}])
    print(f"loaded {config.dim} {sum(x.size for x in jax.tree.leaves(params))} {text!r}")


def _serve(questions: int, answers: int) -> None:
    """Commands, one a line, each with a file for what it prints; the exit statuses, one a line."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _compile_once()
    with open(questions) as lines:
        for line in lines:
            name, words, folder, printed, stop = json.loads(line)
            file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.close(file)
            os.chdir(folder)
            Stop.left = stop
            os.write(answers, f"{_status(name, words)}\n".encode())


def _status(name: str, words: list[str]) -> int:
    """Exit status of a command, as Python would give it."""
    sys.argv = [name, *words]
    try:
        cli.main({"load": _load, "make": make_model}.get(name) or processes.script(name).main)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Stop(loop.StopOnSignal):
    """A signal that comes after so many updates."""

    left: int | None = None

    @property
    def requested(self) -> bool:
        if Stop.left is None:
            return False
        Stop.left -= 1
        return Stop.left < 0

    @requested.setter
    def requested(self, value: bool) -> None:
        pass

    def result(self, future: Any) -> Any:
        return future.result()


def _compile_once() -> None:
    """Keep the compiled programs of a kind of run for the next run of that kind."""
    kept: dict[Any, Any] = {}
    build, compile_scorer, watch = compiled.build, scores.Scorer.compile, loop.NanWatch

    def build_once(algo: Any, members: Any, names: Any, total: int, every: int, *more: Any, **how: Any) -> Any:
        name = ("chunk", algo.name, len(members.labels), every, str(members.keys))
        if name not in kept:
            kept[name] = build(algo, members, names, total, every, *more, **how)
        return kept[name]._replace(start=jax.tree.map(lambda x: x.copy(), kept[name].start))  # for a chunk takes it

    def compile_once(self: Any, states: Any) -> None:
        name = ("scores", self._algo.name, self._layout.num_members)
        if name not in kept:
            compile_scorer(self, states)
            kept[name] = self._programs
        self._programs = kept[name]

    def watch_once(algo: Any, labels: Any, layout: Any) -> Any:
        made = watch(algo, labels, layout)
        made._is_broken = kept.setdefault(("broken", algo.name, len(labels)), made._is_broken)
        return made

    compiled.build, scores.Scorer.compile, loop.NanWatch = build_once, compile_once, watch_once
    loop.CHUNK_SECONDS = 0.0
    loop.StopOnSignal = Stop
    loop.report.write_curves = lambda *_: None
    check, check_act = loop.check, loop.check_act

    def check_once(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(algo: Any, *more: Any) -> Any:
            name = (what, algo.name, str(algo.config))
            if name not in kept:
                kept[name] = function(algo, *more)
            return kept[name]

        return checked

    loop.check, loop.check_act = check_once("check", check), check_once("act", check_act)
    language = processes.script("grpo_llm.py")
    language.StopOnSignal = Stop
    language.plot.draw = lambda *_: None
    learner = language.grpo.learner

    def learner_once(model: Any, config: Any, **more: Any) -> Any:
        name = ("learner", str(config), str(more))
        if name not in kept:
            kept[name] = learner(model, config, **more)
        return kept[name]

    language.grpo.learner = learner_once


class Server:
    """The process, which is begun again where a case ends it."""

    def __init__(self) -> None:
        self._process: processes.Process | None = None

    def run(self, name: str, words: list[str], folder: Path, printed: Path, stop: int | None = None) -> processes.Ended:
        """A command in a folder, which may stop after so many updates."""
        if self._process is None:
            self._begin()
        question = json.dumps([name, words, str(folder), str(printed), stop]) + "\n"
        os.write(self._questions, question.encode())
        seconds = SECONDS * (5 if stop is not None else 1)
        ready, _, _ = select.select([self._answers], [], [], seconds)
        answer = os.read(self._answers, 100).decode() if ready else ""
        if not answer:
            code = self._end() if ready else None
            self._end()
        else:
            code = int(answer)
        return processes.Ended(code, printed.read_text(errors="replace"), 0.0)

    def _begin(self) -> None:
        assert processes.no_device_used()
        questions, self._questions = os.pipe()
        self._answers, answers = os.pipe()

        def body() -> None:
            os.close(self._questions)
            os.close(self._answers)
            _serve(questions, answers)

        self._process = processes.Process(body, Path.cwd(), Path(os.devnull))
        os.close(questions)
        os.close(answers)

    def _end(self) -> int | None:
        if self._process is None:
            return None
        self._process.send(signal.SIGKILL)
        code = self._process.wait(10).code
        self._process = None
        os.close(self._questions)
        os.close(self._answers)
        return code


SERVER = Server()
atexit.register(SERVER._end)


# --- What is attacked ---


@functools.cache
def bases(root: Path) -> Path:
    """The folder of all that is damaged in copies: of each kind one, and another one beside it."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    return root


@functools.cache
def base(root: Path, kind: str, other: bool = False) -> Path:
    """A run that was stopped, or a model."""
    path = bases(root) / (f"{kind}-other" if other else kind)
    if kind in MODELS:
        ended = SERVER.run("make", [kind, str(path), str(int(other))], root, root / "log", STOPPED)
    else:
        if kind == "grpo_llm":
            base(root, "folder")
        stop = UPDATES if kind == "finished" else STOPPED
        ended = SERVER.run(*command(root, kind, path, "--seed", str(int(other))), root, root / "log", stop)
    if ended.code not in (0, 130):
        raise RuntimeError(f"{path} could not be made: {ended.output}")
    return path


def command(root: Path, kind: str, folder: Path, *more: str) -> tuple[str, list[str]]:
    """The experiment, and its words."""
    if kind == "grpo_llm":
        model = base(root, "folder")
        return "grpo_llm.py", [
            "--model",
            str(model),
            "--dataset",
            str(model / "say.py"),
            "--folder",
            str(folder),
            *GRPO,
            *more,
        ]
    name, words = TRAINED[kind]
    return name, [*words, "--run-dir", str(folder), "--env-steps", str(8 * UPDATES), *more]


def attacked(root: Path, case: Case, folder: Path) -> tuple[str, list[str]]:
    """The command that is to refuse the folder, or to notice nothing."""
    if case.kind in MODELS:
        return "load", [str(folder / "model.gguf" if case.kind == "gguf" else folder)]
    return command(root, case.kind, folder, *([] if case.kind == "grpo_llm" else ["--resume"]))


@functools.cache
def undamaged(root: Path, kind: str) -> dict[str, Any]:
    """What an undamaged copy holds in the end."""
    case, copy = Case(kind, "", "", 0), bases(root) / f"{kind}-whole"
    shutil.copytree(base(root, kind), copy)
    ended = SERVER.run(*attacked(root, case, copy), root, root / "log")
    if ended.code != 0:
        raise RuntimeError(f"{copy} could not be read: {ended.output}")
    return held(copy)


def held(folder: Path) -> dict[str, Any]:
    """What may not differ: the last checkpoint's arrays by their checksums, the metrics, the evaluations, the summary's scores."""
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    manifest = json.loads((folder / f"checkpoints/{steps[-1]}/manifest/metadata").read_text())
    found = {"updates": steps[-1], "arrays": manifest["arrays"], "metrics": metrics(folder)}
    for name in ("evaluations.json", "summary.json"):
        if (folder / name).exists():
            found[name] = json.loads((folder / name).read_text())
    for name in ("compile_seconds", "run_seconds", "env_steps_per_second", "crc32"):
        found.get("summary.json", {}).pop(name, None)
    return found


def metrics(folder: Path) -> Any:
    """The table's rows; speeds left out."""
    if (folder / "metrics").is_dir():
        return [str(parquet.read_table(path).to_pydict()) for path in sorted((folder / "metrics").glob("*.parquet"))]
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if "per_s" not in str(k)} for row in csv.DictReader(file)]


def make_model(argv: list[str]) -> None:
    """A tiny model of random weights in one of the forms that are read."""
    kind, folder, seed = argv[0], Path(argv[1]), int(argv[2])
    more = {"experts": moe.Config(2, 1, 8)} if kind == "experts" else {"qk_norm": True, "head_dim": 4}
    config = transformer.Config(
        vocab_size=len(language_model.SYMBOLS),
        dim=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        ffn_dim=8,
        tie_embeddings=False,
        **more,
    )
    params = transformer.init(jax.random.key(seed), config)
    folder.mkdir()
    if kind == "gguf":
        return write_gguf(folder / "model.gguf", config, params, language_model.SYMBOLS)
    language_model.write_words(folder, pad_token={"content": "0"})
    (folder / "say.py").write_text(language_model.PROBLEMS)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    if kind != "folder":  # which trains with texts as they stand
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}")
    hf.save(folder, config, params, shard_bytes=600 if kind == "shards" else 10**9)
    if kind == "saved":
        lm.save(folder, *lm.load(folder))


def write_gguf(path: Path, config: transformer.Config, params: Any, symbols: list[str]) -> None:
    """The model and its tokens in one file."""
    writer = gguf_package.GGUFWriter(path, "qwen3")
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.inner)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.width)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(symbols)
    writer.add_token_types([3, *[1] * (len(symbols) - 1)])
    writer.add_token_merges(["1 2"] if "12" in symbols else [])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}")
    for name, x in layout.scatter(params, layout.tensors(config)):
        writer.add_tensor(gguf._name(name), x)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()


# --- Damage ---


class Payload:
    """A pickle that leaves a mark where it is read."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._mark}",)


WRONG = (
    None, [], {}, "", "x", True, float("nan"), -1, 0, 1.5, 10**30, "1e400", "../../x", [None], {"a": 1}, [[1]], "\ud800", "'; import os",
)  # fmt: skip
DEEP = "[" * 100_000
RAW = {"1e400": "1e400", "deep": DEEP}


def files_of(folder: Path, case: Case) -> list[Path]:
    """The files of the part that is damaged."""
    steps = sorted((path for path in (folder / "checkpoints").glob("[0-9]*")), key=lambda path: int(path.name))
    where = {
        "state": lambda: (steps[-1] / "state").rglob("*"),
        "older state": lambda: (steps[0] / "state").rglob("*"),
        "marks": lambda: [*steps[-1].rglob("commit_success.txt"), *steps[-1].rglob("_*METADATA")],
        "manifest": lambda: [steps[-1] / "manifest/metadata"],
        "sealed manifest": lambda: [steps[-1] / "manifest/metadata"],
        "metrics": lambda: [*folder.glob("metrics.csv"), *folder.glob("metrics/*")],
        "events": lambda: (folder / "events").glob("*"),
        "weights": lambda: folder.glob("*.safetensors"),
        "header": lambda: folder.glob("*.safetensors"),
        "index": lambda: [folder / hf.INDEX],
        "file": lambda: [folder / "model.gguf"],
        "metadata": lambda: [folder / "model.gguf"],
    }.get(case.part, lambda: [folder / case.part])
    return sorted((path for path in where() if path.is_file()), key=lambda path: (path.stat().st_size, path.name))


def damage(case: Case, folder: Path, other: Path, mark: Path) -> str | None:
    """Do it; says to what it was done, or None if there is nothing to damage."""
    rng = random.Random(case.number)
    if case.part == "checkpoints":
        return _among_checkpoints(case.damage, folder / "checkpoints", other / "checkpoints")
    if case.part == "folders":
        return _within_checkpoint(case.damage, folder / "checkpoints")
    files = files_of(folder, case)
    if not files:
        return None
    path = rng.choice(files)
    before = path.read_bytes()
    if case.damage in ROWS:
        _rows(rng, case.damage, path)
    elif case.part == "metadata":
        _gguf(rng, path)
    elif case.part == "header":
        _header(rng, case.damage, path)
    elif case.damage in JSON or case.damage == "a path":
        text = before.decode()
        changed = _json(rng, case.damage, text)
        path.write_text(_sealed(changed) if case.part == "sealed manifest" else changed)
    else:
        _file(rng, case.damage, path, other / path.relative_to(folder), mark)
    same = path.is_file() and not path.is_symlink() and path.read_bytes() == before
    return None if same else str(path.relative_to(folder))


def _file(rng: random.Random, how: str, path: Path, other: Path, mark: Path) -> None:
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data)) if data else 0
    if how == "flip a bit" and data:
        data[place] ^= 1 << rng.randrange(8)
    elif how == "change a byte" and data:
        data[place] = rng.randrange(256)
    elif how == "zero a part" and data:
        end = min(len(data), place + rng.randrange(1, 65))
        data[place:end] = bytes(end - place)
    elif how == "cut off":
        del data[place:]
    elif how == "empty":
        data.clear()
    elif how == "append":
        data += rng.choice([b"\0" * 9, b"x\n", b",,,\n", rng.randbytes(40), bytes(data[:50])])
    elif how == "a pickle":
        data = bytearray(pickle.dumps(Payload(mark)))
    elif how == "swap with a sibling":
        siblings = sorted(x for x in path.parent.iterdir() if x.is_file() and x != path)
        if not siblings:
            return
        sibling = rng.choice(siblings)
        data, there = bytearray(sibling.read_bytes()), bytes(data)
        sibling.write_bytes(there)
    elif how == "take another run's":
        if not other.is_file():
            matching = sorted(other.parent.glob("*")) if other.parent.is_dir() else []
            if not matching or not matching[0].is_file():
                return
            other = matching[0]
        data = bytearray(other.read_bytes())
    else:
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how == "a link to nowhere":
            path.symlink_to(path.with_name("nowhere"))
        return
    path.write_bytes(data)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Each container of a tree of JSON with each of its keys."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in [(tree, key), *_places(value)]]


def _json(rng: random.Random, how: str, text: str) -> str:
    tree = json.loads(text)
    places = _places(tree)
    if how == "a wrong value" and rng.random() < 0.1:
        return rng.choice(["null", "[]", "{}", "1", '"x"', "NaN", "[1]", "[{}]", '{"a": []}'])
    if not places:
        return text + " x"
    levels = {
        id(node): len(_places(node)) for node, _ in places
    }  # fields near the root are as likely as those of long lists
    node, key = rng.choices(places, [1 / (1 + len(node)) * (1 + levels[id(node)]) ** 0.3 for node, _ in places])[0]
    if how == "a wrong value":
        node[key] = rng.choice(WRONG)
    elif how == "a key less":
        del node[key]
    elif how == "a key more":
        if isinstance(node, dict):
            node[rng.choice(["x", "../x", "__class__", "", "0", "chat_template", "updates"])] = rng.choice(WRONG)
        else:
            node.append(rng.choice(WRONG))
    elif how == "a path":
        tree["weight_map"][rng.choice([*tree["weight_map"]])] = rng.choice(
            ["../folder/model.safetensors", "/etc/passwd", "..", ".", "a\0b"]
        )
    else:
        node[key] = "deep"
    text = json.dumps(tree, indent=2)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw, 1)
    return text


def _sealed(text: str) -> str:
    """With the right checksum of what it holds."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(tree, dict):
        return text
    return json.dumps(checkpoint.sealed({name: value for name, value in tree.items() if name != checkpoint.SEAL}))


def _header(rng: random.Random, how: str, path: Path) -> None:
    """The JSON at the head of a file of safetensors."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = _json(rng, how, data[8 : 8 + size].decode()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def _gguf(rng: random.Random, path: Path) -> None:
    """A value of the metadata, in its place."""
    reader = gguf_package.GGUFReader(path, "r+")
    fields = [field for name, field in reader.fields.items() if name != "general.alignment"]
    part = rng.choice(rng.choice(fields).parts)
    flat = part.view(np.uint8).reshape(-1)
    if rng.random() < 0.5:
        flat[rng.randrange(len(flat))] = rng.randrange(256)
    else:
        flat[:] = rng.choice([0, 1, 127, 255])
    reader.data.flush()


def _rows(rng: random.Random, how: str, path: Path) -> None:
    if path.suffix == ".parquet":
        return _parquet(rng, how, path)
    head, *rows = path.read_text().splitlines(keepends=True)
    place = rng.randrange(len(rows))
    if how == "a row twice":
        rows.insert(rng.randrange(len(rows)), rows[place])
    elif how == "a row less":
        del rows[place]
    elif how == "shuffled rows":
        rng.shuffle(rows)
    elif how == "another digit":
        digits = [i for i, c in enumerate(rows[place]) if c.isdigit()]
        i = rng.choice(digits)
        rows[place] = rows[place][:i] + str((int(rows[place][i]) + 1) % 10) + rows[place][i + 1 :]
    else:
        column = rng.randrange(head.count(",") + 1)
        head, *rows = [
            ",".join(cells[:column] + cells[column + 1 :])
            for cells in (x.rstrip("\r\n").split(",") for x in (head, *rows))
        ]
        head, rows = head + "\r\n", [row + "\r\n" for row in rows]
    path.write_text("".join([head, *rows]), newline="")


def _parquet(rng: random.Random, how: str, path: Path) -> None:
    rows = parquet.read_table(path)
    order = [*range(len(rows))]
    if how == "a row twice":
        order.insert(rng.choice(order), rng.choice(order))
    elif how == "a row less":
        del order[rng.choice(order)]
    elif how == "shuffled rows":
        rng.shuffle(order)
    name = rng.choice(rows.column_names)
    rows = rows.take(order)
    if how == "another digit":
        values = rows[name].to_numpy().copy()
        values[rng.choice(order)] += 1
        rows = rows.set_column(rows.column_names.index(name), name, [values])
    elif how == "a column less":
        rows = rows.drop_columns([name])
    parquet.write_table(rows, path)


def _among_checkpoints(how: str, folder: Path, other: Path) -> str:
    steps = sorted((path for path in folder.glob("[0-9]*")), key=lambda path: int(path.name))
    newest = steps[-1]
    if how == "renamed":
        newest.rename(newest.with_name(str(int(newest.name) + 1)))
    elif how == "a name":
        newest.rename(newest.with_name(newest.name + "x"))
    elif how == "swapped":
        newest.rename(folder / "aside")
        steps[0].rename(newest)
        (folder / "aside").rename(steps[0])
    elif how == "all removed":
        shutil.rmtree(folder)
    else:
        shutil.rmtree(newest)
        if how == "a file":
            newest.write_text("x")
        elif how == "another run's":
            shutil.copytree(other / newest.name, newest)
    return f"checkpoints, {how}"


def _within_checkpoint(how: str, folder: Path) -> str:
    steps = sorted((path for path in folder.glob("[0-9]*")), key=lambda path: int(path.name))
    part = "manifest" if "manifest" in how else "state"
    shutil.rmtree(steps[-1] / part)
    if "other" in how:
        shutil.copytree(steps[0] / part, steps[-1] / part)
    elif "link" in how:
        (steps[-1] / part).symlink_to("nowhere")
    return f"checkpoints/{steps[-1].name}, {how}"


# --- An attack ---


def attempt(case: Case, folder: Path) -> tuple[str | None, dict[str, int]]:
    """Damage a copy, and use it."""
    root = folder.parent / "bases"
    original = base(root, case.kind)
    other = base(root, case.kind, other=True) if "another run's" in case.damage else Path(os.devnull)
    expected = undamaged(root, case.kind) if case.kind in RUNS else None
    copy, mark = folder / "copy", folder / "executed"
    shutil.copytree(original, copy)
    what = damage(case, copy, other, mark)
    if what is None:
        return None, {"nothing to damage": 1}
    ended = SERVER.run(*attacked(root, case, copy), folder, folder / "log")
    broke, count = judged(case, ended, copy, expected)
    if mark.exists():
        broke = "what a file held was executed"
    return (None if broke is None else f"{what}: {broke}"), {count: 1}


def judged(case: Case, ended: processes.Ended, folder: Path, expected: dict[str, Any] | None) -> tuple[str | None, str]:
    """What was wrong with the end, if anything, and what the end was."""
    lines = ended.output.strip().splitlines()
    if ended.code is None:
        return "did not end", "hung"
    if "Traceback" in ended.output:
        return f"a traceback: {lines[-1][:200]}", "traceback"
    if ended.code == 0 and expected is None:
        return None, "loaded"
    if ended.code == 0:
        found = held(folder)
        differing = [
            name
            for name in expected
            if found.get(name) != expected[name] and not less(found.get(name), expected[name], name)
        ]
        return (f"different data accepted: {', '.join(differing)}" if differing else None), "changed nothing"
    errors = [line for line in lines if line.startswith("error: ")]
    if ended.code != 1:
        return f"exit status {ended.code}: {lines[-1:]}", "died"
    if len(errors) != 1 or lines[-1] != errors[0]:
        return f"{len(errors)} lines of error: {lines[-3:]}", "refused"
    if str(folder) not in errors[0] and "the chat template refuses" not in errors[0]:
        return f"the path is not named: {errors[0][:300]}", "refused"
    return None, "refused"


def less(found: Any, expected: Any, name: str) -> bool:
    """Whether all that is found is right: a record that was removed says less, but nothing wrong."""
    if name == "evaluations.json":
        return all(entry in expected for entry in found or [])
    return False
