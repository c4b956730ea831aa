"""Problems, prompts and judges of the commands of lm.py in which a model answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import lm
from jrl.algos import process_reward, reward_model
from jrl.lm import data, examples, hf, judging, verifiers
from jrl.lm.model import Model, decoder
from jrl.lm.pairs import as_rollout
from jrl.nets import transformer
from jrl.numerics import checks, precision
from jrl.run import cli, language
from jrl.run.language import Opened

Array = jax.Array
Judge = Callable[..., tuple[dict[str, np.ndarray], list[str]]]
Learned = Callable[[Array, Array, Any, list[str]], Array]  # (prompt, valid, rollout, texts) -> [N]
BLOCK = 100  # updates whose problems are drawn at once
EVAL = 10_007  # added to the seed of problems that are held out
LEARNED = "learned"  # the part of a reward that a reward model gives

# What of a completion is judged, what is asked for it, and the tokens of the longest answer.
FORMS: dict[str, tuple[verifiers.Extract, str, int]] = {
    "number": (verifiers.last_number, "\n\nAnswer with the number alone.", 16),
    "whole": (verifiers.whole, "\n\nWrite the answer and nothing else.", 64),
    "boxed": (verifiers.boxed, "\n\nThink step by step, and put the final answer in \\boxed{}.", 256),
    "tagged": (verifiers.tagged, verifiers.INSTRUCTION, 256),
}


@dataclass(frozen=True)
class Asking:
    """How a model is asked, and what judges its answers."""

    model: Path  # A .gguf file, a folder with config.json, safetensors and tokenizer.json, or the folder of a run.
    # Data set of reasoning-gym, a Python file with make(seed) -> verifiers.Source, or JSON lines with prompts.
    dataset: str = "chain_sum"
    # Settings of the data set, as NAME=NUMBER ...; by default chain_sum has two terms of one digit.
    setting: tuple[str, ...] = ()
    # Form of an answer to reasoning-gym: number (the last one in the text), whole (all of it), boxed or tagged; default: number for
    # chain_sum, whole for others.
    form: Literal["number", "whole", "boxed", "tagged"] | None = None
    instruction: str | None = None  # Text behind each problem of reasoning-gym; default: by form.
    system: str | None = None  # Message of the system before each prompt.
    template: tuple[str, ...] = ()  # Options of the chat template, as NAME=VALUE ..., such as enable_thinking=false.
    # Texts behind which an answer ends, beside the end tokens and stop strings of the model.
    stop: tuple[str, ...] = ()
    # A reward model: the folder of a run of lm.py reward or process, or one in Hugging Face's layout.
    reward: Path | None = None
    # Tokens of the longest prompt. Default: with room to spare for the first hundred problems.
    prompt_length: int | None = None
    # Problems with longer prompts are passed over and counted (drop), or lose their beginning (cut).
    overlong: examples.Overlong = "drop"
    # Tokens of the longest answer; default: 16 for numbers, 64 for whole answers and files, else 256.
    answer_length: int | None = None
    # Number of devices to use; default: all, but only one of a CPU's, which share its cores.
    devices: int | None = None
    # Number of devices that hold one copy of the model together; the answers are shared among the copies.
    model_devices: int = 1
    seed: int = 0  # Seed of all random numbers.


def with_defaults(args: Any) -> Any:
    """The arguments with the defaults that depend on others. Raises ``ValueError`` for what cannot be asked."""
    form = args.form or ("number" if args.dataset == "chain_sum" else "whole")
    _, instruction, length = FORMS[form]
    answer_length = length if args.answer_length is None else args.answer_length
    checks.positive_int("model_devices", args.model_devices)
    checks.positive_int("answer_length", answer_length)
    if args.prompt_length is not None:
        checks.positive_int("prompt_length", args.prompt_length)
    if "" in args.stop:
        raise ValueError("stop: a text behind which answers end must not be empty")
    instruction = instruction if args.instruction is None else args.instruction
    return replace(args, form=form, instruction=instruction, answer_length=answer_length)


def prepared(args: Any, policy: str, rows: float, what: str) -> tuple[Opened, verifiers.Source, Any]:
    """The model, the problems, and the arguments with the length of prompts. Raises ``ValueError`` for what does not fit."""
    mesh = language.mesh_of(args.devices, args.model_devices, int(rows) if rows == int(rows) else 1, what)
    source = source_of(args)
    it = language.opened(args.model, policy, mesh)
    if args.prompt_length is None:
        count = 4 * BLOCK
        shown = block_of(source, args.seed * 1_000_003, count)[:100]
        args = replace(args, prompt_length=room_for([tokens_of(it.words, item.prompt, args) for item in shown]))
    return it, source, args


def source_of(args: Any) -> verifiers.Source:
    """Problems of a file or of reasoning-gym."""
    settings = cli.parse_params(args.setting)
    if taken := {"seed", "threshold", "extract", "instruction", "seconds"} & settings.keys():
        raise ValueError(
            f"setting: {', '.join(sorted(taken))} is not the dataset's; see --seed, --form and --instruction"
        )
    if args.dataset.endswith(".py"):
        return verifiers.from_file(args.dataset, args.seed, **settings)
    if args.dataset.endswith((".jsonl", ".json")):
        if args.reward is None:
            raise ValueError(
                f"{args.dataset} has prompts alone: what is worth an answer? --reward names a reward model"
            )
        return verifiers.from_prompts([row["prompt"] for row in data.read(args.dataset, "prompts")], args.dataset)
    easy = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1} if args.dataset == "chain_sum" else {}
    extract = FORMS[args.form or "whole"][0]
    asked: dict[str, Any] = {"extract": extract, "instruction": args.instruction or ""}
    return verifiers.reasoning_gym(args.dataset, args.seed, **asked | easy | settings)


class Drawn(NamedTuple):
    """Problems of an update, the tokens of their prompts, and how many were passed over since theirs are too long."""

    items: list[verifiers.Item]
    prompts: list[list[int]]
    passed: int


def problems(source: verifiers.Source, words: lm.Tokenizer, args: Any, step: int, count: int, seed: int) -> Drawn:
    """Of one update. So many updates draw together, so that a source that shuffles shows all before it shows one again."""
    longest = args.prompt_length
    block, place = divmod(step, BLOCK)
    drawn = block_of(source, seed * 1_000_003 + block, count * BLOCK)
    found = Drawn([], [], 0)
    for item in drawn[place * count :] + drawn[: place * count]:
        tokens = tokens_of(words, item.prompt, args)
        if len(tokens) > longest and args.overlong == "drop":
            found = found._replace(passed=found.passed + 1)
            continue
        found.items.append(item)
        found.prompts.append(tokens[-longest:])
        if len(found.items) == count:
            return found
    raise ValueError(
        f"prompt_length = {longest} fits {len(found.items)} of {len(drawn)} prompts, and an update takes {count}"
    )


@lru_cache(maxsize=2)
def block_of(source: verifiers.Source, seed: int, count: int) -> list[verifiers.Item]:
    return source.draw(seed, count)


def room_for(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens for prompts like these: a quarter more than the longest, in steps of 32."""
    return -(-5 * max(map(len, prompts)) // 4 // 32) * 32


def tokens_of(words: lm.Tokenizer, prompt: Any, args: Any) -> list[int]:
    """As a user's message behind the system's, or as it stands where the model knows no conversations; messages as they are."""
    if isinstance(prompt, str) and words.template is None:
        if args.system is not None:
            raise ValueError("system: this model has no chat template")
        return words.encode(prompt, begin=True)
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return words.encode(words.chat([*system, *said], **cli.parse_params(args.template)))


class Scorer(NamedTuple):
    """A reward model: its shape, its decoder, its parameters ``{"body", "head"}``, and what stands behind each step of an answer, for one that judges steps."""

    shape: transformer.Config
    model: Model
    params: Any
    separator: str | None


def scorer(path: Path, policy: str, it: Opened) -> Scorer:
    """The reward model of a folder. Raises ``ValueError`` unless it has the policy's vocabulary."""
    folder = lm.models.place_of(path)
    parsed = precision.parse(policy)
    shape, params = hf.load_scorer(folder, parsed.compute)
    if shape.vocab_size != it.shape.vocab_size:
        raise ValueError(f"{path}: its vocabulary must be the model's {it.shape.vocab_size}; got {shape.vocab_size}")
    if (folder / "tokenizer.json").is_file():
        theirs, ours = lm.tokenizer.from_folder(folder).raw.get_vocab(), it.words.raw.get_vocab()
        if apart := next((word for word in theirs if ours.get(word) != theirs[word]), None):
            raise ValueError(
                f"{path}: its tokens must be the model's; it has {apart!r} as number {theirs[apart]}, the model {ours.get(apart)}"
            )
    return Scorer(shape, decoder(shape, parsed.compute), params, hf.read_json(folder / "config.json").get(hf.SEPARATOR))


def judge_of(it: Opened, source: verifiers.Source, learned: Learned | None) -> Judge:
    """``(items, prompt, valid, rollout) -> (parts [N], texts)`` of the verifier, and of the learned reward where there is one."""

    def judge(items: Any, prompt: Array, valid: Array, said: Any) -> tuple[dict[str, np.ndarray], list[str]]:
        texts = judging.texts_of(it.words, said)
        parts = verifiers.judge(source, items, texts)
        if learned is not None:
            parts = parts | {LEARNED: np.asarray(learned(prompt, valid, said, texts))}
        return parts, texts

    return judge


def learned_reward(args: Any, policy: str, it: Opened) -> Learned | None:
    """The reward model that the command line names, or None."""
    return None if args.reward is None else learned_by(scorer(args.reward, policy, it), it)


def learned_by(judge: Scorer, it: Opened) -> Learned:
    """``(prompt, valid, rollout, texts) -> [N]``: the score of an answer, or, of a model that judges steps, that of its weakest step (2312.08935,
    section 3.4), both log-odds."""

    # Parameters are an argument, for constants would be part of the program.
    @jax.jit
    def of_answers(params: Any, prompt: Array, valid: Array, said: Any) -> Array:
        return reward_model.scores(judge.model, params, prompt, valid, said)[0]

    @jax.jit
    def of_steps(params: Any, prompt: Array, valid: Array, said: Any, ends: Array) -> Array:
        logits, _ = process_reward.logits(judge.model, params, prompt, valid, said)
        return jnp.min(jnp.where(ends, logits, jnp.inf), axis=1)

    def learned(prompt: Array, valid: Array, said: Any, texts: list[str]) -> Array:
        if judge.separator is None:
            return of_answers(judge.params, prompt, valid, said)
        tokens, mask, ends = examples.in_steps(it.words, texts, judge.separator, it.pad)
        return of_steps(
            judge.params, prompt, valid, as_rollout(jnp.asarray(tokens), jnp.asarray(mask)), jnp.asarray(ends)
        )

    return learned


def read_by(args: Any) -> dict[str, list[Path]]:
    """The files that problems and rewards are read from, by the words of the command line that name them."""
    named = {name: getattr(args, name, None) for name in ("dataset", "eval_dataset")}
    files = {name: [Path(x)] for name, x in named.items() if x is not None and x.endswith((".py", ".jsonl", ".json"))}
    return files | ({} if args.reward is None else {"reward": lm.models.files_of(args.reward)})


def asked(args: Any, it: Opened, prompts: Sequence[Sequence[int]], copies: int) -> tuple[Array, Array]:
    tokens, valid = examples.left_padded([p for p in prompts for _ in range(copies)], args.prompt_length, it.pad)
    return jnp.asarray(tokens), jnp.asarray(valid)


def said_by(it: Opened, args: Any, rollout: Any) -> Any:
    """The answers, cut where a stop string of the command line or of the model stands."""
    stops = (*args.stop, *it.words.stops)
    return judging.stopped(it.words, rollout, stops) if stops else rollout
