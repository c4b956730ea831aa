"""PPO on a language model with a critic, as in learning from human feedback (Ziegler et al. 2019, 1909.08593; Ouyang et al. 2022,
2203.02155): actor, critic, reference and a reward.

    r_t = -beta (log pi_old(token) - log pi_ref(token)), and the answer's reward at its last token
    A_t by GAE over the tokens of an answer, whitened over the batch; G_t = A_t + V_t
    L = mean over tokens of  clipped surrogate + c clipped value loss

The reward is the task's verifier, or any function of answers that is given, such as a reward model trained by
``preferences.bradley_terry``. Everything else is shared with GRPO.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, Metrics, current_optimizer, start_learning
from jrl.algos.ppo_lm_settings import Config, Hyper, check
from jrl.equations import losses, token_losses
from jrl.experience import rollout
from jrl.lm.policy import Answers, answer, language_model, reader
from jrl.lm.sampling import Rollout, Support
from jrl.lm.scoring import answer_hidden, score
from jrl.lm.tasks import Task
from jrl.lm.tasks.environment import as_environment
from jrl.nets import moe
from jrl.numerics import checks, optim
from jrl.numerics.settings import check_hyper
from jrl.numerics.types import OptState, Params

Array = jax.Array


def make(
    task: Task,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    start: Any = None,
    reward: Callable[[Answers], Array] | None = None,
) -> Algorithm:
    """PPO on a task; a step of the run is one token of an answer.

    Args:
        task: what is asked.
        config: static settings.
        hyper: defaults that ``init`` takes.
        start: parameters of actor and reference; at random if not given.
        reward: A function of answers that gives float32 ``[N]``; by default the verifier's parts, weighed by ``hyper``.

    Raises ``ValueError`` for a setting out of range or one that does not fit the task.
    """
    check(task, config, hyper)
    model = language_model(task, config.model, config.precision)
    defaults = hyper

    def update(state: State) -> tuple[State, Metrics]:
        hyper = state.hyper
        key, key_answer, key_learn = jax.random.split(state.key, 3)
        support = Support(hyper.temperature)
        answers = answer(key_answer, task, model, state.params["actor"], config.num_answers, 1, support)
        (prompt, valid, _), said = answers.problems, answers.rollout
        scored = score_of(answers, hyper)
        ref = score(model, state.reference, prompt, said, valid=valid, support=support).log_prob
        rewards = token_losses.token_rewards(scored, said.log_prob, ref, said.mask, hyper.kl_weight)
        value = token_losses.masked(values(state.params["critic"], prompt, said, valid)[0], said.mask)
        advantage = token_losses.gae(value, rewards, said.mask, hyper.gamma, hyper.gae_lambda)
        batch = Batch(prompt, valid, said, value, token_losses.whiten(advantage, said.mask), advantage + value)
        state, metrics = learn(state, batch, key_learn)
        metrics |= {
            "reward": scored.mean(),
            "kl": jnp.sum(token_losses.masked(said.log_prob - ref, said.mask)) / said.mask.sum(dtype=jnp.float32),
            "explained_variance": losses.explained_variance(value, advantage + value, said.mask),
            "episodes": jnp.float32(config.num_answers),
            "episode_return": answers.parts["correct"].mean(),
            "episode_length": said.mask.sum(1).mean(dtype=jnp.float32),
        }
        checks.apart(f"{task.name}: verify's parts", answers.parts, metrics)
        metrics |= {name: x.mean() for name, x in answers.parts.items()}
        return state._replace(key=key, updates=state.updates + 1), metrics

    def loss(params: Params, batch: Batch, hyper: Hyper) -> tuple[Array, tuple[Metrics, tuple[moe.Load, moe.Load]]]:
        mask, support = batch.rollout.mask, Support(hyper.temperature)
        weight = token_losses.weights(mask, "token_mean")

        def mean(x):
            return token_losses.weighted_sum(weight, x)

        now = score(model, params["actor"], batch.prompt, batch.rollout, valid=batch.valid, support=support)
        log_ratio = token_losses.masked(now.log_prob - batch.rollout.log_prob, mask)
        policy = mean(token_losses.clip(log_ratio, batch.advantage, hyper.clip_eps, hyper.clip_eps))
        value, critic_load = values(params["critic"], batch.prompt, batch.rollout, batch.valid)
        critic = mean(losses.clipped_value_loss(value, batch.value, batch.target, hyper.value_clip_eps))
        entropy = mean(now.entropy)
        balance = model.balance_loss(now.load) + model.balance_loss(critic_load)
        total = policy + hyper.value_weight * critic - hyper.entropy_weight * entropy + hyper.balance_weight * balance
        outside = jnp.abs(jnp.expm1(log_ratio)) > hyper.clip_eps
        metrics = {
            "policy_loss": policy,
            "value_loss": critic,
            "entropy": entropy,
            "clip_fraction": mean(outside.astype(jnp.float32)),
        }
        return total, (metrics, (now.load, critic_load))

    def learn(state: State, batch: Batch, key: Array) -> tuple[State, Metrics]:
        order = rollout.minibatches(key, config.num_answers, config.num_epochs, config.num_minibatches)
        tx = current_optimizer(config, state)

        def minibatch(carry: tuple[Any, Any], rows: Array) -> tuple[tuple[Any, Any], Metrics]:
            part = jax.tree.map(lambda x: x[rows], batch)
            step = optim.minimize(tx, lambda p: loss(p, part, state.hyper), *carry)
            metrics, loads = step.extra
            return (balanced(step.params, *loads), step.opt_state), metrics | {"grad_norm": step.grad_norm}

        (params, opt_state), metrics = jax.lax.scan(minibatch, (state.params, state.opt_state), order)
        return state._replace(params=params, opt_state=opt_state), jax.tree.map(jnp.mean, metrics)

    def balanced(params: Params, actor_load: moe.Load, critic_load: moe.Load) -> Any:
        critic = params["critic"]
        return {
            "actor": model.balance(params["actor"], actor_load),
            "critic": critic | {"body": model.balance(critic["body"], critic_load)},
        }

    def values(critic: Any, prompt: Array, said: Rollout, valid: Array) -> tuple[Array, moe.Load]:
        """Of the state before each token, float32 ``[N, T]``, and the load of the critic's experts."""
        hidden, load = answer_hidden(model, critic["body"], prompt, said, valid)
        return jnp.einsum("ntd,d->nt", hidden.astype(jnp.float32), critic["head"].astype(jnp.float32)), load

    def score_of(answers: Answers, hyper: Hyper) -> Array:
        if reward is not None:
            return reward(answers)
        total = answers.parts["correct"] + hyper.format_weight * answers.parts["format"]
        return total + hyper.close_weight * answers.parts.get("close", 0.0)

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_actor, key_critic, key_run, key_optimizer = jax.random.split(key, 4)
        actor = model.init(key_actor) if start is None else start
        critic = {"body": model.init(key_critic), "head": jnp.zeros(config.model.dim, jnp.float32)}
        params = {"actor": actor, "critic": critic}
        return State(
            **start_learning(config, hyper, params, key_optimizer, num_updates),
            reference=jax.tree.map(jnp.copy, actor),
            key=key_run,
        )

    return Algorithm(
        init=init,
        update=update,
        act=reader(task, model, lambda state: state.params["actor"], lambda state: Support(state.hyper.temperature)),
        env_steps_per_update=config.num_answers * task.answer_length,
        name="ppo_lm",
        env=as_environment(task),
        config=config,
        hyper=hyper,
        uses_length=config.optimizer.uses_length,
        remake=lambda config: make(task, config, hyper, start=start, reward=reward),
        check_hyper=check_hyper,
    )


class State(NamedTuple):
    """The whole run. ``params`` and the critic's are trained; ``reference`` is the actor at the start."""

    params: dict[str, Any]
    reference: Any
    opt_state: OptState
    key: Array
    updates: Array
    num_updates: Array
    hyper: Hyper


class Batch(NamedTuple):
    """Answers ``[N, ...]`` with what each token teaches, ``[N, T]``."""

    prompt: Array
    valid: Array
    rollout: Rollout
    value: Array
    advantage: Array
    target: Array
