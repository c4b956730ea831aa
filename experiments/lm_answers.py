"""The commands of lm.py that learn from the model's own answers: ``grpo`` and ``ppo``, with verified and learned rewards."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from lm_problems import (
    EVAL,
    LEARNED,
    Asking,
    asked,
    judge_of,
    learned_reward,
    prepared,
    problems,
    read_by,
    said_by,
    scorer,
    source_of,
    with_defaults,
)

from jrl.algos import grpo as grpo_
from jrl.algos import ppo_lm, ppo_lm_settings
from jrl.lm import groups, judging, verifiers
from jrl.nets import adapters
from jrl.numerics import checks, optim
from jrl.numerics.settings import check_hyper
from jrl.run import cli, folders, interrupt, language, loggers, memory, steps
from jrl.run.language import Opened
from jrl.run.steps import Row

Array = jax.Array
LORA = adapters.Config("lora")


@dataclass(frozen=True)
class Answering(Asking):
    """What commands that learn from the model's own answers have in common."""

    # Weights of the parts of the reward, as NAME=NUMBER ...; learned is the reward model's. Default: learned=1 with a reward model, else
    # correct=1 and the weights in hyper.
    weight: tuple[str, ...] = ()
    steps: int = 100  # Number of updates.
    # Data set of evaluations; default: the same, drawn by another seed, and of a list of problems a tenth, which is not learned from.
    eval_dataset: str | None = None
    # Updates between evaluations, whose best checkpoint is kept; 0 for none.
    eval_every: int = 0
    eval_prompts: int = 64  # Problems of an evaluation.
    save_every: int = 10  # Updates between checkpoints.
    log: tuple[Literal["wandb"], ...] = ()  # Loggers besides the folder's table and TensorBoard events.


@dataclass(frozen=True)
class GRPO(Answering):
    """Group relative policy optimization: several answers to each prompt, compared with each other."""

    # Folder of the run. If it has a checkpoint, the run goes on with the same settings: only prompt_length, save_every, the devices and
    # config.micro_batches may differ, which change no mathematics.
    run_dir: cli.NamedFolder = Path("runs/lm-grpo")
    # Static settings.
    config: grpo_.Config = field(
        default_factory=lambda: grpo_.Config(num_prompts=4, group_size=4, adapter=LORA, micro_batches=4, kl="none")
    )
    hyper: grpo_.Hyper = grpo_.Hyper(learning_rate=1e-4)  # Hyperparameters.


@dataclass(frozen=True)
class PPO(Answering):
    """PPO with a critic: RLHF with four models where there is a reward model, whose parameters the critic begins with."""

    # Folder of the run. If it has a checkpoint, the run goes on with the same settings: only prompt_length, save_every, the devices and
    # config.micro_batches may differ, which change no mathematics.
    run_dir: cli.NamedFolder = Path("runs/lm-ppo")
    # Static settings.
    config: ppo_lm.Config = field(default_factory=lambda: ppo_lm.Config(num_answers=16, adapter=LORA, micro_batches=2))
    hyper: ppo_lm.Hyper = ppo_lm.Hyper(learning_rate=1e-4)  # Hyperparameters.


class Method(NamedTuple):
    """An algorithm that learns from answers.

    Attributes:
        name: Name of its module.
        init: ``(key, params, hyper, updates, ...) -> state``.
        sample: ``(state, key, prompt, valid) -> Rollout``.
        learn: ``(state, key, prompt, valid, rollout, reward) -> (state, metrics)``.
        reward: ``(parts, mask) -> [N]`` by the weights in hyper.
        trained: ``state ->`` parameters of the policy that were trained.
        prompts: Number of problems of an update that answers are drawn for.
        copies: Number of answers to each.
    """

    name: str
    init: Callable[..., Any]
    sample: Callable[..., Any]
    learn: Callable[..., Any]
    reward: Callable[..., Any]
    trained: Callable[[Any], Any]
    prompts: int
    copies: int


def grpo(argv: list[str]) -> None:
    args = checked(cli.parse(cli.without(GRPO, "config", "model", "supervised"), argv, doc=GRPO.__doc__))
    config = args.config
    grpo_.check(config)
    refuse_large(args, config.oversample * config.rows)
    rows = config.rows / (config.num_minibatches * config.micro_batches)
    it, source, args = prepared(
        args, config.precision, rows, "num_prompts * group_size / (num_minibatches * micro_batches)"
    )
    learning = grpo_.learner(it.model, config, length=args.answer_length, end=it.words.ends, pad=it.pad)

    def reward(parts: Any, mask: Array) -> Array:
        return grpo_.rewards(config, args.hyper, parts, mask)

    def trained(state: Any) -> Any:
        return optim.eval_params(state.opt_state, state.params)

    method = Method(
        "grpo", learning.init, learning.sample, learning.learn, reward, trained, config.num_prompts * config.oversample, config.group_size
    )  # fmt: skip
    run(args, it, source, method)


def ppo(argv: list[str]) -> None:
    args = checked(cli.parse(cli.without(PPO, "config", "model"), argv, doc=PPO.__doc__))
    config = args.config
    ppo_lm_settings.check(config)
    refuse_large(args, config.num_answers)
    rows = config.num_answers / (config.num_minibatches * config.micro_batches)
    it, source, args = prepared(args, config.precision, rows, "num_answers / (num_minibatches * micro_batches)")
    learning = ppo_lm.learner(it.model, config, length=args.answer_length, end=it.words.ends, pad=it.pad)
    judge = None if args.reward is None else scorer(args.reward, config.precision, it)
    same = judge is not None and judge.shape == replace(it.shape, tie_embeddings=True, remat=False)
    print(f"the critic begins as the {'reward model' if same else 'policy, with a head of zeros'}", flush=True)

    def init(key: Array, params: Any, hyper: Any, updates: int, critic: Any) -> Any:
        body = {name: x for name, x in params.items() if name != "head"}
        begin = {"body": body, "head": jnp.zeros(it.shape.dim)} if critic is None else critic
        return learning.init(key, params, begin, hyper, updates)

    def reward(parts: Any, mask: Array) -> Array:
        return ppo_lm.weighed(args.hyper, parts)

    def trained(state: Any) -> Any:
        return optim.eval_params(state.opt_state, state.params)["actor"]

    critic = judge.params if same and judge is not None else None
    method = Method("ppo_lm", init, learning.sample, learning.learn, reward, trained, config.num_answers, 1)
    run(args, it, source, method, critic)


# What they share


def checked(args: Any) -> Any:
    """The arguments with the defaults that depend on others. Raises ``ValueError`` for what cannot be trained."""
    for name in ("steps", "save_every", "eval_prompts"):
        checks.positive_int(name, getattr(args, name))
    checks.positive_int("eval_every", args.eval_every, at_least=0)
    check_hyper(args.hyper)
    judging.weights_of(args.weight)
    return with_defaults(args)


def refuse_large(args: Any, rows: int) -> None:
    tokens = args.answer_length + (args.prompt_length or 0)
    answers = jax.ShapeDtypeStruct((rows, tokens, 3), jnp.float32)
    memory.refuse_if_too_large("num_prompts, group_size, prompt_length and answer_length", answers)


def run(args: Any, it: Opened, source: verifiers.Source, method: Method, *more: Any) -> None:
    """Sample, judge, learn, and leave what was trained in the folder; ``more`` is what the method's ``init`` takes besides."""
    key_init, key_run = jax.random.split(jax.random.key(args.seed))
    with jax.set_mesh(it.mesh):
        state, where = language.start(it, method.init, key_init, it.params, args.hyper, args.steps, *more)
    sample = jax.jit(method.sample)
    learn = jax.jit(steps.unless_broken(method.learn), donate_argnums=0, out_shardings=(where, None))
    source, unseen = apart(args, source)
    learned = learned_reward(args, args.config.precision, it)
    judge, judge_unseen = (judge_of(it, x, learned) for x in (source, unseen))

    def step(state: Any, done: int) -> tuple[Any, Row, list[dict[str, Any]]]:
        with jax.set_mesh(it.mesh):
            return one_step(
                args, it, source, method, sample, learn, judge, state, jax.random.fold_in(key_run, done), done
            )

    def evaluate(state: Any) -> Row:
        with jax.set_mesh(it.mesh):
            return held_out(args, it, unseen, method, sample, judge_unseen, state)

    settings = settings_of(args, it, method.name)
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


def settings_of(args: Any, it: Opened, algorithm: str) -> dict[str, Any]:
    """What a run must share with the one that it goes on from."""
    length = {"steps": args.steps} if args.config.optimizer.uses_length else {}
    return language.settings_of(algorithm, args, it, read_by(args), env=Path(args.dataset).name, **length)


def apart(args: Any, source: verifiers.Source) -> tuple[verifiers.Source, verifiers.Source]:
    """Problems to learn from and those of evaluations. Of a list a tenth, at most ``eval_prompts``, is held out where evaluations are asked for."""
    if args.eval_dataset is not None:
        return source, source_of(replace(args, dataset=args.eval_dataset, setting=()))
    if not args.eval_every or source.split is None:
        return source, source
    return source.split(args.eval_prompts, args.seed)


SHOWN = (
    "correct", LEARNED, "reward", "kl", "episode_length", "no_signal", "overlong_prompts", "abstained", "sampled_tokens_per_s",
    "trained_tokens_per_s",
)  # fmt: skip


def one_step(args, it, source, method, sample, learn, judge, state, key, done) -> tuple[Any, Row, list[dict[str, Any]]]:
    """Sample, judge, learn: ``(state, metrics, samples)``."""
    key_sample, key_learn = jax.random.split(key)
    drawn = problems(source, it.words, args, done, method.prompts, args.seed)
    tokens, valid = asked(args, it, drawn.prompts, method.copies)
    begin = time.monotonic()
    rollout = jax.block_until_ready(sample(state, key_sample, tokens, valid))
    sampled, count = time.monotonic() - begin, int(rollout.mask.sum())
    rollout = said_by(it, args, rollout)
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
        rollout = said_by(it, args, sample(state, jax.random.fold_in(jax.random.key(args.seed + 1), i), tokens, valid))
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
