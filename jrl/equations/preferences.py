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


def robust_dpo(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: Scalar, smoothing: Scalar
) -> Array:
    """DPO whose mean is that of labels without noise, where labels are flipped with probability ``smoothing`` e below 1/2:
    ``(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e)`` (Chowdhury et al. 2024, 2403.00409)."""
    h = _margin("robust_dpo", chosen, rejected, ref_chosen, ref_rejected)
    mixed = -(1 - smoothing) * jax.nn.log_sigmoid(beta * h) + smoothing * jax.nn.log_sigmoid(-beta * h)
    return mixed / (1 - 2 * smoothing)


def hinge(chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: Scalar) -> Array:
    """``max(0, 1 - beta h)`` with DPO's h (Zhao et al. 2023, 2305.10425)."""
    return jax.nn.relu(1 - beta * _margin("hinge", chosen, rejected, ref_chosen, ref_rejected))


def kto(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: Scalar, baseline: Array
) -> tuple[Array, Array]:
    """Kahneman-Tversky optimization: losses of answers that were liked and of those that were not, ``1 - sigmoid(beta (r - z))`` and
    ``1 - sigmoid(beta (z - r))`` with ``r = log(pi/ref)`` (Ethayarajh et al. 2024, 2402.01306, eq. 8). ``baseline`` z is the divergence from the
    reference, at least 0, through which no gradient flows; weigh the two and take the mean."""
    z = jax.lax.stop_gradient(jnp.maximum(baseline, 0))
    liked, disliked = _rewards("kto", chosen, rejected, ref_chosen, ref_rejected)
    return 1 - jax.nn.sigmoid(beta * (liked - z)), 1 - jax.nn.sigmoid(beta * (z - disliked))


def orpo(chosen: Array, rejected: Array) -> Array:
    """The odds ratio of ORPO, ``-log sigmoid(log odds(chosen) - log odds(rejected))`` with ``odds(p) = p / (1 - p)``, of mean log-probabilities of
    a token, below 0 (Hong et al. 2024, 2403.07691, eq. 7). It is added to the negative log-likelihood of the chosen answer."""
    checks.same_shape("orpo", chosen=chosen, rejected=rejected)
    odds_w, odds_l = (losses.wide(m) - jnp.log(-jnp.expm1(losses.wide(m))) for m in (chosen, rejected))
    return -jax.nn.log_sigmoid(odds_w - odds_l)


def simpo(chosen: Array, rejected: Array, beta: Scalar, margin: Scalar, smoothing: Scalar = 0.0) -> Array:
    """SimPO, ``-log sigmoid(beta (m_chosen - m_rejected) - margin)`` of mean log-probabilities of a token, without a reference (Meng et al. 2024,
    2405.14734, eq. 6), smoothed as ``dpo``."""
    checks.same_shape("simpo", chosen=chosen, rejected=rejected)
    z = beta * (losses.wide(chosen) - rejected) - margin
    return -(1 - smoothing) * jax.nn.log_sigmoid(z) - smoothing * jax.nn.log_sigmoid(-z)


def apo(chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: Scalar) -> Array:
    """Anchored preference optimization (zero): the chosen answer becomes likelier and the rejected one less likely,
    ``1 - sigmoid(beta r_chosen) + sigmoid(beta r_rejected)`` (D'Oosterlinck et al. 2024, 2408.06266)."""
    liked, disliked = _rewards("apo", chosen, rejected, ref_chosen, ref_rejected)
    return 1 - jax.nn.sigmoid(beta * liked) + jax.nn.sigmoid(beta * disliked)


def sppo(chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: Scalar) -> Array:
    """Self-play preference optimization for certain labels, ``(r_chosen - 1 / (2 beta))^2 + (r_rejected + 1 / (2 beta))^2`` (Wu et al. 2024,
    2405.00675)."""
    liked, disliked = _rewards("sppo", chosen, rejected, ref_chosen, ref_rejected)
    return jnp.square(liked - 1 / (2 * beta)) + jnp.square(disliked + 1 / (2 * beta))


def nca(chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: Scalar) -> Array:
    """Noise contrastive alignment of a pair, ``-log sigmoid(beta r_chosen) - 1/2 sum over both of log sigmoid(-beta r)`` (Chen et al. 2024,
    2402.05369)."""
    liked, disliked = _rewards("nca", chosen, rejected, ref_chosen, ref_rejected)
    return -jax.nn.log_sigmoid(beta * liked) - 0.5 * (
        jax.nn.log_sigmoid(-beta * liked) + jax.nn.log_sigmoid(-beta * disliked)
    )


def exo(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: Scalar, smoothing: Scalar
) -> Array:
    """Exact optimization of a pair: the reverse KL from ``sigmoid(beta h)`` to labels that hold with probability ``1 - smoothing`` (Ji et al. 2024,
    2402.00856); ``smoothing`` must be above 0."""
    h = _margin("exo", chosen, rejected, ref_chosen, ref_rejected)
    log_p, log_q = jax.nn.log_sigmoid(beta * h), jax.nn.log_sigmoid(-beta * h)
    return jnp.exp(log_p) * (log_p - jnp.log1p(-smoothing)) + jnp.exp(log_q) * (log_q - jnp.log(smoothing))


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


def calibration_error(p: Array, label: Array, weight: Array, bins: int = 10) -> Array:
    """Expected calibration error (Guo et al. 2017, 1706.04599, eq. 3): the mean distance, over bins of predicted probability, of mean prediction and mean
    label, both in [0, 1] and of one shape; ``weight`` is how much each counts."""
    place = jnp.clip((p * bins).astype(jnp.int32), 0, bins - 1).ravel()
    sums = [jnp.zeros(bins).at[place].add((weight * x).ravel()) for x in (p, label)]
    return jnp.abs(sums[0] - sums[1]).sum() / jnp.maximum(weight.sum(), 1e-30)


def _margin(function: str, chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array) -> Array:
    liked, disliked = _rewards(function, chosen, rejected, ref_chosen, ref_rejected)
    return liked - disliked


def _rewards(
    function: str, chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array
) -> tuple[Array, Array]:
    """``log(pi/ref)`` of both answers."""
    checks.same_shape(function, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    return losses.wide(chosen) - ref_chosen, losses.wide(rejected) - ref_rejected
