"""Actor-critic networks: a torso, an optional GRU, and heads for policy and value."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jrl.distributions import MASKED, NormalParams
from jrl.envs.types import Box, Discrete, MultiDiscrete, Space
from jrl.nets.initializers import orthogonal
from jrl.nets.torso import (
    Features,
    TorsoConfig,
    as_network,
    empty_memory,
    observation_shape,
    remember,
    split_mask,
    wide_dot,
)
from jrl.nets.types import Network, Outputs

Array = jax.Array


@dataclass(frozen=True)
class Config(TorsoConfig):
    """Shape of an actor-critic network.

    Attributes:
        torso: mlp flattens the observation; conv and vit (a vision transformer) expect ``[height, width, channels]``; auto
            takes conv for such observations, else mlp.
        hidden: widths of the dense layers (for conv and vit, those after it).
        channels: widths of the 3x3 convolutions.
        patch: height and width of vit's patches; observations are padded with zeros to whole ones.
        vit_dim: width of vit.
        vit_layers: layers of vit.
        vit_heads: heads of vit.
        activation: between layers.
        norm: layer normalization before each activation, or none.
        gru: width of a GRU after the torso; 0 for none.
        attention: a transformer over the episode so far, after the torso.
        shared: one torso for policy and value instead of two.
        log_std: initial log standard deviation of continuous policies, a parameter independent of the observation.
    """

    shared: bool = False
    log_std: float = 0.0


def actor_critic(config: Config, obs_spec: Any, space: Space) -> Network:
    """A network for observations of ``obs_spec`` (one unbatched observation) and actions of ``space``.

    Raises ``ValueError`` if a conv torso is asked for observations that are not ``[height, width, channels]``.
    """
    shape = observation_shape(config, obs_spec)
    module = ActorCritic(config, len(shape), space)
    towers = 1 if config.shared else 2
    memory = tuple(empty_memory(config) for _ in range(towers)) if config.remembers else ()
    return as_network(module, config, obs_spec, memory)


class ActorCritic(nn.Module):
    """``(memory of each tower [B] or (), obs [T, B], first [T, B]) -> (memories, Outputs [T, B])``."""

    config: Config
    obs_rank: int
    space: Space

    @nn.compact
    def __call__(self, memory: Any, obs: Any, first: Array) -> tuple[Any, Outputs]:
        x, mask = split_mask(self, obs)
        names = ["shared"] if self.config.shared else ["actor", "critic"]
        features, memories = [], []
        for i, name in enumerate(names):
            h = Features(self.config, self.obs_rank, name=name)(x)
            later, h = remember(self.config, name, memory[i] if memory else (), h, first)
            memories.append(later)
            features.append(h)
        policy = Policy(self.space, self.config.log_std, name="policy")(features[0], mask)
        value = nn.Dense(1, kernel_init=orthogonal(1.0), dot_general=wide_dot, name="value")(features[-1])[..., 0]
        return tuple(memories) if self.config.remembers else (), Outputs(policy, value)


class Policy(nn.Module):
    """The policy head: logits (masked where an action is illegal) or ``NormalParams``."""

    space: Space
    log_std: float

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Any:
        match self.space:
            case Discrete(n):
                width = n
            case MultiDiscrete(nvec):
                width = sum(nvec)
            case Box(low):
                width = len(low)
        out = nn.Dense(width, kernel_init=orthogonal(0.01), dot_general=wide_dot, name="out")(x)
        if isinstance(self.space, Box):
            log_std = self.param("log_std", nn.initializers.constant(self.log_std), (width,))
            return NormalParams(out, jnp.broadcast_to(log_std, out.shape).astype(out.dtype))
        return out if mask is None else jnp.where(mask, out, max(MASKED, float(jnp.finfo(out.dtype).min)))
