"""Supervised fine-tuning: cross-entropy on demonstrated answers, so that reinforcement learning has something to reinforce."""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, Metrics, current_optimizer, start_learning
from jrl.equations import token_losses
from jrl.lm.pairs import as_rollout
from jrl.lm.policy import language_model, reader
from jrl.lm.sampling import Model, score
from jrl.lm.tasks import Task
from jrl.lm.tasks.environment import as_environment
from jrl.nets import moe, transformer
from jrl.numerics import checks, optim
from jrl.numerics.settings import AboveZero, NonNegative, Positive, Precision, Settings, check_hyper
from jrl.numerics.types import OptState, Params

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    # Shape of the decoder; its vocabulary is the task's.
    model: transformer.Config = field(default_factory=lambda: transformer.Config(dim=64, num_layers=2))
    batch_size: Positive = 64  # Demonstrations of a gradient step.
    # What the optimizer is made of.
    optimizer: optim.OptimizerConfig = field(default_factory=lambda: optim.OptimizerConfig("adamw"))
    precision: Precision = "float32"  # float32, bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 1e-3  # Initial learning rate; decays by config.optimizer.schedule.
    balance_weight: NonNegative = 1e-3  # Weight of the loss that evens the load of experts (moe.balance_loss).
    max_grad_norm: AboveZero = 1.0  # Largest global norm of a gradient.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.


def make(task: Task, config: Config = Config(), hyper: Hyper = Hyper(), *, model: Model | None = None) -> Algorithm:
    """Supervised fine-tuning on a task's demonstrations; a step of the run is one token of an answer. ``model`` takes the place of the
    decoder that ``config.model`` describes.

    Raises ``ValueError`` for a setting out of range or one that does not fit the task.
    """
    checks.instances("sft.make", task=(task, Task), config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    token_losses.refuse_accumulation(config.optimizer.accumulate, "a larger config.batch_size")
    remake = functools.partial(make, task, hyper=hyper, model=model)
    model = language_model(task, config.model, config.precision, model)
    defaults = hyper

    def update(state: State) -> tuple[State, Metrics]:
        key, key_draw = jax.random.split(state.key)
        problems = jax.vmap(task.draw)(jax.random.split(key_draw, config.batch_size))
        tokens = jax.vmap(task.demonstrate)(problems)
        shown = as_rollout(tokens)
        mask = shown.mask
        weight = token_losses.weights(mask, "token_mean")

        def loss(params: Params) -> tuple[Array, tuple[Metrics, moe.Load]]:
            log_prob, _, _, load = score(model, params, problems.prompt, shown, valid=problems.valid)
            value = token_losses.weighted_sum(weight, -log_prob)
            certain = jnp.all(jnp.where(mask, log_prob > jnp.log(0.5), True), axis=1)
            total = value + state.hyper.balance_weight * model.balance_loss(load)
            return total, ({"loss": value, "sure_of_all": certain.mean()}, load)

        step = optim.minimize(current_optimizer(config, state), loss, state.params, state.opt_state)
        metrics, load = step.extra
        params = model.balance(step.params, load)
        state = state._replace(params=params, opt_state=step.opt_state, key=key, updates=state.updates + 1)
        metrics |= {
            "episodes": jnp.float32(config.batch_size),
            "episode_return": metrics["sure_of_all"],
            "episode_length": mask.sum(1).mean(dtype=jnp.float32),
            "grad_norm": step.grad_norm,
        }
        return state, metrics

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_params, key_run, key_optimizer = jax.random.split(key, 3)
        learner = start_learning(config, hyper, model.init(key_params), key_optimizer, num_updates)
        return State(**learner, key=key_run)

    return Algorithm(
        init=init,
        update=update,
        act=reader(task, model, lambda state: state.params),
        env_steps_per_update=config.batch_size * task.answer_length,
        name="sft",
        env=as_environment(task),
        config=config,
        hyper=hyper,
        uses_length=config.optimizer.uses_length,
        remake=remake,
        check_hyper=check_hyper,
    )


class State(NamedTuple):
    """The whole run."""

    params: Params
    opt_state: OptState
    key: Array
    updates: Array
    num_updates: Array
    hyper: Hyper
