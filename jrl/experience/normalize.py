"""Running normalization of observations and rewards, as pure functions of statistics kept in the learner's state.

Statistics stand still while an update collects and learns, and take in its data at its end; otherwise the first
importance ratio of the update would not be 1. All statistics are float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.envs.types import without_mask
from jrl.equations.losses import deviation
from jrl.numerics.types import Observation

Array = jax.Array


class Stats(NamedTuple):
    """Number, mean and variance of everything seen; mean and variance have the shape of one element.

    The number stops growing where float32 cannot count on, at 2^24 batches: from there on the oldest data fade.
    """

    size: Array
    mean: Array
    variance: Array


def init(shape: tuple[int, ...]) -> Stats:
    """Statistics of nothing: mean 0, variance 1, so that normalization starts as the identity."""
    return Stats(jnp.float32(0), jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32))


def starting_from(shape: tuple[int, ...], trained: Any) -> Stats:
    """The statistics of ``trained``, the state of a run for one seed, if it has some of this shape; else those of nothing yet."""
    found = getattr(trained, "obs_stats", None)
    return init(shape) if found is None or found.mean.shape != shape else jax.tree.map(jnp.asarray, found)


def update(stats: Stats, batch: Array) -> Stats:
    """Take in a batch ``[..., *shape]`` (Chan et al. 1983, the parallel variance update)."""
    axes = tuple(range(batch.ndim - stats.mean.ndim))
    x = batch.astype(jnp.float32)
    new = jnp.float32(x.size / max(stats.mean.size, 1))
    mean, variance = x.mean(axes), x.var(axes)
    size = stats.size + new
    shift = mean - stats.mean
    spread = stats.variance * stats.size + variance * new + jnp.square(shift) * stats.size * new / size
    return Stats(size, stats.mean + shift * new / size, spread / size)


def standardize(stats: Stats, x: Array, clip: float = 10.0) -> Array:
    """``(x - mean) / std``, clipped, float32; 0 for what never varied."""
    scaled = deviation(x.astype(jnp.float32), stats.mean) * jax.lax.rsqrt(stats.variance + 1e-8)
    return jnp.clip(scaled, -clip, clip)


def destandardize(stats: Stats, x: Array) -> Array:
    """What ``standardize`` made ``x`` of, but for its clipping."""
    return stats.mean + x * jnp.sqrt(stats.variance + 1e-8)


def scale(stats: Stats, x: Array, clip: float = 10.0) -> Array:
    """``x / std``, clipped: for rewards, whose sign and zero must stay; as it is where nothing varied."""
    varies = stats.variance > jnp.square(8 * jnp.finfo(jnp.float32).eps * stats.mean)
    return jnp.clip(x * jax.lax.rsqrt(jnp.where(varies, stats.variance, 1.0) + 1e-8), -clip, clip)


class RewardStats(NamedTuple):
    """Statistics of the discounted sum of past rewards, and its running value in each environment ``[B]``."""

    stats: Stats
    running: Array


def init_rewards(num_envs: int) -> RewardStats:
    """Reward statistics of nothing."""
    return RewardStats(init(()), jnp.zeros(num_envs, jnp.float32))


def update_rewards(state: RewardStats, reward: Array, ended: Array, gamma: Array | float) -> RewardStats:
    """Take in rewards ``[T, B]``; ``ended = terminated | truncated`` restarts the sums (Engstrom et al. 2020, arXiv 2005.12729, sec. 2)."""

    def step(running: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
        total = gamma * running + x[0]
        return jnp.where(x[1], 0.0, total), total

    running, totals = jax.lax.scan(step, state.running, (reward, ended))
    return RewardStats(update(state.stats, totals), running)


def check(config: Any, obs_spec: Any) -> None:
    """Raise ``ValueError`` where observations that are to be normalized are not one array."""
    if config.normalize_observations and not hasattr(without_mask(obs_spec), "shape"):
        raise ValueError("config.normalize_observations needs observations of one array; got a tree of them")


def start(config: Any, obs_spec: Any, trained: Any) -> dict[str, Any]:
    """The fields ``obs_stats`` and ``reward_stats`` of a learner's state, None where ``config`` does not ask for them. Statistics of
    observations are those of ``trained`` if it has some."""
    return {
        "obs_stats": starting_from(without_mask(obs_spec).shape, trained) if config.normalize_observations else None,
        "reward_stats": init_rewards(config.num_envs) if config.normalize_rewards else None,
    }


def after(state: Any, steps: Any) -> dict[str, Any]:
    """The same fields after a rollout: ``state`` has them before it, and ``hyper.gamma``."""
    obs_stats, reward_stats = state.obs_stats, state.reward_stats
    if obs_stats is not None:
        obs_stats = update(obs_stats, without_mask(steps.obs))
    if reward_stats is not None:
        ended = steps.terminated | steps.truncated
        reward_stats = update_rewards(reward_stats, steps.reward, ended, state.hyper.gamma)
    return {"obs_stats": obs_stats, "reward_stats": reward_stats}


def rewards(stats: RewardStats | None, reward: Array) -> Array:
    """Rewards as they are learned from: divided by the deviation of returns where there are statistics."""
    return reward if stats is None else scale(stats.stats, reward)


def transitions(state: Any, batch: Any) -> Any:
    """A minibatch from the replay with observations and rewards as they are learned from, by the statistics of ``state``."""
    obs, next_obs = (observations(state.obs_stats, x) for x in (batch.obs, batch.next_obs))
    return batch._replace(obs=obs, next_obs=next_obs, reward=rewards(state.reward_stats, batch.reward))


def clipped(bound: float, reward: Array) -> Array:
    """Rewards between ``-bound`` and ``bound``; as they are if that is 0."""
    return jnp.clip(reward, -bound, bound) if bound else reward


def observations(stats: Stats | None, obs: Observation) -> Any:
    """Observations as the network sees them: standardized where there are statistics; masks are left alone."""
    if stats is None:
        return obs
    if hasattr(obs, "mask"):
        return obs._replace(obs=standardize(stats, obs.obs))
    return standardize(stats, obs)
