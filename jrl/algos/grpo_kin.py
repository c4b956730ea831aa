"""The settings of GRPO and its kin, and what they choose: how advantages are made, the loss of a token, and the KL.

``METHODS`` names the published compositions. The equations are in ``jrl.equations.token_losses``.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrl.equations import token_losses
from jrl.lm.sampling import Support
from jrl.nets import adapters, transformer
from jrl.numerics import checks, optim
from jrl.numerics.settings import (
    AboveZero,
    AtLeastOne,
    NonNegative,
    NonNegativeInt,
    Positive,
    Precision,
    Settings,
    Unit,
)

Array = jax.Array
Advantage = Literal["zscore", "centred", "rloo", "reinforce++"]
Loss = Literal["clip", "dual_clip", "gspo", "cispo", "policy_gradient"]
Reduction = Literal["sequence_mean", "token_mean", "constant"]
Divergence = Literal["none", "k1", "k2", "k3", "exact"]
SMALL = functools.partial(transformer.Config, dim=64, num_layers=2)
ADAMW = functools.partial(optim.OptimizerConfig, "adamw")


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    model: transformer.Config = field(default_factory=SMALL)  # Shape of the decoder; its vocabulary is the task's.
    num_prompts: Positive = 32  # Prompts of an update.
    group_size: Positive = 8  # Answers to each prompt; 1 only with reinforce++, which compares with the whole batch.
    num_epochs: Positive = 1  # Passes over the answers of an update.
    num_minibatches: Positive = 1  # Gradient steps per pass; divides num_prompts * group_size.
    micro_batches: Positive = 1  # Parts in which a minibatch is computed, one after another; they change no gradient.
    advantage: Advantage = "zscore"  # zscore is GRPO's, centred Dr. GRPO's.
    ddof: Literal[0, 1] = 1  # The standard deviation of zscore divides by group_size - ddof.
    loss: Loss = "clip"  # Loss of a token.
    reduction: Reduction = "sequence_mean"  # Mean over tokens; constant divides by the longest answer's length.
    kl: Divergence = "none"  # Estimate of the KL to the model at the start.
    kl_in: Literal["loss", "reward"] = "loss"  # Where the KL goes; the reward takes k1 alone.
    old_log_probs: Literal["sampler", "recomputed"] = "sampler"  # Denominator of the ratio.
    truncated_importance: bool = False  # Weigh tokens by recomputed over sampled policy, at most hyper.importance_cap.
    oversample: Positive = 1  # Draw this many times num_prompts, and prefer informative groups (DAPO).
    overlong: NonNegativeInt = 0  # Tokens before the maximum length over which the overlong penalty grows.
    top_k: NonNegativeInt = 0  # Sample from this many most likely tokens; 0 for all.
    top_p: float = 1.0  # Sample from the most likely tokens that have this probability together.
    min_p: float = 0.0  # Sample from tokens of at least this share of the largest probability.
    # Answers that learner.sample decodes at once, where one that ends makes room for the next; 0 for all.
    slots: NonNegativeInt = 0
    supervised: NonNegativeInt = 0  # Supervised updates before reinforcement learning starts.
    adapter: adapters.Config = field(
        default_factory=adapters.Config
    )  # What is trained: everything, or a little beside.
    optimizer: optim.OptimizerConfig = field(default_factory=ADAMW)  # What the optimizer is made of.
    precision: Precision = "float32"  # float32, bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.

    @property
    def rows(self) -> int:
        """Answers that an update learns from."""
        return self.num_prompts * self.group_size

    def support(self, temperature: Array | float) -> Support:
        """What answers are drawn from."""
        return Support(temperature, self.top_k, self.top_p, self.min_p)


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 3e-4  # Initial learning rate; decays by config.optimizer.schedule.
    clip_low: Unit = 0.2  # Lower clip bound of the ratio: 1 - clip_low.
    clip_high: NonNegative = 0.2  # Upper clip bound of the ratio: 1 + clip_high.
    dual_clip: AtLeastOne = 3.0  # Bound on the ratio where the advantage is negative.
    kl_weight: NonNegative = 0.04  # Beta, the weight of the KL.
    entropy_weight: NonNegative = 0.0  # Weight of the entropy bonus.
    balance_weight: NonNegative = 1e-3  # Weight of the loss that evens the load of experts (moe.balance_loss).
    advantage_eps: NonNegative = 1e-4  # Added to zscore's standard deviation.
    temperature: AboveZero = 1.0  # Temperature at which answers are sampled.
    importance_cap: NonNegative = 2.0  # Largest weight of a token by truncated importance.
    format_weight: NonNegative = 0.0  # Weight of the format in the reward, where being correct counts 1.
    close_weight: NonNegative = 0.0  # Weight of coming close, where the task says how close.
    overlong_weight: NonNegative = 1.0  # Penalty for an answer of the maximum length.
    supervised_learning_rate: NonNegative = 1e-3  # Learning rate of the supervised start.
    max_grad_norm: AboveZero = 1.0  # Largest global norm of a gradient.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.


def _composed(
    advantage: Advantage, loss: Loss, reduction: Reduction, kl: Divergence = "none", **more: Any
) -> dict[str, Any]:
    return {"advantage": advantage, "loss": loss, "reduction": reduction, "kl": kl, "kl_in": "loss"} | more


# Fields of Config and of Hyper that a method names. RLOO's loss is clipped, for updates of more than one step; in one step clipping does
# nothing. DAPO's penalty of long answers is left to ``overlong``, since most tasks here have answers of one length.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": (_composed("zscore", "clip", "sequence_mean", "k3"), {}),  # 2402.03300
    "dr_grpo": (_composed("centred", "clip", "constant"), {}),  # 2503.20783
    "dapo": (_composed("zscore", "clip", "token_mean", oversample=2), {"clip_high": 0.28}),  # 2503.14476
    "gspo": (_composed("zscore", "gspo", "sequence_mean"), {"clip_low": 3e-4, "clip_high": 4e-4}),  # 2507.18071
    "cispo": (_composed("zscore", "cispo", "token_mean"), {"clip_low": 1.0, "clip_high": 0.28}),  # 2506.13585
    "rloo": (_composed("rloo", "clip", "constant", "k1", kl_in="reward"), {}),  # 2402.14740
    "reinforce++": (_composed("reinforce++", "clip", "token_mean", "k1", kl_in="reward"), {}),  # 2501.03262
}


def method(name: str, config: Config = Config(), hyper: Hyper = Hyper()) -> tuple[Config, Hyper]:
    """Settings with those that a published method names; the others stay. Raises ``ValueError`` for an unknown name."""
    checks.one_of("method", name, METHODS)
    fields, numbers = METHODS[name]
    return replace(config, **fields), hyper._replace(**numbers)


def check(config: Config) -> None:
    """Raise ``ValueError`` for settings that do not fit each other."""
    checks.positive_int("config.group_size", config.group_size, at_least=1 if config.advantage == "reinforce++" else 2)
    if config.truncated_importance and config.old_log_probs == "sampler":
        raise ValueError(
            "config.truncated_importance needs config.old_log_probs=recomputed: else its weights are all 1"
        )
    if config.kl_in == "reward" and config.kl not in ("none", "k1"):
        raise ValueError(f"config.kl_in=reward takes config.kl=k1, the unbiased estimator; got {config.kl}")
    if config.reduction == "token_mean":
        token_losses.refuse_accumulation(config.optimizer.accumulate, "config.micro_batches, which add up exactly")
    parts = config.num_minibatches * config.micro_batches
    if config.rows % parts:
        raise ValueError(
            f"config.num_minibatches * micro_batches must divide num_prompts * group_size = {config.rows}; got {parts}"
        )


def advantages(config: Config, hyper: Hyper, reward: Array, log_prob: Array, ref_log_prob: Array, mask: Array) -> Array:
    """Advantages ``[N, T]`` of each token, of rewards ``[N]`` in groups side by side. An answer whose tokens are all masked, which
    nobody judged, has no part in its group's mean and deviation."""
    beta = hyper.kl_weight if config.kl != "none" and config.kl_in == "reward" else 0.0
    counts = mask.any(1)
    if config.advantage == "reinforce++":
        return token_losses.reinforce_plus_plus(reward, log_prob, ref_log_prob, mask, beta)
    if config.kl_in == "reward":
        reward = reward - beta * token_losses.masked(log_prob - ref_log_prob, mask).sum(1)
    match config.advantage:
        case "zscore":
            found = token_losses.zscore(reward, config.group_size, config.ddof, hyper.advantage_eps, counts)
        case "centred":
            found = token_losses.centred(reward, config.group_size, counts)
        case "rloo":
            found = token_losses.rloo(reward, config.group_size, counts)
    return jnp.broadcast_to(found[:, None], mask.shape)


def token_loss(config: Config, hyper: Hyper, log_prob: Array, log_ratio: Array, advantage: Array, mask: Array) -> Array:
    """Loss ``[N, T]`` of each token."""
    match config.loss:
        case "clip":
            return token_losses.clip(log_ratio, advantage, hyper.clip_low, hyper.clip_high)
        case "dual_clip":
            return token_losses.dual_clip(log_ratio, advantage, hyper.clip_low, hyper.clip_high, hyper.dual_clip)
        case "gspo":
            return token_losses.gspo(log_ratio, advantage, mask, hyper.clip_low, hyper.clip_high)
        case "cispo":
            return token_losses.cispo(log_prob, log_ratio, advantage, hyper.clip_low, hyper.clip_high)
        case "policy_gradient":
            return token_losses.policy_gradient(log_prob, advantage)


def divergence(kind: Divergence, log_prob: Array, ref_log_prob: Array, exact: Array) -> Array:
    """KL to the reference ``[N, T]``, estimated or exact; 0 for none."""
    match kind:
        case "k1":
            return token_losses.kl_k1(log_prob, ref_log_prob)
        case "k2":
            return token_losses.kl_k2(log_prob, ref_log_prob)
        case "k3":
            return token_losses.kl_k3(log_prob, ref_log_prob)
        case _:
            return exact
