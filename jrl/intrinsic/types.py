"""What an intrinsic reward is: a record of pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jrl.numerics.types import Memory, Observation, Params

Array = jax.Array


class Transitions(NamedTuple):
    """Steps ``[N]`` that a bonus is paid for; ``next_obs`` is the observation before any reset."""

    obs: Observation
    action: Array
    next_obs: Observation


class Intrinsic(NamedTuple):
    """A reward that an agent gives itself, the bonus, as pure functions of a model of what it has seen.

    Attributes:
        init: ``key -> (params, memory)``: what is learned by gradients, and what is not: counts, or a network that stays as it is.
        observe: ``(memory, Transitions [N]) -> memory``: takes in a rollout, before its bonuses are paid.
        bonus: ``(params, memory, Transitions [N]) -> float32 [N]``, at least 0 and the larger, the less is known.
        loss: ``(params, memory, Transitions [N], hyper) -> float32 [N]``, of which the mean is descended.
        standardized: whether the functions are given observations that are standardized by running statistics, or raw ones.
        uses_next: whether the bonus depends on ``next_obs``.
    """

    init: Callable[[Array], tuple[Params, Memory]]
    observe: Callable[[Memory, Transitions], Memory]
    bonus: Callable[[Params, Memory, Transitions], Array]
    loss: Callable[[Params, Memory, Transitions, Any], Array]
    standardized: bool = True
    uses_next: bool = True
