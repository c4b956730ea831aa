"""Group relative policy optimization of a language model on verified rewards (Shao et al. 2024, arXiv 2402.03300), and its kin.

One update: draw prompts, answer each of them ``group_size`` times, verify the answers, and step down a clipped loss in which an
answer's advantage is its reward against those of its group, no critic needed:

    A_i = (R_i - mean(R)) / (std(R) + eps)        r = pi(token) / pi_old(token)
    L = mean over answers of the mean over tokens of  -min(r A, clip(r, 1 - low, 1 + high) A) + beta KL        (eq. 3-4)

What differs between methods are independent settings: how advantages are made, the loss of a token, how tokens are averaged, and
whether there is a KL to the reference and where it goes. ``METHODS`` names the published compositions; ``method("dapo")`` gives one.

Everything is one pure function of a state, so that it vmaps over seeds and hyperparameters. ``learner`` is the same for answers that
are verified outside of it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, Metrics, current_optimizer, start_learning
from jrl.algos import sft
from jrl.algos.grpo_kin import METHODS as METHODS
from jrl.algos.grpo_kin import Config, Hyper, advantages, check, divergence, token_loss
from jrl.algos.grpo_kin import method as method
from jrl.equations import token_losses
from jrl.experience import rollout
from jrl.lm import groups, refill
from jrl.lm.model import Model
from jrl.lm.policy import Answers, adapted, answer, language_model, reader
from jrl.lm.sampling import Rollout, check_support, sample
from jrl.lm.scoring import score
from jrl.lm.tasks import END, PAD, Task
from jrl.lm.tasks.environment import as_environment
from jrl.nets import moe
from jrl.numerics import checks, loops, optim
from jrl.numerics.settings import check_hyper
from jrl.numerics.types import OptState, Params

Array = jax.Array


def learner(model: Model, config: Config, *, length: int, end: int | Sequence[int], pad: int) -> "Learner":
    """GRPO of a model whose answers have up to ``length`` tokens, as pure functions. Raises ``ValueError`` for a wrong setting."""
    check(config)
    check_support(config.support(1.0), model.vocab_size)
    adapter = model.adapter(config.adapter)
    keeps_start = not config.adapter.trains_all or config.kl != "none"
    fixed_length = float(length) if config.reduction == "constant" else None

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
        ref = log_probs(state.frozen, state, prompt, valid, rollout_) if config.kl in ("k1", "k2", "k3") else nothing
        advantage = advantages(config, state.hyper, reward, old, ref, rollout_.mask)
        batch = Batch(prompt, valid, rollout_, old, ref, advantage, nothing)
        order = rollout.minibatches(key, config.rows, config.num_epochs, config.num_minibatches)
        tx = current_optimizer(config, state)

        def minibatch(carry: tuple[Any, Any], rows: Array) -> tuple[tuple[Any, Any], Metrics]:
            part = jax.tree.map(lambda x: x[rows], batch)
            part = part._replace(weight=token_losses.weights(part.rollout.mask, config.reduction, fixed_length))
            tokens = token_losses.weights(part.rollout.mask, "token_mean")
            step = optim.minimize(tx, lambda p: loss(p, state, part, tokens), *carry)
            metrics, load = step.extra
            params = model.balance(step.params, load) if config.adapter.trains_all else step.params
            return (params, step.opt_state), metrics | {"grad_norm": step.grad_norm}

        (params, opt_state), metrics = jax.lax.scan(minibatch, (state.params, state.opt_state), order)
        metrics = jax.tree.map(jnp.mean, metrics)
        ratio, square = metrics.pop("ratio"), metrics.pop("square")
        metrics |= groups.drawn(reward, rollout_.mask, config.group_size) | {
            "effective_sample_size": jnp.where(square > 0, ratio**2 / jnp.where(square > 0, square, 1.0), 1.0),
        }
        state = state._replace(params=params, opt_state=opt_state, updates=state.updates + 1)
        return state, metrics

    def loss(trained: Any, state: State, batch: Batch, tokens: Array) -> tuple[Array, tuple[Metrics, moe.Load]]:
        """Loss of a minibatch: the sum over its micro-batches, plus the loss of the experts' load."""

        def part(x: tuple[Batch, Array]) -> tuple[Array, Metrics, moe.Load]:
            return part_loss(trained, state, *x)

        total, metrics, load = loops.sum_over_parts(part, (batch, tokens), config.micro_batches)
        return total + state.hyper.balance_weight * model.balance_loss(load), (metrics, load)

    def part_loss(trained: Any, state: State, batch: Batch, tokens: Array) -> tuple[Array, Metrics, moe.Load]:
        hyper, mask = state.hyper, batch.rollout.mask
        scored = score(
            model,
            adapted(model, adapter, state.frozen, trained),
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

    def init(key: Array, params: Params, hyper: Hyper, num_updates: Array | int | None = None) -> State:
        key_adapter, key_optimizer, key_run = jax.random.split(key, 3)
        return State(
            **start_learning(config, hyper, adapter.init(key_adapter, params), key_optimizer, num_updates),
            frozen=jax.tree.map(jnp.copy, params) if keeps_start else (),
            key=key_run,
        )

    def policy(state: State) -> Any:
        return adapted(model, adapter, state.frozen, state.params)

    def draw(state: State, key: Array, prompt: Array, valid: Array) -> Rollout:
        more: dict[str, Any] = {"length": length, "end": end, "pad": pad}
        more |= {"support": config.support(state.hyper.temperature)}
        if config.slots:
            return refill.sample(key, model, policy(state), prompt, valid=valid, slots=config.slots, **more)[0]
        more |= {"valid": valid[:: config.group_size], "copies": config.group_size}
        return sample(key, model, policy(state), prompt[:: config.group_size], **more)

    def log_probs(params: Params, state: State, prompt: Array, valid: Array, rollout: Rollout) -> Array:
        """Log-probabilities of the tokens of all answers, computed in micro-batches."""

        def part(x: Any) -> Array:
            support = config.support(state.hyper.temperature)
            return score(model, params, x[0], x[2], valid=x[1], support=support).log_prob

        return loops.in_parts(part, (prompt, valid, rollout), config.num_minibatches * config.micro_batches)

    return Learner(init, policy, draw, learn)


def make(
    task: Task,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    model: Model | None = None,
    start: Params = None,
    reward: Callable[[Answers], Array] | None = None,
) -> Algorithm:
    """GRPO on a task with a verifier; a step of the run is one token of an answer.

    Args:
        task: what is asked.
        config: static settings.
        hyper: defaults that ``init`` takes.
        model: A language model (``jrl.lm.own``) that takes the place of the decoder of ``config.model``.
        start: parameters to begin with; at random, or after supervised learning, if not given.
        reward: A function of answers that gives float32 ``[N]``; by default the verifier's parts, weighed by ``hyper``.

    Raises ``ValueError`` for a setting out of range or one that does not fit the task.
    """
    checks.instances("grpo.make", task=(task, Task), config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    remake, own = functools.partial(make, task, hyper=hyper, model=model, start=start, reward=reward), model
    model = language_model(task, config.model, config.precision, own)
    learning = learner(model, config, length=task.answer_length, end=END, pad=PAD)
    shown = sft.Config(config.model, optimizer=optim.OptimizerConfig("adamw"), precision=config.precision)
    before = sft.make(task, shown, model=own)
    defaults = hyper

    def update(state: State) -> tuple[State, Metrics]:
        key, key_answer, key_learn = jax.random.split(state.key, 3)
        support = config.support(state.hyper.temperature)
        prompts = config.num_prompts * config.oversample
        answers = answer(key_answer, task, model, learning.policy(state), prompts, config.group_size, support)
        earned = reward(answers) if reward else rewards(config, state.hyper, answers.parts, answers.rollout.mask)
        scored = groups.scores(answers.parts, config.group_size)
        metrics = groups.drawn(earned, answers.rollout.mask, config.group_size)
        if config.oversample > 1:
            rows = groups.informative(
                answers.parts["correct"], answers.rollout.mask, config.group_size, config.num_prompts
            )
            answers, earned = jax.tree.map(lambda x: x[rows], (answers, earned))
        problems, rollout_ = answers.problems, answers.rollout
        state, learned = learning.learn(state, key_learn, problems.prompt, problems.valid, rollout_, earned)
        checks.apart(f"{task.name}: verify's parts", scored, learned | metrics)
        return state._replace(key=key), learned | metrics | scored

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_start, key_learner = jax.random.split(key)
        return learning.init(key_learner, begin(key_start, hyper), hyper, num_updates)

    def begin(key: Array, hyper: Hyper) -> Any:
        """Parameters that are given, at random, or after supervised learning."""
        if start is not None:
            return start
        if not config.supervised:
            return model.init(key)
        numbers = sft.Hyper(hyper.supervised_learning_rate, hyper.balance_weight)
        shown = before.init(key, numbers, config.supervised)
        return jax.lax.scan(lambda s, _: (before.update(s)[0], None), shown, length=config.supervised)[0].params

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
        remake=remake,
        check_hyper=check_hyper,
    )


class State(NamedTuple):
    """The whole run."""

    params: Params  # what is trained: all parameters, or the matrices beside them
    frozen: Any  # the initial model, where it is the KL reference or carries LoRA; else ()
    opt_state: OptState
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
        sample: ``(state, key, prompt [N, P], valid) -> Rollout``; the prompts of a group stand side by side, and are read once.
        learn: ``(state, key, prompt, valid, rollout, reward [N]) -> (State, Metrics)``; groups stand side by side. An answer that
            nobody judged is left out by masking all of its tokens: it has no gradient, and no part in its group's mean and deviation.
    """

    init: Callable[..., State]
    policy: Callable[[State], Any]
    sample: Callable[..., Rollout]
    learn: Callable[..., tuple[State, Metrics]]


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
