"""Puzzles, packing and routing of jumanji, where most actions are illegal at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
from jumanji.registration import registered_environments

from jrl.envs.spaces import Box, Discrete, MultiDiscrete, Space
from jrl.envs.types import Environment, MaskedObs
from jrl.envs.wrappers import time_limit
from jrl.numerics.types import EnvState, Observation

Array = jax.Array


def names() -> list[str]:
    return sorted(registered_environments())


def make(name: str, steps: int | None = None) -> Environment:
    """An environment of jumanji for one agent; ``steps`` truncates episodes. Its observation is one array: that of the package if
    there is one beside the mask, else all of them in one vector.

    Raises ``ValueError`` for environments of several agents, whose actions are learned by none of our algorithms.
    """
    env: Any = jumanji.make(name)
    space = _space(env.action_spec)

    def reset(key: Array) -> tuple[Any, Any]:
        state, timestep = env.reset(key)
        return observe(timestep.observation, space), state

    def step(key: Array, state: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        state, timestep = env.step(state, action)
        ended, lasts = timestep.last(), timestep.discount > 0
        return observe(timestep.observation, space), state, timestep.reward, ended & ~lasts, ended & lasts

    reward = jax.eval_shape(lambda key: env.reset(key)[1].reward, jax.eval_shape(jax.random.key, 0))
    if reward.shape:
        raise ValueError(f"jumanji/{name} is for several agents: its reward has shape {list(reward.shape)}")

    def draw(states: list[Any], path: str) -> None:
        env.animate(states, save_path=path)

    made = Environment(name, reset, step, space, getattr(env, "time_limit", None), draw=draw)
    return made if steps is None else time_limit(made, steps)._replace(settings=())


def observe(obs: Any, space: Space) -> Observation:
    """Everything but the mask as one array, and the mask as one vector where it is one over the actions of ``space``."""
    fields = obs._asdict() if hasattr(obs, "_asdict") else dict(vars(obs)) if hasattr(obs, "__dict__") else {"": obs}
    mask = fields.pop("action_mask", None)
    leaves = jax.tree.leaves(fields)
    one = leaves[0] if len(leaves) == 1 else jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in leaves])
    one = one.astype(jnp.float32) if jnp.issubdtype(one.dtype, jnp.integer) else one
    one = one.ravel() if one.ndim == 2 else one
    wanted = {Discrete: lambda: space.n, MultiDiscrete: lambda: sum(space.nvec)}.get(type(space), lambda: None)()  # type: ignore[union-attr]
    return MaskedObs(one, mask.ravel()) if mask is not None and mask.size == wanted else one


def _space(spec: Any) -> Space:
    if hasattr(spec, "num_values"):
        count = np.asarray(spec.num_values)
        return Discrete(int(count)) if not count.ndim else MultiDiscrete(tuple(count.ravel().tolist()))
    low, high = (np.broadcast_to(np.asarray(x, float), spec.shape).ravel() for x in (spec.minimum, spec.maximum))
    return Box(tuple(low.tolist()), tuple(high.tolist()))
