"""A reward model from preferences (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1).

    r(x, y)   a linear head on the decoder's stream at the last token of the answer
    loss      -log sigmoid( r(chosen) - r(rejected) ) + c (r(chosen) + r(rejected))^2

The second term keeps rewards near 0, which the first leaves open. Pairs that are held out tell how good it is: the share that it ranks as they
are labelled, and its mean log-loss, which is least for probabilities that are right.

``reward_of`` makes it the reward of answers, for ``ppo_lm.make(..., reward=...)``, ``dpo.make(..., reward=...)``, or the best of several answers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, Metrics, current_optimizer, start_learning
from jrl.equations import preferences
from jrl.lm import pairs as pairs_of
from jrl.lm.model import Model
from jrl.lm.pairs import Pairs
from jrl.lm.policy import Answers, language_model, reader
from jrl.lm.scoring import answer_hidden
from jrl.lm.tasks import Task
from jrl.lm.tasks.environment import as_environment
from jrl.nets import transformer
from jrl.numerics import checks, optim
from jrl.numerics.settings import AboveZero, BelowOne, NonNegative, Positive, Precision, Settings, check_hyper
from jrl.numerics.types import OptState, Params

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    # Shape of the decoder; its vocabulary is the task's.
    model: transformer.Config = field(default_factory=lambda: transformer.Config(dim=64, num_layers=2))
    batch_size: Positive = 64  # Pairs of a gradient step.
    held_out: BelowOne = 0.1  # Share of the pairs, the last ones, that are not learned from.
    # What the optimizer is made of.
    optimizer: optim.OptimizerConfig = field(default_factory=lambda: optim.OptimizerConfig("adamw"))
    precision: Precision = "float32"  # float32, bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 1e-3  # Initial learning rate; decays by config.optimizer.schedule.
    centring: NonNegative = 0.01  # c: weight of the squared sum of both rewards.
    balance_weight: NonNegative = 1e-3  # Weight of the loss that evens the load of experts (moe.balance_loss).
    max_grad_norm: AboveZero = 1.0  # Largest global norm of a gradient.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.


def make(
    task: Task,
    pairs: Pairs,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    start: Any = None,
    model: Model | None = None,
) -> Algorithm:
    """A reward model of answers to a task, from ``pairs``; a step of the run is one token of an answer that is learned from.

    Args:
        task: what is asked.
        pairs: what is learned from, drawn with replacement.
        config: static settings.
        hyper: defaults that ``init`` takes.
        start: parameters of the decoder, of a policy for example; at random if not given.
        model: A language model that takes the place of the decoder of ``config.model``.

    Raises ``ValueError`` for a setting out of range, and for pairs that do not fit the task.
    """
    checks.instances("reward_model.make", task=(task, Task), config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    number = pairs_of.check(task, pairs)
    held_out = int(number * config.held_out)
    if number == held_out:
        raise ValueError(f"config.held_out leaves none of the {number} pairs to learn from; got {config.held_out:g}")
    remake = functools.partial(make, task, pairs, hyper=hyper, start=start, model=model)
    model = language_model(task, config.model, config.precision, model)
    defaults = hyper

    def update(state: State) -> tuple[State, Metrics]:
        key, key_rows, key_test = jax.random.split(state.key, 3)
        rows = jax.random.randint(key_rows, (config.batch_size,), 0, number - held_out)
        batch = jax.tree.map(lambda x: x[rows], state.pairs)
        step = optim.minimize(
            current_optimizer(config, state), lambda p: loss(p, batch, state.hyper), state.params, state.opt_state
        )
        metrics, load = step.extra
        params = step.params | {"body": model.balance(step.params["body"], load)}
        state = state._replace(params=params, opt_state=step.opt_state, key=key, updates=state.updates + 1)
        if held_out:
            rows = number - 1 - jax.random.randint(key_test, (config.batch_size,), 0, held_out)
            others = jax.tree.map(lambda x: x[rows], state.pairs)
            unseen = loss(params, others, state.hyper._replace(centring=jnp.float32(0)))[1][0]
            metrics |= {"held_out_accuracy": unseen["accuracy"], "held_out_loss": unseen["loss"]}
        metrics |= {"episodes": jnp.float32(2 * config.batch_size), "grad_norm": step.grad_norm}
        return state, metrics | {"episode_return": metrics.get("held_out_accuracy", metrics["accuracy"])}

    def loss(params: Params, batch: Pairs, hyper: Hyper) -> tuple[Array, tuple[Metrics, Any]]:
        prompt, valid = (jnp.concatenate([x, x]) for x in (batch.prompt, batch.valid))
        rewards, load = scores(model, params, prompt, valid, jnp.concatenate([batch.chosen, batch.rejected]))
        chosen, rejected = jnp.split(rewards, 2)
        weight = batch.weight / jnp.maximum(batch.weight.sum(), 1)
        value = jnp.sum(weight * preferences.bradley_terry(chosen, rejected))
        total = value + hyper.centring * jnp.sum(weight * jnp.square(chosen + rejected))
        metrics = {
            "loss": value,
            "accuracy": jnp.sum(weight * (chosen > rejected)),
            "margin": jnp.sum(weight * (chosen - rejected)),
        }
        return total + hyper.balance_weight * model.balance_loss(load), (metrics, load)

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_body, key_optimizer, key_run = jax.random.split(key, 3)
        body = model.init(key_body) if start is None else jax.tree.map(jnp.copy, start)
        params = {"body": body, "head": jnp.zeros(width_of(model, task, body), jnp.float32)}
        learner = start_learning(config, hyper, params, key_optimizer, num_updates)
        return State(**learner, pairs=jax.tree.map(jnp.asarray, pairs), key=key_run)

    return Algorithm(
        init=init,
        update=update,
        act=reader(task, model, lambda state: state.params["body"]),
        env_steps_per_update=2 * config.batch_size * task.answer_length,
        name="reward_model",
        env=as_environment(task),
        config=config,
        hyper=hyper,
        uses_length=config.optimizer.uses_length,
        remake=remake,
        check_hyper=check_hyper,
    )


class State(NamedTuple):
    """The whole run, the pairs included."""

    params: dict[str, Any]  # of the decoder, "body", and of the head
    opt_state: OptState
    pairs: Pairs
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


def scores(model: Model, params: Params, prompt: Array, valid: Array, tokens: Array) -> tuple[Array, Any]:
    """Rewards float32 ``[N]`` of answers ``tokens [N, T]``, and the load of experts."""
    said = pairs_of.as_rollout(tokens)
    # The stream that predicts the token after the last one has seen the whole answer.
    behind = said._replace(
        tokens=jnp.pad(tokens, [(0, 0), (0, 1)]), mask=jnp.pad(said.mask, [(0, 0), (0, 1)]), log_prob=said.log_prob
    )
    hidden, load = answer_hidden(model, params["body"], prompt, behind, valid)
    last = jnp.take_along_axis(hidden, said.mask.sum(-1)[:, None, None], axis=1)[:, 0]
    return jnp.einsum("nd,d->n", last.astype(jnp.float32), params["head"].astype(jnp.float32)), load


def reward_of(algo: Algorithm, state: State, task: Task, model: Model | None = None) -> Callable[[Answers], Array]:
    """The trained model as the reward of answers, float32 ``[N]``; ``state`` is of one seed, and ``model`` the one that ``make`` was given."""
    model = language_model(task, algo.config.model, algo.config.precision, model)
    params = optim.eval_params(state.opt_state, state.params)

    def reward(answers: Answers) -> Array:
        problems, tokens = answers.problems, jnp.where(answers.rollout.mask, answers.rollout.tokens, 0)
        return scores(model, params, problems.prompt, problems.valid, tokens)[0]

    return reward


def width_of(model: Model, task: Task, params: Params) -> int:
    """Width of the decoder's stream."""
    prompt = jnp.zeros((1, task.prompt_length), jnp.int32)
    valid = jnp.ones(prompt.shape, bool)
    return jax.eval_shape(lambda p: model.hidden_and_load(p, prompt, valid, valid)[0], params).shape[-1]
