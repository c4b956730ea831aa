"""The commands of lm.py that learn from the model's own answers: ``grpo`` and ``ppo``, with verified and learned rewards."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import lm
from jrl.algos import grpo as grpo_
from jrl.algos import ppo_lm, ppo_lm_settings, reward_model
from jrl.lm import data, examples, groups, hf, judging, verifiers
from jrl.lm.model import decoder
from jrl.nets import adapters
from jrl.numerics import checks, optim, precision
from jrl.numerics.settings import check_hyper
from jrl.run import cli, folders, interrupt, language, loggers, memory, steps
from jrl.run.language import Opened
from jrl.run.steps import Row

Array = jax.Array
LORA = adapters.Config("lora")
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
class Answering:
    """What commands that learn from the model's own answers have in common."""

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
    stop: tuple[
        str, ...
    ] = ()  # Texts behind which an answer ends, beside the end tokens and stop strings of the model.
    reward: Path | None = None  # A reward model: the folder of a run of lm.py reward, or one in Hugging Face's layout.
    # Weights of the parts of the reward, as NAME=NUMBER ...; learned is the reward model's. Default: learned=1 with a reward model, else
    # correct=1 and the weights in hyper.
    weight: tuple[str, ...] = ()
    steps: int = 100  # Number of updates.
    # Tokens of the longest prompt. Default: with room to spare for the first hundred problems.
    prompt_length: int | None = None
    overlong: examples.Overlong = (
        "drop"  # Problems with longer prompts are passed over and counted (drop), or lose their beginning (cut).
    )
    # Tokens of the longest answer; default: 16 for numbers, 64 for whole answers and files, else 256.
    answer_length: int | None = None
    eval_dataset: str | None = (
        None  # Data set of evaluations; default: other problems of the same, drawn by another seed.
    )
    eval_every: int = (
        0  # Updates between evaluations on problems that are held out; 0 for none. The best checkpoint is kept.
    )
    eval_prompts: int = 64  # Problems of an evaluation, answered once each.
    save_every: int = 10  # Updates between checkpoints.
    # Number of devices to use; default: all, but only one of a CPU's, which share its cores.
    devices: int | None = None
    # Number of devices that hold one copy of the model together; the answers are shared among the copies.
    model_devices: int = 1
    seed: int = 0  # Seed of all random numbers.
    log: tuple[Literal["wandb"], ...] = ()  # Loggers besides the folder's table and TensorBoard events.


@dataclass(frozen=True)
class GRPO(Answering):
    """Group relative policy optimization: several answers to each prompt, compared with each other."""

    # Folder of the run. If it has a checkpoint, the run continues with its settings: only prompt_length, save_every, the devices and
    # config.micro_batches may differ, which change no mathematics.
    run_dir: cli.NamedFolder = Path("runs/lm-grpo")
    # Static settings; the model is that of the file.
    config: grpo_.Config = field(
        default_factory=lambda: grpo_.Config(num_prompts=4, group_size=4, adapter=LORA, micro_batches=4, kl="none")
    )
    hyper: grpo_.Hyper = grpo_.Hyper(learning_rate=1e-4)  # Hyperparameters.


@dataclass(frozen=True)
class PPO(Answering):
    """PPO with a critic: RLHF with four models where there is a reward model, whose parameters the critic begins with."""

    # Folder of the run. If it has a checkpoint, the run continues with its settings: only prompt_length, save_every, the devices and
    # config.micro_batches may differ, which change no mathematics.
    run_dir: cli.NamedFolder = Path("runs/lm-ppo")
    # Static settings; the model is that of the file.
    config: ppo_lm.Config = field(default_factory=lambda: ppo_lm.Config(num_answers=16, adapter=LORA, micro_batches=2))
    hyper: ppo_lm.Hyper = ppo_lm.Hyper(learning_rate=1e-4)  # Hyperparameters.


class Method(NamedTuple):
    """An algorithm that learns from answers.

    Attributes:
        init: ``(key, params, hyper, updates) -> state``.
        sample: ``(state, key, prompt, valid) -> Rollout``.
        learn: ``(state, key, prompt, valid, rollout, reward) -> (state, metrics)``.
        reward: ``(parts, mask) -> [N]`` by the weights in hyper.
        trained: ``state ->`` parameters of the policy that were trained.
        policy: ``state ->`` the policy's parameters, as they are computed with.
        prompts: Number of problems of an update that answers are drawn for.
        copies: Number of answers to each.
    """

    init: Callable[..., Any]
    sample: Callable[..., Any]
    learn: Callable[..., Any]
    reward: Callable[..., Any]
    trained: Callable[[Any], Any]
    prompts: int
    copies: int


def grpo(argv: list[str]) -> None:
    args = checked(cli.parse(GRPO, argv, doc=GRPO.__doc__))
    config = args.config
    if config.supervised:
        raise ValueError("config.supervised must be 0: a published model needs no supervised start here")
    grpo_.check(config)
    refuse_large(args, config.oversample * config.rows)
    rows = config.rows / (config.num_minibatches * config.micro_batches)
    it, source, args = prepared(args, rows, "num_prompts * group_size / (num_minibatches * micro_batches)")
    learning = grpo_.learner(it.model, config, length=args.answer_length, end=it.words.ends, pad=it.pad)

    def reward(parts: Any, mask: Array) -> Array:
        return grpo_.rewards(config, args.hyper, parts, mask)

    def trained(state: Any) -> Any:
        return optim.eval_params(state.opt_state, state.params)

    method = Method(
        learning.init, learning.sample, learning.learn, reward, trained, config.num_prompts * config.oversample, config.group_size
    )  # fmt: skip
    run(args, it, source, method)


def ppo(argv: list[str]) -> None:
    args = checked(cli.parse(PPO, argv, doc=PPO.__doc__))
    config = args.config
    ppo_lm_settings.check(config)
    refuse_large(args, config.num_answers)
    rows = config.num_answers / (config.num_minibatches * config.micro_batches)
    it, source, args = prepared(args, rows, "num_answers / (num_minibatches * micro_batches)")
    learning = ppo_lm.learner(it.model, config, length=args.answer_length, end=it.words.ends, pad=it.pad)
    given = None if args.reward is None else scorer(args.reward, config.precision, it)[1]

    def init(key: Array, params: Any, hyper: Any, updates: int) -> Any:
        body = {name: x for name, x in params.items() if name != "head"} if given is None else given["body"]
        head = jnp.zeros(it.shape.dim) if given is None else given["head"]
        critic = {"body": body | ({"head": params["head"]} if "head" in params else {}), "head": head}
        return learning.init(key, params, critic, hyper, updates)

    def reward(parts: Any, mask: Array) -> Array:
        return ppo_lm.weighed(args.hyper, parts)

    def trained(state: Any) -> Any:
        return optim.eval_params(state.opt_state, state.params)["actor"]

    run(args, it, source, Method(init, learning.sample, learning.learn, reward, trained, config.num_answers, 1))


# What they share


def checked(args: Any) -> Any:
    """The arguments with the defaults that depend on others. Raises ``ValueError`` for what cannot be trained."""
    form = args.form or ("number" if args.dataset == "chain_sum" else "whole")
    _, instruction, length = FORMS[form]
    answer_length = length if args.answer_length is None else args.answer_length
    for name in ("steps", "save_every", "model_devices", "eval_prompts"):
        checks.positive_int(name, getattr(args, name))
    checks.positive_int("eval_every", args.eval_every, at_least=0)
    checks.positive_int("answer_length", answer_length)
    if args.prompt_length is not None:
        checks.positive_int("prompt_length", args.prompt_length)
    check_hyper(args.hyper)
    judging.weights_of(args.weight)
    if "" in args.stop:
        raise ValueError("stop: a text behind which answers end must not be empty")
    instruction = instruction if args.instruction is None else args.instruction
    return replace(args, form=form, instruction=instruction, answer_length=answer_length)


def refuse_large(args: Any, rows: int) -> None:
    tokens = args.answer_length + (args.prompt_length or 0)
    answers = jax.ShapeDtypeStruct((rows, tokens, 3), jnp.float32)
    memory.refuse_if_too_large("num_prompts, group_size, prompt_length and answer_length", answers)


def prepared(args: Any, rows: float, what: str) -> tuple[Opened, verifiers.Source, Any]:
    """The model, the problems, and the arguments with the length of prompts. Raises ``ValueError`` for what does not fit."""
    mesh = language.mesh_of(args.devices, args.model_devices, int(rows) if rows == int(rows) else 1, what)
    source = source_of(args)
    it = language.opened(args.model, args.config.precision, mesh)
    if args.prompt_length is None:
        count = 4 * BLOCK
        shown = _block(source, args.seed * 1_000_003, count)[:100]
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
    drawn = _block(source, seed * 1_000_003 + block, count * BLOCK)
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
def _block(source: verifiers.Source, seed: int, count: int) -> list[verifiers.Item]:
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


def scorer(path: Path, policy: str, it: Opened) -> tuple[Any, Any]:
    """The decoder and the parameters of a reward model. Raises ``ValueError`` unless it has the policy's vocabulary."""
    folder = path / lm.models.MODEL if (path / lm.models.MODEL).is_dir() else path
    parsed = precision.parse(policy)
    shape, params = hf.load_scorer(folder, parsed.compute)
    if shape.vocab_size != it.shape.vocab_size:
        raise ValueError(f"{path}: its vocabulary must be the model's {it.shape.vocab_size}; got {shape.vocab_size}")
    return decoder(shape, parsed.compute), params


def run(args: Any, it: Opened, source: verifiers.Source, method: Method) -> None:
    """Sample, judge, learn, and leave what was trained in the folder."""
    key_init, key_run = jax.random.split(jax.random.key(args.seed))
    with jax.set_mesh(it.mesh):
        state, where = language.start(it, method.init, key_init, it.params, args.hyper, args.steps)
    sample = jax.jit(method.sample)
    learn = jax.jit(method.learn, donate_argnums=0, out_shardings=(where, None))
    judge = judge_of(args, it, source)
    unseen = source if args.eval_dataset is None else source_of(replace(args, dataset=args.eval_dataset, setting=()))
    judge_unseen = judge_of(args, it, unseen)

    def step(state: Any, done: int) -> tuple[Any, Row, list[dict[str, Any]]]:
        with jax.set_mesh(it.mesh):
            return one_step(
                args, it, source, method, sample, learn, judge, state, jax.random.fold_in(key_run, done), done
            )

    def evaluate(state: Any) -> Row:
        with jax.set_mesh(it.mesh):
            return held_out(args, it, unseen, method, sample, judge_unseen, state)

    settings = settings_of(args, it)
    interrupt.on_leaving(f"interrupted; the same command goes on in {args.run_dir}")
    with folders.opened(args.run_dir, True, settings) as folder:
        plan = steps.Plan(
            folder, settings, args.steps, method.prompts * method.copies, args.seed, args.save_every, evaluate=evaluate,
            evaluated=("reward",), evaluate_every=args.eval_every, best=("reward", True), shown=SHOWN, where=where,
            sinks=loggers.opened(args.log, settings, folder),
        )  # fmt: skip
        state, done, rows = steps.train(plan, state, step)
        state = steps.best_of(plan, state)
    if passed := sum(row.get("overlong_prompts", 0) for row in rows):
        print(f"{passed:.0f} problems with prompts of over {args.prompt_length} tokens were passed over")
    steps.draw_curve(folder / "curve.png", source.name, rows, ["correct", LEARNED, "reward", "eval_reward"])
    if done < args.steps:
        raise KeyboardInterrupt
    print(f"{folder}/curve.png  metrics.csv  {steps.SAMPLES}")
    print(language.leave(folder, it, args.config.adapter, method.trained(state)))


def settings_of(args: Any, it: Opened) -> dict[str, Any]:
    """What a run must share with the one that it goes on from, as flat JSON values."""
    free = ("run_dir", "steps", "save_every", "devices", "model_devices", "prompt_length", "log")
    fixed = {name: x for name, x in asdict(args).items() if name not in free}
    fixed |= {"config": asdict(args.config) | {"model": asdict(it.shape)}, "hyper": args.hyper._asdict()}
    length = {"steps": args.steps} if args.config.optimizer.uses_length else {}
    return folders.plain(fixed | length)


SHOWN = (
    "correct", LEARNED, "reward", "kl", "episode_length", "no_signal", "overlong_prompts", "abstained", "sampled_tokens_per_s",
    "trained_tokens_per_s",
)  # fmt: skip
Judge = Callable[..., tuple[dict[str, np.ndarray], list[str]]]


def judge_of(args: Any, it: Opened, source: verifiers.Source) -> Judge:
    """``(items, prompt, valid, rollout) -> (parts [N], texts)`` of the verifier and the reward model."""
    learned = None
    if args.reward is not None:
        model, params = scorer(args.reward, args.config.precision, it)
        learned = jax.jit(lambda prompt, valid, said: reward_model.scores(model, params, prompt, valid, said)[0])

    def judge(items: Any, prompt: Array, valid: Array, said: Any) -> tuple[dict[str, np.ndarray], list[str]]:
        texts = judging.texts_of(it.words, said)
        parts = verifiers.judge(source, items, texts)
        if learned is not None:
            parts = parts | {LEARNED: np.asarray(learned(prompt, valid, said))}
        return parts, texts

    return judge


def asked(args: Any, it: Opened, prompts: Sequence[Sequence[int]], copies: int) -> tuple[Array, Array]:
    tokens, valid = examples.left_padded([p for p in prompts for _ in range(copies)], args.prompt_length, it.pad)
    return jnp.asarray(tokens), jnp.asarray(valid)


def one_step(args, it, source, method, sample, learn, judge, state, key, done) -> tuple[Any, Row, list[dict[str, Any]]]:
    """Sample, judge, learn: ``(state, metrics, samples)``."""
    key_sample, key_learn = jax.random.split(key)
    drawn = problems(source, it.words, args, done, method.prompts, args.seed)
    tokens, valid = asked(args, it, drawn.prompts, method.copies)
    begin = time.monotonic()
    rollout = jax.block_until_ready(sample(state, key_sample, tokens, valid))
    sampled, count = time.monotonic() - begin, int(rollout.mask.sum())
    if stops := (*args.stop, *it.words.stops):
        rollout = judging.stopped(it.words, rollout, stops)
    rollout = jax.tree.map(jnp.asarray, rollout)
    parts, texts = judge([item for item in drawn.items for _ in range(method.copies)], tokens, valid, rollout)
    judged = np.isfinite(np.stack(list(parts.values()))).all(0)
    reward = jnp.where(judged, total(args, method, parts, rollout.mask, source.name), 0)
    rollout = rollout._replace(mask=rollout.mask & judged[:, None])  # who was not judged takes no part
    row: Any = {"overlong_prompts": drawn.passed, "abstained": np.sum(~judged)}
    if method.copies > 1:
        row |= groups.drawn(reward, rollout.mask, method.copies)
    row |= {"sampled_tokens_per_s": count / sampled}
    batch = (tokens, valid, rollout, reward)
    if getattr(args.config, "oversample", 1) > 1:
        correct = jnp.asarray(parts.get("correct", reward))
        chosen = groups.informative(correct, rollout.mask, method.copies, args.config.num_prompts)
        batch = jax.tree.map(lambda x: x[chosen], batch)
    begin = time.monotonic()
    state, metrics = jax.block_until_ready(learn(state, key_learn, *batch))
    trained = (int(batch[2].mask.sum()) + int(batch[1].sum())) / (time.monotonic() - begin)
    row = {name: float(x) for name, x in (metrics | row).items()} | {"trained_tokens_per_s": trained}
    checks.apart(f"{source.name}: the verifier's parts", parts, [*row, "update", "env_steps", "seed"])
    row |= {name: float(x[judged].mean()) if judged.any() else math.nan for name, x in parts.items()}
    return state, row, samples_of(drawn.items, texts, parts, reward, method.copies)


def total(args: Any, method: Method, parts: dict[str, np.ndarray], mask: Array, name: str) -> Any:
    """The reward ``[N]`` of answers by their parts."""
    if args.weight:
        return judging.weighed(parts, judging.weights_of(args.weight))
    if LEARNED in parts:
        return parts[LEARNED]
    _check_weights(args.hyper, parts, name)
    return method.reward(jax.tree.map(jnp.asarray, parts), mask)


def samples_of(items: Any, texts: list[str], parts: Any, reward: Array, copies: int) -> list[dict[str, Any]]:
    """The first answer to each problem, with a column for each part of its reward."""
    found = []
    for i, item in enumerate(items):
        at = i * copies
        prompt = item.prompt if isinstance(item.prompt, str) else json.dumps(item.prompt, ensure_ascii=False)
        scores = {name: float(x[at]) for name, x in parts.items()}
        found.append({"prompt": prompt, "answer": texts[at], "reward": float(reward[at])} | scores)
    return found


def held_out(args, it, source, method, sample, judge, state) -> Row:
    """Mean reward of answers to problems that are not learned from, drawn as those in training are, with a key that is always the same."""
    per, number = method.prompts, -(-args.eval_prompts // method.prompts)
    rewards = []
    for i in range(number):
        drawn = problems(source, it.words, args, i, per, args.seed + EVAL)
        tokens, valid = asked(args, it, drawn.prompts, method.copies)
        rollout = sample(state, jax.random.fold_in(jax.random.key(args.seed + 1), i), tokens, valid)
        if stops := (*args.stop, *it.words.stops):
            rollout = judging.stopped(it.words, rollout, stops)
        items = [item for item in drawn.items for _ in range(method.copies)]
        parts, _ = judge(items, tokens, valid, rollout)
        rewards.append(np.asarray(total(args, method, parts, rollout.mask, source.name), np.float32))
    return {"reward": float(np.nanmean(np.concatenate(rewards)))}


def _check_weights(hyper: Any, parts: dict[str, np.ndarray], name: str) -> None:
    """Raise for a weight of a part that the verifier does not give."""
    for part in ("format", "close"):
        weight = getattr(hyper, f"{part}_weight")
        if weight and part not in parts:
            raise verifiers.VerifierError(
                f"{name}: hyper.{part}_weight = {weight:g} weighs a part that the verifier does not give; it gives {', '.join(parts)}"
            )
