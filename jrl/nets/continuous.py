"""Networks that learn from single transitions: numbers for an observation, and critics of observation and action."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jrl.nets.initializers import orthogonal
from jrl.nets.torso import (
    Activation,
    Features,
    Shapes,
    TorsoConfig,
    as_network,
    observation_shapes,
    split_mask,
    wide_dot,
)
from jrl.nets.types import Network
from jrl.numerics.settings import Positive
from jrl.numerics.types import Memory, Observation

Array = jax.Array


@dataclass(frozen=True)
class ContinuousConfig(TorsoConfig):
    """Shape of the policy and of each critic."""

    hidden: tuple[Positive, ...] = (256, 256)  # Widths of the dense layers (for images, of those after them).
    activation: Activation = "relu"  # Activation between layers.


def head(config: TorsoConfig, obs_spec: Any, width: int, scale: float) -> Network:
    """A network of ``width`` numbers for an observation, float32 ``[..., width]``, the last layer orthogonal times ``scale`` at first.

    Raises ``ValueError`` for one with a memory.
    """
    _refuse_memory(config)
    shapes = observation_shapes(config, obs_spec)
    return as_network(Heads(config, shapes, width, scale), config, obs_spec, ())


def critics(config: TorsoConfig, obs_spec: Any, num_actions: int, number: int) -> Network:
    """Critics that share nothing, whose observation is a pair of the environment's and an action float32 ``[..., num_actions]``: values
    float32 ``[..., number]``. Raises ``ValueError`` for a network with a memory."""
    _refuse_memory(config)
    both = (obs_spec, jax.ShapeDtypeStruct((num_actions,), jnp.float32))
    shapes = observation_shapes(config, both)
    return as_network(Heads(config, shapes, 1, scale=1.0, towers=number), config, both, ())


def _refuse_memory(config: TorsoConfig) -> None:
    if config.remembers:
        raise ValueError("network.gru, lstm and attention: what is learned from single transitions has no memory")


class Heads(nn.Module):
    """``((), obs [T, B], first [T, B]) -> ((), [T, B, towers * width])``: a torso and a head for each tower."""

    config: TorsoConfig
    shapes: Shapes
    width: int
    scale: float
    towers: int = 1

    @nn.compact
    def __call__(self, memory: Memory, obs: Observation, first: Array) -> tuple[Any, Array]:
        arrays, _ = split_mask(self, obs, self.shapes)
        outputs = []
        for i in range(self.towers):
            x = Features(self.config, self.shapes, name=f"torso_{i}")(arrays)
            head = nn.Dense(self.width, kernel_init=orthogonal(self.scale), dot_general=wide_dot, name=f"head_{i}")
            outputs.append(head(x))
        return (), jnp.concatenate(outputs, axis=-1)
