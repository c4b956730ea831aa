"""PPO on a language model with a critic, as in learning from human feedback (Ziegler et al. 2019, 1909.08593; Ouyang et al. 2022,
2203.02155): actor, critic, reference and a reward.

    r_t = -beta (log pi_old(token) - log pi_ref(token)), and the answer's reward at its last token
    A_t by GAE over the tokens of an answer, whitened over the batch; G_t = A_t + V_t
    L = mean over tokens of  clipped surrogate + c clipped value loss

The reward is the task's verifier, or any function of answers that is given, such as a reward model trained by
``preferences.bradley_terry``. Everything else is shared with GRPO.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, Metrics, current_optimizer, start_learning
from jrl.algos.ppo_lm_settings import Config, Hyper, check
from jrl.equations import losses, token_losses
from jrl.experience import rollout
from jrl.lm.model import Model
from jrl.lm.policy import Answers, adapted, answer, language_model, reader
from jrl.lm.sampling import Rollout, Support, sample
from jrl.lm.scoring import answer_hidden, score
from jrl.lm.tasks import END, PAD, Task
from jrl.lm.tasks.environment import as_environment
from jrl.nets import moe
from jrl.numerics import checks, loops, optim
from jrl.numerics.settings import check_hyper
from jrl.numerics.types import OptState, Params

Array = jax.Array


def learner(model: Model, config: Config, *, length: int, end: int | Sequence[int], pad: int) -> "Learner":
    """PPO of a model whose answers have up to ``length`` tokens, as pure functions. Raises ``ValueError`` for a wrong setting."""
    check(config)
    adapter = model.adapter(config.adapter)
    ends = jnp.atleast_1d(jnp.asarray(end, jnp.int32))
    parts = config.num_minibatches * config.micro_batches

    def learn(
        state: State, key: Array, prompt: Array, valid: Array, said: Rollout, score_: Array
    ) -> tuple[State, Metrics]:
        """Rewards of tokens, advantages, and epochs of minibatch steps."""
        hyper = state.hyper
        cut_off = unended(said, ends)
        ref, value = before(state, prompt, valid, said)
        rewards = token_losses.token_rewards(
            score_ - hyper.unended_penalty * cut_off, said.log_prob, ref, said.mask, state.kl_weight
        )
        if config.whiten_rewards:
            rewards = token_losses.whiten(rewards, said.mask, keep_mean=True)
        advantage = token_losses.gae(value, rewards, said.mask, hyper.gamma, hyper.gae_lambda)
        batch = Batch(prompt, valid, said, value, token_losses.whiten(advantage, said.mask), advantage + value)
        state, metrics = steps(state, batch, key)
        there, tokens = said.mask.any(1), jnp.maximum(said.mask.sum(dtype=jnp.float32), 1)
        number = jnp.maximum(there.sum(dtype=jnp.float32), 1)
        kl = jnp.sum(token_losses.masked(said.log_prob - ref, said.mask))
        metrics |= {
            "reward": jnp.sum(score_, where=there) / number,
            "unended": jnp.sum(cut_off, where=there) / number,
            "kl": kl / tokens,
            "kl_weight": state.kl_weight,
            "explained_variance": losses.explained_variance(value, advantage + value, said.mask),
            "episodes": there.sum(dtype=jnp.float32),
            "episode_length": tokens / number,
        }
        return state._replace(kl_weight=adapted_weight(state, kl / number), updates=state.updates + 1), metrics

    def before(state: State, prompt: Array, valid: Array, said: Rollout) -> tuple[Array, Array]:
        """Log-probabilities under the reference, and values, of each token ``[N, T]``, a part of the answers at once."""
        critic = networks(state, state.params)["critic"]

        def part(x: tuple[Array, Array, Rollout]) -> tuple[Array, Array]:
            prompt, valid, said = x
            support = Support(state.hyper.temperature)
            ref = score(model, state.frozen["actor"], prompt, said, valid=valid, support=support).log_prob
            return ref, token_losses.masked(values(critic, prompt, said, valid)[0], said.mask)

        return loops.in_parts(part, (prompt, valid, said), parts)

    def steps(state: State, batch: Batch, key: Array) -> tuple[State, Metrics]:
        order = rollout.minibatches(key, config.num_answers, config.num_epochs, config.num_minibatches)
        tx = current_optimizer(config, state)

        def minibatch(carry: tuple[Any, Any], rows: Array) -> tuple[tuple[Any, Any], Metrics]:
            part = jax.tree.map(lambda x: x[rows], batch)
            step = optim.minimize(tx, lambda p: loss(p, state, part), *carry)
            metrics, actor_load, critic_load = step.extra
            params = step.params
            if config.adapter.trains_all:
                body = model.balance(params["critic"]["body"], critic_load)
                actor = model.balance(params["actor"], actor_load)
                params = {"actor": actor, "critic": params["critic"] | {"body": body}}
            return (params, step.opt_state), metrics | {"grad_norm": step.grad_norm}

        (params, opt_state), metrics = jax.lax.scan(minibatch, (state.params, state.opt_state), order)
        return state._replace(params=params, opt_state=opt_state), jax.tree.map(jnp.mean, metrics)

    def loss(trained: Params, state: State, batch: Batch) -> tuple[Array, tuple[Metrics, moe.Load, moe.Load]]:
        """Of a minibatch: the sum over its micro-batches, plus the loss of the experts' load."""
        params, weight = networks(state, trained), token_losses.weights(batch.rollout.mask, "token_mean")

        def part(x: tuple[Batch, Array]) -> tuple[Array, Metrics, moe.Load, moe.Load]:
            return part_loss(params, state.hyper, *x)

        total, metrics, *loads = loops.sum_over_parts(part, (batch, weight), config.micro_batches)
        balance = model.balance_loss(loads[0]) + model.balance_loss(loads[1])
        return total + state.hyper.balance_weight * balance, (metrics, *loads)

    def part_loss(params: Any, hyper: Hyper, batch: Batch, weight: Array) -> tuple[Array, Metrics, moe.Load, moe.Load]:
        mask, support = batch.rollout.mask, Support(hyper.temperature)

        def mean(x):
            return token_losses.weighted_sum(weight, x)

        now = score(model, params["actor"], batch.prompt, batch.rollout, valid=batch.valid, support=support)
        log_ratio = token_losses.masked(now.log_prob - batch.rollout.log_prob, mask)
        policy = mean(token_losses.clip(log_ratio, batch.advantage, hyper.clip_eps, hyper.clip_eps))
        value, critic_load = values(params["critic"], batch.prompt, batch.rollout, batch.valid)
        critic = mean(losses.clipped_value_loss(value, batch.value, batch.target, hyper.value_clip_eps))
        entropy = mean(now.entropy)
        outside = jnp.abs(jnp.expm1(log_ratio)) > hyper.clip_eps
        metrics = {
            "policy_loss": policy,
            "value_loss": critic,
            "entropy": entropy,
            "clip_fraction": mean(outside.astype(jnp.float32)),
        }
        total = policy + hyper.value_weight * critic - hyper.entropy_weight * entropy
        return total, metrics | {"loss": total}, now.load, critic_load

    def values(critic: Any, prompt: Array, said: Rollout, valid: Array) -> tuple[Array, moe.Load]:
        """Of the state before each token, float32 ``[N, T]``, and the load of the critic's experts."""
        hidden, load = answer_hidden(model, critic["body"], prompt, said, valid)
        return jnp.einsum("ntd,d->nt", hidden.astype(jnp.float32), critic["head"].astype(jnp.float32)), load

    def networks(state: State, trained: Params) -> Any:
        """Actor and critic as they are computed with."""
        body = state.frozen.get("critic", ())
        critic = {
            "body": adapted(model, adapter, body, trained["critic"]["body"]),
            "head": trained["critic"]["head"],
        }
        return {"actor": adapted(model, adapter, state.frozen["actor"], trained["actor"]), "critic": critic}

    def init(key: Array, params: Params, critic: Params, hyper: Hyper, num_updates: Array | int | None = None) -> State:
        key_actor, key_critic, key_run, key_optimizer = jax.random.split(key, 4)
        body = adapter.init(key_critic, critic["body"])
        trained = {"actor": adapter.init(key_actor, params), "critic": {"body": body, "head": critic["head"]}}
        frozen = {"actor": params} | ({} if config.adapter.trains_all else {"critic": critic["body"]})
        fields = start_learning(config, hyper, trained, key_optimizer, num_updates)
        kl_weight = jnp.asarray(hyper.kl_weight, jnp.float32)
        return State(**fields, frozen=jax.tree.map(jnp.copy, frozen), kl_weight=kl_weight, key=key_run)

    def policy(state: State) -> Any:
        return adapted(model, adapter, state.frozen["actor"], state.params["actor"])

    def draw(state: State, key: Array, prompt: Array, valid: Array) -> Rollout:
        support = Support(state.hyper.temperature)
        more: dict[str, Any] = {"length": length, "end": end, "pad": pad, "valid": valid, "support": support}
        return sample(key, model, policy(state), prompt, **more)

    return Learner(init, policy, draw, learn)


def make(
    task: Task,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    start: Any = None,
    critic: Any = None,
    reward: Callable[[Answers], Array] | None = None,
) -> Algorithm:
    """PPO on a task; a step of the run is one token of an answer.

    Args:
        task: what is asked.
        config: static settings.
        hyper: defaults that ``init`` takes.
        start: parameters of actor and reference; at random if not given.
        critic: parameters ``{"body", "head"}`` of the critic, such as those of a reward model; a decoder at random with a head of zeros if not
            given.
        reward: A function of answers that gives float32 ``[N]``; by default the verifier's parts, weighed by ``hyper``.

    Raises ``ValueError`` for a setting out of range or one that does not fit the task.
    """
    checks.instances("ppo_lm.make", task=(task, Task), config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    model = language_model(task, config.model, config.precision)
    learning = learner(model, config, length=task.answer_length, end=END, pad=PAD)
    defaults = hyper

    def update(state: State) -> tuple[State, Metrics]:
        key, key_answer, key_learn = jax.random.split(state.key, 3)
        support = Support(state.hyper.temperature)
        answers = answer(key_answer, task, model, learning.policy(state), config.num_answers, 1, support)
        problems, said = answers.problems, answers.rollout
        score_ = reward(answers) if reward else weighed(state.hyper, answers.parts)
        state, metrics = learning.learn(state, key_learn, problems.prompt, problems.valid, said, score_)
        metrics["episode_return"] = answers.parts["correct"].mean()
        checks.apart(f"{task.name}: verify's parts", answers.parts, metrics)
        return state._replace(key=key), metrics | {name: x.mean() for name, x in answers.parts.items()}

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_actor, key_critic, key_learner = jax.random.split(key, 3)
        actor = model.init(key_actor) if start is None else start
        body = model.init(key_critic)
        begin = {"body": body, "head": jnp.zeros(config.model.dim, jnp.float32)} if critic is None else critic
        return learning.init(key_learner, actor, begin, hyper, num_updates)

    return Algorithm(
        init=init,
        update=update,
        act=reader(task, model, learning.policy, lambda state: Support(state.hyper.temperature)),
        env_steps_per_update=config.num_answers * task.answer_length,
        name="ppo_lm",
        env=as_environment(task),
        config=config,
        hyper=hyper,
        uses_length=config.optimizer.uses_length,
        remake=lambda config: make(task, config, hyper, start=start, critic=critic, reward=reward),
        check_hyper=check_hyper,
    )


class State(NamedTuple):
    """The whole run."""

    params: dict[str, Any]  # what is trained of "actor" and "critic", which is {"body", "head"}
    frozen: dict[
        str, Any
    ]  # the actor at the start, which is the reference; the critic's body, where little is trained beside it
    opt_state: OptState
    kl_weight: Array  # beta as it is now
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


class Batch(NamedTuple):
    """Answers ``[N, ...]`` with what each token teaches, ``[N, T]``."""

    prompt: Array
    valid: Array
    rollout: Rollout
    value: Array
    advantage: Array
    target: Array


class Learner(NamedTuple):
    """The algorithm without its task: answers may be judged anywhere between ``sample`` and ``learn``.

    Attributes:
        init: ``(key, params, critic {"body", "head"}, hyper, num_updates=None) -> State``.
        policy: ``State -> params`` of the model that answers.
        sample: ``(state, key, prompt [N, P], valid) -> Rollout``.
        learn: ``(state, key, prompt, valid, rollout, score [N]) -> (State, Metrics)``. An answer that nobody judged is left out by masking all of
            its tokens.
    """

    init: Callable[..., State]
    policy: Callable[[State], Any]
    sample: Callable[..., Rollout]
    learn: Callable[..., tuple[State, Metrics]]


def unended(said: Rollout, ends: Array) -> Array:
    """1 for answers that stop without an end token, float32 ``[N]``."""
    ended = jnp.any(said.mask & jnp.isin(said.tokens, ends), axis=1) | ~said.mask.all(1)  # a stop string cuts it short
    return (said.mask.any(1) & ~ended).astype(jnp.float32)


def adapted_weight(state: State, kl: Array) -> Array:
    """Beta after an update whose answers had this KL (1909.08593, section 2.2): times ``1 + gain clip(KL / target - 1, -0.2, 0.2)``."""
    hyper = state.hyper
    target = jnp.where(hyper.kl_target > 0, hyper.kl_target, 1.0)
    off = jnp.clip(kl / target - 1, -0.2, 0.2)
    return jnp.where(hyper.kl_target > 0, state.kl_weight * (1 + hyper.kl_gain * off), state.kl_weight)


def weighed(hyper: Hyper, parts: dict[str, Array]) -> Array:
    """The reward ``[N]`` of answers by the verifier's parts."""
    total = parts["correct"] + hyper.format_weight * parts.get("format", 0.0)
    return total + hyper.close_weight * parts.get("close", 0.0)
