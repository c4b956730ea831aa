"""The intrinsic curiosity module (Pathak et al. 2017, arXiv 1705.05363).

    inverse model    L_I = -log p( a | phi(x), phi(x') )                    (eq. 2)
    forward model    L_F = 1/2 || f(phi(x), a) - phi(x') ||^2               (eq. 5)
    bonus            L_F                                                    (eq. 6)
    loss             (1 - beta) L_I + beta L_F                              (eq. 7)

The features phi tell what the agent's actions change, since the inverse model must read the action from them. As in the authors' later code
(Burda et al. 2018, arXiv 1808.04355) they learn from the inverse model alone, since the forward model could make them all the same, and are
standardized, each vector of features by its own mean and deviation, since they could grow without bound and the bonus with them.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import nn

from jrl import nets
from jrl.envs.spaces import Box, Discrete, Space, counts, to_vector
from jrl.equations import distributions
from jrl.equations.exploration import curiosity_loss, forward_error
from jrl.intrinsic.settings import Config
from jrl.intrinsic.types import Intrinsic, Transitions
from jrl.numerics.types import Memory, Params

Array = jax.Array


def make(config: Config, obs_spec: Any, action_space: Space) -> Intrinsic:
    """The bonus for observations of ``obs_spec`` and actions of ``action_space``."""
    width = sum(counts(action_space))
    vector, action_spec = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (config.features, width))
    dense = replace(config.network, torso="mlp")
    encoder = nets.head(config.network, obs_spec, config.features, scale=1.0)
    inverse = nets.head(dense, (vector, vector), width, scale=0.01)
    forward = nets.head(dense, (vector, action_spec), config.features, scale=1.0)

    def init(key: Array) -> tuple[Params, Memory]:
        keys = jax.random.split(key, 3)
        return {
            "encoder": encoder.init(keys[0]),
            "inverse": inverse.init(keys[1]),
            "forward": forward.init(keys[2]),
        }, ()

    def observe(memory: Memory, transitions: Transitions) -> Memory:
        return memory

    def features(params: Params, transitions: Transitions) -> tuple[Array, Array]:
        phi, next_phi = (nets.outputs(encoder, params["encoder"], x) for x in (transitions.obs, transitions.next_obs))
        return nn.standardize(phi, axis=-1), nn.standardize(next_phi, axis=-1)

    def forward_loss(params: Params, phi: Array, action: Array, next_phi: Array) -> Array:
        prediction = nets.outputs(
            forward, params["forward"], (jax.lax.stop_gradient(phi), to_vector(action_space, action))
        )
        return forward_error(prediction, next_phi)

    def bonus(params: Params, memory: Memory, transitions: Transitions) -> Array:
        phi, next_phi = features(params, transitions)
        return forward_loss(params, phi, transitions.action, next_phi)

    def loss(params: Params, memory: Memory, transitions: Transitions, hyper: Any) -> Array:
        phi, next_phi = features(params, transitions)
        guess = nets.outputs(inverse, params["inverse"], (phi, next_phi))
        inverse_loss = action_error(action_space, guess, transitions.action)
        forward = forward_loss(params, phi, transitions.action, next_phi)
        return curiosity_loss(inverse_loss, forward, hyper.forward_share)

    return Intrinsic(init, observe, bonus, loss)


def action_error(space: Space, guess: Array, action: Array) -> Array:
    """What the inverse model's guess ``[N, width]`` costs: the negative log-likelihood of choices, half the squared error of real numbers."""
    if isinstance(space, Box):
        return 0.5 * jnp.sum(jnp.square(guess - action), -1)
    if isinstance(space, Discrete):
        return -distributions.categorical(space.n).log_prob(guess, action)
    return -distributions.multi_categorical(space.nvec).log_prob(guess, action)
