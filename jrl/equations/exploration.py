"""Rewards that an agent gives itself for what it does not know yet. One equation a function, on one transition; callers vmap."""

import jax
import jax.numpy as jnp

from jrl.equations.losses import wide

Array = jax.Array


def distillation_error(prediction: Array, target: Array) -> Array:
    """``1/n ||f(x') - f*(x')||^2`` of features ``[n]``, float32 ``[]``: the bonus and the loss of random network distillation (Burda et al.
    2018, arXiv 1810.12894, section 2.2). The target gets no gradient."""
    return jnp.mean(jnp.square(wide(prediction) - jax.lax.stop_gradient(wide(target))), -1)


def forward_error(prediction: Array, features: Array) -> Array:
    """``1/2 ||f(phi(x), a) - phi(x')||^2`` of features ``[n]``, float32 ``[]``: how wrong the forward model is (Pathak et al. 2017, arXiv
    1705.05363, eq. 5; its eq. 6 rewards it). The features get no gradient."""
    return 0.5 * jnp.sum(jnp.square(wide(prediction) - jax.lax.stop_gradient(wide(features))), -1)


def curiosity_loss(inverse_loss: Array, forward_loss: Array, forward_share: Array | float) -> Array:
    """``(1 - beta) L_I + beta L_F``, the loss of the inverse and the forward model (1705.05363, eq. 7)."""
    return (1 - forward_share) * inverse_loss + forward_share * forward_loss


def count_bonus(count: Array) -> Array:
    """``1 / sqrt(N)`` after N visits, at least 1 (Strehl & Littman 2008, MBIE-EB)."""
    return jax.lax.rsqrt(jnp.maximum(count, 1).astype(jnp.float32))
