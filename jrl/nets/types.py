"""What an algorithm sees of a network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.numerics.types import Memory, Observation, Params

Array = jax.Array


class Outputs(NamedTuple):
    """Parameters of the action distribution, and the value of the observation ``[...]``."""

    policy: Any
    value: Array


class Network(NamedTuple):
    """A network as pure functions; ``B`` is any batch size. Its output is ``Outputs``, or action values ``[B, A]``.

    Attributes:
        init: ``key -> params``.
        step: ``(params, memory [B], obs [B], first bool [B]) -> (memory, output [B])``. Where ``first`` is true an
            episode begins, and the memory is forgotten before it is used.
        unroll: ``(params, memory [B], obs [T, B], first [T, B]) -> (memories [T, B], outputs [T, B])``; the same numbers as T steps.
            ``memories`` is for ``memory_at``.
        memory: the empty memory of one agent; ``()`` for feed-forward networks.
        memory_at: ``(memories, t int [N], b int [N]) -> memory [N]``: those after observations t of rows b.
        heavy: whether memories are so large that only as many as there are environments should be taken at once.
    """

    init: Callable[[Array], Params]
    step: Callable[[Params, Memory, Observation, Array], tuple[Memory, Any]]
    unroll: Callable[[Params, Memory, Observation, Array], tuple[Memory, Any]]
    memory: Memory
    memory_at: Callable[[Any, Array, Array], Memory]
    heavy: bool = False

    @property
    def remembers(self) -> bool:
        """Whether it has a memory."""
        return bool(jax.tree.leaves(self.memory))


def outputs(network: Network, params: Params, obs: Observation) -> Any:
    """The output of a network without a memory for observations ``[B]``."""
    return network.step(params, (), obs, jnp.zeros(jax.tree.leaves(obs)[0].shape[0], bool))[1]


def step_one(network: Network, params: Params, obs: Observation, memory: Memory | None = None) -> tuple[Memory, Any]:
    """``network.step`` on one observation, without axis ``B``; ``memory=None`` begins an episode."""
    first = jnp.bool_(memory is None)
    one = jax.tree.map(lambda x: x[None], (network.memory if memory is None else memory, obs, first))
    return jax.tree.map(lambda x: x[0], network.step(params, *one))
