"""Direct preference optimization and its kin (Rafailov et al. 2023, arXiv 2305.18290).

A policy learns from pairs of answers, of which one is preferred, without a reward model. With the log-ratio to the policy at the start,

    r(y) = log pi(y|x) - log ref(y|x),    h = r(chosen) - r(rejected):

    sigmoid    -log sigmoid(beta h)                              DPO, 2305.18290, eq. 7; with hyper.smoothing cDPO
    ipo        (h - 1 / (2 beta))^2                              2310.12036, eq. 17
    hinge      max(0, 1 - beta h)                                2305.10425
    kto        of each answer alone, against the mean of r       2402.01306
    apo        the chosen likelier, the rejected less likely     2408.06266
    orpo       -log p(chosen) - beta log odds ratio              2403.07691, without a reference
    simpo      -log sigmoid(beta (m_w - m_l) - margin)           2405.14734, m a token's mean, without a reference

Pairs are given (offline), or drawn from the policy at each update and ranked by a reward (online). The reference is the policy at the start; its
log-probabilities of pairs that are given are computed once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, Metrics, current_optimizer, start_learning
from jrl.equations import preferences, token_losses
from jrl.lm import pairs as pairs_of
from jrl.lm.model import Model
from jrl.lm.pairs import PairLogProbs, Pairs
from jrl.lm.policy import Answers, adapted, language_model, reader
from jrl.lm.sampling import Support
from jrl.lm.tasks import Task
from jrl.lm.tasks.environment import as_environment
from jrl.nets import adapters, moe, transformer
from jrl.numerics import checks, optim
from jrl.numerics.settings import (
    AboveZero,
    NonNegative,
    Positive,
    Precision,
    Settings,
    Unit,
    check_hyper,
)
from jrl.numerics.types import OptState, Params

Array = jax.Array
Loss = Literal["sigmoid", "ipo", "hinge", "kto", "apo", "orpo", "simpo"]
WITHOUT_REFERENCE = ("orpo", "simpo")  # losses of a token's mean log-probability


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    # Shape of the decoder; its vocabulary is the task's.
    model: transformer.Config = field(default_factory=lambda: transformer.Config(dim=64, num_layers=2))
    batch_size: Positive = 64  # Pairs of a gradient step.
    loss: Loss = "sigmoid"  # Loss of a pair.
    token_mean: bool = False  # Log-ratios are means over tokens instead of sums; orpo and simpo always take means.
    adapter: adapters.Config = field(
        default_factory=adapters.Config
    )  # What is trained: everything, or a little beside.
    # What the optimizer is made of.
    optimizer: optim.OptimizerConfig = field(default_factory=lambda: optim.OptimizerConfig("adamw"))
    precision: Precision = "float32"  # float32, bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 3e-4  # Initial learning rate; decays by config.optimizer.schedule.
    beta: AboveZero = 0.1  # How dear it is to leave the reference; of orpo, the weight of its odds ratio.
    smoothing: Unit = 0.0  # Share of pairs taken to be labelled the wrong way round (sigmoid, simpo).
    margin: NonNegative = 0.5  # Margin of simpo.
    liked_weight: NonNegative = 1.0  # Weight of chosen answers in kto.
    disliked_weight: NonNegative = 1.0  # Weight of rejected answers in kto.
    likelihood_weight: NonNegative = 0.0  # Weight of -log p of a chosen token beside the loss (orpo has 1 more).
    temperature: AboveZero = 1.0  # Temperature at which answers are drawn online.
    balance_weight: NonNegative = 1e-3  # Weight of the loss that evens the load of experts (moe.balance_loss).
    max_grad_norm: AboveZero = 1.0  # Largest global norm of a gradient.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.


def make(
    task: Task,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    pairs: Pairs | None = None,
    reward: Callable[[Answers], Array] | None = None,
    start: Any = None,
    model: Model | None = None,
) -> Algorithm:
    """DPO on a task; a step of the run is one token of an answer that is learned from.

    Args:
        task: what is asked.
        config: static settings.
        hyper: defaults that ``init`` takes.
        pairs: what is learned from, in a new order each epoch; if not given, pairs are drawn from the policy at each update.
        reward: A function of answers that gives float32 ``[N]`` and ranks those that are drawn; by default whether they are correct.
        start: parameters of policy and reference; at random if not given.
        model: A language model that takes the place of the decoder of ``config.model``.

    Raises ``ValueError`` for a setting out of range, and for pairs or a reward that do not fit.
    """
    check(task, config, hyper)
    if pairs is not None and reward is not None:
        raise ValueError("dpo.make: pairs that are given are ranked already; reward ranks those that are drawn")
    number = None if pairs is None else pairs_of.check(task, pairs)
    if number is not None and number < config.batch_size:
        raise ValueError(f"config.batch_size must be at most the {number} pairs; got {config.batch_size}")
    remake = functools.partial(make, task, hyper=hyper, pairs=pairs, reward=reward, start=start, model=model)
    model = language_model(task, config.model, config.precision, model)
    adapter = model.adapter(config.adapter)
    keeps_start = not config.adapter.trains_all or config.loss not in WITHOUT_REFERENCE
    rank_by = reward or (lambda answers: answers.parts["correct"])
    defaults = hyper

    def update(state: State) -> tuple[State, Metrics]:
        key, key_draw = jax.random.split(state.key)
        if number is None:
            support = Support(state.hyper.temperature)
            batch, answers = pairs_of.draw(key_draw, task, model, policy(state), config.batch_size, rank_by, support)
            reference = reference_of(state, batch)
            seen = {"episode_return": answers.parts["correct"].mean(), "informative": batch.weight.mean()}
        else:
            rows = rows_of(state, number)
            batch, reference = jax.tree.map(lambda x: x[rows], (state.pairs, state.reference))
            seen = {}
        tx = current_optimizer(config, state)
        step = optim.minimize(tx, lambda trained: loss(trained, state, batch, reference), state.params, state.opt_state)
        metrics, load = step.extra
        params = model.balance(step.params, load) if config.adapter.trains_all else step.params
        state = state._replace(params=params, opt_state=step.opt_state, key=key, updates=state.updates + 1)
        metrics |= {"episodes": jnp.float32(2 * config.batch_size), "grad_norm": step.grad_norm}
        return state, metrics | {"episode_return": metrics["accuracy"]} | seen

    def loss(
        trained: Any, state: State, batch: Pairs, reference: Reference | tuple[()]
    ) -> tuple[Array, tuple[Metrics, moe.Load]]:
        scored = pairs_of.log_probs(model, adapted(model, adapter, state.frozen, trained), batch)
        mean = functools.partial(token_losses.weighted_sum, batch.weight / jnp.maximum(batch.weight.sum(), 1))
        if config.loss in WITHOUT_REFERENCE:
            reference = Reference(jnp.zeros_like(scored.chosen), jnp.zeros_like(scored.rejected))
        assert isinstance(reference, Reference)
        each = losses_of(config, state.hyper, scored, reference, mean)
        likelihood = mean(-scored.chosen / scored.chosen_length)
        weight = state.hyper.likelihood_weight + (config.loss == "orpo")
        liked, disliked = scored.chosen - reference.chosen, scored.rejected - reference.rejected
        metrics = {
            "loss": mean(each),
            "accuracy": mean(1.0 * (liked > disliked)),
            "margin": state.hyper.beta * mean(liked - disliked),
            "chosen_log_ratio": mean(liked),
            "rejected_log_ratio": mean(disliked),
            "likelihood_loss": likelihood,
        }
        balance = state.hyper.balance_weight * model.balance_loss(scored.load)
        return metrics["loss"] + weight * likelihood + balance, (metrics, scored.load)

    def reference_of(state: State, batch: Pairs) -> Any:
        """Log-probabilities under the policy at the start; nothing where there is none."""
        if config.loss in WITHOUT_REFERENCE:
            return ()

        def of_one(pair: Pairs) -> Reference:
            scored = pairs_of.log_probs(model, state.frozen, jax.tree.map(lambda x: x[None], pair))
            return Reference(scored.chosen[0], scored.rejected[0])

        return jax.lax.map(of_one, batch, batch_size=config.batch_size)

    def rows_of(state: State, number: int) -> Array:
        """Pairs of this update: the next ones of an order that is new in each epoch."""
        per_epoch = number // config.batch_size
        epoch, at = state.updates // per_epoch, state.updates % per_epoch
        order = jax.random.permutation(jax.random.fold_in(state.key_order, epoch), number)
        return jax.lax.dynamic_slice_in_dim(order, at * config.batch_size, config.batch_size)

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_start, key_adapter, key_optimizer, key_run, key_order = jax.random.split(key, 5)
        params = model.init(key_start) if start is None else start
        learner = start_learning(config, hyper, adapter.init(key_adapter, params), key_optimizer, num_updates)
        frozen = jax.tree.map(jnp.copy, params) if keeps_start else ()
        state = State(**learner, frozen=frozen, pairs=(), reference=(), key=key_run, key_order=key_order)
        if pairs is None:
            return state
        shown = jax.tree.map(jnp.asarray, pairs)
        return state._replace(pairs=shown, reference=reference_of(state, shown))

    def policy(state: State) -> Any:
        return adapted(model, adapter, state.frozen, state.params)

    return Algorithm(
        init=init,
        update=update,
        act=reader(task, model, policy, lambda state: Support(state.hyper.temperature)),
        env_steps_per_update=2 * config.batch_size * task.answer_length,
        name="dpo",
        env=as_environment(task),
        config=config,
        hyper=hyper,
        uses_length=config.optimizer.uses_length,
        remake=remake,
        check_hyper=check_hyper,
    )


class Reference(NamedTuple):
    """Log-probabilities ``[N]`` of both answers of pairs under the policy at the start."""

    chosen: Array
    rejected: Array


class State(NamedTuple):
    """The whole run, the pairs that were given included."""

    params: Params  # what is trained: all parameters, or the matrices beside them
    frozen: Any  # the policy at the start, where it is the reference or carries LoRA; else ()
    opt_state: OptState
    pairs: Any  # Pairs that were given; () where they are drawn
    reference: Any  # Reference of these; () without one
    key: Array
    key_order: Array  # of the orders of pairs
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


def losses_of(
    config: Config, hyper: Hyper, scored: PairLogProbs, reference: Reference, mean: Callable[[Array], Array]
) -> Array:
    """The loss of each pair, ``[N]``; ``mean`` is over the pairs that count."""
    chosen, rejected, ref_chosen, ref_rejected = scored.chosen, scored.rejected, *reference
    if config.token_mean or config.loss in WITHOUT_REFERENCE:
        chosen, ref_chosen = chosen / scored.chosen_length, ref_chosen / scored.chosen_length
        rejected, ref_rejected = rejected / scored.rejected_length, ref_rejected / scored.rejected_length
    both = chosen, rejected, ref_chosen, ref_rejected
    match config.loss:
        case "sigmoid":
            return preferences.dpo(*both, hyper.beta, hyper.smoothing)
        case "ipo":
            return preferences.ipo(*both, hyper.beta)
        case "hinge":
            return preferences.hinge(*both, hyper.beta)
        case "apo":
            return preferences.apo(*both, hyper.beta)
        case "orpo":
            return hyper.beta * preferences.orpo(chosen, rejected)
        case "simpo":
            return preferences.simpo(chosen, rejected, hyper.beta, hyper.margin, hyper.smoothing)
        case "kto":
            apart = mean((chosen - ref_chosen + rejected - ref_rejected) / 2)
            liked, disliked = preferences.kto(*both, hyper.beta, apart)
            return 0.5 * (hyper.liked_weight * liked + hyper.disliked_weight * disliked)


def check(task: Task, config: Config, hyper: Hyper) -> None:
    """Raise ``ValueError`` for settings that are wrong or do not fit each other."""
    checks.instances("dpo.make", task=(task, Task), config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    token_losses.refuse_accumulation(config.optimizer.accumulate, "a larger config.batch_size")
