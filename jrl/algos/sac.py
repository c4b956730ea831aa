"""Soft actor-critic (Haarnoja et al. 2018, arXiv 1801.01290; with a learned temperature, arXiv 1812.05905).

The policy maximizes the return and, at every step, its entropy: a tanh-normal policy pi, critics Q_i and a temperature alpha,
learned from replayed transitions (equations of 1812.05905):

    critics      y = r + discount ( min_i Q'_i(x', a') - alpha log pi(a'|x') )      a' ~ pi(.|x')       (eq. 2, 3)
                 J_Q = 1/2 sum_i (Q_i(x, a) - y)^2                                                      (eq. 5)
    policy       J_pi = alpha log pi(a|x) - min_i Q_i(x, a)      a = tanh(mean + std z)                 (eq. 9)
    temperature  J_alpha = -alpha (log pi(a|x) + H)              H = hyper.target_entropy * dim(a)      (eq. 18)

Q' follows the critics softly. Truncated episodes bootstrap from their last observation. Log-probabilities are of actions in
[-1, 1], also where the environment's bounds are others.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import algorithm, nets
from jrl.algorithm import Algorithm, Metrics
from jrl.algos import off_policy
from jrl.algos.off_policy import OffPolicyConfig
from jrl.envs.spaces import to_env
from jrl.envs.types import Environment
from jrl.equations import distributions
from jrl.equations.distributions import NormalParams
from jrl.experience import normalize, replay, rollout
from jrl.numerics import checks, optim
from jrl.numerics.settings import AboveZero, Finite, NonNegative, Unit, check_hyper
from jrl.numerics.types import Memory, Observation, OptState, Params

Array = jax.Array
LOG_STD = (-5.0, 2.0)  # bounds of the logarithm of a standard deviation
LEARNED = ("params", "opt_state", "critic_params", "critic_opt_state", "target_params")


@dataclass(frozen=True)
class Config(OffPolicyConfig):
    """Static settings, which shape the compiled program."""


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 3e-4  # Initial learning rate; decays by config.optimizer.schedule.
    gamma: Unit = 0.99  # Discount of the return.
    tau: Unit = 0.005  # Polyak coefficient of the critics' targets.
    target_entropy: Finite = -1.0  # Entropy that the temperature keeps, for each number of an action.
    temperature: AboveZero = 1.0  # Initial temperature alpha.
    max_grad_norm: AboveZero = 10.0  # Bound of config.optimizer.clip, if there is one.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizers.


def make(
    env: Environment,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    optimizer: algorithm.Optimizer | None = None,
    start: Any = None,
) -> Algorithm:
    """SAC in ``env``, which must have bounded real actions. ``hyper`` are the defaults of ``init``; ``optimizer`` takes the place of the one
    that ``config`` describes; ``start``, the state of one trained seed, gives the parameters and the statistics of observations to begin with.

    Raises ``ValueError`` for a setting that is wrong or does not fit the environment, or a replay larger than memory.
    """
    checks.instances("sac.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    parts, defaults = off_policy.make_parts(env, config, "sac", width=2), hyper
    remake = functools.partial(make, env, hyper=hyper, optimizer=optimizer, start=start)

    def update(state: State) -> tuple[State, Metrics]:
        key, key_act, key_learn = jax.random.split(state.key, 3)
        keys = jax.random.split(key_learn, config.num_gradient_steps)

        def act(obs: Observation, noise: Array) -> Array:
            return distributions.squashed(policy(state.params, obs), noise)[0]

        state, steps, episodes = off_policy.act_and_store(parts, config, state, key_act, act)
        ready = state.updates + 1 >= parts.first_learning
        state, metrics = algorithm.gradient_steps(learn, state._replace(key=key), keys, ready, LEARNED)
        state = state._replace(updates=state.updates + 1, **normalize.after(state, steps))
        return state, metrics | {"temperature": jnp.exp(state.params["log_alpha"])} | episodes

    def learn(state: State, key: Array) -> tuple[State, Metrics]:
        """One minibatch: critics, then policy and temperature, then targets."""
        key_batch, key_next, key_now = jax.random.split(key, 3)
        batch = off_policy.sample(parts, state, key_batch)
        shape = (config.batch_size, parts.num_actions)
        z_next, z_now = (jax.random.normal(k, shape, jnp.float32) for k in (key_next, key_now))
        tx = algorithm.current_optimizer(config, state, optimizer)
        state, metrics = off_policy.critic_step(parts, tx, state, batch, target(state, batch, z_next))

        def loss(params: Params) -> tuple[Array, Metrics]:
            return policy_and_temperature_loss(params, state, batch, z_now)

        step = optim.minimize(tx, loss, state.params, state.opt_state)
        targets = optim.towards(state.target_params, state.critic_params, state.hyper.tau)
        state = state._replace(params=step.params, opt_state=step.opt_state, target_params=targets)
        return state, metrics | step.extra | {"grad_norm": step.grad_norm}

    def target(state: State, batch: replay.Batch, z: Array) -> Array:
        action, log_prob = distributions.squashed(policy(state.params, batch.next_obs), z)
        value = nets.outputs(parts.critics, state.target_params, (batch.next_obs, action)).min(-1)
        return batch.reward + batch.discount * (value - jnp.exp(state.params["log_alpha"]) * log_prob)

    def policy_and_temperature_loss(
        params: Params, state: State, batch: replay.Batch, z: Array
    ) -> tuple[Array, Metrics]:
        alpha, fixed = jnp.exp(params["log_alpha"]), jax.lax.stop_gradient
        action, log_prob = distributions.squashed(policy(params, batch.obs), z)
        value = nets.outputs(parts.critics, state.critic_params, (batch.obs, action)).min(-1)
        policy_loss = replay.mean(batch, fixed(alpha) * log_prob - value)
        wanted = state.hyper.target_entropy * parts.num_actions
        temperature_loss = -alpha * replay.mean(batch, fixed(log_prob) + wanted)
        metrics = {
            "policy_loss": policy_loss,
            "temperature_loss": temperature_loss,
            "entropy": -replay.mean(batch, log_prob),
        }
        return policy_loss + temperature_loss, metrics

    def policy(params: Params, obs: Observation) -> NormalParams:
        """The normal behind the policy, for observations ``[N]``; its deviation is bounded smoothly."""
        mean, raw = jnp.split(nets.outputs(parts.policy, params["policy"], obs), 2, axis=-1)
        low, high = LOG_STD
        return NormalParams(mean, low + 0.5 * (high - low) * (jnp.tanh(raw) + 1))

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)

        def params_of(key: Array) -> Params:
            log_alpha = jnp.log(jnp.asarray(hyper.temperature, jnp.float32))
            return {"policy": parts.policy.init(key), "log_alpha": log_alpha}

        fields = off_policy.start_learning(parts, config, hyper, key, num_updates, optimizer, params_of, start)
        return State(**fields, target_params=optim.copied(fields["critic_params"]))

    def act(state: State, obs: Observation, key: Array | None = None, memory: Memory = None) -> tuple[Array, Any]:
        params = optim.eval_params(state.opt_state, state.params)
        one = jax.tree.map(lambda x: x[None], normalize.observations(state.obs_stats, obs))
        normal = jax.tree.map(lambda x: x[0], policy(params, one))
        distribution = distributions.tanh_normal(parts.num_actions)
        action = distribution.mode(normal) if key is None else distribution.sample(key, normal)
        return to_env(parts.env.action_space, action), ()

    return Algorithm(
        init=init,
        update=update,
        act=act,
        env_steps_per_update=config.num_envs * config.num_steps,
        name="sac",
        env=parts.env,
        config=config,
        hyper=hyper,
        uses_length=config.optimizer.uses_length,
        remake=remake,
        losses=("critic_loss", "policy_loss"),
        check_hyper=check_hyper,
    )


class State(NamedTuple):
    """The whole run, the replay included."""

    params: Params  # of the policy, and the logarithm of the temperature
    opt_state: OptState
    critic_params: Params
    critic_opt_state: OptState
    target_params: Params  # of the critics
    actors: rollout.Actors
    obs_stats: normalize.Stats | None
    reward_stats: normalize.RewardStats | None
    buffer: replay.Buffer
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper
