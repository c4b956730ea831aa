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

from jrl.algorithm import Algorithm, Metrics
from jrl.algos.scorer import Learner, by_head, scorer
from jrl.equations import preferences
from jrl.lm import pairs as pairs_of
from jrl.lm.model import Model
from jrl.lm.pairs import Pairs
from jrl.lm.policy import Answers, language_model, reader
from jrl.lm.sampling import Rollout
from jrl.lm.scoring import answer_hidden
from jrl.lm.tasks import Task
from jrl.lm.tasks.environment import as_environment
from jrl.nets import adapters, transformer
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
    micro_batches: Positive = 1  # Parts in which a batch is computed, one after another; they change no gradient.
    adapter: adapters.Config = field(default_factory=adapters.Config)  # What is trained beside the head.
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


def learner(model: Model, config: Config) -> Learner:
    """A reward model on pairs of any origin, as pure functions. Raises ``ValueError`` for settings that do not fit each other."""

    def weigh(batch: Pairs) -> Array:
        return batch.weight / jnp.maximum(batch.weight.sum(), 1)

    def scored(params: Params, hyper: Hyper, batch: Pairs, weight: Array) -> tuple[Array, Metrics, Any]:
        """Loss and metrics of some pairs."""
        rewards, load = scores(model, params, *pairs_of.answers_of(batch))
        chosen, rejected = jnp.split(rewards, 2)
        value = jnp.sum(weight * preferences.bradley_terry(chosen, rejected))
        metrics = {
            "loss": value,
            "accuracy": jnp.sum(weight * (chosen > rejected)),
            "margin": jnp.sum(weight * (chosen - rejected)),
        }
        return value + hyper.centring * jnp.sum(weight * jnp.square(chosen + rejected)), metrics, load

    parts = scorer(model, config, weigh, scored)

    def init(key: Array, params: Params, hyper: Hyper, num_updates: Array | int | None = None) -> State:
        key_parts, key_run = jax.random.split(key)
        return State(**parts.fields(key_parts, params, hyper, num_updates), pairs=(), key=key_run)

    return Learner(init, parts.parameters, parts.learn, parts.evaluate)


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
    learning = learner(model, config)
    defaults = hyper

    def update(state: State) -> tuple[State, Metrics]:
        key, key_rows, key_test = jax.random.split(state.key, 3)
        rows = jax.random.randint(key_rows, (config.batch_size,), 0, number - held_out)
        state, metrics = learning.learn(state._replace(key=key), jax.tree.map(lambda x: x[rows], state.pairs))
        if held_out:
            rows = number - 1 - jax.random.randint(key_test, (config.batch_size,), 0, held_out)
            unseen = learning.evaluate(state, jax.tree.map(lambda x: x[rows], state.pairs))
            metrics |= {"held_out_accuracy": unseen["accuracy"], "held_out_loss": unseen["loss"]}
        metrics |= {"episodes": jnp.float32(2 * config.batch_size)}
        return state, metrics | {"episode_return": metrics.get("held_out_accuracy", metrics["accuracy"])}

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_body, key_learner = jax.random.split(key)
        body = model.init(key_body) if start is None else start
        state = learning.init(key_learner, body, hyper, num_updates)
        return state._replace(pairs=jax.tree.map(jnp.asarray, pairs))

    return Algorithm(
        init=init,
        update=update,
        act=reader(task, model, lambda state: learning.parameters(state)["body"]),
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

    params: dict[str, Any]  # what is trained: of the decoder, "body", or what stands beside it, and of the head
    frozen: Any  # the decoder at the start, where little is trained beside it; else ()
    opt_state: OptState
    pairs: Any  # Pairs that were given; () where they come from elsewhere
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


def scores(model: Model, params: Params, prompt: Array, valid: Array, said: Rollout) -> tuple[Array, Any]:
    """Rewards float32 ``[N]`` of answers ``[N, T]``, and the load of experts."""
    tokens = jnp.where(said.mask, said.tokens, 0)
    # The stream that predicts the token after the last one has seen the whole answer.
    behind = said._replace(
        tokens=jnp.pad(tokens, [(0, 0), (0, 1)]), mask=jnp.pad(said.mask, [(0, 0), (0, 1)]), log_prob=said.log_prob
    )
    hidden, load = answer_hidden(model, params["body"], prompt, behind, valid)
    last = jnp.take_along_axis(hidden, said.mask.sum(-1)[:, None, None], axis=1)[:, 0]
    return by_head(params, last), load


def reward_of(algo: Algorithm, state: State, task: Task, model: Model | None = None) -> Callable[[Answers], Array]:
    """The trained model as the reward of answers, float32 ``[N]``; ``state`` is of one seed, and ``model`` the one that ``make`` was given."""
    model = language_model(task, algo.config.model, algo.config.precision, model)
    params = learner(model, algo.config).parameters(state)

    def reward(answers: Answers) -> Array:
        return scores(model, params, answers.problems.prompt, answers.problems.valid, answers.rollout)[0]

    return reward
