"""Craftax and Craftax-Classic: an open world in which achievements are rewarded. Worlds are costly to make."""

from typing import Any

import jax
from craftax.craftax_env import make_craftax_env_from_name

from jrl.envs.spaces import Discrete
from jrl.envs.types import Environment
from jrl.numerics import checks
from jrl.numerics.types import EnvState

Array = jax.Array


def names() -> list[str]:
    return [f"Craftax-{kind}-v1" for kind in ("Symbolic", "Pixels", "Classic-Symbolic", "Classic-Pixels")]


def make(name: str, max_timesteps: int | None = None, steps_per_reset: int = 16) -> Environment:
    """A world, whose episodes are truncated after ``max_timesteps`` (100,000, of Classic 10,000, if not given). One new world is made for
    ``steps_per_reset`` steps."""
    env = make_craftax_env_from_name(name, auto_reset=False)
    params = env.default_params
    limit = params.max_timesteps if max_timesteps is None else max_timesteps
    checks.positive_int("max_timesteps", limit)
    ends = params.replace(max_timesteps=limit)
    endless = params.replace(max_timesteps=2**30)  # to see what else ends an episode

    def reset(key: Array) -> tuple[Any, Any]:
        return env.reset_env(key, ends)

    def step(key: Array, state: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        obs, state, reward, _, _ = env.step_env(key, state, action, ends)
        return obs, state, reward, env.is_terminal(state, endless), state.timestep >= limit

    return Environment(
        name,
        reset,
        step,
        Discrete(env.num_actions),
        time_limit=limit,
        first_truncation=limit,
        steps_per_reset=steps_per_reset,
    )
