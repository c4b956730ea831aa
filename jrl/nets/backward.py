"""A model that goes back in time: which action led to an observation, and from where (Edwards et al. 2018, arXiv 1803.10227)."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jrl.nets.continuous import head
from jrl.nets.torso import TorsoConfig
from jrl.nets.types import outputs
from jrl.numerics.types import Params

Array = jax.Array


class BackwardModel(NamedTuple):
    """Pure functions of the model, of observations ``[N, ...]``, one array each, and choices int32 ``[N]``.

    Attributes:
        init: ``key -> params``.
        losses: ``(params, obs, action, next_obs) -> (float32 [N], float32 [N])``, those of the action and of the observation before.
        imagine: ``(params, goals, keys [L]) -> (obs [L, N, ...], action [L, N], next_obs [L, N, ...])``, trajectories that end in the goals, their
            last step first.
    """

    init: Callable[[Array], Params]
    losses: Callable[[Params, Array, Array, Array], tuple[Array, Array]]
    imagine: Callable[[Params, Array, Array], tuple[Array, Array, Array]]


def backward_model(
    config: TorsoConfig,
    obs_spec: jax.ShapeDtypeStruct,
    num_actions: int,
    predecessor: Literal["difference", "one_hot"] = "difference",
) -> BackwardModel:
    """The model for observations of one array. ``predecessor`` says what it gives of the observation before: the difference to it, or, where
    observations are one-hot, the probabilities of each."""
    action_head = head(config, obs_spec, num_actions, scale=0.01)
    pair = (obs_spec, jax.ShapeDtypeStruct((num_actions,), jnp.float32))
    numbers = math.prod(obs_spec.shape)
    before_head = head(config, pair, numbers, scale=0.01)
    one_hot = predecessor == "one_hot"

    def init(key: Array) -> Params:
        key_action, key_before = jax.random.split(key)
        return {"action": action_head.init(key_action), "before": before_head.init(key_before)}

    def losses(params: Params, obs: Array, action: Array, next_obs: Array) -> tuple[Array, Array]:
        guess = outputs(action_head, params["action"], next_obs)
        action_loss = optax.softmax_cross_entropy_with_integer_labels(guess, action)
        output = before(params, next_obs, action)
        if one_hot:
            return action_loss, optax.softmax_cross_entropy(output, flat(obs))
        return action_loss, 0.5 * jnp.square(output - flat(next_obs - obs)).sum(-1)

    def imagine(params: Params, goals: Array, keys: Array) -> tuple[Array, Array, Array]:
        def back(next_obs: Array, key: Array) -> tuple[Array, tuple[Array, Array, Array]]:
            key_action, key_before = jax.random.split(key)
            action = jax.random.categorical(key_action, outputs(action_head, params["action"], next_obs))
            output = before(params, next_obs, action)
            if one_hot:
                drawn = jax.random.categorical(key_before, output)
                obs = jax.nn.one_hot(drawn, numbers, dtype=output.dtype).reshape(next_obs.shape)
            else:
                obs = next_obs - output.reshape(next_obs.shape)
            return obs, (obs, action.astype(jnp.int32), next_obs)

        return jax.lax.scan(back, goals, keys)[1]

    def flat(x: Array) -> Array:
        return x.reshape(-1, numbers)

    def before(params: Params, next_obs: Array, action: Array) -> Array:
        vector = jax.nn.one_hot(action, num_actions, dtype=jnp.float32)
        return outputs(before_head, params["before"], (next_obs, vector))

    return BackwardModel(init, losses, imagine)
