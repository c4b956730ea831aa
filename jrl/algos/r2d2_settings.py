"""The settings of R2D2."""

from dataclasses import dataclass, field
from typing import NamedTuple

from jrl import nets
from jrl.experience import replay
from jrl.numerics import checks, optim, settings
from jrl.numerics.settings import AboveZero, NonNegative, NonNegativeInt, Positive, Precision, Settings, Unit


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    num_envs: Positive = 16  # Environments that each seed steps in parallel.
    num_steps: Positive = 4  # Steps of each environment per update.
    num_gradient_steps: Positive = 1  # Minibatches per update.
    batch_size: Positive = 32  # Sequences in a minibatch.
    burn_in: NonNegativeInt = 10  # Rows at the start of a sequence that only bring the memory up to date.
    length: Positive = 20  # Rows after them that are learned from.
    capacity: Positive = 50_000  # Rows of the replay, over all environments.
    learning_starts: NonNegativeInt = 2_000  # Environment steps before the first gradient step.
    target_every: NonNegativeInt = 50  # Updates between copies to the target network; 0 for a soft update each time.
    n_step: Positive = 5  # Steps of a target, fewer at the end of a sequence.
    double: bool = True  # The online network chooses what the target network values.
    prioritized: bool = True  # Draw sequences in proportion to their errors.
    rescale: bool = False  # Learn h(x) = sgn(x) (sqrt(|x| + 1) - 1) + x / 1000, for returns of very different sizes.
    normalize_observations: bool = False  # Standardize observations by running statistics.
    normalize_rewards: bool = False  # Divide rewards by the running deviation of discounted returns.
    reward_clip: NonNegative = 0.0  # Bound that rewards are cut off at, above and below 0; 0 for none.
    # Shape of the network; gru is the width of its memory, which is stored with each row.
    network: nets.ValueConfig = field(default_factory=lambda: nets.ValueConfig(hidden=(64,), norm="none", gru=64))
    optimizer: optim.OptimizerConfig = field(default_factory=optim.OptimizerConfig)  # What the optimizer is made of.
    # float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    precision: Precision = "float32"


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 1e-3  # Initial learning rate; decays by config.optimizer.schedule.
    gamma: Unit = 0.99  # Discount of the return.
    epsilon_start: Unit = 1.0  # Share of actions chosen uniformly at the start of the run.
    epsilon_end: Unit = 0.05  # Final share, and that of a run of unknown length.
    epsilon_fraction: Unit = 0.3  # Share of the run over which epsilon falls linearly.
    tau: Unit = 0.01  # Polyak coefficient of a soft target update; 1 copies the online network.
    max_grad_norm: AboveZero = 10.0  # Largest global norm of a gradient, or the bound of config.optimizer.clip.
    priority_exponent: Unit = 0.9  # Alpha of prioritized replay.
    importance_start: Unit = 0.6  # Beta of prioritized replay at the start of the run; it rises to 1.
    priority_max: Unit = 0.9  # Eta: share of a sequence's largest error in its priority; the rest is the mean.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.


def check(config: Config, hyper: Hyper) -> None:
    """Raise ``ValueError`` for settings that are wrong or do not fit each other."""
    checks.instances("r2d2.make", config=(config, Config), hyper=(hyper, Hyper))
    settings.check_hyper(hyper)
    replay.check_learning_starts(config)
    if config.network.attention.kind != "none":
        raise ValueError("config.network.attention: R2D2 would store its memory with each row; PPO and PQN train it")
    if config.network.noisy:
        raise ValueError("config.network.noisy is an option of DQN; R2D2 explores by epsilon")
    least = (config.burn_in + config.length + 3) * config.num_envs
    if config.capacity < least:
        raise ValueError(
            f"config.capacity must be at least {least}, burn_in + length + 3 rows for each environment; got {config.capacity}"
        )
