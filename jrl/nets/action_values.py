"""Networks that value actions: a torso, an optional GRU, and a head for every action, dueling or not."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jrl.envs.types import Discrete, Space
from jrl.nets.initializers import orthogonal
from jrl.nets.torso import (
    Activation,
    Features,
    Norm,
    Recurrent,
    TorsoConfig,
    as_network,
    observation_shape,
    split_mask,
    wide_dot,
)
from jrl.nets.types import Network

Array = jax.Array


@dataclass(frozen=True)
class ValueConfig(TorsoConfig):
    """Shape of a network of action values.

    Attributes:
        torso: mlp flattens the observation; conv expects ``[height, width, channels]``; auto takes conv for such
            observations, else mlp.
        hidden: widths of the dense layers (for conv, those after the convolution).
        channels: widths of the 3x3 convolutions.
        activation: between layers.
        norm: layer normalization before each activation, or none.
        gru: width of a GRU after the torso; 0 for none.
        dueling: value and advantages apart, put together around the advantages' mean (1511.06581, eq. 9).
    """

    hidden: tuple[int, ...] = (128, 128)
    activation: Activation = "relu"
    norm: Norm = "layer"
    dueling: bool = False


def action_values(config: ValueConfig, obs_spec: Any, space: Space, atoms: int = 1) -> Network:
    """A network whose outputs are ``[..., actions]``, or ``[..., actions, atoms]`` for several numbers an action.

    Raises ``ValueError`` for actions that are not discrete or observations that do not fit.
    """
    if not isinstance(space, Discrete):
        raise ValueError(f"action values need discrete actions; got {space}")
    shape = observation_shape(config, obs_spec)
    memory = jnp.zeros(config.gru, jnp.float32) if config.gru else ()
    return as_network(ActionValues(config, len(shape), space.n, atoms), obs_spec, memory)


class ActionValues(nn.Module):
    """``(memory [B, gru] or (), obs [T, B], first [T, B]) -> (memories [T, B, ...], values [T, B, actions(, atoms)])``."""

    config: ValueConfig
    obs_rank: int
    num_actions: int
    atoms: int

    @nn.compact
    def __call__(self, memory: Any, obs: Any, first: Array) -> tuple[Any, Array]:
        x, _ = split_mask(self, obs)
        memories: Any = ()
        x = Features(self.config, self.obs_rank, name="torso")(x)
        if self.config.gru:
            x = memories = Recurrent(self.config.gru, name="gru")(memory, x, first)
        values = self._head("values", x, self.num_actions)
        if self.config.dueling:
            values = self._head("baseline", x, 1) + values - values.mean(-2, keepdims=True)
        return memories, values[..., 0] if self.atoms == 1 else values

    def _head(self, name: str, x: Array, rows: int) -> Array:
        dense = nn.Dense(rows * self.atoms, kernel_init=orthogonal(1.0), dot_general=wide_dot, name=name)
        return dense(x).reshape(*x.shape[:-1], rows, self.atoms)
