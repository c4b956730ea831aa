"""Networks that value actions: a torso, an optional memory, and a head for every action, dueling or not."""

import math
import zlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jrl.envs.types import Discrete, Space
from jrl.nets import fused
from jrl.nets.initializers import orthogonal
from jrl.nets.torso import (
    Activation,
    Features,
    Norm,
    Shapes,
    TorsoConfig,
    activated,
    as_network,
    empty_memory,
    observation_shapes,
    remember,
    split_mask,
    wide_dot,
)
from jrl.nets.types import Network
from jrl.numerics.settings import Positive
from jrl.numerics.types import Memory, Observation, Params

Array = jax.Array


@dataclass(frozen=True)
class ValueConfig(TorsoConfig):
    """Shape of a network of action values."""

    hidden: tuple[Positive, ...] = (128, 128)  # Widths of the dense layers (for conv and vit, of those after it).
    activation: Activation = "relu"  # Activation between layers.
    norm: Norm = "layer"  # Layer normalization before each activation, or none.
    # Value and advantages apart, each with a layer of the last hidden width, put together around the advantages' mean (1511.06581, eq. 9).
    dueling: bool = False
    # Heads, and dueling streams, whose weights carry learned, factorized noise (1706.10295, eq. 9-11): exploration that is learned. It is
    # there where with_noise gave a key; without one their means are used.
    noisy: bool = False


def action_values(config: ValueConfig, obs_spec: Any, space: Space, atoms: int = 1) -> Network:
    """A network whose outputs are ``[..., actions]``, or ``[..., actions, atoms]`` for several numbers an action.

    Raises ``ValueError`` for actions that are not discrete or observations that do not fit.
    """
    if not isinstance(space, Discrete):
        raise ValueError(f"action values need discrete actions; got {space}")
    shapes = observation_shapes(config, obs_spec)
    network = as_network(ActionValues(config, shapes, space.n, atoms), config, obs_spec, empty_memory(config))
    plain = not config.dueling and not config.noisy and atoms == 1
    fits = plain and fused.fits(config, shapes) and space.n <= fused.MOST_OUTPUTS
    return fused.over(network, len(shapes[0]), partial(fused_values, config)) if fits else network


def fused_values(config: ValueConfig, params: Params, x: Array, mask: Array | None) -> Array:
    """What ``ActionValues`` computes, by the fused kernel."""
    return fused.towers(config, [params["torso"]], [params["values"]], x)[0]


class ActionValues(nn.Module):
    """``(memory [B, gru] or (), obs [T, B], first [T, B]) -> (memories [T, B, ...], values [T, B, actions(, atoms)])``."""

    config: ValueConfig
    shapes: Shapes
    num_actions: int
    atoms: int

    @nn.compact
    def __call__(self, memory: Memory, obs: Observation, first: Array) -> tuple[Any, Array]:
        x, _ = split_mask(self, obs, self.shapes)
        dueling = self.config.dueling and bool(self.config.hidden)
        torso = replace(self.config, hidden=self.config.hidden[:-1]) if dueling else self.config
        x = Features(torso, self.shapes, name="torso")(x)
        memories, x = remember(self.config, "torso", memory, x, first)
        values = self._head("values", x, self.num_actions)
        if self.config.dueling:
            values = self._head("baseline", x, 1) + values - values.mean(-2, keepdims=True)
        return memories, values[..., 0] if self.atoms == 1 else values

    def _head(self, name: str, x: Array, rows: int) -> Array:
        if self.config.dueling and self.config.hidden:
            hidden = self._dense(f"{name}_hidden", x, self.config.hidden[-1], math.sqrt(2)).astype(x.dtype)
            x = activated(self.config, hidden)
        return self._dense(name, x, rows * self.atoms, 1.0).reshape(*x.shape[:-1], rows, self.atoms)

    def _dense(self, name: str, x: Array, width: int, scale: float) -> Array:
        if not self.config.noisy:
            return nn.Dense(width, kernel_init=orthogonal(scale), dot_general=wide_dot, name=name)(x)
        key = self.get_variable("noise", "key") if self.has_variable("noise", "key") else None
        if key is not None:
            key = jax.random.fold_in(key, zlib.crc32(name.encode()))  # each layer its own noise
        return NoisyDense(width, name=name)(x, key)


class NoisyDense(nn.Module):
    """``y = (mu_w + sigma_w e_w) x + mu_b + sigma_b e_b`` with ``e_w = f(e_out) f(e_in)``, ``f(x) = sgn(x) sqrt(|x|)``.

    Initialized as in section 3.2 of 1706.10295; without a key the noise is 0.
    """

    width: int

    @nn.compact
    def __call__(self, x: Array, key: Array | None) -> Array:
        fan_in = x.shape[-1]
        bound = fan_in**-0.5

        def uniform(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        sigma = nn.initializers.constant(0.5 * bound)
        kernel, kernel_sigma = (
            self.param("kernel", uniform, (fan_in, self.width)),
            self.param("kernel_sigma", sigma, (fan_in, self.width), jnp.float32),
        )
        bias, bias_sigma = (
            self.param("bias", uniform, (self.width,)),
            self.param("bias_sigma", sigma, (self.width,), jnp.float32),
        )
        if key is not None:
            noise = jax.random.normal(key, (fan_in + self.width,), jnp.float32)
            noise = (jnp.sign(noise) * jnp.sqrt(jnp.abs(noise))).astype(kernel.dtype)
            e_in, e_out = noise[:fan_in], noise[fan_in:]
            kernel = kernel + kernel_sigma * jnp.outer(e_in, e_out)
            bias = bias + bias_sigma * e_out
        y = wide_dot(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        return y + jnp.broadcast_to(bias, y.shape)


def with_noise(params: Params, key: Array) -> Any:
    """Parameters of a noisy network with the key of its noise; what trains is ``params`` alone."""
    return {**params, "noise": {"key": key}}
