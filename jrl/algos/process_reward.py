"""Reward models from labels: of each step of an answer (process), or of its last token alone (outcome).

    r_t in (0, 1) = sigmoid( w . h_t )     at the last token of a step, whose stream h_t has seen it (Lightman et al. 2023, 2305.20050)
    loss           cross-entropy with the labels, or squared distance

A label is 1 or 0, or a share: that of continuations which end right, drawn from the step on (Wang et al. 2023, Math-Shepherd, 2312.08935, eq. 4, its
soft estimate), which ``lm.rollouts.step_values`` makes. An outcome reward model learns whether answers were verified. Held-out labels tell how good
it is: the share that it ranks above and below 1/2 as they are, and its calibration error.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Metrics
from jrl.algos.scorer import Learner, by_head, scorer
from jrl.equations import preferences
from jrl.lm.model import Model
from jrl.lm.sampling import Rollout
from jrl.lm.scoring import answer_hidden
from jrl.nets import adapters, transformer
from jrl.numerics import optim
from jrl.numerics.settings import AboveZero, NonNegative, Positive, Precision, Settings
from jrl.numerics.types import OptState, Params

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    # Shape of the decoder; its vocabulary is the task's.
    model: transformer.Config = field(default_factory=lambda: transformer.Config(dim=64, num_layers=2))
    batch_size: Positive = 64  # Answers of a gradient step.
    micro_batches: Positive = 1  # Parts in which a batch is computed, one after another; they change no gradient.
    loss: Literal["cross_entropy", "squared"] = "cross_entropy"  # Loss of a label.
    adapter: adapters.Config = field(default_factory=adapters.Config)  # What is trained beside the head.
    # What the optimizer is made of.
    optimizer: optim.OptimizerConfig = field(default_factory=lambda: optim.OptimizerConfig("adamw"))
    precision: Precision = "float32"  # float32, bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 1e-3  # Initial learning rate; decays by config.optimizer.schedule.
    balance_weight: NonNegative = 1e-3  # Weight of the loss that evens the load of experts (moe.balance_loss).
    max_grad_norm: AboveZero = 1.0  # Largest global norm of a gradient.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.


class Labelled(NamedTuple):
    """Answers with labels ``[N, ...]``.

    Attributes:
        prompt: int32 ``[N, P]``, padded on the left.
        valid: bool ``[N, P]``, false for that padding.
        rollout: the answers ``[N, T]``.
        label: float32 ``[N, T]``, in [0, 1].
        weight: float32 ``[N, T]``, how much the label at a token counts: 0 but at the ends of steps, or at the last token.
    """

    prompt: Array
    valid: Array
    rollout: Rollout
    label: Array
    weight: Array


def learner(model: Model, config: Config) -> Learner:
    """A reward model from labels of any origin, as pure functions. Raises ``ValueError`` for settings that do not fit each other."""

    def weigh(batch: Labelled) -> Array:
        return batch.weight / jnp.maximum(batch.weight.sum(), 1e-30)

    def scored(params: Params, hyper: Hyper, batch: Labelled, weight: Array) -> tuple[Array, Metrics, Any]:
        """Loss and metrics of some answers."""
        logit, load = logits(model, params, batch.prompt, batch.valid, batch.rollout)
        right = (logit > 0) == (batch.label > 0.5)
        value = jnp.sum(weight * each(logit, batch.label))
        return value, {"loss": value, "accuracy": jnp.sum(weight * right)}, load

    def each(logit: Array, label: Array) -> Array:
        if config.loss == "squared":
            return jnp.square(jax.nn.sigmoid(logit) - label)
        return -label * jax.nn.log_sigmoid(logit) - (1 - label) * jax.nn.log_sigmoid(-logit)

    parts = scorer(model, config, weigh, scored)

    def init(key: Array, params: Params, hyper: Hyper, num_updates: Array | int | None = None) -> State:
        return State(**parts.fields(key, params, hyper, num_updates))

    def evaluate(state: State, batch: Labelled) -> Metrics:
        logit, _ = logits(model, parts.parameters(state), batch.prompt, batch.valid, batch.rollout)
        error = preferences.calibration_error(jax.nn.sigmoid(logit), batch.label, batch.weight)
        return parts.evaluate(state, batch) | {"calibration_error": error}

    return Learner(init, parts.parameters, parts.learn, evaluate)


class State(NamedTuple):
    """The whole run but for its labels."""

    params: dict[str, Any]  # what is trained: of the decoder, "body", or what stands beside it, and of the head
    frozen: Any  # the decoder at the start, where little is trained beside it; else ()
    opt_state: OptState
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


def logits(model: Model, params: Params, prompt: Array, valid: Array, said: Rollout) -> tuple[Array, Any]:
    """The head at each token of the answers, which its stream has seen, float32 ``[N, T]``, and the load of experts."""
    behind = said._replace(
        tokens=jnp.pad(said.tokens, [(0, 0), (0, 1)]),
        mask=jnp.pad(said.mask, [(0, 0), (0, 1)]),
        log_prob=jnp.pad(said.log_prob, [(0, 0), (0, 1)]),
        kept=None,
    )
    hidden, load = answer_hidden(model, params["body"], prompt, behind, valid)
    return by_head(params, hidden[:, 1:]), load


def last_token(mask: Array) -> Array:
    """1 at the last token of each answer, float32 ``[N, T]``: where an outcome is labelled."""
    following = jnp.pad(mask[:, 1:], [(0, 0), (0, 1)])
    return (mask & ~following).astype(jnp.float32)


def step_ends(said: Rollout, separators: Array) -> Array:
    """1 at the tokens that end a step, float32 ``[N, T]``: each of ``separators`` int ``[S]``, and the last token of the answer."""
    ends = said.mask & jnp.isin(said.tokens, separators)
    return jnp.maximum(ends.astype(jnp.float32), last_token(said.mask))
