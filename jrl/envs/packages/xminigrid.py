"""XLand-MiniGrid: gridworlds with rules, and those of MiniGrid."""

from typing import Any

import jax
import jax.numpy as jnp
import xminigrid

from jrl.envs.spaces import Discrete
from jrl.envs.types import Environment
from jrl.numerics import checks
from jrl.numerics.types import EnvState

Array = jax.Array


def names() -> list[str]:
    return sorted(xminigrid.registered_environments())


def make(name: str, max_steps: int | None = None, view_size: int | None = None) -> Environment:
    """A gridworld, whose episodes are truncated after ``max_steps`` (the package's number if not given), seen in a square of ``view_size``
    before the agent: codes of tile and colour of each cell divided by 10, float32 ``[view_size, view_size, 2]``."""
    given = {"max_steps": max_steps, "view_size": view_size}
    for field, value in given.items():
        if value is not None:
            checks.positive_int(field, value)
    if view_size is not None and view_size % 2 == 0:
        raise ValueError(f"view_size must be odd, with the agent in the middle; got {view_size}")
    env: Any
    params: Any
    env, params = xminigrid.make(name, **{field: value for field, value in given.items() if value is not None})

    def reset(key: Array) -> tuple[Any, Any]:
        timestep = env.reset(params, key)
        return timestep.observation.astype(jnp.float32) / 10, timestep

    def step(key: Array, timestep: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        timestep = env.step(params, timestep, action)
        ended, lasts = timestep.last(), timestep.discount > 0
        return timestep.observation.astype(jnp.float32) / 10, timestep, timestep.reward, ended & ~lasts, ended & lasts

    limit = int(params.max_steps)
    return Environment(name, reset, step, Discrete(env.num_actions(params)), time_limit=limit, first_truncation=limit)
