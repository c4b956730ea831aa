"""Actor-critic networks: a torso, an optional memory, and heads for policy and value."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jrl.envs.types import Box, Discrete, MultiDiscrete, Space
from jrl.equations.distributions import MASKED, NormalParams
from jrl.nets import fused
from jrl.nets.initializers import orthogonal
from jrl.nets.torso import (
    Features,
    Shapes,
    TorsoConfig,
    as_network,
    empty_memory,
    observation_shapes,
    remember,
    split_mask,
    wide_dot,
)
from jrl.nets.types import Network, Outputs
from jrl.numerics import checks
from jrl.numerics.types import Memory, Observation, Params

Array = jax.Array
TOWERS = {True: ["shared"], False: ["actor", "critic"]}  # names of the torsos, that of the policy first
LogStd = Annotated[float, partial(checks.within, low=-80, high=80)]  # its exponential is a float32 above 0


@dataclass(frozen=True)
class Config(TorsoConfig):
    """Shape of an actor-critic network."""

    shared: bool = False  # One torso for policy and value instead of two.
    log_std: LogStd = 0.0  # Initial log standard deviation of a continuous policy.
    log_std_min: LogStd = -80.0  # Its least value; it is clipped there.
    log_std_max: LogStd = 80.0  # Its largest value.
    state_std: bool = False  # The policy's head gives the standard deviation, too, so that it depends on the state.

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.log_std_min <= self.log_std_max:
            raise ValueError(
                f"network.log_std_min must be at most log_std_max; got {self.log_std_min:g} and {self.log_std_max:g}"
            )
        if not self.log_std_min <= self.log_std <= self.log_std_max:
            raise ValueError(
                f"network.log_std must be between log_std_min and log_std_max, {self.log_std_min:g} and {self.log_std_max:g}; "
                f"got {self.log_std:g}"
            )


def actor_critic(config: Config, obs_spec: Any, space: Space) -> Network:
    """A network for observations of ``obs_spec`` (one unbatched observation) and actions of ``space``.

    Raises ``ValueError`` if a conv torso is asked for observations that are not ``[height, width, channels]``.
    """
    shapes = observation_shapes(config, obs_spec)
    module = ActorCritic(config, shapes, space)
    memory = tuple(empty_memory(config) for _ in TOWERS[config.shared]) if config.remembers else ()
    network = as_network(module, config, obs_spec, memory)
    fits = fused.fits(config, shapes) and policy_width(space) < fused.MOST_OUTPUTS and not config.state_std
    return fused.over(network, len(shapes[0]), partial(fused_outputs, config, space)) if fits else network


def fused_outputs(config: Config, space: Space, params: Params, x: Array, mask: Array | None) -> Outputs:
    """What ``ActorCritic`` computes, by the fused kernel."""
    policy, value = params["policy"]["out"], params["value"]
    if config.shared:
        heads = jax.tree.map(lambda p, v: jnp.concatenate([p, v], axis=-1), policy, value)
        [out] = fused.towers(config, [params["shared"]], [heads], x)
        logits, value = out[..., :-1], out[..., -1]
    else:
        logits, value = fused.towers(config, [params["actor"], params["critic"]], [policy, value], x)
        value = value[..., 0]
    return Outputs(policy_params(config, space, logits, params["policy"].get("log_std"), mask), value)


def policy_features(config: Config, obs_spec: Any) -> Callable[[Params, Observation], Array]:
    """The features ``[N, width]`` that the policy of ``actor_critic`` sees of observations ``[N]``, of the parameters of that network."""
    torso = PolicyTorso(config, observation_shapes(config, obs_spec))
    return lambda params, obs: torso.apply(params, obs)  # type: ignore[return-value]


class PolicyTorso(nn.Module):
    """The part of ``ActorCritic`` that the policy's head follows, without a memory."""

    config: Config
    shapes: Shapes

    @nn.compact
    def __call__(self, obs: Observation) -> Array:
        x, _ = split_mask(self, obs, self.shapes)
        return Features(self.config, self.shapes, name=TOWERS[self.config.shared][0])(x)


class ActorCritic(nn.Module):
    """``(memory of each tower [B] or (), obs [T, B], first [T, B]) -> (memories, Outputs [T, B])``."""

    config: Config
    shapes: Shapes
    space: Space

    @nn.compact
    def __call__(self, memory: Memory, obs: Observation, first: Array) -> tuple[Any, Outputs]:
        x, mask = split_mask(self, obs, self.shapes)
        features, memories = [], []
        for i, name in enumerate(TOWERS[self.config.shared]):
            h = Features(self.config, self.shapes, name=name)(x)
            later, h = remember(self.config, name, memory[i] if memory else (), h, first)
            memories.append(later)
            features.append(h)
        policy = Policy(self.space, self.config, name="policy")(features[0], mask)
        value = nn.Dense(1, kernel_init=orthogonal(1.0), dot_general=wide_dot, name="value")(features[-1])[..., 0]
        return tuple(memories) if self.config.remembers else (), Outputs(policy, value)


class Policy(nn.Module):
    """The policy head: logits (masked where an action is illegal) or ``NormalParams``."""

    space: Space
    config: Config

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Any:
        width, log_std = policy_width(self.space), None
        outputs = 2 * width if isinstance(self.space, Box) and self.config.state_std else width
        out = nn.Dense(outputs, kernel_init=orthogonal(0.01), dot_general=wide_dot, name="out")(x)
        if outputs > width:
            out, change = jnp.split(out, 2, axis=-1)
            log_std = self.config.log_std + change
        elif isinstance(self.space, Box):
            log_std = self.param("log_std", nn.initializers.constant(self.config.log_std), (width,), jnp.float32)
        return policy_params(self.config, self.space, out, log_std, mask)


def policy_width(space: Space) -> int:
    """How many numbers the head of a policy gives, besides a standard deviation."""
    match space:
        case Discrete(n):
            return n
        case MultiDiscrete(nvec):
            return sum(nvec)
        case Box(low):
            return len(low)


def policy_params(config: Config, space: Space, out: Array, log_std: Array | None, mask: Array | None) -> Any:
    """The parameters of the distribution over actions, of the head's output."""
    if isinstance(space, Box):
        assert log_std is not None
        if (config.log_std_min, config.log_std_max) != (Config.log_std_min, Config.log_std_max):
            log_std = jnp.clip(log_std, config.log_std_min, config.log_std_max)
        return NormalParams(out, jnp.broadcast_to(log_std, out.shape).astype(out.dtype))
    return out if mask is None else jnp.where(mask, out, max(MASKED, float(jnp.finfo(out.dtype).min)))
