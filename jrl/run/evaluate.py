"""Evaluation apart from training: whole episodes, the same number for every seed, on the same keys."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, State
from jrl.numerics.types import Memory, Observation

Array = jax.Array
MAX_STEPS = 10_000  # for environments without a time limit
MAX_FRAMES = 100


class Evaluation(NamedTuple):
    """Undiscounted returns and lengths of ``[episodes]``; ``finished`` is false where MAX_STEPS cut an episode."""

    returns: Array
    lengths: Array
    finished: Array


def evaluate(algo: Algorithm, state: State, key: Array, episodes: int, greedy: bool = True) -> Evaluation:
    """One agent in ``episodes`` whole episodes, greedy or sampled. Pure: vmap it over states with one key.

    Every environment plays exactly one episode, so that short episodes are not counted more often than long ones.
    """
    env = algo.env
    limit = env.time_limit or MAX_STEPS
    key_reset, key_first, key_run = jax.random.split(key, 3)

    def act(obs: Observation, keys: Array, memory: Memory = None) -> tuple[Array, Any]:
        return jax.vmap(lambda o, k, m: algo.act(state, o, None if greedy else k, m))(obs, keys, memory)

    def play(carry: Any) -> Any:
        t, env_state, action, memory, alive, total, length = carry
        key_env, key_act = jax.random.split(jax.random.fold_in(key_run, t))
        step = jax.vmap(env.step)
        obs, env_state, reward, terminated, truncated = step(jax.random.split(key_env, episodes), env_state, action)
        action, memory = act(obs, jax.random.split(key_act, episodes), memory)
        total, length = total + jnp.where(alive, reward, 0.0), length + alive
        return t + 1, env_state, action, memory, alive & ~(terminated | truncated), total, length

    obs, env_state = jax.vmap(env.reset)(jax.random.split(key_reset, episodes))
    action, memory = act(obs, jax.random.split(key_first, episodes))
    alive = jnp.ones(episodes, bool)
    start = (jnp.int32(0), env_state, action, memory, alive, jnp.zeros(episodes), jnp.zeros(episodes, jnp.int32))
    end = jax.lax.while_loop(lambda c: jnp.any(c[4]) & (c[0] < limit), play, start)
    return Evaluation(end[5], end[6], ~end[4])


def record(algo: Algorithm, state: State, key: Array, path: str) -> int:
    """Play one greedy episode and write it as a GIF of at most MAX_FRAMES, evenly spaced; returns the episode's length.

    Raises ``ValueError`` if the environment has no picture.
    """
    if algo.env.draw is None:
        raise ValueError(f"{algo.env.name} cannot be drawn: it has no draw function")
    key_reset, key_run = jax.random.split(key)
    obs, env_state = algo.env.reset(key_reset)
    step, act = jax.jit(algo.env.step), jax.jit(lambda s, o, m: algo.act(s, o, None, m))
    states, memory = [env_state], None
    for t in range(algo.env.time_limit or MAX_STEPS):
        action, memory = act(state, obs, memory)
        obs, env_state, _, terminated, truncated = step(jax.random.fold_in(key_run, t), env_state, action)
        if terminated | truncated:
            break
        states.append(env_state)
    algo.env.draw(states[:: -(-len(states) // MAX_FRAMES)], path)
    return len(states)
