"""Equations of reinforcement learning on language models: advantages, token losses, KL terms, and how they are averaged.

N rows, each an answer of up to T tokens: prompts x group_size of them, the answers to one prompt side by side. Arrays are
``[N, T]``, ``mask [N, T]`` (bool, or 0 and 1) marks the tokens that were sampled, the end of sequence included, and
rewards are ``[N]``. Losses are elementwise and minimised; a sum with weights that know the whole batch reduces them:

    log_ratio = masked(log_prob - old_log_prob, mask)
    loss = weighted_sum(weights(mask, "token_mean"), clip(log_ratio, zscore(reward, group_size, 1, 1e-4), 0.2, 0.28))

A masked position may hold anything, inf and NaN too, in what goes through ``masked`` and in the arguments beside a ``mask``:
``masked`` cleans what goes into an equation and ``weighted_sum`` what comes out, so that gradients stay clean as well.
Advantages are constants: no token loss differentiates them. Everything is float32, or float64 for arguments that are.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jrl.equations import losses, returns
from jrl.equations.losses import masked
from jrl.numerics import checks

Array = jax.Array
Scalar = Array | float

LARGEST = 60.0  # of a log ratio: e^60 is finite, so what a clip cuts off has gradient 0, not 0 times infinity


# Masks and reductions


def weights(
    mask: Array, how: Literal["sequence_mean", "token_mean", "constant"], length: Scalar | None = None
) -> Array:
    """Weights ``[N, T]`` of the tokens of a whole minibatch, so that its loss is ``weighted_sum(weights, x)``.

    Compute them once and slice them with the rows: the losses of micro-batches then add up to that of the whole, however it is
    split. Of ``how``:

    - ``sequence_mean``: the mean over rows of each row's mean (GRPO, 2402.03300, eq. 3). All N rows count, so that one
      without tokens gives 0 and still divides.
    - ``token_mean``: the mean over all tokens (DAPO, 2503.14476, eq. 12).
    - ``constant``: the mean over rows of each row's sum over ``length``, one number for all (Dr. GRPO, 2503.20783, section 3.2).

    Raises ``ValueError`` for another ``how``, or if ``length`` is missing for ``constant`` or given for another.
    """
    checks.one_of("how", how, ("sequence_mean", "token_mean", "constant"))
    if (length is None) == (how == "constant"):
        raise ValueError(f"weights: how='constant' takes a length and no other does; got how={how!r}, length={length}")
    if mask.ndim != 2:
        raise ValueError(f"weights: mask must be [N, T], got {mask.shape}")
    m = losses.wide((mask > 0).astype(mask.dtype))
    if how == "token_mean":
        return m / jnp.maximum(m.sum(), 1)
    if length is not None:
        return m / (length * len(m))
    return m / (jnp.maximum(m.sum(1, keepdims=True), 1) * len(m))


def refuse_accumulation(accumulate: int, instead: str) -> None:
    """Raise ``ValueError`` if an optimizer averages the gradients of several steps whose losses are means over their tokens: with
    unequal numbers of tokens, that is not the gradient of the mean over all. ``instead`` says what is."""
    if accumulate > 1:
        raise ValueError(
            f"config.optimizer.accumulate must be 1 where a loss is a mean over tokens, since a mean of such means is not the mean over "
            f"all tokens; got {accumulate}: take {instead}"
        )


def weighted_sum(weight: Array, x: Array) -> Array:
    """Sum of ``weight * x`` over the elements whose weight is not 0; a scalar."""
    checks.same_shape("weighted_sum", weight=weight, x=x)
    return jnp.sum(weight * jnp.where(weight != 0, x, 0))


# Advantages of groups, [N] to [N]. Answers that do not count (``counts``, bool [N]; None: all do) have the advantage 0, and no part
# in the mean and the deviation of their group.


def zscore(reward: Array, group_size: int, ddof: int, eps: Scalar, counts: Array | None = None) -> Array:
    """``(R - mean) / (std + eps)`` within each group, ``[N]`` (GRPO, DeepSeekMath, 2402.03300, section 4.1.2).

    The standard deviation divides by the answers that count less ``ddof``. Trainers differ: TRL takes 1 and 1e-4, others 0 or 1e-6.
    A group without variance gives exactly 0. Raises ``ValueError`` unless groups of more than ``ddof`` divide the rows.
    """
    grouped, there, same = _groups("zscore", reward, group_size, ddof + 1, counts)
    std = jnp.where(same, 1, jnp.std(grouped, axis=1, keepdims=True, ddof=ddof, where=there))
    return (_centre(grouped, there, same) / (std + eps)).reshape(reward.shape)


def centred(reward: Array, group_size: int, counts: Array | None = None) -> Array:
    """``R - mean`` within each group, ``[N]`` (Dr. GRPO, 2503.20783, section 3.2); unbiased but for the factor (G-1)/G."""
    return _centre(*_groups("centred", reward, group_size, 1, counts)).reshape(reward.shape)


def rloo(reward: Array, group_size: int, counts: Array | None = None) -> Array:
    """``R`` less the mean of the others in its group, ``[N]`` (Ahmadian et al. 2024, 2402.14740, section 3); unbiased."""
    grouped, there, same = _groups("rloo", reward, group_size, 2, counts)
    size = there.sum(1, keepdims=True, dtype=grouped.dtype)
    return (_centre(grouped, there, same) * (size / jnp.maximum(size - 1, 1))).reshape(reward.shape)


def varied(x: Array, group_size: int, counts: Array | None = None) -> Array:
    """Which groups of ``x [N]`` hold two numbers, bool ``[N / group_size]``."""
    return ~_groups("varied", x, group_size, 1, counts)[2][:, 0]


def _groups(
    function: str, reward: Array, group_size: int, at_least: int, counts: Array | None
) -> tuple[Array, Array, Array]:
    """Rewards ``[prompts, group_size]``, which of them count, and which groups ``[prompts, 1]`` hold one number only, or none."""
    checks.positive_int(f"{function}: group_size", group_size, at_least)
    if reward.ndim != 1 or len(reward) % group_size:
        raise ValueError(f"{function}: reward must be [prompts * {group_size}], got {reward.shape}")
    grouped = losses.wide(reward).reshape(-1, group_size)
    there = jnp.ones(grouped.shape, bool) if counts is None else counts.reshape(grouped.shape)
    low, high = (jnp.where(there, grouped, end) for end in (jnp.inf, -jnp.inf))
    return grouped, there, high.max(1, keepdims=True) <= low.min(1, keepdims=True)


def _centre(grouped: Array, there: Array, same: Array) -> Array:
    mean = jnp.mean(grouped, axis=1, keepdims=True, where=there)
    return jnp.where(same | ~there, 0, grouped - mean)  # a rounded mean of equal numbers is not that number


# Advantages of tokens, [N, T]


def token_rewards(score: Array, log_prob: Array, ref_log_prob: Array, mask: Array, beta: Scalar) -> Array:
    """Rewards ``[N, T]`` with the KL to a reference in them: ``-beta (log_prob - ref_log_prob)`` at each token, and the row's
    ``score [N]`` at its last (Ziegler et al. 2019, 1909.08593, eq. 2). A row without tokens gets no score.
    """
    checks.same_shape("token_rewards", log_prob=log_prob, ref_log_prob=ref_log_prob, mask=mask)
    checks.same_shape("token_rewards", score=score, **{"mask[:, 0]": mask[:, 0]})
    counted = jnp.cumsum(mask[:, ::-1] > 0, axis=1)[:, ::-1]  # valid tokens from here to the end
    last = (mask > 0) & (counted == 1)
    return -beta * masked(losses.wide(log_prob) - ref_log_prob, mask) + jnp.where(last, score[:, None], 0)


def gae(value: Array, reward: Array, mask: Array, gamma: Scalar, lambda_: Scalar) -> Array:
    """Generalized advantage estimates ``[N, T]`` over the tokens of each row (1506.02438, eq. 16), 0 where masked.

    Nothing follows the last token: its next value is 0. Masked tokens do not exist, so the token before a gap (a tool's
    answer) is followed by the one after it. The matching value targets are the advantages plus ``value``.
    """
    checks.same_shape("gae", value=value, reward=reward, mask=mask)

    def row(value: Array, reward: Array, mask: Array) -> Array:
        order = jnp.argsort(mask == 0, stable=True)  # the valid tokens first, in their order
        v, r, m = (masked(losses.wide(x), mask)[order] for x in (value, reward, mask))
        following = jnp.append(v[1:], 0)
        goes_on = jnp.append(m[1:], 0)
        discount = (gamma * goes_on).astype(v.dtype)
        return masked(returns.gae(v, r, discount, following, goes_on, lambda_)[jnp.argsort(order)], mask)

    return jax.vmap(row)(value, reward, mask)


def whiten(x: Array, mask: Array, eps: Scalar = 1e-8, *, keep_mean: bool = False) -> Array:
    """``(x - mean) / sqrt(variance + eps)`` over all valid tokens, ``[N, T]``, 0 where masked; ``keep_mean`` adds the mean again.

    The variance divides by the number of tokens less one, as PPO on language models does. Without variance: 0.
    """
    checks.same_shape("whiten", x=x, mask=mask)
    x, count = masked(losses.wide(x), mask), jnp.sum(mask > 0)
    difference = masked(x - x.sum() / jnp.maximum(count, 1), mask)
    low, high = (jnp.where(mask > 0, x, end) for end in (jnp.inf, -jnp.inf))
    varies = high.max() > low.min()  # of equal numbers, or of none, the sum of squares may be a rounding error
    variance = jnp.where(varies, jnp.sum(difference**2) / jnp.maximum(count - 1, 1), 1)
    white = jnp.where(varies, difference / jnp.sqrt(variance + eps), 0)
    return masked(white + x.sum() / jnp.maximum(count, 1), mask) if keep_mean else white


def reinforce_plus_plus(
    score: Array,
    log_prob: Array,
    ref_log_prob: Array,
    mask: Array,
    beta: Scalar,
    gamma: Scalar = 1.0,
    eps: Scalar = 1e-8,
) -> Array:
    """REINFORCE++'s advantages ``[N, T]``: returns of ``token_rewards`` from each token on, whitened over the batch
    (Hu 2025, 2501.03262)."""
    reward = token_rewards(score, log_prob, ref_log_prob, mask, beta)
    return whiten(gae(jnp.zeros_like(reward), reward, mask, gamma, 1.0), mask, eps)


# Token losses, [N, T]: log_ratio and log_prob [..., T]; advantage [..., T], or [...] for one number a row


def policy_gradient(log_prob: Array, advantage: Array) -> Array:
    """REINFORCE with a baseline, as a loss: ``-log pi A`` (Williams 1992)."""
    return losses.policy_gradient(losses.wide(log_prob), _per_token("policy_gradient", log_prob, advantage))


def clip(log_ratio: Array, advantage: Array, low: Scalar, high: Scalar) -> Array:
    """``-min(r A, clip(r, 1 - low, 1 + high) A)``: PPO and GRPO with ``low == high`` (2402.03300, eq. 3), DAPO's clip-higher
    with ``low < high`` (2503.14476, eq. 8). Where ``A`` is 0, the loss and its gradient are exactly 0."""
    return losses.ppo_clip(*_ratio_and_advantage("clip", log_ratio, advantage), low, high)


def dual_clip(log_ratio: Array, advantage: Array, low: Scalar, high: Scalar, c: Scalar) -> Array:
    """``clip``, but no more than ``-c A`` where the advantage is negative (Ye et al. 2020, 1912.09729, eq. 5); ``c > 1``."""
    return losses.ppo_dual_clip(*_ratio_and_advantage("dual_clip", log_ratio, advantage), low, c, high)


def gspo(log_ratio: Array, advantage: Array, mask: Array, low: Scalar, high: Scalar) -> Array:
    """Group sequence policy optimization (Zheng et al. 2025, 2507.18071): ``clip`` of the ratio of whole sequences.

    The ratio is ``s = exp(mean of log_ratio)`` over a row's tokens at each of them, with the gradient of that token's own
    probability (GSPO-token, eq. 13-14). Reduced by ``sequence_mean``, with one advantage a row, objective and gradient are
    those of GSPO (eq. 5-7).
    """
    log_ratio, advantage = _ratio_and_advantage("gspo", sequence_log_ratio(log_ratio, mask), advantage)
    return masked(losses.ppo_clip(log_ratio, advantage, low, high), mask)


def sequence_log_ratio(log_ratio: Array, mask: Array) -> Array:
    """The mean of ``log_ratio`` over a row's tokens at each of them, ``[N, T]``, with the gradient of that token's own
    (2507.18071, eq. 7 and 14)."""
    checks.same_shape("sequence_log_ratio", log_ratio=log_ratio, mask=mask)
    log_ratio = losses.wide(masked(log_ratio, mask))
    count = jnp.maximum(jnp.sum(mask > 0, axis=-1, keepdims=True), 1)
    return log_ratio + jax.lax.stop_gradient(log_ratio.sum(-1, keepdims=True) / count - log_ratio)


def cispo(log_prob: Array, log_ratio: Array, advantage: Array, low: Scalar, high: Scalar) -> Array:
    """``-sg[clip(r, 1 - low, 1 + high)] A log pi`` (MiniMax-M1, 2506.13585, eq. 4-5): the clip bounds a token's weight and
    never takes its gradient. ``low=1`` leaves the ratio free below."""
    checks.same_shape("cispo", log_prob=log_prob, log_ratio=log_ratio)
    log_ratio, advantage = _ratio_and_advantage("cispo", log_ratio, advantage)
    weight = jax.lax.stop_gradient(jnp.clip(jnp.exp(log_ratio), 1 - low, 1 + high))
    return losses.policy_gradient(losses.wide(log_prob), weight * advantage)


def truncated_importance(log_trainer: Array, log_sampler: Array, cap: Scalar) -> Array:
    """``min(pi_trainer / pi_sampler, cap)``, elementwise and without gradient: the weight that a token's loss takes where the
    sampler's log-probabilities are not quite the trainer's (Yao et al. 2025; Espeholt et al. 2018, 1802.01561, section 4.1)."""
    checks.same_shape("truncated_importance", log_trainer=log_trainer, log_sampler=log_sampler)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(losses.wide(log_trainer) - log_sampler), cap))


def _per_token(function: str, x: Array, advantage: Array) -> Array:
    """The advantages as constants that broadcast against ``x [..., T]``."""
    if advantage.shape not in (x.shape, x.shape[:-1]):
        raise ValueError(
            f"{function}: advantage must be {x.shape} or, for one a row, {x.shape[:-1]}; got {advantage.shape}"
        )
    advantage = advantage if advantage.ndim == x.ndim else advantage[..., None]
    return jax.lax.stop_gradient(losses.wide(advantage))


def _ratio_and_advantage(function: str, log_ratio: Array, advantage: Array) -> tuple[Array, Array]:
    advantage = _per_token(function, log_ratio, advantage)
    return jnp.where(advantage == 0, 0, jnp.minimum(losses.wide(log_ratio), LARGEST)), advantage


# KL(pi || ref) at each token. Estimates take log-probabilities of tokens that pi sampled, elementwise (Schulman 2020,
# "Approximating KL divergence"). What an estimate is on average, and what its gradient is, are two things.


def kl_k1(log_prob: Array, ref_log_prob: Array) -> Array:
    """``D = log pi - log ref``: unbiased, of either sign. In a loss its gradient is 0 on average: it belongs in the reward."""
    checks.same_shape("kl_k1", log_prob=log_prob, ref_log_prob=ref_log_prob)
    return losses.wide(log_prob) - ref_log_prob


def kl_k2(log_prob: Array, ref_log_prob: Array) -> Array:
    """``D^2 / 2``: biased as a value; its gradient in a loss is that of KL(pi || ref), exactly, on average."""
    return 0.5 * jnp.square(kl_k1(log_prob, ref_log_prob))


def kl_k3(log_prob: Array, ref_log_prob: Array) -> Array:
    """``exp(-D) - 1 + D``: unbiased and not negative. Its gradient in a loss is that of KL(ref || pi), the other way round;
    times ``exp(log_prob - sg[log_prob])``, or the ratio to the sampler, that of KL(pi || ref) (GRPO, 2402.03300, eq. 4)."""
    return losses.approximate_kl(-kl_k1(log_prob, ref_log_prob))


def kl_exact(logits: Array, ref_logits: Array) -> Array:
    """KL(pi || ref) over the whole vocabulary, ``[...]`` for logits ``[..., V]``: its value and gradient, without sampling
    noise. Logits may be -inf where pi never goes."""
    checks.same_shape("kl_exact", logits=logits, ref_logits=ref_logits)
    log_p, log_q = (jax.nn.log_softmax(losses.wide(x)) for x in (logits, ref_logits))
    return jnp.sum(jnp.exp(log_p) * jnp.where(logits > -jnp.inf, log_p - log_q, 0), axis=-1)


# Rewards and scores


def overlong_penalty(length: Array, longest: int, cache: int) -> Array:
    """DAPO's soft punishment of long answers, elementwise, in [-1, 0] (2503.14476, eq. 13): none up to ``longest - cache``
    tokens, then linear, -1 from ``longest`` on. Raises ``ValueError`` unless ``1 <= cache <= longest``."""
    checks.positive_int("cache", cache)
    checks.positive_int("longest", longest, cache)
    return jnp.clip((longest - cache - length) / cache, -1.0, 0.0)


def pass_at_k(n: Array | int, c: Array, k: int) -> Array:
    """Probability that of ``k`` answers one is right, elementwise, where ``c`` of ``n`` were (Chen et al. 2021, 2107.03374, eq. 1).

    ``1 - C(n-c, k) / C(n, k)`` as a product that neither overflows nor cancels. Raises ``ValueError`` if ``k`` exceeds ``n``.
    """
    checks.positive_int("k", k)
    checks.within("n", n, k, float("inf"))
    n, c = jnp.broadcast_arrays(n, c)
    missed = jax.vmap(lambda i: jnp.log1p(-jnp.minimum(c / (n - i), 1.0)))(jnp.arange(k))
    return -jnp.expm1(missed.sum(0))
