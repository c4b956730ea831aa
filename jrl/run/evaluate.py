"""Evaluation apart from training: whole episodes, the same number for every seed, on the same keys."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, State
from jrl.envs import pictures
from jrl.envs.types import Environment
from jrl.numerics.types import Memory, Observation

Array = jax.Array
MAX_STEPS = 10_000  # for environments without a time limit
MAX_FRAMES = {".gif": 100, ".svg": 100, ".mp4": 500}


class Evaluation(NamedTuple):
    """Undiscounted returns and lengths of ``[episodes]``; ``finished`` is false where MAX_STEPS cut an episode."""

    returns: Array
    lengths: Array
    finished: Array


def evaluate(algo: Algorithm, state: State, key: Array, episodes: int, greedy: bool = True) -> Evaluation:
    """One agent in ``episodes`` whole episodes, greedy or sampled. Pure: vmap it over states with one key.

    Every environment plays exactly one episode, so that short episodes are not counted more often than long ones.
    """
    check_one(state)
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

    reset_keys = jax.random.split(key_reset, episodes)
    if env.host:  # agents that are vmapped with one key must not share their simulators
        any_leaf = jnp.ravel(jax.tree.leaves(state)[0])
        reset_keys = jnp.where(any_leaf[0] == any_leaf[0], reset_keys, reset_keys)
    obs, env_state = jax.vmap(env.reset)(reset_keys)
    action, memory = act(obs, jax.random.split(key_first, episodes))
    alive = jnp.ones(episodes, bool)
    start = (jnp.int32(0), env_state, action, memory, alive, jnp.zeros(episodes), jnp.zeros(episodes, jnp.int32))
    end = jax.lax.while_loop(lambda c: jnp.any(c[4]) & (c[0] < limit), play, start)
    if env.host:
        jax.vmap(env.host.release)(end[1])
    return Evaluation(end[5], end[6], ~end[4])


def record(algo: Algorithm, state: State, key: Array, path: str | Path) -> int:
    """Play one greedy episode of one seed and write it as an animation, of at most MAX_FRAMES evenly spaced; returns the episode's length.

    The suffix of ``path`` says as what: ``.mp4``, or what the environment draws, most often ``.gif``.
    Raises ``ValueError`` if the environment has no picture, or none of that kind, or there is no such folder.
    """
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"no such folder: {Path(path).parent}")
    check_one(state)
    env, suffix = algo.env, Path(path).suffix
    check_drawn(env, suffix)
    render = env.host.render if env.host else None
    key_reset, key_run = jax.random.split(key)
    obs, env_state = env.reset(key_reset)
    step, act = jax.jit(env.step), jax.jit(lambda s, o, m: algo.act(s, o, None, m))
    shown, memory = [render(env_state) if render else env_state], None
    for t in range(env.time_limit or MAX_STEPS):
        action, memory = act(state, obs, memory)
        obs, env_state, _, terminated, truncated = step(jax.random.fold_in(key_run, t), env_state, action)
        if terminated | truncated:
            break
        shown.append(render(env_state) if render else env_state)
    if env.host:
        env.host.release(env_state)
    frames = shown[:: -(-len(shown) // MAX_FRAMES[suffix])]
    assert env.draw is not None
    if suffix == env.drawn_as or render:
        env.draw(frames, str(path))
    else:
        with tempfile.TemporaryDirectory() as folder:
            env.draw(frames, f"{folder}/policy.gif")
            pictures.animate(pictures.frames_of(f"{folder}/policy.gif"), str(path))
    return len(shown)


def check_one(state: State) -> None:
    """Raise ``ValueError`` for a state whose hyperparameters are not single numbers: it is not of one seed."""
    if any(jnp.ndim(x) for x in jax.tree.leaves(getattr(state, "hyper", ()))):
        raise ValueError("the state must be of one seed, as loaded.member() gives it; got one with leading axes")


def check_drawn(env: Environment, suffix: str) -> None:
    """Raise ``ValueError`` unless an environment can be drawn into a file with this suffix."""
    if env.draw is None:
        raise ValueError(f"{env.name} cannot be drawn: it has no draw function")
    kinds = (".gif", ".mp4") if env.drawn_as == ".gif" else (env.drawn_as,)
    if suffix not in kinds:
        raise ValueError(f"{env.name} is drawn into files {' or '.join(kinds)}; got {suffix or 'no suffix'}")
