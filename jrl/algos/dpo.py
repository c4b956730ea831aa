"""Direct preference optimization and its kin (Rafailov et al. 2023, arXiv 2305.18290).

A policy learns from pairs of answers, of which one is preferred, without a reward model. With the log-ratio to the policy at the start,

    r(y) = log pi(y|x) - log ref(y|x),    h = r(chosen) - r(rejected):

    sigmoid    -log sigmoid(beta h)                              DPO, 2305.18290, eq. 7; with hyper.smoothing cDPO
    ipo        (h - 1 / (2 beta))^2                              2310.12036, eq. 17
    hinge      max(0, 1 - beta h)                                2305.10425
    kto        of each answer alone, against z                   2402.01306; z is the mean r of answers to other prompts
    apo        the chosen likelier, the rejected less likely     2408.06266
    orpo       -log p(chosen) - beta log odds ratio              2403.07691, without a reference
    simpo      -log sigmoid(beta (m_w - m_l) - margin)           2405.14734, m a token's mean, without a reference

Pairs are given (offline), or drawn from the policy at each update and ranked by a reward (online). The reference is the policy at the start; its
log-probabilities of pairs that are given are computed once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, Metrics, current_optimizer, start_learning
from jrl.algos.dpo_settings import WITHOUT_REFERENCE, Config, Hyper, as_taken, losses_of
from jrl.equations import token_losses
from jrl.lm import pairs as pairs_of
from jrl.lm.model import Model
from jrl.lm.pairs import Pairs
from jrl.lm.policy import Answers, adapted, language_model, reader
from jrl.lm.sampling import Support
from jrl.lm.tasks import Task
from jrl.lm.tasks.environment import as_environment
from jrl.nets import moe
from jrl.numerics import checks, loops, optim
from jrl.numerics.settings import check_hyper
from jrl.numerics.types import OptState, Params

Array = jax.Array


def learner(model: Model, config: Config) -> "Learner":
    """DPO of a model on pairs of any origin, as pure functions. Raises ``ValueError`` for settings that do not fit each other."""
    token_losses.refuse_accumulation(config.optimizer.accumulate, "a larger config.batch_size")
    if config.batch_size % config.micro_batches:
        raise ValueError(
            f"config.micro_batches must divide batch_size = {config.batch_size}; got {config.micro_batches}"
        )
    adapter = model.adapter(config.adapter)

    def learn(state: State, batch: Pairs, reference: Reference | tuple[()]) -> tuple[State, Metrics]:
        tx = current_optimizer(config, state)
        step = optim.minimize(tx, lambda trained: loss(trained, state, batch, reference), state.params, state.opt_state)
        metrics, load = step.extra
        params = model.balance(step.params, load) if config.adapter.trains_all else step.params
        state = state._replace(params=params, opt_state=step.opt_state, updates=state.updates + 1)
        return state, metrics | {"grad_norm": step.grad_norm}

    def loss(
        trained: Any, state: State, batch: Pairs, reference: Reference | tuple[()]
    ) -> tuple[Array, tuple[Metrics, moe.Load]]:
        params = adapted(model, adapter, state.frozen, trained)
        weight = batch.weight / jnp.maximum(batch.weight.sum(), 1)
        apart = divergence(params, reference, weight)

        def part(x: tuple[Pairs, Reference | tuple[()], Array]) -> tuple[Array, Metrics, moe.Load]:
            return scored(params, state.hyper, apart, *x)

        total, metrics, load = loops.sum_over_parts(part, (batch, reference, weight), config.micro_batches)
        return total + state.hyper.balance_weight * model.balance_loss(load), (metrics, load)

    def divergence(params: Any, reference: Reference | tuple[()], weight: Array) -> Array:
        """How far the policy is from the reference, by answers to other prompts, which kto compares with; has no gradient."""
        if not isinstance(reference, Reference) or reference.others is None:
            return jnp.zeros(())
        params = jax.lax.stop_gradient(params)

        def part(x: tuple[Others, Array]) -> Array:
            others, weight = x
            now = pairs_of.log_probs(model, params, others.pairs)
            chosen, rejected, *start = as_taken(config, now, others.chosen, others.rejected)
            return token_losses.weighted_sum(weight, (chosen - start[0] + rejected - start[1]) / 2)

        return loops.sum_over_parts(part, (reference.others, weight), config.micro_batches)

    def scored(
        params: Any, hyper: Hyper, apart: Array, batch: Pairs, reference: Reference | tuple[()], weight: Array
    ) -> tuple[Array, Metrics, moe.Load]:
        """Loss and metrics of some pairs, whose weights are part of a sum of 1."""
        found = pairs_of.log_probs(model, params, batch)
        mean = functools.partial(token_losses.weighted_sum, weight)
        if not isinstance(reference, Reference):
            reference = Reference(jnp.zeros_like(found.chosen), jnp.zeros_like(found.rejected))
        each = mean(losses_of(config, hyper, found, reference[:2], apart))
        likelihood = mean(-found.chosen / found.chosen_length)
        liked, disliked = found.chosen - reference.chosen, found.rejected - reference.rejected
        metrics = {
            "loss": each + (hyper.likelihood_weight + (config.loss == "orpo")) * likelihood,
            "accuracy": mean(1.0 * (liked > disliked)),
            "margin": hyper.beta * mean(liked - disliked),
            "chosen_log_ratio": mean(liked),
            "rejected_log_ratio": mean(disliked),
            "likelihood_loss": likelihood,
        }
        return metrics["loss"], metrics, found.load

    def reference_of(params: Any, batch: Pairs) -> Any:
        """Log-probabilities of pairs under ``params``, a few at once; nothing where the loss needs none."""
        if config.loss in WITHOUT_REFERENCE:
            return ()

        def of_one(pair: Pairs) -> tuple[Array, Array]:
            found = pairs_of.log_probs(model, params, jax.tree.map(lambda x: x[None], pair))
            return found.chosen[0], found.rejected[0]

        def of_all(pairs: Pairs) -> tuple[Array, Array]:
            return jax.lax.map(of_one, pairs, batch_size=config.batch_size // config.micro_batches)

        others = pairs_of.mismatched(batch) if config.loss == "kto" else None
        return Reference(*of_all(batch), None if others is None else Others(others, *of_all(others)))

    def init(
        key: Array, params: Params, hyper: Hyper, num_updates: Array | int | None = None, keeps_start: bool = False
    ) -> State:
        key_adapter, key_optimizer, key_run, key_order = jax.random.split(key, 4)
        fields = start_learning(config, hyper, adapter.init(key_adapter, params), key_optimizer, num_updates)
        kept = keeps_start or not config.adapter.trains_all
        frozen = jax.tree.map(jnp.copy, params) if kept else ()
        return State(**fields, frozen=frozen, pairs=(), reference=(), key=key_run, key_order=key_order)

    def policy(state: State) -> Any:
        return adapted(model, adapter, state.frozen, state.params)

    def evaluate(state: State, batch: Pairs, reference: Reference | tuple[()]) -> Metrics:
        return loss(state.params, state, batch, reference)[1][0]

    return Learner(init, policy, reference_of, learn, evaluate)


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
    checks.instances("dpo.make", task=(task, Task), config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    if pairs is not None and reward is not None:
        raise ValueError("dpo.make: pairs that are given are ranked already; reward ranks those that are drawn")
    number = None if pairs is None else pairs_of.check(task, pairs)
    if number is not None and number < config.batch_size:
        raise ValueError(f"config.batch_size must be at most the {number} pairs; got {config.batch_size}")
    remake = functools.partial(make, task, hyper=hyper, pairs=pairs, reward=reward, start=start, model=model)
    model = language_model(task, config.model, config.precision, model)
    learning = learner(model, config)
    rank_by = reward or (lambda answers: answers.parts["correct"])
    drawn_needs_start = number is None and config.loss not in WITHOUT_REFERENCE
    defaults = hyper

    def update(state: State) -> tuple[State, Metrics]:
        key, key_draw = jax.random.split(state.key)
        if number is None:
            support, now = Support(state.hyper.temperature), learning.policy(state)
            batch, answers = pairs_of.draw(key_draw, task, model, now, config.batch_size, rank_by, support)
            reference = learning.reference(state.frozen, batch)
            seen = {"episode_return": answers.parts["correct"].mean(), "informative": batch.weight.mean()}
        else:
            rows = rows_of(state, number)
            batch, reference = jax.tree.map(lambda x: x[rows], (state.pairs, state.reference))
            seen = {}
        state, metrics = learning.learn(state._replace(key=key), batch, reference)
        metrics |= {"episodes": jnp.float32(2 * config.batch_size), "episode_return": metrics["accuracy"]}
        return state, metrics | seen

    def rows_of(state: State, number: int) -> Array:
        """Pairs of this update: the next ones of an order that is new in each epoch."""
        per_epoch = number // config.batch_size
        epoch, at = state.updates // per_epoch, state.updates % per_epoch
        order = jax.random.permutation(jax.random.fold_in(state.key_order, epoch), number)
        return jax.lax.dynamic_slice_in_dim(order, at * config.batch_size, config.batch_size)

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_start, key_learner = jax.random.split(key)
        params = model.init(key_start) if start is None else start
        state = learning.init(key_learner, params, hyper, num_updates, drawn_needs_start)
        if pairs is None:
            return state
        shown = jax.tree.map(jnp.asarray, pairs)
        return state._replace(pairs=shown, reference=learning.reference(params, shown))

    return Algorithm(
        init=init,
        update=update,
        act=reader(task, model, learning.policy, lambda state: Support(state.hyper.temperature)),
        env_steps_per_update=2 * config.batch_size * task.answer_length,
        name="dpo",
        env=as_environment(task),
        config=config,
        hyper=hyper,
        uses_length=config.optimizer.uses_length,
        remake=remake,
        check_hyper=check_hyper,
    )


class Others(NamedTuple):
    """Pairs ``[N]`` whose answers are to other prompts, and the log-probabilities of both under the policy at the start."""

    pairs: Pairs
    chosen: Array
    rejected: Array


class Reference(NamedTuple):
    """Log-probabilities ``[N]`` of both answers of pairs under the policy at the start, and, for kto, answers to other prompts."""

    chosen: Array
    rejected: Array
    others: Others | None = None


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


class Learner(NamedTuple):
    """The algorithm without its task: pairs may come from anywhere.

    Attributes:
        init: ``(key, params, hyper, num_updates=None, keeps_start=False) -> State``; ``keeps_start`` keeps the parameters at the start in
            ``state.frozen``, where all are trained.
        policy: ``State -> params`` of the model as it is now.
        reference: ``(params, pairs) -> Reference``, under the parameters at the start; ``()`` where the loss needs none.
        learn: ``(state, pairs, reference) -> (State, Metrics)``.
        evaluate: ``(state, pairs, reference) -> Metrics``.
    """

    init: Callable[..., State]
    policy: Callable[[State], Any]
    reference: Callable[[Any, Pairs], Any]
    learn: Callable[..., tuple[State, Metrics]]
    evaluate: Callable[..., Metrics]
