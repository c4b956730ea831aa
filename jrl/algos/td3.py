"""Twin delayed deep deterministic policy gradient (Fujimoto et al. 2018, arXiv 1802.09477).

A deterministic policy mu and critics Q_i, learned from replayed transitions:

    smoothing    a' = clip( mu'(x') + clip(sigma eps, -c, c), -1, 1 )      eps ~ N(0, 1)      (eq. 14)
    critics      y = r + discount min_i Q'_i(x', a')                                          (eq. 10)
                 J_Q = 1/2 sum_i (Q_i(x, a) - y)^2
    policy       J_mu = -Q_1(x, mu(x))              every config.policy_delay critic steps    (section 5.2)

The targets mu' and Q' follow softly, as often as the policy is learned. The policy explores with normal noise. Noise is
measured in actions that reach from -1 to 1. Truncated episodes bootstrap from their last observation.
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
from jrl.experience import normalize, replay, rollout
from jrl.numerics import checks, optim
from jrl.numerics.settings import AboveZero, NonNegative, Positive, Unit, check_hyper
from jrl.numerics.types import Memory, Observation, OptState, Params

Array = jax.Array
LEARNED = ("params", "opt_state", "critic_params", "critic_opt_state", "target_params", "gradient_steps")


@dataclass(frozen=True)
class Config(OffPolicyConfig):
    """Static settings, which shape the compiled program."""

    policy_delay: Positive = 2  # Critic steps for one of the policy and of the targets.


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 3e-4  # Initial learning rate; decays by config.optimizer.schedule.
    gamma: Unit = 0.99  # Discount of the return.
    tau: Unit = 0.005  # Polyak coefficient of the targets.
    exploration_noise: NonNegative = 0.1  # Standard deviation of the noise with which the policy acts.
    target_noise: NonNegative = 0.2  # Standard deviation of the noise of the target's action.
    target_noise_clip: NonNegative = 0.5  # Largest noise of the target's action.
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
    """TD3 in ``env``, which must have bounded real actions. ``hyper`` are the defaults of ``init``; ``optimizer`` takes the place of the one
    that ``config`` describes; ``start``, the state of one trained seed, gives the parameters and the statistics of observations to begin with.

    Raises ``ValueError`` for a setting that is wrong or does not fit the environment, or a replay larger than memory.
    """
    checks.instances("td3.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    parts, defaults = off_policy.make_parts(env, config, "td3"), hyper
    remake = functools.partial(make, env, hyper=hyper, optimizer=optimizer, start=start)

    def update(state: State) -> tuple[State, Metrics]:
        key, key_act, key_learn = jax.random.split(state.key, 3)
        keys = jax.random.split(key_learn, config.num_gradient_steps)

        def act(obs: Observation, noise: Array) -> Array:
            return explored(policy(state.params, obs), noise, state.hyper)

        state, steps, episodes = off_policy.act_and_store(parts, config, state, key_act, act)
        ready = state.updates + 1 >= parts.first_learning
        state, metrics = algorithm.gradient_steps(learn, state._replace(key=key), keys, ready, LEARNED)
        state = state._replace(updates=state.updates + 1, **normalize.after(state, steps))
        return state, metrics | episodes

    def learn(state: State, key: Array) -> tuple[State, Metrics]:
        """One minibatch: critics, and at every ``policy_delay``-th one the policy and the targets."""
        key_batch, key_noise = jax.random.split(key)
        batch = off_policy.sample(parts, state, key_batch)
        noise = jax.random.normal(key_noise, (config.batch_size, parts.num_actions), jnp.float32)
        tx = algorithm.current_optimizer(config, state, optimizer)
        state, metrics = off_policy.critic_step(parts, tx, state, batch, target(state, batch, noise))

        def loss(params: Params) -> tuple[Array, Metrics]:
            value = nets.outputs(parts.critics, state.critic_params, (batch.obs, policy(params, batch.obs)))[:, 0]
            return -replay.mean(batch, value), {"policy_loss": -replay.mean(batch, value)}

        step = optim.minimize(tx, loss, state.params, state.opt_state)
        online = {"policy": step.params, "critics": state.critic_params}
        moved = (step.params, step.opt_state, optim.towards(state.target_params, online, state.hyper.tau))
        turn = (state.gradient_steps + 1) % config.policy_delay == 0
        kept = (state.params, state.opt_state, state.target_params)
        params, opt_state, targets = jax.tree.map(lambda new, old: jnp.where(turn, new, old), moved, kept)
        count = jnp.where(turn, 0, state.gradient_steps + 1)  # since the policy's last step: it would overflow
        state = state._replace(params=params, opt_state=opt_state, target_params=targets, gradient_steps=count)
        return state, metrics | step.extra | {"grad_norm": step.grad_norm}

    def target(state: State, batch: replay.Batch, noise: Array) -> Array:
        h = state.hyper
        smooth = jnp.clip(h.target_noise * noise, -h.target_noise_clip, h.target_noise_clip)
        action = jnp.clip(policy(state.target_params["policy"], batch.next_obs) + smooth, -1.0, 1.0)
        value = nets.outputs(parts.critics, state.target_params["critics"], (batch.next_obs, action)).min(-1)
        return batch.reward + batch.discount * value

    def policy(params: Params, obs: Observation) -> Array:
        """Actions ``[N, A]`` for observations ``[N]``."""
        return jnp.tanh(nets.outputs(parts.policy, params, obs))

    def explored(action: Array, noise: Array, hyper: Hyper) -> Array:
        return jnp.clip(action + hyper.exploration_noise * noise, -1.0, 1.0)

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        fields = off_policy.start_learning(parts, config, hyper, key, num_updates, optimizer, parts.policy.init, start)
        targets = optim.copied({"policy": fields["params"], "critics": fields["critic_params"]})
        return State(**fields, target_params=targets, gradient_steps=jnp.int32(0))

    def act(state: State, obs: Observation, key: Array | None = None, memory: Memory = None) -> tuple[Array, Any]:
        params = optim.eval_params(state.opt_state, state.params)
        one = jax.tree.map(lambda x: x[None], normalize.observations(state.obs_stats, obs))
        action = policy(params, one)[0]
        if key is not None:
            action = explored(action, jax.random.normal(key, action.shape, jnp.float32), state.hyper)
        return to_env(parts.env.action_space, action), ()

    return Algorithm(
        init=init,
        update=update,
        act=act,
        env_steps_per_update=config.num_envs * config.num_steps,
        name="td3",
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

    params: Params  # of the policy
    opt_state: OptState
    critic_params: Params
    critic_opt_state: OptState
    target_params: Params  # of the policy and the critics
    actors: rollout.Actors
    obs_stats: normalize.Stats | None
    reward_stats: normalize.RewardStats | None
    buffer: replay.Buffer
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    gradient_steps: Array  # int32: of the critics since the policy's last
    hyper: Hyper
