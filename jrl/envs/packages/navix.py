"""Navix: the gridworlds of MiniGrid, such as Navix-DoorKey-8x8-v0."""

from typing import Any

import jax
import jax.numpy as jnp
import navix

from jrl.envs.spaces import Discrete
from jrl.envs.types import Environment
from jrl.numerics import checks
from jrl.numerics.types import EnvState

Array = jax.Array
OBSERVATIONS = (
    "symbolic",
    "symbolic_first_person",
    "categorical",
    "categorical_first_person",
    "rgb",
    "rgb_first_person",
)


def names() -> list[str]:
    return sorted(navix.registry())


def make(name: str, observation: str = "symbolic_first_person", max_steps: int | None = None) -> Environment:
    """A gridworld, whose episodes are truncated after ``max_steps``, or 4 x height x width. Symbols are cell codes divided by 10, float32
    ``[H, W, 3]``; pictures are uint8."""
    checks.one_of("observation", observation, OBSERVATIONS)
    function = getattr(navix.observations, observation)
    env = navix.make(name, observation_fn=function)
    limit = 4 * env.height * env.width if max_steps is None else max_steps
    checks.positive_int("max_steps", limit)
    env = navix.make(name, observation_fn=function, max_steps=limit)

    def observe(timestep: Any) -> Array:
        obs = timestep.observation
        if observation.startswith("rgb"):
            return obs
        return (obs if obs.ndim == 3 else obs[..., None]).astype(jnp.float32) / 10

    def reset(key: Array) -> tuple[Any, Any]:
        timestep = env.reset(key)
        return observe(timestep), timestep

    def step(key: Array, timestep: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        timestep = timestep.replace(state=timestep.state.replace(key=key))
        timestep = env._step(timestep, action)  # ``step`` resets by itself
        return observe(timestep), timestep, timestep.reward, timestep.is_termination(), timestep.is_truncation()

    space = Discrete(int(env.action_space.n))
    return Environment(name, reset, step, space, time_limit=limit, first_truncation=limit)
