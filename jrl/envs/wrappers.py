"""Environments from environments. (Normalization of observations and rewards is in ``jrl.experience.normalize``: its statistics
belong to the learner's state, since they must stand still within an update.)"""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import user_file
from jrl.envs.spaces import counts, to_vector
from jrl.envs.types import Environment, MaskedObs, example_action, observation_spec, with_settings
from jrl.numerics import checks
from jrl.numerics.types import EnvState, Observation

Array = jax.Array


class Limited(NamedTuple):
    """The state of an environment whose episodes are truncated."""

    state: EnvState
    time: Array  # int32: steps of the episode so far


def time_limit(env: Environment, steps: int) -> Environment:
    """Truncate episodes after ``steps`` steps. Raises ``ValueError`` unless that is an integer of at least 1."""
    checks.positive_int("time_limit: steps", steps)

    def reset(key: Array) -> tuple[Any, Any]:
        obs, state = env.reset(key)
        return obs, Limited(state, jnp.int32(0))

    def step(key: Array, state: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        inner, t = state
        obs, inner, reward, terminated, truncated = env.step(key, inner, action)
        return obs, Limited(inner, t + 1), reward, terminated, truncated | (t + 1 >= steps)

    limit = steps if env.time_limit is None else min(steps, env.time_limit)
    first = None if env.first_truncation is None else min(steps, env.first_truncation)
    return wrapped_as(
        env, "time_limit", {"steps": steps}, reset=reset, step=step, time_limit=limit, first_truncation=first
    )


def sticky_actions(env: Environment, probability: float = 0.25) -> Environment:
    """Repeat the previous action with ``probability`` at each step (Machado et al. 2018, arXiv 1709.06009, section 5.2).

    The first action of an episode is never replaced. Raises ``ValueError`` for a probability outside 0 to 1.
    """
    checks.within("sticky_actions: probability", probability, 0, 1)

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

    return wrapped_as(env, "sticky_actions", {"probability": probability}, reset=reset, step=step)


def shared_resets(env: Environment, steps: int = 16) -> Environment:
    """Draw one fresh first state for ``steps`` steps of each environment, where resetting costs much more than stepping.

    If two episodes of an environment end within these steps, both are followed by the same first state.
    """
    checks.positive_int("shared_resets: steps", steps)
    return wrapped_as(env, "shared_resets", {"steps": steps}, same_state=True, steps_per_reset=steps)


def frame_stack(env: Environment, num_frames: int = 4) -> Environment:
    """Stack the last ``num_frames`` observations along the last axis, oldest first; the first one is repeated at reset.

    DQN's ``config.num_frames`` stacks by itself, and its replay stores each frame once.
    Raises ``ValueError`` for observations that are not one array.
    """
    checks.positive_int("frame_stack: num_frames", num_frames)
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

    return wrapped_as(env, "frame_stack", {"num_frames": num_frames}, reset=reset, step=step)


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

    return wrapped_as(env, "time_feature", {}, reset=reset, step=step)


def shaped(env: Environment, potential: Callable[[Observation], Array], gamma: float) -> Environment:
    """Add ``gamma Phi(x') - Phi(x)`` to the reward, for a potential ``Phi``: ``observation -> float32 []`` (Ng, Harada and Russell 1999).

    With the agent's ``gamma`` the optimal policies stay the same: ``Phi`` counts as 0 where an episode terminates, and as itself
    where it is truncated. Returns in training and evaluation are those of the shaped reward.
    """
    checks.within("shaped: gamma", gamma, 0, 1)
    checks.function("shaped: potential", potential)

    def of(obs: Observation) -> Array:
        return jnp.reshape(potential(obs), ()).astype(jnp.float32)

    def reset(key: Array) -> tuple[Any, Any]:
        obs, state = env.reset(key)
        return obs, (state, of(obs))

    def step(key: Array, state: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        inner, before = state
        obs, inner, reward, terminated, truncated = env.step(key, inner, action)
        after = of(obs)
        bonus = gamma * jnp.where(terminated, 0.0, after) - before
        return obs, (inner, after), reward + bonus, terminated, truncated

    settings = {"potential": getattr(potential, "__name__", "function"), "gamma": gamma}
    return wrapped_as(env, "shaped", settings, reset=reset, step=step)


def goal_reward(env: Environment) -> Environment:
    """Reward 1 where an episode terminates and 0 elsewhere, as where nothing but arriving counts (MountainCar's goal)."""
    return _rewarded(env, "goal_reward", {}, lambda reward, terminated: terminated)


def reward_above(env: Environment, threshold: float) -> Environment:
    """Reward 1 where the reward is above ``threshold`` and 0 elsewhere, so that a dense reward becomes a sparse one (Pendulum's above -0.5)."""
    checks.within("reward_above: threshold", threshold, -1e30, 1e30)
    return _rewarded(env, "reward_above", {"threshold": threshold}, lambda reward, terminated: reward > threshold)


def _rewarded(
    env: Environment, name: str, settings: dict[str, Any], reward_of: Callable[[Array, Array], Array]
) -> Environment:
    """The environment with the reward ``reward_of(reward, terminated)``."""

    def step(key: Array, state: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        obs, state, reward, terminated, truncated = env.step(key, state, action)
        return obs, state, jnp.asarray(reward_of(reward, terminated), jnp.float32), terminated, truncated

    return wrapped_as(env, name, settings, same_state=True, step=step)


def previous(env: Environment) -> Environment:
    """Show the previous action, one-hot where it is a choice, and the previous reward beside the observation, as recurrent agents are given them
    (Wang et al. 2016, arXiv 1611.05763; R2D2). At the beginning of an episode both are 0.

    They are appended to an observation that is a vector, also beside a mask; any other becomes a dictionary of ``obs`` and ``previous``.
    """
    width = sum(counts(env.action_space))

    def add(obs: Observation, before: Array) -> Any:
        if isinstance(obs, MaskedObs):
            return obs._replace(obs=add(obs.obs, before))
        if isinstance(obs, Array) and obs.ndim == 1:
            return jnp.concatenate([obs.astype(jnp.float32), before])
        return {"obs": obs, "previous": before}

    def reset(key: Array) -> tuple[Any, Any]:
        obs, state = env.reset(key)
        return add(obs, jnp.zeros(width + 1, jnp.float32)), (state,)

    def step(key: Array, state: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        obs, inner, reward, terminated, truncated = env.step(key, state[0], action)
        before = jnp.concatenate([to_vector(env.action_space, action), jnp.reshape(reward, 1)])
        return add(obs, before), (inner,), reward, terminated, truncated

    return wrapped_as(env, "previous", {}, reset=reset, step=step)


NAMED: dict[str, Callable[..., Environment]] = {
    wrapper.__name__: wrapper
    for wrapper in (
        time_limit,
        sticky_actions,
        shared_resets,
        frame_stack,
        time_feature,
        goal_reward,
        reward_above,
        previous,
    )
}


def wrapped(env: Environment, words: Sequence[str]) -> Environment:
    """The environment in wrappers by name, the first innermost: ``previous``, ``time_limit=200``, or as a run records them,
    ``time_limit(steps=200)``. Raises ``ValueError`` for an unknown one, or a value that it does not take."""
    for word in words:
        parts = re.fullmatch(r"(\w+)(?:=(.+)|\((?:\w+=)?([^,()]*)\))?", word)
        name = parts[1] if parts else word
        if parts is None or name not in NAMED:
            raise ValueError(f"unknown wrapper {word!r}; {checks.suggestion(name, list(NAMED))}")
        value = parts[2] or parts[3]
        given = {} if not value else {_parameter(name): _number(word, value)}
        env = user_file.call(name, functools.partial(NAMED[name], env), given)
    return env


def _parameter(name: str) -> str:
    """The parameter of a wrapper."""
    parameters = list(inspect.signature(NAMED[name]).parameters)[1:]
    if not parameters:
        raise ValueError(f"the wrapper {name} takes no value")
    return parameters[0]


def _number(word: str, text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the value of a wrapper must be a number; got {word!r}") from None


def _merge(frames: Array) -> Array:
    return jnp.concatenate(list(jnp.atleast_1d(frames)), axis=-1) if frames.ndim > 1 else frames


def wrapped_as(
    env: Environment, name: str, settings: dict[str, Any], same_state: bool = False, **changed: Any
) -> Environment:
    """The environment with other functions, whose states hold the inner state first unless they are the ``same_state``; the wrapper is put
    on record. Raises ``ValueError`` for an environment on the host, whose simulators would not know."""
    if env.host:
        raise ValueError(
            f"{name}: {env.name} lives on the host and begins its episodes itself: wrap its simulators, as gymnasium does"
        )

    def draw(states: list[Any], path: str) -> None:
        assert env.draw is not None
        env.draw([state[0] for state in states], path)

    listed = ", ".join(f"{field}={value}" for field, value in settings.items())
    wrappers = (*dict(env.settings).get("wrappers", ()), f"{name}({listed})")
    drawn = draw if env.draw and not same_state else env.draw
    return with_settings(env._replace(**changed, draw=drawn), {"wrappers": wrappers})
