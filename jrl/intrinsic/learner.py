"""How a bonus is learned beside an algorithm: it takes in each rollout, pays for it, and then learns from it.

paid         b_t / std( sum_k gamma_i^k b_{t-k} )     a running deviation of discounted sums that never end       (1810.12894, section 2.4)
PPO          A + weight A_i, where A_i are the advantages of the bonuses alone, with their own value and discount,
             which go on over the ends of episodes                                                               (section 2.3)
PQN, DQN     r + weight b, learned as one reward
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import nets
from jrl.envs.types import Environment, observation_spec, without_mask
from jrl.equations import losses, returns
from jrl.experience import normalize, rollout
from jrl.intrinsic import counts, icm, rnd
from jrl.intrinsic.settings import Config
from jrl.intrinsic.types import Intrinsic, Transitions
from jrl.numerics import checks, loops, optim
from jrl.numerics.types import Memory, Observation, OptState, Params

Array = jax.Array
MODELS = {"rnd": rnd.make, "icm": icm.make, "counts": counts.exact, "hash": counts.hashed}
CLIP = 5.0  # of standardized observations, as in RND's code


class ValueState(NamedTuple):
    """The value of bonuses to come."""

    params: Params
    opt_state: OptState


class State(NamedTuple):
    """What was learned for the bonus."""

    params: Params
    opt_state: OptState
    memory: Memory
    inputs: Any  # normalize.Stats of each array of an observation
    sums: normalize.RewardStats  # of discounted sums of bonuses
    value: ValueState


class Learner(NamedTuple):
    """Pure functions for a bonus; ``hyper`` is ``intrinsic.Hyper``.

    Attributes:
        init: ``(key, num_envs) -> State``.
        update: ``(state, Transitions [T, B], hyper, key) -> (state, bonus [T, B], metrics)``: take in a rollout, pay for it, learn from it.
        advantages: ``(state, Transitions [T, B], last_obs [B], hyper, lambda, key) -> (state, float32 [T, B], metrics)``: the same, and
            the advantages of the bonuses by their own value.
        bonus: ``(state, Transitions [N]) -> float32 [N]``, as it is paid now.
        uses_next: whether the bonus depends on ``next_obs``.
    """

    init: Callable[..., State]
    update: Callable[..., tuple[State, Array, dict[str, Array]]]
    advantages: Callable[..., tuple[State, Array, dict[str, Array]]]
    bonus: Callable[[State, Transitions], Array]
    uses_next: bool


def make(config: Config, env: Environment, passes: tuple[int, int], own: Intrinsic | None = None) -> Learner | None:
    """The learner of the bonus that ``config`` describes, or of the user's ``own``; None if there is none of either. ``passes`` are the epochs
    and the minibatches in each in which it learns from a rollout.

    Raises ``ValueError`` for a bonus that does not fit the environment.
    """
    if own is None and config.kind == "none":
        return None
    if own is not None:
        checks.instances("make", bonus=(own, Intrinsic))
    spec = without_mask(observation_spec(env))
    if own is None and config.kind == "counts":
        counts.check_one_hot(env)
    model = own or MODELS[config.kind](config, spec, env.action_space)
    value = nets.head(config.network, spec, 1, scale=1.0)

    def init(key: Array, num_envs: int) -> State:
        key_model, key_value = jax.random.split(key)
        params, memory = model.init(key_model)
        value_params = value.init(key_value)
        inputs = jax.tree.map(lambda x: normalize.init(x.shape), spec)
        adam = optim.make(optim.CONSTANT_ADAM)
        valued = ValueState(value_params, adam.init(value_params))
        return State(params, adam.init(params), memory, inputs, normalize.init_rewards(num_envs), valued)

    def update(state: State, transitions: Transitions, hyper: Any, key: Array) -> tuple[State, Array, dict[str, Array]]:
        shape = transitions.action.shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), unmasked(transitions))
        inputs = jax.tree.map(normalize.update, state.inputs, flat.obs, is_leaf=is_stats)
        state = state._replace(inputs=inputs)
        seen = as_seen(state, flat)
        memory = model.observe(state.memory, seen)
        state = state._replace(memory=memory)
        raw = model.bonus(state.params, memory, seen).reshape(shape)
        sums = normalize.update_rewards(state.sums, raw, jnp.zeros(shape, bool), hyper.gamma)
        state = state._replace(sums=sums)

        def loss(params: Params, rows: Array) -> Array:
            part = jax.tree.map(lambda x: x[rows], seen)
            return model.loss(params, memory, part, hyper).mean()

        params, opt_state, mean = descend(loss, state.params, state.opt_state, hyper, key, raw.size, passes)
        metrics = {"bonus": raw.mean(), "intrinsic_loss": mean}
        return state._replace(params=params, opt_state=opt_state), paid(state, raw), metrics

    def bonus(state: State, transitions: Transitions) -> Array:
        return paid(state, model.bonus(state.params, state.memory, as_seen(state, unmasked(transitions))))

    def advantages(
        state: State, transitions: Transitions, last_obs: Observation, hyper: Any, lambda_: Array, key: Array
    ) -> tuple[State, Array, dict[str, Array]]:
        key_model, key_value = jax.random.split(key)
        state, bonus, metrics = update(state, transitions, hyper, key_model)
        num_steps, num_envs = bonus.shape
        # Values of all observations and of the one after the last; what begins an episode follows the end of another.
        obs = jax.tree.map(lambda x, last: jnp.concatenate([x, last[None]]), transitions.obs, last_obs)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), without_mask(obs))
        seen = standardized(state, flat)
        v = nets.outputs(value, state.value.params, seen)[:, 0].reshape(num_steps + 1, num_envs)
        discount_t, continue_t = jnp.full_like(bonus, hyper.gamma), jnp.ones_like(bonus)
        advantage = returns.over_batch(returns.gae, v[:-1], bonus, discount_t, v[1:], continue_t, lambda_)
        target = (advantage + v[:-1]).ravel()

        def loss(params: Params, rows: Array) -> Array:
            part = jax.tree.map(lambda x: x[rows], seen)
            return losses.value_loss(nets.outputs(value, params, part)[:, 0], target[rows]).mean()

        *learned, mean = descend(loss, *state.value, hyper, key_value, bonus.size, passes)
        return state._replace(value=ValueState(*learned)), advantage, metrics | {"bonus_value_loss": mean}

    def as_seen(state: State, transitions: Transitions) -> Transitions:
        """Transitions as the model sees them."""
        if not model.standardized:
            return transitions
        obs, next_obs = (standardized(state, x) for x in (transitions.obs, transitions.next_obs))
        return transitions._replace(obs=obs, next_obs=next_obs)

    def paid(state: State, raw: Array) -> Array:
        return normalize.scale(state.sums.stats, raw) if config.normalize else raw

    return Learner(init, update, advantages, bonus, model.uses_next)


def descend(
    loss: Callable[[Params, Array], Array],
    params: Params,
    opt_state: OptState,
    hyper: Any,
    key: Array,
    num_rows: int,
    passes: tuple[int, int],
) -> tuple[Params, OptState, Array]:
    """Epochs of minibatch steps down ``loss(params, rows)``, and its mean; nothing where there are no parameters."""
    if not jax.tree.leaves(params):
        return params, opt_state, jnp.float32(0)
    tx = optim.make(optim.CONSTANT_ADAM, learning_rate=hyper.learning_rate)

    def minibatch(carry: tuple[Params, OptState], rows: Array) -> tuple[tuple[Params, OptState], Array]:
        def with_value(params: Params) -> tuple[Array, Array]:
            value = loss(params, rows)
            return value, value

        step = optim.minimize(tx, with_value, *carry)
        return (step.params, step.opt_state), step.extra

    order = rollout.minibatches(key, num_rows, *passes)
    (params, opt_state), means = loops.scan(minibatch, (params, opt_state), order)
    return params, opt_state, means.mean()


def standardized(state: State, obs: Observation) -> Observation:
    """Observations ``[N]`` by the running statistics of each of their arrays."""
    return jax.tree.map(lambda stats, x: normalize.standardize(stats, x, CLIP), state.inputs, obs, is_leaf=is_stats)


def is_stats(x: Any) -> bool:
    return isinstance(x, normalize.Stats)


def unmasked(transitions: Transitions) -> Transitions:
    """Transitions whose observations have no masks."""
    return transitions._replace(obs=without_mask(transitions.obs), next_obs=without_mask(transitions.next_obs))
