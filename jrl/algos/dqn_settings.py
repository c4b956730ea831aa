"""The settings of DQN and of its Rainbow."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax

from jrl import intrinsic, nets
from jrl.experience import replay
from jrl.numerics import checks, optim, settings
from jrl.numerics.settings import AboveZero, Finite, NonNegative, NonNegativeInt, Positive, Precision, Settings, Unit


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    num_envs: Positive = 10  # Environments that each seed steps in parallel.
    num_steps: Positive = 1  # Steps of each environment per update.
    num_gradient_steps: Positive = 1  # Minibatches per update.
    batch_size: Positive = 128  # Transitions in a minibatch.
    capacity: Positive = 10_000  # Rows of the replay, over all environments.
    learning_starts: NonNegativeInt = 1_000  # Environment steps before the first gradient step.
    target_every: NonNegativeInt = 50  # Updates between copies to the target network; 0 for a soft update each time.
    n_step: Positive = 1  # Length n of n-step returns.
    num_frames: Positive = 1  # Observations stacked along the last axis, oldest first; the replay stores each once.
    double: bool = True  # The online network chooses what the target network values; Munchausen ignores it.
    prioritized: bool = False  # Draw transitions by their error to the power hyper.priority_exponent.
    munchausen: bool = False  # Add the scaled log-policy to the reward (of n steps, to the first).
    distribution: Literal["mean", "categorical", "quantile"] = "mean"  # Plain values, C51 or QR.
    atoms: Positive = 51  # Atoms of a distribution.
    loss: Literal["squared", "huber"] = "squared"  # For mean values; huber is robust, but tends to the median.
    normalize_observations: bool = False  # Standardize observations by running statistics.
    normalize_rewards: bool = False  # Divide rewards by the running deviation of discounted returns.
    reward_clip: NonNegative = 0.0  # Bound that rewards are cut off at, above and below 0; 0 for none.
    # Shape of the network; dueling and noisy are here.
    network: nets.ValueConfig = field(default_factory=lambda: nets.ValueConfig(norm="none"))
    optimizer: optim.OptimizerConfig = field(default_factory=optim.OptimizerConfig)  # What the optimizer is made of.
    bonus: intrinsic.Config = field(default_factory=intrinsic.Config)  # Bonus for what is new.
    # float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    precision: Precision = "float32"


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 5e-4  # Initial learning rate; decays by config.optimizer.schedule.
    gamma: Unit = 0.99  # Discount of the return.
    epsilon_start: Unit = 1.0  # Share of actions chosen uniformly at the start of the run, unless the network is noisy.
    epsilon_end: Unit = 0.05  # Final share, and that of a run of unknown length.
    epsilon_fraction: Unit = 0.2  # Share of the run over which epsilon falls linearly.
    tau: Unit = 0.01  # Polyak coefficient of a soft target update; 1 copies the online network.
    max_grad_norm: AboveZero = 10.0  # Largest global norm of a gradient, or the bound of config.optimizer.clip.
    priority_exponent: Unit = 0.6  # Alpha of prioritized replay.
    importance_start: Unit = 0.4  # Beta of prioritized replay at the start of the run; it rises to 1.
    munchausen_weight: Unit = 0.9  # Alpha of Munchausen.
    temperature: AboveZero = 0.03  # Tau of Munchausen.
    v_min: Finite = 0.0  # Smallest return of C51.
    v_max: Finite = 100.0  # Largest return of C51.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.
    bonus: intrinsic.Numbers = intrinsic.Hyper()  # Numbers of the bonus.


def check(config: Config, hyper: Hyper, bonus: intrinsic.Intrinsic | None) -> None:
    """Raise ``ValueError`` for settings that are wrong or do not fit each other."""
    checks.instances("dqn.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    replay.check_learning_starts(config)
    if (bonus or config.bonus.kind != "none") and config.n_step > 1:
        raise ValueError(f"a bonus pays single transitions: config.n_step must be 1; got {config.n_step}")
    if config.munchausen and config.distribution != "mean":
        raise ValueError("config.munchausen needs config.distribution=mean")
    if config.distribution != "mean" and config.atoms < 2:
        raise ValueError(f"config.atoms must be an integer of at least 2; got {config.atoms}")


def check_hyper(hyper: Hyper) -> None:
    """Raise ``ValueError`` for a concrete number outside its range; traced numbers pass."""
    settings.check_hyper(hyper)
    bounds = (hyper.v_min, hyper.v_max)
    if not any(isinstance(x, jax.core.Tracer) for x in bounds) and not float(hyper.v_max) > float(hyper.v_min):
        raise ValueError(f"hyper.v_max must be above hyper.v_min; got {hyper.v_max:g} and {hyper.v_min:g}")


RAINBOW = Config(
    n_step=3,
    double=True,
    prioritized=True,
    distribution="categorical",
    network=nets.ValueConfig(norm="none", dueling=True, noisy=True),
)
