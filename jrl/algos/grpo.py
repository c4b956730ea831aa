"""Group relative policy optimization of a language model on verified rewards (Shao et al. 2024, arXiv 2402.03300), and its kin.

One update: draw prompts, answer each of them ``group_size`` times, verify the answers, and step down a clipped loss in which an
answer's advantage is its reward against those of its group, no critic needed:

    A_i = (R_i - mean(R)) / (std(R) + eps)        r = pi(token) / pi_old(token)
    L = mean over answers of the mean over tokens of  -min(r A, clip(r, 1 - low, 1 + high) A) + beta KL        (eq. 3-4)

What differs between methods are independent settings: how advantages are made, the loss of a token, how tokens are averaged, and
where a KL to the reference goes. ``METHODS`` names the published compositions; ``method("dapo")`` gives one.

Everything is one pure function of a state, so that it vmaps over seeds and hyperparameters. ``learner`` is the same for answers that
are verified outside of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, Metrics, learning_rate_factor, optimizer
from jrl.algos import sft
from jrl.equations import token_losses
from jrl.experience import rollout
from jrl.lm.policy import answer, language_model, reader
from jrl.lm.sampling import Model, Rollout, Support, check_support, sample, score
from jrl.lm.tasks import END, PAD, Task
from jrl.lm.tasks.environment import as_environment
from jrl.nets import moe, transformer
from jrl.numerics import checks, lora, optim, precision

Array = jax.Array
Advantage = Literal["zscore", "centred", "rloo", "reinforce++"]
Loss = Literal["clip", "dual_clip", "gspo", "cispo", "policy_gradient"]
Reduction = Literal["sequence_mean", "token_mean", "constant"]
Divergence = Literal["none", "k1", "k2", "k3", "exact"]


@dataclass(frozen=True)
class Config:
    """Static settings: they decide shapes and structure, and are compiled in.

    Attributes:
        model: shape of the decoder; its vocabulary is the task's.
        num_prompts: prompts of an update.
        group_size: answers to each; 1 only with reinforce++, which compares with the whole batch.
        num_epochs: passes over the answers of an update.
        num_minibatches: gradient steps per pass; divides num_prompts * group_size.
        micro_batches: parts that a minibatch is computed in, one after another; changes no gradient.
        advantage: zscore (GRPO), centred (Dr. GRPO), rloo, or reinforce++.
        ddof: of zscore's standard deviation, which divides by group_size - ddof.
        loss: clip, dual_clip, gspo, cispo or policy_gradient.
        reduction: sequence_mean, token_mean, or constant: the sum over the longest answer's length.
        kl: to the model at the start: none, or k1, k2, k3 or exact.
        kl_in: loss, or reward (k1 alone).
        old_log_probs: of the sampler, or recomputed.
        truncated_importance: weigh tokens by the recomputed policy over the sampler's, at most hyper.importance_cap.
        oversample: factor on the prompts that are drawn, of which groups that are not all right or all wrong are learned from first
            (DAPO's dynamic sampling).
        overlong: last tokens of the longest answer over which a penalty grows to hyper.overlong_weight; 0 for none.
        top_k: sample of the likeliest so many; 0 for all.
        top_p: sample of the likeliest that have this probability together.
        min_p: sample of those at least so likely as a share of the likeliest.
        supervised: updates of supervised learning before the first; 0 for none.
        lora_rank: train matrices of this rank beside the frozen ones; 0 trains all parameters.
        optimizer: what the optimizer is made of.
        precision: float32, bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    """

    model: transformer.Config = field(default_factory=lambda: transformer.Config(dim=64, num_layers=2))
    num_prompts: int = 32
    group_size: int = 8
    num_epochs: int = 1
    num_minibatches: int = 1
    micro_batches: int = 1
    advantage: Advantage = "zscore"
    ddof: int = 1
    loss: Loss = "clip"
    reduction: Reduction = "sequence_mean"
    kl: Divergence = "none"
    kl_in: Literal["loss", "reward"] = "loss"
    old_log_probs: Literal["sampler", "recomputed"] = "sampler"
    truncated_importance: bool = False
    oversample: int = 1
    overlong: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    supervised: int = 0
    lora_rank: int = 0
    optimizer: optim.OptimizerConfig = field(default_factory=lambda: optim.OptimizerConfig("adamw"))
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_epochs", "num_minibatches", "micro_batches", "oversample"):
            checks.positive_int(f"config.{name}", getattr(self, name))
        for name in ("ddof", "overlong", "supervised", "lora_rank"):
            checks.positive_int(f"config.{name}", getattr(self, name), at_least=0)
        checks.positive_int("config.group_size", self.group_size, at_least=1 if self.advantage == "reinforce++" else 2)
        checks.within("config.ddof", self.ddof, 0, 1)
        for name, kinds in (("advantage", Advantage), ("loss", Loss), ("reduction", Reduction), ("kl", Divergence)):
            checks.one_of(f"config.{name}", getattr(self, name), get_args(kinds))
        checks.one_of("config.kl_in", self.kl_in, ("loss", "reward"))
        checks.one_of("config.old_log_probs", self.old_log_probs, ("sampler", "recomputed"))
        precision.parse(self.precision)
        if self.truncated_importance and self.old_log_probs == "sampler":
            raise ValueError(
                "config.truncated_importance needs config.old_log_probs=recomputed: else its weights are all 1"
            )
        if self.kl_in == "reward" and self.kl not in ("none", "k1"):
            raise ValueError(f"config.kl_in=reward takes config.kl=k1, the estimate without bias; got {self.kl}")
        if self.reduction == "token_mean":
            token_losses.refuse_accumulation(self.optimizer.accumulate, "config.micro_batches, which add up exactly")
        parts = self.num_minibatches * self.micro_batches
        if self.rows % parts:
            raise ValueError(
                f"config.num_minibatches * micro_batches must divide num_prompts * group_size = {self.rows}; got {parts}"
            )

    @property
    def rows(self) -> int:
        """Answers that an update learns from."""
        return self.num_prompts * self.group_size

    def support(self, temperature: Array | float) -> Support:
        """What answers are drawn from."""
        return Support(temperature, self.top_k, self.top_p, self.min_p)


class Hyper(NamedTuple):
    """Hyperparameters: data of the state, floats or traced scalars, that may differ between vmapped runs.

    Attributes:
        learning_rate: at the start of the run; config.optimizer.schedule says how it goes on.
        clip_low: the ratio is clipped at 1 less this.
        clip_high: and at 1 plus this.
        dual_clip: bound on the ratio where the advantage is negative.
        kl_weight: beta.
        entropy_weight: of an entropy bonus.
        balance_weight: Weight of the loss that evens the load of experts routed by a softmax (moe.balance_loss).
        advantage_eps: added to zscore's standard deviation.
        temperature: of the answers.
        importance_cap: largest weight of a token by truncated importance.
        format_weight: of the format in the reward, where being correct counts 1.
        close_weight: of coming close, where the task says how close.
        overlong_weight: of an answer as long as may be.
        supervised_learning_rate: of the supervised start.
        max_grad_norm: global norm that gradients are scaled down to.
        optimizer: numbers of the optimizer.
    """

    learning_rate: float = 3e-4
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    kl_weight: float = 0.04
    entropy_weight: float = 0.0
    balance_weight: float = 1e-3
    advantage_eps: float = 1e-4
    temperature: float = 1.0
    importance_cap: float = 2.0
    format_weight: float = 0.0
    close_weight: float = 0.0
    overlong_weight: float = 1.0
    supervised_learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    optimizer: optim.Hyper = optim.Hyper()


def check_hyper(hyper: Hyper) -> None:
    """Raise ``ValueError`` for a concrete number outside its range; traced numbers pass."""
    ranges = {"clip_low": (0, 1), "dual_clip": (1, float("inf"))}
    for name in hyper._fields[:-1]:
        checks.within(f"hyper.{name}", getattr(hyper, name), *ranges.get(name, (0, float("inf"))))
    for name in ("temperature", "max_grad_norm"):
        checks.above_zero(f"hyper.{name}", getattr(hyper, name))
    optim.check_hyper(hyper.optimizer)


def _composed(
    advantage: Advantage, loss: Loss, reduction: Reduction, kl: Divergence = "none", **more: Any
) -> dict[str, Any]:
    return {"advantage": advantage, "loss": loss, "reduction": reduction, "kl": kl, "kl_in": "loss"} | more


# Fields of Config and of Hyper that a method names. RLOO's loss is clipped, for updates of more than one step; in one step clipping does
# nothing. DAPO's penalty of long answers is left to ``overlong``, since most tasks here have answers of one length.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": (_composed("zscore", "clip", "sequence_mean", "k3"), {}),  # 2402.03300
    "dr_grpo": (_composed("centred", "clip", "constant"), {}),  # 2503.20783
    "dapo": (_composed("zscore", "clip", "token_mean", oversample=2), {"clip_high": 0.28}),  # 2503.14476
    "gspo": (_composed("zscore", "gspo", "sequence_mean"), {"clip_low": 3e-4, "clip_high": 4e-4}),  # 2507.18071
    "cispo": (_composed("zscore", "cispo", "token_mean"), {"clip_low": 1.0, "clip_high": 0.28}),  # 2506.13585
    "rloo": (_composed("rloo", "clip", "constant", "k1", kl_in="reward"), {}),  # 2402.14740
    "reinforce++": (_composed("reinforce++", "clip", "token_mean", "k1", kl_in="reward"), {}),  # 2501.03262
}


def method(name: str, config: Config = Config(), hyper: Hyper = Hyper()) -> tuple[Config, Hyper]:
    """Settings with those that a published method names; the others stay. Raises ``ValueError`` for an unknown name."""
    checks.one_of("method", name, METHODS)
    fields, numbers = METHODS[name]
    return replace(config, **fields), hyper._replace(**numbers)


class State(NamedTuple):
    """The whole run."""

    params: Any  # what is trained: all parameters, or the matrices beside them
    frozen: Any  # the model at the start, where it is the reference or the rest of the model; else ()
    opt_state: Any
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


class Batch(NamedTuple):
    """Answers ``[N, ...]`` and what is needed to learn from them."""

    prompt: Array
    valid: Array
    rollout: Rollout
    old_log_prob: Array
    ref_log_prob: Array  # 0 without a KL estimate
    advantage: Array  # [N, T]
    weight: Array  # [N, T], of the minibatch: see token_losses.weights


class Learner(NamedTuple):
    """The algorithm without its task: answers may be verified anywhere between ``sample`` and ``learn``.

    Attributes:
        init: ``(key, params, hyper, num_updates=None) -> State``.
        policy: ``State -> params`` of the model that answers.
        sample: ``(state, key, prompt [N, P], valid) -> Rollout``.
        learn: ``(state, key, prompt, valid, rollout, reward [N]) -> (State, Metrics)``; groups stand side by side. An answer that
            nobody judged is left out by masking all of its tokens: it has no gradient, and no part in its group's mean and deviation.
    """

    init: Callable[..., State]
    policy: Callable[[State], Any]
    sample: Callable[..., Rollout]
    learn: Callable[..., tuple[State, Metrics]]


def learner(model: Model, config: Config, *, length: int, end: int | Sequence[int], pad: int) -> Learner:
    """GRPO of a model whose answers have up to ``length`` tokens, as pure functions. Raises ``ValueError`` for a wrong setting."""
    check_support(config.support(1.0), model.vocab_size)
    adapter = lora.lora(config.lora_rank, 2.0 * config.lora_rank) if config.lora_rank else lora.full()
    keeps_start = bool(config.lora_rank) or config.kl != "none"
    estimates_kl = config.kl in ("k1", "k2", "k3")
    fixed_length = float(length) if config.reduction == "constant" else None

    def init(key: Array, params: Any, hyper: Hyper, num_updates: Array | int | None = None) -> State:
        key_adapter, key_optimizer, key_run = jax.random.split(key, 3)
        hyper = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyper)
        trained = adapter.init(key_adapter, params)
        return State(
            params=trained,
            frozen=jax.tree.map(jnp.copy, params) if keeps_start else (),
            opt_state=optimizer(config, hyper, 1.0, key_optimizer).init(trained),
            key=key_run,
            updates=jnp.int32(0),
            num_updates=jnp.asarray(0 if num_updates is None else num_updates, jnp.int32),
            hyper=hyper,
        )

    def policy(state: State) -> Any:
        return adapter.merge(state.frozen, state.params)

    def draw(state: State, key: Array, prompt: Array, valid: Array) -> Rollout:
        support = config.support(state.hyper.temperature)
        return sample(key, model, policy(state), prompt, length=length, end=end, valid=valid, pad=pad, support=support)

    def log_probs(params: Any, state: State, prompt: Array, valid: Array, rollout: Rollout) -> Array:
        """Of all answers, in as many parts as learning takes."""

        def part(x: Any) -> Array:
            support = config.support(state.hyper.temperature)
            return score(model, params, x[0], x[2], valid=x[1], support=support).log_prob

        return _in_parts(part, (prompt, valid, rollout), config.num_minibatches * config.micro_batches)

    def learn(
        state: State, key: Array, prompt: Array, valid: Array, rollout_: Rollout, reward: Array
    ) -> tuple[State, Metrics]:
        if reward.shape != (config.rows,) or len(prompt) != config.rows:
            raise ValueError(
                f"learn: needs num_prompts * group_size = {config.rows} prompts and rewards; got {len(prompt)} and {reward.shape}"
            )
        old = rollout_.log_prob
        if config.old_log_probs == "recomputed":
            old = jax.lax.stop_gradient(log_probs(policy(state), state, prompt, valid, rollout_))
        nothing = jnp.zeros(old.shape, jnp.float32)
        ref = log_probs(state.frozen, state, prompt, valid, rollout_) if estimates_kl else nothing
        advantage = advantages(config, state.hyper, reward, old, ref, rollout_.mask)
        batch = Batch(prompt, valid, rollout_, old, ref, advantage, nothing)
        order = jax.vmap(lambda k: rollout.shuffle(k, config.rows))(jax.random.split(key, config.num_epochs))
        order = order.reshape(config.num_epochs * config.num_minibatches, -1)
        tx = optimizer(config, state.hyper, learning_rate_factor(config, state))

        def minibatch(carry: tuple[Any, Any], rows: Array) -> tuple[tuple[Any, Any], Metrics]:
            part = jax.tree.map(lambda x: x[rows], batch)
            part = part._replace(weight=token_losses.weights(part.rollout.mask, config.reduction, fixed_length))
            tokens = token_losses.weights(part.rollout.mask, "token_mean")
            step = optim.minimize(tx, lambda p: loss(p, state, part, tokens), *carry)
            metrics, load = step.extra
            params = step.params if config.lora_rank else model.balance(step.params, load)
            return (params, step.opt_state), metrics | {"grad_norm": step.grad_norm}

        (params, opt_state), metrics = jax.lax.scan(minibatch, (state.params, state.opt_state), order)
        metrics = jax.tree.map(jnp.mean, metrics)
        ratio, square = metrics.pop("ratio"), metrics.pop("square")
        metrics |= drawn(reward, rollout_.mask, config.group_size) | {
            "effective_sample_size": jnp.where(square > 0, ratio**2 / jnp.where(square > 0, square, 1.0), 1.0),
        }
        state = state._replace(params=params, opt_state=opt_state, updates=state.updates + 1)
        return state, metrics

    def loss(trained: Any, state: State, batch: Batch, tokens: Array) -> tuple[Array, tuple[Metrics, moe.Load]]:
        """Loss of a minibatch, the sum of its parts, and of the load of experts in all of them."""

        def part(x: tuple[Batch, Array]) -> tuple[Array, Metrics, moe.Load]:
            return part_loss(trained, state, *x)

        if config.micro_batches == 1:
            total, metrics, load = part((batch, tokens))
        else:
            parts = jax.lax.map(jax.checkpoint(part), _split((batch, tokens), config.micro_batches))
            total, metrics, load = jax.tree.map(lambda x: x.sum(0), parts)
        return total + state.hyper.balance_weight * model.balance_loss(load), (metrics, load)

    def part_loss(trained: Any, state: State, batch: Batch, tokens: Array) -> tuple[Array, Metrics, moe.Load]:
        hyper, mask = state.hyper, batch.rollout.mask
        scored = score(
            model,
            adapter.merge(state.frozen, trained),
            batch.prompt,
            batch.rollout,
            valid=batch.valid,
            support=config.support(hyper.temperature),
            reference=state.frozen if config.kl == "exact" else None,
        )
        log_prob = token_losses.masked(scored.log_prob, mask)
        log_ratio = log_prob - token_losses.masked(batch.old_log_prob, mask)
        each = token_loss(config, hyper, log_prob, log_ratio, batch.advantage, mask)
        if config.truncated_importance:
            sampler = batch.rollout.log_prob
            each *= token_losses.truncated_importance(batch.old_log_prob, sampler, hyper.importance_cap)
        kl = divergence(config.kl, log_prob, token_losses.masked(batch.ref_log_prob, mask), scored.kl)
        if config.kl != "none" and config.kl_in == "loss":
            each += hyper.kl_weight * kl
        total = token_losses.weighted_sum(batch.weight, each - hyper.entropy_weight * scored.entropy)
        clipped = token_losses.sequence_log_ratio(log_ratio, mask) if config.loss == "gspo" else log_ratio
        ratio, mean = jnp.exp(jnp.minimum(clipped, token_losses.LARGEST)), token_losses.weighted_sum
        metrics = {
            "loss": total,
            "entropy": mean(tokens, scored.entropy),
            "kl": mean(tokens, kl),
            "clip_fraction_low": mean(tokens, (ratio < 1 - hyper.clip_low).astype(jnp.float32)),
            "clip_fraction_high": mean(tokens, (ratio > 1 + hyper.clip_high).astype(jnp.float32)),
            "ratio": mean(tokens, ratio),
            "square": mean(tokens, ratio**2),
        }
        return total, metrics, scored.load

    return Learner(init, policy, draw, learn)


def advantages(config: Config, hyper: Hyper, reward: Array, log_prob: Array, ref_log_prob: Array, mask: Array) -> Array:
    """Advantages ``[N, T]`` of each token, of rewards ``[N]`` in groups side by side. An answer whose tokens are all masked, which
    nobody judged, has no part in its group's mean and deviation."""
    beta = hyper.kl_weight if config.kl != "none" and config.kl_in == "reward" else 0.0
    counts = mask.any(1)
    if config.advantage == "reinforce++":
        return token_losses.reinforce_plus_plus(reward, log_prob, ref_log_prob, mask, beta)
    if config.kl_in == "reward":
        reward = reward - beta * token_losses.masked(log_prob - ref_log_prob, mask).sum(1)
    match config.advantage:
        case "zscore":
            found = token_losses.zscore(reward, config.group_size, config.ddof, hyper.advantage_eps, counts)
        case "centred":
            found = token_losses.centred(reward, config.group_size, counts)
        case "rloo":
            found = token_losses.rloo(reward, config.group_size, counts)
    return jnp.broadcast_to(found[:, None], mask.shape)


def token_loss(config: Config, hyper: Hyper, log_prob: Array, log_ratio: Array, advantage: Array, mask: Array) -> Array:
    """Loss ``[N, T]`` of each token."""
    match config.loss:
        case "clip":
            return token_losses.clip(log_ratio, advantage, hyper.clip_low, hyper.clip_high)
        case "dual_clip":
            return token_losses.dual_clip(log_ratio, advantage, hyper.clip_low, hyper.clip_high, hyper.dual_clip)
        case "gspo":
            return token_losses.gspo(log_ratio, advantage, mask, hyper.clip_low, hyper.clip_high)
        case "cispo":
            return token_losses.cispo(log_prob, log_ratio, advantage, hyper.clip_low, hyper.clip_high)
        case "policy_gradient":
            return token_losses.policy_gradient(log_prob, advantage)


def divergence(kind: Divergence, log_prob: Array, ref_log_prob: Array, exact: Array) -> Array:
    """KL to the reference ``[N, T]``, estimated or exact; 0 for none."""
    match kind:
        case "k1":
            return token_losses.kl_k1(log_prob, ref_log_prob)
        case "k2":
            return token_losses.kl_k2(log_prob, ref_log_prob)
        case "k3":
            return token_losses.kl_k3(log_prob, ref_log_prob)
        case _:
            return exact


def rewards(config: Config, hyper: Hyper, parts: dict[str, Array], mask: Array) -> Array:
    """Reward ``[N]`` of answers by the verifier's parts, less a penalty for those that are too long."""
    total = (
        parts["correct"] + hyper.format_weight * parts.get("format", 0.0) + hyper.close_weight * parts.get("close", 0.0)
    )
    if config.overlong:
        total += hyper.overlong_weight * token_losses.overlong_penalty(
            mask.sum(1, dtype=jnp.float32), mask.shape[1], config.overlong
        )
    return total


def scores(parts: dict[str, Array], group_size: int) -> Metrics:
    """Mean parts, and the chance that one answer, or one of half a group, is right."""
    right = parts["correct"].reshape(-1, group_size).sum(1)
    k = min(group_size, max(2, group_size // 2))
    own = {
        "episode_return": parts["correct"].mean(),
        f"pass_at_{k}": token_losses.pass_at_k(group_size, right, k).mean(),
    }
    checks.apart("verify's parts", parts, own)
    return own | {name: x.mean() for name, x in parts.items()}


def drawn(reward: Array, mask: Array, group_size: int) -> Metrics:
    """Statistics of the answers that count (some token is not masked): mean reward, share of groups without two rewards to compare,
    number and mean length."""
    counts = mask.any(1)
    number = counts.sum(dtype=jnp.float32)
    return {
        "reward": jnp.sum(reward, where=counts) / jnp.maximum(number, 1),
        "no_signal": 1 - token_losses.varied(reward, group_size, counts).mean(dtype=jnp.float32),
        "episodes": number,
        "episode_length": mask.sum(dtype=jnp.float32) / jnp.maximum(number, 1),
    }


def informative_groups(correct: Array, mask: Array, config: Config) -> Array:
    """Rows of as many groups as an update learns from, first those whose answers are neither all right nor all wrong.

    This is DAPO's dynamic sampling, ``0 < right answers < G`` (2503.14476, eq. 11): it goes by the verifier's ``correct [N]`` alone,
    whatever else is rewarded. Where that is more than right and wrong, two answers differ in it. Answers whose tokens are all masked
    do not count.
    """
    informative = token_losses.varied(correct, config.group_size, mask.any(1))
    order = jnp.argsort(~informative, stable=True)[: config.num_prompts]
    return (order[:, None] * config.group_size + jnp.arange(config.group_size)[None]).ravel()


def make(task: Task, config: Config = Config(), hyper: Hyper = Hyper()) -> Algorithm:
    """GRPO on a task with a verifier; a step of the run is one token of an answer. ``hyper`` are the defaults that ``init`` takes.

    Raises ``ValueError`` for a setting out of range or one that does not fit the task.
    """
    checks.instances("grpo.make", task=(task, Task), config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    model = language_model(task, config.model, config.precision)
    learning = learner(model, config, length=task.answer_length, end=END, pad=PAD)
    before = sft.make(
        task, sft.Config(config.model, optimizer=optim.OptimizerConfig("adamw"), precision=config.precision)
    )
    defaults = hyper

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = defaults if hyper is None else hyper
        check_hyper(hyper)
        key_start, key_learner = jax.random.split(key)
        return learning.init(key_learner, start(key_start, hyper), hyper, num_updates)

    def start(key: Array, hyper: Hyper) -> Any:
        """Parameters at random, or after supervised learning."""
        if not config.supervised:
            return model.init(key)
        numbers = sft.Hyper(hyper.supervised_learning_rate, hyper.balance_weight)
        shown = before.init(key, numbers, config.supervised)
        return jax.lax.scan(lambda s, _: (before.update(s)[0], None), shown, length=config.supervised)[0].params

    def update(state: State) -> tuple[State, Metrics]:
        key, key_answer, key_learn = jax.random.split(state.key, 3)
        support = config.support(state.hyper.temperature)
        prompts = config.num_prompts * config.oversample
        answers = answer(key_answer, task, model, learning.policy(state), prompts, config.group_size, support)
        reward = rewards(config, state.hyper, answers.parts, answers.rollout.mask)
        scored = scores(answers.parts, config.group_size)
        metrics = drawn(reward, answers.rollout.mask, config.group_size)
        if config.oversample > 1:
            rows = informative_groups(answers.parts["correct"], answers.rollout.mask, config)
            answers, reward = jax.tree.map(lambda x: x[rows], (answers, reward))
        problems, rollout_ = answers.problems, answers.rollout
        state, learned = learning.learn(state, key_learn, problems.prompt, problems.valid, rollout_, reward)
        checks.apart(f"{task.name}: verify's parts", scored, learned | metrics)
        return state._replace(key=key), learned | metrics | scored

    return Algorithm(
        init=init,
        update=update,
        act=reader(task, model, learning.policy, lambda state: config.support(state.hyper.temperature)),
        env_steps_per_update=config.rows * config.oversample * task.answer_length,
        name="grpo",
        env=as_environment(task),
        config=config,
        hyper=hyper,
        uses_length=config.optimizer.uses_length,
        remake=lambda config: make(task, config, hyper),
        check_hyper=check_hyper,
    )


def _split(tree: Any, parts: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), tree)


def _in_parts(function: Callable[[Any], Array], rows: Any, parts: int) -> Array:
    """``function`` of rows ``[N, ...]``, so many parts one after another."""
    found = jax.lax.map(function, _split(rows, parts))
    return found.reshape(-1, *found.shape[2:])
