"""Environments from environments. (Normalization of observations and rewards is in ``jrl.experience.normalize``: its statistics
belong to the learner's state, since they must stand still within an update.)"""

from typing import Any

import jax
import jax.numpy as jnp

from jrl.envs.types import Environment, MaskedObs, example_action, observation_spec, with_settings
from jrl.numerics import checks
from jrl.numerics.types import EnvState, Observation

Array = jax.Array


def time_limit(env: Environment, steps: int) -> Environment:
    """Truncate episodes after ``steps`` steps. Raises ``ValueError`` unless that is an integer of at least 1."""
    checks.positive_int("time_limit: steps", steps)

    def reset(key: Array) -> tuple[Any, Any]:
        obs, state = env.reset(key)
        return obs, (state, jnp.int32(0))

    def step(key: Array, state: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        inner, t = state
        obs, inner, reward, terminated, truncated = env.step(key, inner, action)
        return obs, (inner, t + 1), reward, terminated, truncated | (t + 1 >= steps)

    limit = steps if env.time_limit is None else min(steps, env.time_limit)
    first = None if env.first_truncation is None else min(steps, env.first_truncation)
    return _wrapped(
        env, "time_limit", {"steps": steps}, reset=reset, step=step, time_limit=limit, first_truncation=first
    )


def sticky_actions(env: Environment, probability: float = 0.25) -> Environment:
    """Repeat the previous action with ``probability`` at each step (Machado et al. 2018, arXiv 1709.06009, section 5.2).

    The first action of an episode is never replaced.
    """

    def reset(key: Array) -> tuple[Any, Any]:
        obs, state = env.reset(key)
        return obs, (state, example_action(env.action_space), jnp.bool_(True))

    def step(key: Array, state: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        inner, previous, first = state
        key_stick, key_step = jax.random.split(key)
        stick = jax.random.bernoulli(key_stick, probability) & ~first
        action = jnp.where(stick, previous, action)
        obs, inner, reward, terminated, truncated = env.step(key_step, inner, action)
        return obs, (inner, action, jnp.bool_(False)), reward, terminated, truncated

    return _wrapped(env, "sticky_actions", {"probability": probability}, reset=reset, step=step)


def shared_resets(env: Environment, steps: int = 16) -> Environment:
    """Draw one fresh first state for ``steps`` steps of each environment, where resetting costs much more than stepping.

    If two episodes of an environment end within these steps, both are followed by the same first state.
    """
    checks.positive_int("shared_resets: steps", steps)
    return _wrapped(env, "shared_resets", {"steps": steps}, same_state=True, steps_per_reset=steps)


def frame_stack(env: Environment, num_frames: int = 4) -> Environment:
    """Stack the last ``num_frames`` observations along the last axis, oldest first; the first one is repeated at reset.

    DQN's ``config.num_frames`` stacks by itself, and its replay stores each frame once.
    Raises ``ValueError`` for observations that are not one array.
    """
    if len(jax.tree.leaves(observation_spec(env))) != 1:
        raise ValueError(f"frame_stack: observations must be one array; {env.name} has {observation_spec(env)}")

    def reset(key: Array) -> tuple[Any, Any]:
        obs, state = env.reset(key)
        frames = jnp.stack([obs] * num_frames)
        return _merge(frames), (state, frames)

    def step(key: Array, state: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        inner, frames = state
        obs, inner, reward, terminated, truncated = env.step(key, inner, action)
        frames = jnp.concatenate([frames[1:], obs[None]])
        return _merge(frames), (inner, frames), reward, terminated, truncated

    return _wrapped(env, "frame_stack", {"num_frames": num_frames}, reset=reset, step=step)


def time_feature(env: Environment) -> Environment:
    """Append the share of the time limit that has passed to a vector observation (Pardo et al. 2018, arXiv 1712.00378, sec. 3).

    Raises ``ValueError`` if the environment has no time limit.
    """
    if env.time_limit is None:
        raise ValueError(f"time_feature: {env.name} has no time limit; wrap it in time_limit first")
    limit = env.time_limit

    def add(obs: Observation, t: Array) -> Any:
        if isinstance(obs, MaskedObs):
            return obs._replace(obs=add(obs.obs, t))
        return jnp.concatenate([obs.astype(jnp.float32).ravel(), (t / limit).astype(jnp.float32)[None]])

    def reset(key: Array) -> tuple[Any, Any]:
        obs, state = env.reset(key)
        return add(obs, jnp.int32(0)), (state, jnp.int32(0))

    def step(key: Array, state: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        inner, t = state
        obs, inner, reward, terminated, truncated = env.step(key, inner, action)
        return add(obs, t + 1), (inner, t + 1), reward, terminated, truncated

    return _wrapped(env, "time_feature", {}, reset=reset, step=step)


def _merge(frames: Array) -> Array:
    return jnp.concatenate(list(jnp.atleast_1d(frames)), axis=-1) if frames.ndim > 1 else frames


def _wrapped(
    env: Environment, name: str, settings: dict[str, Any], same_state: bool = False, **changed: Any
) -> Environment:
    """The environment with other functions, whose states hold the inner state first unless they are the ``same_state``; the wrapper is put
    on record."""

    def draw(states: list[Any], path: str) -> None:
        assert env.draw is not None
        env.draw([state[0] for state in states], path)

    listed = ", ".join(f"{field}={value}" for field, value in settings.items())
    wrappers = (*dict(env.settings).get("wrappers", ()), f"{name}({listed})")
    drawn = draw if env.draw and not same_state else env.draw
    return with_settings(env._replace(**changed, draw=drawn), {"wrappers": wrappers})
