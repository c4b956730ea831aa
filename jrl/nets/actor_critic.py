"""Actor-critic networks: a torso, an optional GRU, and heads for policy and value."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jrl import checks
from jrl.distributions import MASKED, NormalParams
from jrl.envs.types import Box, Discrete, MaskedObs, MultiDiscrete, Space
from jrl.nets.initializers import orthogonal
from jrl.nets.types import Network, Outputs

Array = jax.Array
Activation = Literal["tanh", "relu", "silu", "gelu"]
Torso = Literal["auto", "mlp", "conv"]


@dataclass(frozen=True)
class Config:
    """Shape of an actor-critic network.

    Attributes:
        torso: mlp flattens the observation; conv expects ``[height, width, channels]``; auto takes conv for such
            observations, else mlp.
        hidden: widths of the dense layers (for conv, those after the convolution).
        channels: widths of the 3x3 convolutions.
        activation: between layers.
        shared: one torso for policy and value instead of two.
        gru: width of a GRU after the torso; 0 for none.
        log_std: initial log standard deviation of continuous policies, a parameter independent of the observation.
    """

    torso: Torso = "auto"
    hidden: tuple[int, ...] = (64, 64)
    channels: tuple[int, ...] = (16,)
    activation: Activation = "tanh"
    shared: bool = False
    gru: int = 0
    log_std: float = 0.0

    def __post_init__(self) -> None:
        checks.one_of("network.torso", self.torso, get_args(Torso))
        checks.one_of("network.activation", self.activation, get_args(Activation))
        checks.positive_int("network.gru", self.gru, at_least=0)
        for field in ("hidden", "channels"):
            for width in getattr(self, field):
                checks.positive_int(f"network.{field}", width)


def actor_critic(config: Config, obs_spec: Any, space: Space) -> Network:
    """A network for observations of ``obs_spec`` (one unbatched observation) and actions of ``space``.

    Raises ``ValueError`` if a conv torso is asked for observations that are not ``[height, width, channels]``.
    """
    shape = obs_spec.obs.shape if isinstance(obs_spec, MaskedObs) else getattr(obs_spec, "shape", None)
    if shape is None:
        raise ValueError("observations must be one array, or MaskedObs(obs, mask)")
    if config.torso == "conv" and len(shape) != 3:
        raise ValueError(f"network.torso=conv needs observations [height, width, channels], got {shape}")
    module = ActorCritic(config, len(shape), space)

    def step(params: Any, memory: Any, obs: Any, first: Array) -> tuple[Any, Outputs]:
        memories, outputs = unroll(params, memory, *jax.tree.map(lambda x: x[None], (obs, first)))
        return jax.tree.map(lambda x: x[0], (memories, outputs))

    def unroll(params: Any, memory: Any, obs: Any, first: Array) -> tuple[Any, Outputs]:
        return module.apply(params, memory, obs, first)  # type: ignore[return-value]

    num_towers = 1 if config.shared else 2
    memory = jnp.zeros((num_towers, config.gru), jnp.float32) if config.gru else ()

    def init(key: Array) -> Any:
        batched = jax.tree.map(lambda x: jnp.zeros((1, 1, *x.shape), x.dtype), obs_spec)
        start = jax.tree.map(lambda x: x[None], memory)
        return module.init(key, start, batched, jnp.ones((1, 1), bool))

    return Network(init, step, unroll, memory)


class ActorCritic(nn.Module):
    """``(memory [B, towers, gru] or (), obs [T, B], first [T, B]) -> (memories [T, B, ...], Outputs [T, B])``."""

    config: Config
    obs_rank: int
    space: Space

    @nn.compact
    def __call__(self, memory: Any, obs: Any, first: Array) -> tuple[Any, Outputs]:
        obs, mask = obs if isinstance(obs, MaskedObs) else (obs, None)
        x = obs if jnp.issubdtype(obs.dtype, jnp.floating) else obs.astype(self._dtype())
        names = ["shared"] if self.config.shared else ["actor", "critic"]
        features, memories = [], []
        for i, name in enumerate(names):
            h = Features(self.config, self.obs_rank, name=name)(x)
            if self.config.gru:
                h = Recurrent(self.config.gru, name=f"{name}_gru")(memory[:, i], h, first)
                memories.append(h)
            features.append(h)
        policy = Policy(self.space, self.config.log_std, name="policy")(features[0], mask)
        value = nn.Dense(1, kernel_init=orthogonal(1.0), dot_general=_wide_dot, name="value")(features[-1])[..., 0]
        return jnp.stack(memories, axis=-2) if memories else (), Outputs(policy, value)

    def _dtype(self) -> Any:
        """Integer and boolean observations are computed in the dtype of the parameters."""
        params = jax.tree.leaves(self.variables.get("params", {}))
        return params[0].dtype if params else jnp.float32


class Features(nn.Module):
    """The torso: ``[..., *observation] -> [..., width]``."""

    config: Config
    obs_rank: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        activation = getattr(nn, self.config.activation)
        batch_shape = x.shape[: x.ndim - self.obs_rank]
        if self.config.torso == "conv" or (self.config.torso == "auto" and self.obs_rank == 3):
            for width in self.config.channels:
                x = activation(nn.Conv(width, (3, 3), padding="VALID", kernel_init=orthogonal(math.sqrt(2)))(x))
        x = x.reshape(*batch_shape, -1)
        for width in self.config.hidden:
            x = activation(nn.Dense(width, kernel_init=orthogonal(math.sqrt(2)))(x))
        return x


class Recurrent(nn.Module):
    """A GRU over time (Cho et al. 2014, arXiv 1406.1078) that starts from zero where ``first`` is true."""

    width: int

    @nn.compact
    def __call__(self, memory: Array, x: Array, first: Array) -> Array:
        cell = nn.GRUCell(self.width, kernel_init=orthogonal(1.0), recurrent_kernel_init=orthogonal(1.0))

        def step(cell: nn.GRUCell, h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            x_t, first_t = inputs
            h = jnp.where(first_t[:, None], jnp.zeros_like(h), h)
            h, _ = cell(h, x_t)
            return h, h

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        return scan(cell, memory.astype(x.dtype), (x, first))[1]


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
        out = nn.Dense(width, kernel_init=orthogonal(0.01), dot_general=_wide_dot, name="out")(x)
        if isinstance(self.space, Box):
            log_std = self.param("log_std", nn.initializers.constant(self.log_std), (width,))
            return NormalParams(out, jnp.broadcast_to(log_std, out.shape).astype(out.dtype))
        return out if mask is None else jnp.where(mask, out, max(MASKED, float(jnp.finfo(out.dtype).min)))


def _wide_dot(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    """The heads' product, given out in float32 at least: a value of 100 rounded to bfloat16 would be off by a quarter."""
    options["preferred_element_type"] = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, kernel, *args, **options)
