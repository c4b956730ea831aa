"""One process that resumes runs and loads models by their commands, one after another.

It compiles the programs of a kind of run but once, and does not draw the curve; that is all in which it differs from the command.
"""

import atexit
import json
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as gguf_package
import jax

from attacks import language_model, processes
from jrl import lm
from jrl.algos import grpo
from jrl.lm import gguf, hf, layout
from jrl.nets import moe, transformer
from jrl.run import cli, compiled, loop, scores, steps

SECONDS = 120.0  # until a case counts as hanging
MEMORY = 24 << 30  # bytes of address space


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
    steps.StopOnSignal = Stop
    steps.plot.draw = lambda *_: None
    learner = grpo.learner

    def learner_once(model: Any, config: Any, **more: Any) -> Any:
        name = ("learner", str(config), str(more))
        if name not in kept:
            kept[name] = learner(model, config, **more)
        return kept[name]

    grpo.learner = learner_once


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
