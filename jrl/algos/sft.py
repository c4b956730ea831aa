"""Supervised learning of a language model: cross-entropy on the tokens of texts that are learned from.

    L = mean over these tokens of  -log p(token | tokens before)  +  weight L of the tokens further ahead (``jrl.nets.ahead``)

``make`` learns a task's demonstrated answers, so that reinforcement learning has something to reinforce. ``learner`` learns from texts of any
origin: chats, of which the assistant's answers count (``jrl.lm.data``), or whole texts, which is pre-training.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, Metrics, current_optimizer, start_learning
from jrl.equations import token_losses
from jrl.lm.model import Model, turned
from jrl.lm.policy import adapted, language_model, reader
from jrl.lm.scoring import read
from jrl.lm.tasks import Problem, Task, answer_mask
from jrl.lm.tasks.environment import as_environment
from jrl.lm.texts import Texts
from jrl.nets import adapters, moe, transformer
from jrl.numerics import checks, loops, optim
from jrl.numerics.settings import AboveZero, NonNegative, Positive, Precision, Settings, check_hyper
from jrl.numerics.types import OptState, Params

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    # Shape of the decoder; its vocabulary is the task's.
    model: transformer.Config = field(default_factory=lambda: transformer.Config(dim=64, num_layers=2))
    batch_size: Positive = 64  # Demonstrations, or rows of texts, of a gradient step.
    micro_batches: Positive = 1  # Parts in which a batch is computed, one after another; they change no gradient.
    adapter: adapters.Config = field(
        default_factory=adapters.Config
    )  # What is trained: everything, or a little beside.
    # What the optimizer is made of.
    optimizer: optim.OptimizerConfig = field(default_factory=lambda: optim.OptimizerConfig("adamw"))
    precision: Precision = "float32"  # float32, bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 1e-3  # Initial learning rate; decays by config.optimizer.schedule.
    ahead_weight: NonNegative = 0.3  # Weight of the loss of tokens further ahead, where the model predicts them.
    balance_weight: NonNegative = 1e-3  # Weight of the loss that evens the load of experts (moe.balance_loss).
    max_grad_norm: AboveZero = 1.0  # Largest global norm of a gradient.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.


def learner(model: Model, config: Config, *, packed: bool = False) -> "Learner":
    """Supervised learning of a model from texts, as pure functions; rows hold several texts if they are ``packed``.

    Raises ``ValueError`` for a setting that does not fit.
    """
    token_losses.refuse_accumulation(config.optimizer.accumulate, "a larger config.batch_size")
    if config.batch_size % config.micro_batches:
        raise ValueError(
            f"config.micro_batches must divide batch_size = {config.batch_size}; got {config.micro_batches}"
        )
    adapter = model.adapter(config.adapter)
    if packed and config.adapter.kind in ("prefix", "prompt"):
        raise ValueError(f"config.adapter.kind = {config.adapter.kind} is of one text a row: packing must be none")

    def learn(state: State, key: Array, texts: Texts) -> tuple[State, Metrics]:
        if len(texts.tokens) != config.batch_size:
            raise ValueError(f"learn: needs config.batch_size = {config.batch_size} rows; got {len(texts.tokens)}")
        step = optim.minimize(
            current_optimizer(config, state), lambda p: loss(p, state, key, texts), state.params, state.opt_state
        )
        metrics, load = step.extra
        params = model.balance(step.params, load) if config.adapter.trains_all else step.params
        state = state._replace(params=params, opt_state=step.opt_state, updates=state.updates + 1)
        return state, metrics | {"grad_norm": step.grad_norm}

    def loss(trained: Any, state: State, key: Array, texts: Texts) -> tuple[Array, tuple[Metrics, moe.Load]]:
        """Of a batch: the sum over its micro-batches, plus the loss of the experts' load."""
        params = adapted(model, adapter, state.frozen, trained, key if config.adapter.dropout else None)
        weight = token_losses.weights(texts.learned, "token_mean")

        def part(x: tuple[Texts, Array]) -> tuple[Metrics, moe.Load]:
            return scored(params, *x)

        metrics, load = loops.sum_over_parts(part, (texts, weight), config.micro_batches)
        total = metrics["loss"] + state.hyper.ahead_weight * metrics.get("ahead_loss", 0.0)
        return total + state.hyper.balance_weight * model.balance_loss(load), (metrics, load)

    def scored(params: Params, texts: Texts, weight: Array) -> tuple[Metrics, moe.Load]:
        found = read(model, params, texts, packed=packed)
        certain = jnp.where(texts.learned, found.log_prob > jnp.log(0.5), True)
        metrics = {
            "loss": token_losses.weighted_sum(weight, -found.log_prob),
            "token_accuracy": token_losses.weighted_sum(weight, found.likeliest.astype(jnp.float32)),
            "sure_of_all": jnp.all(certain, axis=1).mean() / config.micro_batches,
        }
        if found.further:
            each = [-further_ahead(texts, x, k) for k, x in enumerate(found.further, 1)]
            metrics["ahead_loss"] = jnp.mean(jnp.stack([token_losses.weighted_sum(weight, x) for x in each]))
        return metrics, found.load

    def init(key: Array, params: Params, hyper: Hyper, num_updates: Array | int | None = None) -> State:
        key_adapter, key_optimizer, key_run = jax.random.split(key, 3)
        fields = start_learning(config, hyper, adapter.init(key_adapter, params), key_optimizer, num_updates)
        frozen = () if config.adapter.trains_all else jax.tree.map(jnp.copy, params)
        return State(**fields, frozen=frozen, key=key_run)

    def policy(state: State) -> Any:
        return adapted(model, adapter, state.frozen, optim.eval_params(state.opt_state, state.params))

    def evaluate(state: State, texts: Texts) -> dict[str, Array]:
        weight = token_losses.weights(texts.learned, "token_mean")
        return scored(policy(state), texts, weight)[0] | {"tokens": texts.learned.sum(dtype=jnp.float32)}

    return Learner(init, policy, learn, evaluate)


def make(task: Task, config: Config = Config(), hyper: Hyper = Hyper(), *, model: Model | None = None) -> Algorithm:
    """Supervised fine-tuning on a task's demonstrations; a step of the run is one token of an answer. ``model`` takes the place of the
    decoder that ``config.model`` describes.

    Raises ``ValueError`` for a setting out of range or one that does not fit the task.
    """
    checks.instances("sft.make", task=(task, Task), config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    remake = functools.partial(make, task, hyper=hyper, model=model)
    model = language_model(task, config.model, config.precision, model)
    learning = learner(model, config)
    defaults = hyper

    def update(state: State) -> tuple[State, Metrics]:
        key, key_draw, key_learn = jax.random.split(state.key, 3)
        problems = jax.vmap(task.draw)(jax.random.split(key_draw, config.batch_size))
        texts = demonstrations(problems, jax.vmap(task.demonstrate)(problems))
        state, metrics = learning.learn(state, key_learn, texts)
        metrics |= {
            "episodes": jnp.float32(config.batch_size),
            "episode_return": metrics["sure_of_all"],
            "episode_length": texts.learned.sum(1).mean(dtype=jnp.float32),
        }
        return state._replace(key=key), metrics

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_params, key_learner = jax.random.split(key)
        return learning.init(key_learner, model.init(key_params), hyper, num_updates)

    return Algorithm(
        init=init,
        update=update,
        act=reader(task, model, learning.policy),
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

    params: Params  # what is trained: all parameters, or what stands beside them
    frozen: Any  # the model at the start, where little is trained beside it; else ()
    opt_state: OptState
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


class Learner(NamedTuple):
    """The algorithm without its task: texts may come from anywhere.

    Attributes:
        init: ``(key, params, hyper, num_updates=None) -> State``.
        policy: ``State -> params`` of the model as it is now.
        learn: ``(state, key, texts) -> (State, Metrics)``.
        evaluate: ``(state, texts) -> {"loss", "token_accuracy", ...}``, means over the tokens that are learned from, and their number, "tokens".
    """

    init: Callable[..., State]
    policy: Callable[[State], Any]
    learn: Callable[..., tuple[State, Metrics]]
    evaluate: Callable[[State, Texts], dict[str, Array]]


def further_ahead(texts: Texts, log_prob: Array, k: int) -> Array:
    """Log-probabilities by the k-th module, 0 for tokens with fewer than ``k + 1`` of their own text before them."""
    before = jnp.pad(texts.segments[:, : -k - 1], [(0, 0), (k + 1, 0)])
    return jnp.where(texts.segments == before, log_prob, 0.0)


def demonstrations(problems: Problem, answers: Array) -> Texts:
    """Prompts and answers ``[N, T]`` to them as one text a row, of which the answers are learned from."""
    tokens = jnp.concatenate([problems.prompt, answers], axis=1)
    said = answer_mask(answers)
    there = jnp.concatenate([problems.valid, said], axis=1)
    learned = jnp.concatenate([jnp.zeros_like(problems.valid), said], axis=1)
    padding = jnp.argmax(problems.valid, axis=1)
    return Texts(*(turned(x, -padding) for x in (tokens, learned, there.astype(jnp.int32))))
