"""Puzzles, packing and routing of jumanji, where most actions are illegal at a time."""

import math
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
TEAMS = ("Connector", "LevelBasedForaging", "MultiCVRP", "SearchAndRescue")  # of several agents


def names() -> list[str]:
    return sorted(name for name in registered_environments() if name.rpartition("-")[0] not in TEAMS)


def make(name: str, steps: int | None = None) -> Environment:
    """An environment of jumanji; ``steps`` truncates episodes. Where one mask is over all combinations of several choices, the action is one
    number for the combination. The observation is one array: that of the package if there is one beside the mask, else all of them
    in one vector.
    """
    env: Any = jumanji.make(name)
    state, timestep = jax.eval_shape(env.reset, jax.eval_shape(jax.random.key, 0))
    space, joint = _space(env.action_spec), ()
    mask = _fields(timestep.observation).get("action_mask")
    if isinstance(space, MultiDiscrete) and mask is not None and mask.size == math.prod(space.nvec):
        joint, space = space.nvec, Discrete(mask.size)
    limit = getattr(env, "time_limit", None)
    clock = limit is not None and hasattr(state, "step_count")

    def reset(key: Array) -> tuple[Any, Any]:
        state, timestep = env.reset(key)
        return observe(timestep.observation, space), state

    def step(key: Array, state: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        if joint:
            action = jnp.stack(jnp.unravel_index(action, joint)).astype(jnp.int32)
        state, timestep = env.step(state, action)
        # Some of these environments give a discount of 0 when the clock runs out.
        late = (timestep.discount > 0) | (state.step_count >= limit if clock else False)
        ended = timestep.last()
        return observe(timestep.observation, space), state, timestep.reward, ended & ~late, ended & late

    def draw(states: list[Any], path: str) -> None:
        env.animate(states, save_path=path)

    made = Environment(name, reset, step, space, limit, draw=draw)
    return made if steps is None else time_limit(made, steps)._replace(settings=())


def observe(obs: Any, space: Space) -> Observation:
    """Everything but the mask as one array, and the mask as one vector where it is one over the actions of ``space``."""
    fields = _fields(obs)
    mask = fields.pop("action_mask", None)
    leaves = jax.tree.leaves(fields)
    one = leaves[0] if len(leaves) == 1 else jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in leaves])
    one = one.astype(jnp.float32) if jnp.issubdtype(one.dtype, jnp.integer) else one
    one = one.ravel() if one.ndim == 2 else one
    counts = (space.n,) if isinstance(space, Discrete) else space.nvec if isinstance(space, MultiDiscrete) else ()
    return MaskedObs(one, mask.ravel()) if mask is not None and mask.size == sum(counts) else one


def _fields(obs: Any) -> dict[str, Any]:
    """The arrays of an observation by name."""
    if hasattr(obs, "_asdict"):
        return dict(obs._asdict())
    return dict(vars(obs)) if hasattr(obs, "__dict__") and not hasattr(obs, "shape") else {"": obs}


def _space(spec: Any) -> Space:
    if hasattr(spec, "num_values"):
        count = np.asarray(spec.num_values)
        return Discrete(int(count)) if not count.ndim else MultiDiscrete(tuple(count.ravel().tolist()))
    low, high = (np.broadcast_to(np.asarray(x, float), spec.shape).ravel() for x in (spec.minimum, spec.maximum))
    return Box(tuple(low.tolist()), tuple(high.tolist()))
