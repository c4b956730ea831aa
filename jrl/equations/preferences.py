"""Losses of preferences and of reward models, elementwise; reduce them where you call them.

A log-probability of an answer is the sum over its tokens, ``jnp.sum(token_losses.masked(log_prob, mask), -1)``. float32, or
float64 for arguments that are.
"""

import jax
import jax.numpy as jnp

from jrl.equations import losses
from jrl.numerics import checks

Array = jax.Array
Scalar = Array | float

UNLABELLED = -100


def dpo(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: Scalar, smoothing: Scalar = 0.0
) -> Array:
    """Direct preference optimization, ``-log sigmoid(beta h)`` (Rafailov et al. 2023, 2305.18290, eq. 7).

    ``h = log(pi/ref)(chosen) - log(pi/ref)(rejected)``, of log-probabilities of one shape. With ``smoothing`` e, labels are taken to be
    flipped that often: ``-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)`` (Mitchell 2023, conservative DPO).
    """
    h = _margin("dpo", chosen, rejected, ref_chosen, ref_rejected)
    return -(1 - smoothing) * jax.nn.log_sigmoid(beta * h) - smoothing * jax.nn.log_sigmoid(-beta * h)


def ipo(chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, tau: Scalar) -> Array:
    """Identity preference optimization, ``(h - 1 / (2 tau))^2`` with DPO's h (Azar et al. 2023, 2310.12036, eq. 17)."""
    return jnp.square(_margin("ipo", chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * tau))


def bradley_terry(chosen: Array, rejected: Array, margin: Scalar = 0.0) -> Array:
    """Loss of a reward model, ``-log sigmoid(r_chosen - r_rejected - margin)`` (Ouyang et al. 2022, 2203.02155, eq. 1; the
    margin: Touvron et al. 2023, 2307.09288, eq. 2)."""
    checks.same_shape("bradley_terry", chosen=chosen, rejected=rejected)
    return -jax.nn.log_sigmoid(losses.wide(chosen) - rejected - margin)


def process_reward(logits: Array, labels: Array) -> Array:
    """Cross-entropy of right (1) and wrong (0) steps, ``[N, T]`` (Lightman et al. 2023, 2305.20050, section 2.6).

    ``logits [N, T, 2]``; ``labels [N, T]``, int, are -100 except where a step ends, and the loss is 0 there whatever the
    logits are. Reduce with ``token_losses.weights(labels != UNLABELLED, "token_mean")``. Math-Shepherd's + and - (2312.08935) are 1
    and 0. PRM800K rates steps -1, 0 (neutral) and 1: map -1 to 0, and 0 to 1, 0 or -100, as you read a neutral step; the paper leaves
    that open. Raises ``ValueError`` for shapes that do not fit and for another label; a traced one has no loss.
    """
    if logits.shape != (*labels.shape, 2):
        raise ValueError(
            f"process_reward: logits must be {(*labels.shape, 2)} for labels {labels.shape}, got {logits.shape}"
        )
    ends = (labels == 0) | (labels == 1)
    if not isinstance(labels, jax.core.Tracer) and (other := labels[~ends & (labels != UNLABELLED)]).size:
        raise ValueError(
            f"process_reward: labels must be 1 (right), 0 (wrong) or {UNLABELLED} (no step ends here); got {other[0]}"
        )
    log_p = jax.nn.log_softmax(jnp.where(ends[..., None], losses.wide(logits), 0))
    return jnp.where(ends, -jnp.where(labels == 1, log_p[..., 1], log_p[..., 0]), 0)


def _margin(function: str, chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array) -> Array:
    checks.same_shape(function, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    return (losses.wide(chosen) - ref_chosen) - (losses.wide(rejected) - ref_rejected)
