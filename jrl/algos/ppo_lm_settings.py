"""The settings of PPO on a language model."""

from dataclasses import dataclass, field
from typing import NamedTuple

from jrl.equations import token_losses
from jrl.nets import adapters, transformer
from jrl.numerics import optim
from jrl.numerics.settings import AboveZero, NonNegative, Positive, Precision, Settings, Unit


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    # Shape of actor and critic; the vocabulary is the task's.
    model: transformer.Config = field(default_factory=lambda: transformer.Config(dim=64, num_layers=2))
    num_answers: Positive = 256  # Answers of an update, each to a prompt of its own.
    num_epochs: Positive = 2  # Passes over the answers of an update.
    num_minibatches: Positive = 2  # Gradient steps per pass; divides num_answers.
    micro_batches: Positive = 1  # Parts in which a minibatch is computed, one after another; they change no gradient.
    whiten_rewards: bool = False  # Divide the tokens' rewards by their standard deviation over the batch.
    adapter: adapters.Config = field(default_factory=adapters.Config)  # What is trained of actor and critic.
    # What the optimizer is made of.
    optimizer: optim.OptimizerConfig = field(default_factory=lambda: optim.OptimizerConfig("adamw"))
    precision: Precision = "float32"  # float32, bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 1e-3  # Initial learning rate; decays by config.optimizer.schedule.
    gamma: Unit = 1.0  # Discount from token to token.
    gae_lambda: Unit = 0.95  # Lambda of the advantage estimate.
    clip_eps: Unit = 0.2  # The ratio is trusted between 1 - eps and 1 + eps.
    value_clip_eps: NonNegative = 0.2  # Range of a value update.
    value_weight: NonNegative = 0.5  # Weight of the value loss.
    kl_weight: NonNegative = 0.05  # Beta, the weight of the KL to the reference in the reward.
    kl_target: NonNegative = 0.0  # KL of an answer that beta is adapted to; 0 leaves it as it is.
    kl_gain: NonNegative = 0.1  # How fast beta is adapted: by up to a fifth of this at each update.
    unended_penalty: NonNegative = 0.0  # What an answer that does not end within its length loses.
    entropy_weight: NonNegative = 0.0  # Weight of the entropy bonus.
    balance_weight: NonNegative = 1e-3  # Weight of the loss that evens the load of actor's and critic's experts.
    temperature: AboveZero = 1.0  # Temperature at which answers are sampled.
    format_weight: NonNegative = 0.0  # Weight of the format in the reward, where being correct counts 1.
    close_weight: NonNegative = 0.0  # Weight of coming close, where the task says how close.
    max_grad_norm: AboveZero = 1.0  # Largest global norm of a gradient.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.


def check(config: Config) -> None:
    """Raise ``ValueError`` for settings that do not fit each other."""
    token_losses.refuse_accumulation(config.optimizer.accumulate, "fewer config.num_minibatches")
    if config.num_answers % (config.num_minibatches * config.micro_batches):
        raise ValueError(
            f"config.num_minibatches * micro_batches must divide num_answers = {config.num_answers}; got "
            f"{config.num_minibatches} and {config.micro_batches}"
        )
