"""Losses and diagnostics of policy gradients and of action values, each on one element or one batch, in float32.

Elementwise functions broadcast; reduce them where you call them. ``log_ratio`` is ``log pi(a|x) - log pi_old(a|x)``.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def wide(x: Array) -> Array:
    """``x`` in float32, or as it is in a wider type."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def masked(x: Array, mask: Array) -> Array:
    """``x`` where the mask is set and 0 elsewhere, whatever stands there; ``x`` may have more axes than ``mask``."""
    if x.shape[: mask.ndim] != mask.shape:
        raise ValueError(f"masked: x {x.shape} must begin with the shape of the mask, {mask.shape}")
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)) > 0, x, 0)


def policy_gradient(log_prob: Array, advantage: Array) -> Array:
    """REINFORCE with a baseline, as a loss: ``-log pi(a|x) A`` (Williams 1992)."""
    return -log_prob * jax.lax.stop_gradient(advantage)


def ppo_clip(
    log_ratio: Array, advantage: Array, clip_eps: Array | float, clip_high: Array | float | None = None
) -> Array:
    """PPO's clipped surrogate, as a loss (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    The ratio is clipped to ``[1 - clip_eps, 1 + clip_high]``; ``clip_high`` is ``clip_eps`` unless given (DAPO's clip-higher,
    Yu et al. 2025, arXiv 2503.14476, eq. 10).
    """
    ratio = jnp.exp(log_ratio)
    high = clip_eps if clip_high is None else clip_high
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip_eps, 1 + high) * advantage)


def ppo_dual_clip(
    log_ratio: Array,
    advantage: Array,
    clip_eps: Array | float,
    dual_clip: Array | float,
    clip_high: Array | float | None = None,
) -> Array:
    """Dual-clip PPO, as a loss (Ye et al. 2020, arXiv 1912.09729, eq. 5); ``dual_clip`` is their c > 1.

    Where the advantage is negative the loss is bounded above by ``-c A``, so that a huge ratio cannot dominate.
    """
    clipped = ppo_clip(log_ratio, advantage, clip_eps, clip_high)
    return jnp.where(advantage < 0, jnp.minimum(clipped, -dual_clip * advantage), clipped)


def ppo_unclipped(log_ratio: Array, advantage: Array) -> Array:
    """The surrogate of trust-region methods, as a loss (arXiv 1707.06347, eq. 6), which PPO-Penalty adds a KL term to."""
    return -jnp.exp(log_ratio) * advantage


def adapt_kl_weight(kl_weight: Array, kl: Array, target_kl: Array | float, initial: Array | float) -> Array:
    """The next penalty coefficient of PPO-Penalty (arXiv 1707.06347, section 4): halved or doubled outside 1.5x.

    It stays within a factor of 100 of ``initial``. Without a bound a phase of small steps would halve it to nothing, from which
    no doubling leads back.
    """
    lower = jnp.where(kl < target_kl / 1.5, 0.5, 1.0)
    adapted = kl_weight * jnp.where(kl > target_kl * 1.5, 2.0, lower)
    return jnp.clip(adapted, initial / 100, initial * 100)


def value_loss(v: Array, target: Array) -> Array:
    """Half the squared error."""
    return 0.5 * jnp.square(v - target)


def clipped_value_loss(v: Array, v_old: Array, target: Array, clip_eps: Array | float) -> Array:
    """Value loss pessimistic about moving more than ``clip_eps`` from ``v_old`` (Engstrom et al. 2020, arXiv 2005.12729, sec. 2)."""
    clipped = v_old + jnp.clip(v - v_old, -clip_eps, clip_eps)
    return jnp.maximum(value_loss(v, target), value_loss(clipped, target))


def self_imitation(log_prob: Array, value: Array, target: Array) -> tuple[Array, Array, Array]:
    """Losses of policy and value, and the advantage ``(R - V)+`` that weighs them (Oh et al. 2018, arXiv 1806.05635, eqs. 2 and 3).

    ``-log pi(a|x) (R - V)+`` and ``1/2 ((R - V)+)^2`` for returns ``target`` that were reached; where V is higher, nothing is to be learned.
    """
    advantage = jnp.maximum(wide(target) - wide(value), 0.0)
    return -wide(log_prob) * jax.lax.stop_gradient(advantage), 0.5 * jnp.square(advantage), advantage


def mirrored_actions(action: Array, advantage: Array, mean: Array, std: Array) -> tuple[Array, Array]:
    """Actions ``[..., A]`` to move a normal policy towards, and their weights ``[...]`` (Hamalainen et al. 2018, arXiv 1810.02541, section 4.3).

    Where the advantage is negative the action is mirrored at the mean, with a weight that falls with its distance from it:
    ``-A mean_i exp(-(a_i - mu_i)^2 / (2 sigma_i^2))``.
    """
    distance = wide(action) - wide(mean)
    kernel = jnp.mean(jnp.exp(-0.5 * jnp.square(distance / wide(std))), axis=-1)
    good = advantage > 0
    target = jnp.where(good[..., None], wide(action), wide(mean) - distance)
    return jax.lax.stop_gradient(target), jax.lax.stop_gradient(jnp.where(good, advantage, -advantage * kernel))


def large_margin(q: Array, shown: Array, margin: Array | float) -> Array:
    """``max_a [q(a) + margin 1(a != shown)] - q(shown)`` for values ``q [A]``: 0 where the action that was shown is better than all others by
    the margin (Hester et al. 2018, arXiv 1704.03732, after Piot et al. 2014)."""
    expert = jnp.arange(q.shape[0]) == shown
    return jnp.max(q + jnp.where(expert, 0.0, margin)) - jnp.sum(jnp.where(expert, q, 0.0))


def standardize(x: Array, eps: float = 1e-8) -> Array:
    """Zero mean and unit standard deviation over all elements; 0 where they are equal."""
    return deviation(x, x.mean()) / (x.std() + eps)


def deviation(x: Array, mean: Array) -> Array:
    """``x - mean``, 0 where the two differ by no more than the rounding of the mean.

    A small standard deviation would blow that rounding up: equal numbers are to come out as 0, not as plus or minus 1.
    """
    return jnp.where(jnp.abs(x - mean) <= 8 * jnp.finfo(x.dtype).eps * jnp.abs(mean), 0.0, x - mean)


def approximate_kl(log_ratio: Array) -> Array:
    """Unbiased, non-negative estimate of KL(pi_old || pi) from samples of pi_old, elementwise.

    ``(r - 1) - log r``, the "k3" estimator (Schulman 2020, "Approximating KL divergence").
    """
    return jnp.expm1(log_ratio) - log_ratio


def clip_fraction(log_ratio: Array, clip_eps: Array | float) -> Array:
    """Share of a batch whose ratio lies outside the clip range; a scalar."""
    return jnp.mean(jnp.abs(jnp.expm1(log_ratio)) > clip_eps)


def explained_variance(v: Array, target: Array, mask: Array | None = None) -> Array:
    """``1 - Var[target - v] / Var[target]`` over all elements, or those of a mask; 0 where the targets do not vary."""
    variance = jnp.mean(jnp.square(deviation(target, jnp.mean(target, where=mask))), where=mask)
    return jnp.where(variance > 0, 1 - jnp.var(target - v, where=mask) / jnp.where(variance > 0, variance, 1.0), 0.0)


def huber(error: Array, delta: float = 1.0) -> Array:
    """``error^2 / 2`` up to ``delta``, linear beyond, elementwise (Huber 1964)."""
    size = jnp.abs(error)
    inner = jnp.minimum(size, delta)
    return inner * (size - 0.5 * inner)


def project_categorical(probability: Array, moved: Array, atoms: Array) -> Array:
    """A distribution on points ``moved`` put onto ``atoms`` (equally spaced), all ``[K]`` (1707.06887, eq. 7).

    Each point gives its probability to the two atoms beside it, in proportion to its nearness; points outside go to the ends.
    """
    step = atoms[1] - atoms[0]
    moved = jnp.clip(moved, atoms[0], atoms[-1])
    nearness = jnp.clip(1 - jnp.abs(moved[None] - atoms[:, None]) / step, 0, 1)  # [atoms, points]
    return jnp.sum(nearness * probability[None], axis=1)  # not a product of matrices, which a TPU rounds


def quantile_huber(quantiles: Array, target: Array, kappa: float = 1.0) -> Array:
    """Quantile regression's loss of ``quantiles [K]`` at midpoints against target samples ``[M]``, a scalar (1710.10044, eq. 10).

    ``kappa`` bounds the quadratic part, as in the paper; later papers divide by it.
    """
    count = quantiles.shape[0]
    levels = (jnp.arange(count, dtype=jnp.float32) + 0.5) / count
    error = target[None] - quantiles[:, None]  # [K, M]
    weight = jnp.abs(levels[:, None] - (error < 0))
    return jnp.sum(jnp.mean(weight * huber(error, kappa), axis=1))


def squash(x: Array, eps: float = 1e-3) -> Array:
    """``h(x) = sgn(x) (sqrt(|x| + 1) - 1) + eps x``, elementwise: large values come near each other (1805.11593, section 3.2)."""
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1) - 1) + eps * x


def unsquash(x: Array, eps: float = 1e-3) -> Array:
    """The inverse of ``squash`` (1805.11593, proposition A.2), in a form without cancellation.

    With ``s = sqrt(|y| + 1) - 1`` for the answer y, ``|x| = s + eps (s^2 + 2 s)``, solved for s.
    """
    size = jnp.abs(x)
    s = 2 * size / (1 + 2 * eps + jnp.sqrt((1 + 2 * eps) ** 2 + 4 * eps * size))
    return jnp.sign(x) * (s * s + 2 * s)
