"""Locomotion of brax: ant, halfcheetah, hopper, humanoid and others, in its own physics."""

from typing import Any, Literal, get_args

import jax
from brax import envs

from jrl.envs.spaces import Box
from jrl.envs.types import Environment
from jrl.envs.wrappers import time_limit
from jrl.numerics import checks
from jrl.numerics.types import EnvState

Array = jax.Array
Backend = Literal["generalized", "positional", "spring", "mjx"]


def names() -> list[str]:
    return sorted(envs._envs)


def make(name: str, backend: Backend = "positional", steps: int = 1000, steps_per_reset: int = 1) -> Environment:
    """An environment of brax, whose episodes are truncated after ``steps``. One first state is drawn for ``steps_per_reset`` steps."""
    checks.one_of("backend", backend, get_args(Backend))
    checks.positive_int("steps", steps)
    env = envs.get_environment(name, backend=backend)

    def reset(key: Array) -> tuple[Any, Any]:
        state = env.reset(key)
        return state.obs, state

    def step(key: Array, state: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        state = env.step(state, action)
        return state.obs, state, state.reward, state.done > 0, jax.numpy.bool_(False)

    space = Box((-1.0,) * env.action_size, (1.0,) * env.action_size)
    made = Environment(name, reset, step, space, first_truncation=steps, steps_per_reset=steps_per_reset)
    return time_limit(made, steps)._replace(settings=())
