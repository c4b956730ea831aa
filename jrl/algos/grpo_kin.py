"""What tells GRPO from its kin: how advantages are made, the loss of a token, how tokens are averaged, and the KL.

``METHODS`` names the published compositions of these. The equations are in ``jrl.equations.token_losses``.
"""

from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from jrl.equations import token_losses

if TYPE_CHECKING:
    from jrl.algos.grpo import Config, Hyper

Array = jax.Array
Advantage = Literal["zscore", "centred", "rloo", "reinforce++"]
Loss = Literal["clip", "dual_clip", "gspo", "cispo", "policy_gradient"]
Reduction = Literal["sequence_mean", "token_mean", "constant"]
Divergence = Literal["none", "k1", "k2", "k3", "exact"]


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


def advantages(
    config: "Config", hyper: "Hyper", reward: Array, log_prob: Array, ref_log_prob: Array, mask: Array
) -> Array:
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


def token_loss(
    config: "Config", hyper: "Hyper", log_prob: Array, log_ratio: Array, advantage: Array, mask: Array
) -> Array:
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
