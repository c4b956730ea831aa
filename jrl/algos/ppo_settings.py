"""The settings of PPO."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jrl import intrinsic, nets
from jrl.algos import auxiliary_tasks, self_imitation
from jrl.numerics import checks, optim
from jrl.numerics.settings import AboveZero, AtLeastOne, NonNegative, Positive, Precision, Settings, Unit, check_hyper


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    num_envs: Positive = 4  # Environments that each seed steps in parallel.
    num_steps: Positive = 128  # Steps of each environment per update.
    num_epochs: Positive = 4  # Passes over the rollout of an update.
    num_minibatches: Positive = 4  # Gradient steps per pass; divides num_envs * num_steps (recurrent: num_envs).
    loss: Literal["clip", "penalty"] = "clip"  # PPO-Clip, or PPO-Penalty with an adaptive KL weight (preset "penalty").
    dual_clip: bool = False  # Bound the loss of negative advantages by hyper.dual_clip.
    value_clip: bool = True  # Clip value updates by hyper.value_clip_eps.
    kl_stop: bool = False  # Discard the remaining minibatches once the KL exceeds 1.5 * hyper.target_kl.
    standardize_advantages: Literal["minibatch", "batch", "none"] = "minibatch"  # Over which samples.
    normalize_observations: bool = False  # By their running mean and standard deviation.
    normalize_rewards: bool = False  # By the running standard deviation of the discounted return.
    continuous: Literal["normal", "tanh_normal"] = "normal"  # Policy for continuous actions, in units of the bounds.
    network: nets.Config = field(default_factory=nets.Config)  # Shape of the network.
    optimizer: optim.OptimizerConfig = field(default_factory=optim.OptimizerConfig)  # What the optimizer is made of.
    bonus: intrinsic.Config = field(default_factory=intrinsic.Config)  # Bonus for what is new.
    # Learning from one's own good past, beside PPO's loss.
    imitation: self_imitation.Config = field(default_factory=self_imitation.Config)
    # Value replay and reward prediction, beside PPO's loss.
    auxiliary: auxiliary_tasks.Config = field(default_factory=auxiliary_tasks.Config)
    # float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    precision: Precision = "float32"


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 2.5e-4  # Initial learning rate; decays by config.optimizer.schedule.
    gamma: Unit = 0.99  # Discount of the return.
    gae_lambda: Unit = 0.95  # Lambda of the advantage estimate.
    clip_eps: NonNegative = 0.2  # The ratio is trusted between 1 - eps and 1 + eps.
    value_clip_eps: NonNegative = 0.2  # Range of a value update, in units of return.
    entropy_weight: NonNegative = 0.01  # Weight of the entropy bonus.
    value_weight: NonNegative = 0.5  # Weight of the value loss.
    max_grad_norm: AboveZero = 0.5  # Largest global norm of a gradient, or the bound of config.optimizer.clip.
    dual_clip: AtLeastOne = 3.0  # Bound on the ratio where the advantage is negative.
    target_kl: AboveZero = 0.01  # KL to which the penalty steers; kl_stop stops at 1.5 times it.
    kl_weight: NonNegative = 1.0  # Initial weight of the KL penalty, which is adapted within a factor of 100.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.
    bonus: intrinsic.Numbers = intrinsic.Hyper()  # Numbers of the bonus.
    imitation: self_imitation.Numbers = self_imitation.Hyper()  # Numbers of self-imitation.
    auxiliary: auxiliary_tasks.Numbers = auxiliary_tasks.Hyper()  # Numbers of the auxiliary tasks.


def check(config: Config, hyper: Hyper, start: Any) -> None:
    """Raise ``ValueError`` for wrong settings, for advantages standardized over a single sample (all 0), and for a ``start`` trained on
    normalized observations where this run does not normalize."""
    checks.instances("ppo.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    if config.dual_clip and config.loss == "penalty":
        raise ValueError("config.dual_clip needs config.loss=clip; got penalty")
    if getattr(start, "obs_stats", None) is not None and not config.normalize_observations:
        raise ValueError("start was trained on normalized observations: config.normalize_observations must be True")
    if getattr(start, "obs_stats", 0) is None and config.normalize_observations:
        raise ValueError("start was trained on observations as they are: config.normalize_observations must be False")
    num_parts = {"minibatch": config.num_minibatches, "batch": 1, "none": 0}[config.standardize_advantages]
    if config.num_envs * config.num_steps == num_parts:
        raise ValueError(
            f"config.standardize_advantages={config.standardize_advantages} needs two samples or more; got "
            f"num_envs * num_steps / num_minibatches = 1"
        )
