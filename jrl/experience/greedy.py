"""Acting on action values: what is legal, and exploring by chance."""

import jax
import jax.numpy as jnp

from jrl.envs.types import MaskedObs
from jrl.numerics.types import Observation

Array = jax.Array


def mask(q: Array, obs: Observation) -> Array:
    """Action values ``[..., A]``, minus infinity where ``MaskedObs`` says that the action is illegal."""
    return jnp.where(obs.mask, q, -jnp.inf) if isinstance(obs, MaskedObs) else q


def best_value(q: Array, obs: Observation) -> Array:
    """The largest value of a legal action ``[...]``; 0 where none is legal, as in a terminal state."""
    best = mask(q, obs).max(-1)
    return jnp.where(jnp.isneginf(best), 0.0, best)


def pick(x: Array, action: Array) -> Array:
    """What belongs to each action: ``x[i, action[i]]`` of ``x [..., A]`` or ``[..., A, atoms]``, for ``action [...]``.

    A sum in which all others are 0, since the gradient of a gather is a scatter, which is slow on every platform.
    """
    chosen = action[..., None] == jnp.arange(x.shape[action.ndim])
    chosen = chosen.reshape(*chosen.shape, *(1,) * (x.ndim - chosen.ndim))
    return jnp.sum(jnp.where(chosen, x, 0), axis=action.ndim)


def exploration_noise(key: Array, shape: tuple[int, ...], num_actions: int) -> tuple[Array, Array]:
    """What ``epsilon_greedy`` needs of chance: uniform ``shape`` and ``[*shape, A]``, from one draw."""
    uniform = jax.random.uniform(key, (*shape, num_actions + 1), jnp.float32)
    return uniform[..., 0], uniform[..., 1:]


def epsilon_greedy(q: Array, epsilon: Array, noise: tuple[Array, Array]) -> Array:
    """The best action, or with probability ``epsilon`` any that is not at minus infinity; int32 ``[...]``."""
    whether, which = noise
    explored = jnp.where(jnp.isneginf(q), -1.0, which)
    return jnp.argmax(jnp.where((whether < epsilon)[..., None], explored, q), axis=-1).astype(jnp.int32)


def choose(q: Array, epsilon: Array, key: Array | None) -> Array:
    """An action by values ``[A]``, int32: the best one, or epsilon-greedy with a key."""
    if key is None:
        return jnp.argmax(q).astype(jnp.int32)
    return epsilon_greedy(q, epsilon, exploration_noise(key, (), q.shape[0]))
