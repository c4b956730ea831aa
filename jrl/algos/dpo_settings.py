"""The settings of DPO and its kin."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from jrl.nets import adapters, transformer
from jrl.numerics import optim
from jrl.numerics.settings import AboveZero, NonNegative, Positive, Precision, Settings, Unit

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
