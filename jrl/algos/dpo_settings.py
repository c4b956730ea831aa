"""The settings of DPO and its kin, and the loss of a pair that they choose. The equations are in ``jrl.equations.preferences``."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrl.equations import preferences
from jrl.lm.pairs import PairLogProbs
from jrl.nets import adapters, transformer
from jrl.numerics import optim
from jrl.numerics.settings import AboveZero, NonNegative, Positive, Precision, Settings, Unit

Array = jax.Array
Loss = Literal["sigmoid", "ipo", "hinge", "kto", "apo", "orpo", "simpo"]
WITHOUT_REFERENCE = ("orpo", "simpo")  # losses of a token's mean log-probability


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    # Shape of the decoder; its vocabulary is the task's.
    model: transformer.Config = field(default_factory=lambda: transformer.Config(dim=64, num_layers=2))
    batch_size: Positive = 64  # Pairs of a gradient step.
    micro_batches: Positive = 1  # Parts in which a batch is computed, one after another; they change no gradient.
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


def as_taken(
    config: Config, scored: PairLogProbs, ref_chosen: Array, ref_rejected: Array
) -> tuple[Array, Array, Array, Array]:
    """Log-probabilities of chosen and rejected answers, and those under the reference, ``[N]`` each, as the loss takes them: sums over tokens, or means."""
    chosen, rejected = scored.chosen, scored.rejected
    if config.token_mean or config.loss in WITHOUT_REFERENCE:
        chosen, ref_chosen = chosen / scored.chosen_length, ref_chosen / scored.chosen_length
        rejected, ref_rejected = rejected / scored.rejected_length, ref_rejected / scored.rejected_length
    return chosen, rejected, ref_chosen, ref_rejected


def losses_of(
    config: Config, hyper: Hyper, scored: PairLogProbs, reference: tuple[Array, Array], apart: Array | float = 0.0
) -> Array:
    """The loss of each pair, ``[N]``, by log-probabilities under the policy and the reference; ``apart`` is how far these are from each other, for kto."""
    both = as_taken(config, scored, *reference)
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
            return hyper.beta * preferences.orpo(*both[:2])
        case "simpo":
            return preferences.simpo(*both[:2], hyper.beta, hyper.margin, hyper.smoothing)
        case "kto":
            liked, disliked = preferences.kto(*both, hyper.beta, jnp.asarray(apart))
            return 0.5 * (hyper.liked_weight * liked + hyper.disliked_weight * disliked)
