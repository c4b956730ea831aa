"""MuJoCo Playground: control and locomotion in MuJoCo's own physics on an accelerator (MJX), such as CheetahRun."""

from typing import Any, Literal, get_args

import jax
from mujoco_playground import registry

from jrl.envs.spaces import Box
from jrl.envs.types import Environment
from jrl.envs.wrappers import time_limit
from jrl.numerics import checks
from jrl.numerics.types import EnvState, Observation

Array = jax.Array
Physics = Literal["jax", "warp"]


def names() -> list[str]:
    return sorted(registry.ALL_ENVS)


def make(name: str, impl: Physics = "jax", steps: int | None = None, steps_per_reset: int = 16) -> Environment:
    """An environment of MuJoCo Playground, whose episodes are truncated after ``steps``, or the package's number. Where observations are
    told apart, the agent is given the one named ``state``. One first state is drawn for ``steps_per_reset`` steps.

    Robots' models are fetched from the internet when they are made for the first time; those of the control suite come with the package.
    """
    checks.one_of("impl", impl, get_args(Physics))
    limit = int(registry.get_default_config(name).episode_length) if steps is None else steps
    checks.positive_int("steps", limit)
    env: Any = registry.load(name, config_overrides={"impl": impl})

    def observe(obs: Any) -> Observation:
        return obs["state"] if isinstance(obs, dict) else obs

    def reset(key: Array) -> tuple[Any, Any]:
        state = env.reset(key)
        return observe(state.obs), state

    def step(key: Array, state: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        state = env.step(state, action)
        return observe(state.obs), state, state.reward, state.done > 0, jax.numpy.bool_(False)

    space = Box((-1.0,) * env.action_size, (1.0,) * env.action_size)
    made = Environment(name, reset, step, space, first_truncation=limit, steps_per_reset=steps_per_reset)
    return time_limit(made, limit)._replace(settings=())
