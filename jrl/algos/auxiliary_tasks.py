"""Auxiliary tasks beside PPO: value replay and reward prediction, as in UNREAL (Jaderberg et al. 2017, arXiv 1611.05397, section 3).

    value replay         1/2 (R_n - V(x))^2        R_n the n-step return of a transition from the replay, continued by V
    reward prediction    -log p(c | phi(x))        c says whether the reward that followed x was negative, zero or positive; half of the
                                                   minibatch was rewarded, however rare that is

Rewards are learned from many times, and shape the features phi of the policy before they change the policy. After PPO's epochs
come ``num_gradient_steps`` minibatches of both losses, with the same optimizer.

What differs from the paper: PPO in place of A3C, and single observations in place of three frames (``wrappers.frame_stack`` stacks them). Its third
task, pixel control, is not here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jrl import nets
from jrl.algorithm import Metrics
from jrl.envs.types import Environment, observation_spec
from jrl.experience import normalize, replay, ring, rollout
from jrl.nets.torso import TorsoConfig
from jrl.numerics import optim, precision
from jrl.numerics.settings import NonNegative, NonNegativeInt, Positive, Settings, check
from jrl.numerics.types import Observation, OptState, Params

Array = jax.Array
SIGNS = 3  # negative, zero, positive
PREDICTOR = TorsoConfig(torso="mlp", hidden=(128,), activation="relu")


@dataclass(frozen=True)
class Config(Settings, prefix="auxiliary"):
    """Static settings of the auxiliary tasks."""

    num_gradient_steps: NonNegativeInt = 0  # Minibatches of the auxiliary tasks per update; 0 for none.
    # Transitions in a minibatch of value replay, and observations in one of reward prediction.
    batch_size: Positive = 256
    # Rows of the replay, over all environments, and observations that are kept with and without a reward.
    capacity: Positive = 20_000
    n_step: Positive = 20  # Length n of the returns of value replay.


class Hyper(NamedTuple):
    """Numbers of the auxiliary tasks, floats or traced scalars; each may be swept."""

    value_weight: NonNegative = 1.0  # Weight of value replay.
    reward_weight: NonNegative = 1.0  # Weight of reward prediction.
    learning_rate: NonNegative = 1e-3  # Of the layers that predict rewards alone; constant, by Adam.


Numbers = Annotated[Hyper, check]  # a field of an algorithm's hyperparameters


class State(NamedTuple):
    """What the auxiliary tasks keep."""

    buffer: replay.Buffer
    # Observations, and the sign of the reward that followed each: 0, 1 or 2 for negative, zero or positive.
    rewarded: ring.Ring
    unrewarded: ring.Ring
    params: Params
    opt_state: OptState


class Tasks(NamedTuple):
    """Pure functions of the auxiliary tasks.

    Attributes:
        init: ``key -> State``.
        update: ``(state, Steps [T, B], actions [T, B], key, optimizer) -> (state, metrics)``, of the algorithm's state whose ``auxiliary``
            is a ``State``.
    """

    init: Callable[[Array], State]
    update: Callable[..., tuple[Any, Metrics]]


def make(config: Config, env: Environment, learner: Any, network: nets.Network, own: Any) -> Tasks | None:
    """The tasks of the policy and the value of ``network``, which ``learner``, the settings of PPO, describe; None if ``config`` asks for no
    gradient steps.

    Raises ``ValueError`` for the user's ``own`` network, whose features are not known, for one with a memory, or a replay that does not fit.
    """
    if not config.num_gradient_steps:
        return None
    if own is not None or network.remembers:
        raise ValueError(
            "config.auxiliary needs the network that config.network describes, without gru, lstm and attention"
        )
    if config.capacity < learner.num_envs * learner.num_steps:
        raise ValueError(
            f"config.auxiliary.capacity must be at least num_envs * num_steps = {learner.num_envs * learner.num_steps}; "
            f"got {config.capacity}"
        )
    spec = observation_spec(env)
    store = replay.make(spec, learner.num_envs, config.capacity, config.batch_size, config.n_step)
    features = precision.apply(learner.precision, nets.policy_features(learner.network, spec))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), spec)
    width = jax.eval_shape(lambda key, obs: features(network.init(key), obs), jax.random.key(0), one).shape[-1]
    predictor = nets.head(PREDICTOR, jax.ShapeDtypeStruct((width,), jnp.float32), SIGNS, scale=0.01)

    def init(key: Array) -> State:
        params, nothing = predictor.init(key), ring.empty((spec, jax.ShapeDtypeStruct((), jnp.int32)), config.capacity)
        return State(store.init(), nothing, nothing, params, optim.make(optim.CONSTANT_ADAM).init(params))

    def update(
        state: Any, steps: rollout.Steps, action: Array, key: Array, tx: optax.GradientTransformation
    ) -> tuple[Any, Metrics]:
        obs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps.obs)
        sign = (1 + jnp.sign(steps.reward)).astype(jnp.int32).ravel()
        kept = state.auxiliary._replace(
            buffer=replay.add_rollout(store, state.auxiliary.buffer, steps, jnp.zeros(steps.reward.shape, jnp.int32)),
            rewarded=ring.add(state.auxiliary.rewarded, (obs, sign), sign != 1),
            unrewarded=ring.add(state.auxiliary.unrewarded, (obs, sign), sign == 1),
        )
        adam = optim.make(optim.CONSTANT_ADAM, learning_rate=state.hyper.auxiliary.learning_rate)

        def learn(state: Any, key: Array) -> tuple[Any, Metrics]:
            kept, (key_values, *key_rewards) = state.auxiliary, jax.random.split(key, 3)
            batch = normalize.transitions(state, store.sample(kept.buffer, key_values, state.hyper.gamma))
            obs, sign, known = minibatch(kept, config.batch_size, key_rewards)
            obs = normalize.observations(state.obs_stats, obs)
            seen = features(state.params, obs)
            own = optim.minimize(adam, lambda p: predicted(p, seen, sign, known), kept.params, kept.opt_state)

            def loss(params: Params) -> tuple[Array, Metrics]:
                rewards, hit = predicted(own.params, features(params, obs), sign, known)
                values = replayed(params, batch)
                h = state.hyper.auxiliary
                total = h.value_weight * values + h.reward_weight * rewards
                return total, {"value_replay_loss": values, "reward_prediction_loss": rewards, "rewards_foreseen": hit}

            step = optim.minimize(tx, loss, state.params, state.opt_state)
            kept = kept._replace(params=own.params, opt_state=own.opt_state)
            return state._replace(params=step.params, opt_state=step.opt_state, auxiliary=kept), step.extra

        keys = jax.random.split(key, config.num_gradient_steps)
        state, metrics = jax.lax.scan(learn, state._replace(auxiliary=kept), keys)
        return state, jax.tree.map(jnp.mean, metrics)

    def replayed(params: Params, batch: replay.Batch) -> Array:
        """The loss of value replay, over the transitions of a minibatch."""
        following = jax.lax.stop_gradient(nets.outputs(network, params, batch.next_obs).value)
        target = batch.reward + jnp.where(batch.discount > 0, batch.discount * following, 0.0)
        error = jnp.where(batch.weight > 0, target - nets.outputs(network, params, batch.obs).value, 0.0)
        return 0.5 * replay.mean(batch, error**2)

    def predicted(params: Params, seen: Array, sign: Array, known: Array) -> tuple[Array, Array]:
        """The loss of reward prediction from features ``[N, D]``, and the share of rewards whose sign was foreseen."""
        logits = nets.outputs(predictor, params, seen.astype(jnp.float32))
        each = optax.softmax_cross_entropy_with_integer_labels(logits, sign)
        number = jnp.maximum(known.sum(), 1)
        return jnp.sum(known * each) / number, jnp.sum(known & (jnp.argmax(logits, -1) == sign)) / number

    return Tasks(init, update)


def minibatch(state: State, number: int, keys: list[Array]) -> tuple[Observation, Array, Array]:
    """Observations and signs ``[number]``, half of which were rewarded, and which of them are known, since nothing was rewarded at first."""
    sizes = (number // 2, number - number // 2)
    halves = [ring.sample(*each) for each in zip((state.rewarded, state.unrewarded), keys, sizes, strict=True)]
    obs, sign = jax.tree.map(lambda *x: jnp.concatenate(x), *(rows for rows, _ in halves))
    return obs, sign, jnp.concatenate([jnp.full(n, known) for n, (_, known) in zip(sizes, halves, strict=True)])
