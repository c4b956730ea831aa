"""Supervised fine-tuning: cross-entropy on demonstrated answers, so that reinforcement learning has something to reinforce."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, Metrics, learning_rate_factor, optimizer
from jrl.equations import token_losses
from jrl.lm.policy import language_model, reader
from jrl.lm.sampling import Rollout, score
from jrl.lm.tasks import Task, answer_mask
from jrl.lm.tasks.environment import as_environment
from jrl.nets import moe, transformer
from jrl.numerics import checks, optim, precision

Array = jax.Array


@dataclass(frozen=True)
class Config:
    """Static settings.

    Attributes:
        model: shape of the decoder; its vocabulary is the task's.
        batch_size: demonstrations of a gradient step.
        optimizer: what the optimizer is made of.
        precision: float32, bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    """

    model: transformer.Config = field(default_factory=lambda: transformer.Config(dim=64, num_layers=2))
    batch_size: int = 64
    optimizer: optim.OptimizerConfig = field(default_factory=lambda: optim.OptimizerConfig("adamw"))
    precision: str = "float32"

    def __post_init__(self) -> None:
        checks.positive_int("config.batch_size", self.batch_size)
        precision.parse(self.precision)
        token_losses.refuse_accumulation(self.optimizer.accumulate, "a larger config.batch_size")


class Hyper(NamedTuple):
    """Hyperparameters: data of the state.

    Attributes:
        learning_rate: at the start of the run; config.optimizer.schedule says how it goes on.
        balance_weight: Weight of the loss that evens the load of experts routed by a softmax (moe.balance_loss).
        max_grad_norm: global norm that gradients are scaled down to.
        optimizer: numbers of the optimizer.
    """

    learning_rate: float = 1e-3
    balance_weight: float = 1e-3
    max_grad_norm: float = 1.0
    optimizer: optim.Hyper = optim.Hyper()


def check_hyper(hyper: Hyper) -> None:
    """Raise ``ValueError`` for a concrete number outside its range; traced numbers pass."""
    for name in ("learning_rate", "balance_weight"):
        checks.within(f"hyper.{name}", getattr(hyper, name), 0, float("inf"))
    checks.above_zero("hyper.max_grad_norm", hyper.max_grad_norm)
    optim.check_hyper(hyper.optimizer)


class State(NamedTuple):
    """The whole run."""

    params: Any
    opt_state: Any
    key: Array
    updates: Array
    num_updates: Array
    hyper: Hyper


def make(task: Task, config: Config = Config(), hyper: Hyper = Hyper()) -> Algorithm:
    """Supervised fine-tuning on a task's demonstrations; a step of the run is one token of an answer.

    Raises ``ValueError`` for a setting out of range or one that does not fit the task.
    """
    checks.instances("sft.make", task=(task, Task), config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    model = language_model(task, config.model, config.precision)
    defaults = hyper

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = defaults if hyper is None else hyper
        check_hyper(hyper)
        key_params, key_run, key_optimizer = jax.random.split(key, 3)
        hyper = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyper)
        params = model.init(key_params)
        opt_state = optimizer(config, hyper, 1.0, key_optimizer).init(params)
        return State(
            params,
            opt_state,
            key_run,
            jnp.int32(0),
            jnp.asarray(0 if num_updates is None else num_updates, jnp.int32),
            hyper,
        )

    def update(state: State) -> tuple[State, Metrics]:
        key, key_draw = jax.random.split(state.key)
        problems = jax.vmap(task.draw)(jax.random.split(key_draw, config.batch_size))
        tokens = jax.vmap(task.demonstrate)(problems)
        mask = answer_mask(tokens)
        shown = Rollout(tokens, mask, jnp.zeros(tokens.shape, jnp.float32), None)
        weight = token_losses.weights(mask, "token_mean")

        def loss(params: Any) -> tuple[Array, tuple[Metrics, moe.Load]]:
            log_prob, _, _, load = score(model, params, problems.prompt, shown, valid=problems.valid)
            value = token_losses.weighted_sum(weight, -log_prob)
            certain = jnp.all(jnp.where(mask, log_prob > jnp.log(0.5), True), axis=1)
            total = value + state.hyper.balance_weight * model.balance_loss(load)
            return total, ({"loss": value, "sure_of_all": certain.mean()}, load)

        tx = optimizer(config, state.hyper, learning_rate_factor(config, state))
        step = optim.minimize(tx, loss, state.params, state.opt_state)
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
        remake=lambda config: make(task, config, hyper),
        check_hyper=check_hyper,
    )
