"""Small networks by one kernel a pass, on a Hopper GPU.

Thousands of agents with two layers of 64 units each spend their time on writing activations to memory and reading them
again. The kernels of ``jrl.nets.mlp_kernel`` keep them on the chip: a forward pass reads observations and gives outputs, a
backward pass gives the gradients of the weights. Which networks they compute, and where, is decided here; their numbers are
those of the flax modules in full float32, to rounding.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jrl.envs.types import MaskedObs
from jrl.nets.torso import is_image, shares
from jrl.nets.types import Network
from jrl.numerics import host
from jrl.numerics.types import Memory, Observation, Params

Array = jax.Array
MOST_OUTPUTS = 16


def fits(config: Any, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether the kernels compute a torso (``TorsoConfig``) over observations whose arrays have these shapes."""
    if len(shapes) != 1:
        return False
    [obs_shape] = shapes
    dense = config.torso == "mlp" or (config.torso == "auto" and len(obs_shape) != 3)
    plain = config.norm == "none" and config.activation in ("tanh", "relu") and not config.remembers
    return dense and plain and config.hidden == (64, 64) and math.prod(obs_shape) > 0


def over(network: Network, obs_rank: int, compute: Callable[[Any, Array, Array | None], Any]) -> Network:
    """A network without memory by ``compute(params, x [..., inputs], mask)``, in float32 on a Hopper GPU; else as it is."""

    def outputs(
        plain: Callable[..., Any], params: Params, memory: Memory, obs: Observation, first: Array
    ) -> tuple[Any, Any]:
        if not host.has_kernels() or any(p.dtype != jnp.float32 for p in jax.tree.leaves(params)):
            return plain(params, memory, obs, first)
        x, mask = obs if isinstance(obs, MaskedObs) else (obs, None)
        x = shares(x) if is_image(x, obs_rank) else x.astype(jnp.float32)
        x = x.reshape(*x.shape[: x.ndim - obs_rank], -1)
        return memory, compute(params["params"], x, mask)

    return network._replace(step=partial(outputs, network.step), unroll=partial(outputs, network.unroll))


def towers(config: Any, torsos: list[Any], heads: list[Any], x: Array) -> list[Array]:
    """Two hidden layers and a head each, ``[..., inputs] -> [..., outputs]``, by the parameters of their flax modules."""
    from jrl.nets import mlp  # its Pallas is that of a newer JAX than the oldest that jrl runs on

    params = [
        [part[name] for part in (torso["Dense_0"], torso["Dense_1"], head) for name in ("kernel", "bias")]
        for torso, head in zip(torsos, heads, strict=True)
    ]
    outputs = mlp.towers(params, x.reshape(-1, x.shape[-1]), config.activation)
    return [out.reshape(*x.shape[:-1], -1) for out in outputs]
