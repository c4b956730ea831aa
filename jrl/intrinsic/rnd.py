"""Random network distillation (Burda et al. 2018, arXiv 1810.12894).

    bonus = loss    1/n || f(x') - f*(x') ||^2        f* a random network that stays as it is, f learns to predict it

What was seen often is predicted well. The predictor has two layers more than the target, as in the paper's code. Noise earns nothing for
ever: the target is a function of the observation, so that it can be learned, which the next observation often cannot.
"""

from dataclasses import replace
from typing import Any

import jax

from jrl import nets
from jrl.equations.exploration import distillation_error
from jrl.intrinsic.settings import Config
from jrl.intrinsic.types import Intrinsic, Transitions
from jrl.numerics.types import Memory, Params

Array = jax.Array


def make(config: Config, obs_spec: Any, action_space: Any) -> Intrinsic:
    """The bonus for observations of ``obs_spec``, whatever the actions."""
    shape = config.network
    target = nets.head(shape, obs_spec, config.features, scale=1.0)
    predictor = nets.head(
        replace(shape, hidden=(*shape.hidden, *2 * shape.hidden[-1:])), obs_spec, config.features, scale=1.0
    )

    def init(key: Array) -> tuple[Params, Memory]:
        key_predictor, key_target = jax.random.split(key)
        return predictor.init(key_predictor), target.init(key_target)

    def observe(memory: Memory, transitions: Transitions) -> Memory:
        return memory

    def bonus(params: Params, memory: Memory, transitions: Transitions) -> Array:
        prediction = nets.outputs(predictor, params, transitions.next_obs)
        return distillation_error(prediction, nets.outputs(target, memory, transitions.next_obs))

    def loss(params: Params, memory: Memory, transitions: Transitions, hyper: Any) -> Array:
        return bonus(params, memory, transitions)

    return Intrinsic(init, observe, bonus, loss)
