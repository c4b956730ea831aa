"""Acting on the action values of a network, as PQN, R2D2 and EBU do: epsilon-greedily, or greedily where no key is given."""

from collections.abc import Callable
from typing import Any

import jax

from jrl import nets
from jrl.algorithm import exploration
from jrl.experience import normalize
from jrl.experience.greedy import choose, epsilon_greedy, mask
from jrl.numerics import optim
from jrl.numerics.types import Memory, Observation

Array = jax.Array


def actor(network: nets.Network, state: Any) -> Callable[[Memory, Observation, Array, Any], tuple[Any, Array, Any]]:
    """What ``rollout.collect`` acts by: ``(memory, obs [B], first [B], noise) -> (memory, action [B], action)``."""
    epsilon = exploration(state)

    def act(memory: Memory, obs: Observation, first: Array, noise: tuple[Array, Array]) -> tuple[Any, Array, Any]:
        next_memory, q = network.step(state.params, memory, normalize.observations(state.obs_stats, obs), first)
        action = epsilon_greedy(mask(q, obs), epsilon, noise)
        return next_memory, action, action

    return act


def act(
    network: nets.Network, state: Any, obs: Observation, key: Array | None = None, memory: Memory = None
) -> tuple[Array, Any]:
    """The ``act`` of an ``Algorithm``, after the network."""
    params = optim.eval_params(state.opt_state, state.params)
    next_memory, q = nets.step_one(network, params, normalize.observations(state.obs_stats, obs), memory)
    return choose(mask(q, obs), exploration(state), key), next_memory
