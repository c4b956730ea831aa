"""Parallelised Q-networks: deep Q-learning without replay or target network (Gallici et al. 2024, arXiv 2407.04811).

One update: act epsilon-greedily for T steps in B environments, take the lambda returns of the greedy policy as targets

    G_t = r_t + discount_t ( lambda c_t G_{t+1} + (1 - lambda c_t) max_a Q(x_t, a) )        c_t = 0 where an episode ends

(Peng's Q(lambda); section 4 and algorithm 1), and descend ``(Q(x, a) - G)^2`` in several epochs of minibatches. Layer
normalization in the network stands in for the target network (theorem 2).

Truncated episodes bootstrap from their last observation. A recurrent network starts each rollout from the memory it had
and trains on whole sequences, as in the paper's PQN-RNN. ``config.bonus`` adds a bonus for what is new to the reward (``jrl.intrinsic``).
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import algorithm, intrinsic, nets
from jrl.algorithm import Algorithm, Metrics, exploration
from jrl.algos import value_policy
from jrl.envs.strict import strict
from jrl.envs.types import Environment, observation_spec
from jrl.equations import returns
from jrl.experience import normalize, rollout
from jrl.experience.greedy import best_value, exploration_noise, pick
from jrl.numerics import checks, loops, optim, precision
from jrl.numerics.settings import AboveZero, NonNegative, Positive, Precision, Settings, Unit, check_hyper
from jrl.numerics.types import Memory, Observation, OptState, Params

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    num_envs: Positive = 32  # Environments that each seed steps in parallel.
    num_steps: Positive = 64  # Steps of each environment per update.
    num_epochs: Positive = 4  # Passes over the rollout of an update.
    num_minibatches: Positive = 16  # Gradient steps per pass; divides num_envs * num_steps (recurrent: num_envs).
    normalize_observations: bool = False  # Standardize observations by running statistics.
    normalize_rewards: bool = False  # Divide rewards by the running deviation of discounted returns.
    reward_clip: NonNegative = 0.0  # Bound that rewards are cut off at, above and below 0; 0 for none.
    network: nets.ValueConfig = field(default_factory=nets.ValueConfig)  # Shape of the network.
    optimizer: optim.OptimizerConfig = field(default_factory=optim.OptimizerConfig)  # What the optimizer is made of.
    bonus: intrinsic.Config = field(default_factory=intrinsic.Config)  # Bonus for what is new.
    # float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    precision: Precision = "float32"


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 2.5e-4  # Initial learning rate; decays by config.optimizer.schedule.
    gamma: Unit = 0.99  # Discount of the return.
    q_lambda: Unit = 0.95  # Lambda of the returns.
    epsilon_start: Unit = 1.0  # Share of actions chosen uniformly at the start of the run.
    epsilon_end: Unit = 0.05  # Final share, and that of a run of unknown length.
    epsilon_fraction: Unit = 0.2  # Share of the run over which epsilon falls linearly.
    max_grad_norm: AboveZero = 10.0  # Largest global norm of a gradient, or the bound of config.optimizer.clip.
    reward_scale: NonNegative = 1.0  # Factor on the rewards that are learned from.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.
    bonus: intrinsic.Numbers = intrinsic.Hyper()  # Numbers of the bonus.


def make(
    env: Environment,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    network: nets.Network | None = None,
    optimizer: algorithm.Optimizer | None = None,
    bonus: intrinsic.Intrinsic | None = None,
    start: Any = None,
) -> Algorithm:
    """PQN in ``env``, which must have discrete actions. ``hyper`` are the defaults of ``init``; ``network``, ``optimizer`` and ``bonus`` take
    the place of those that ``config`` describes; ``start``, the state of one trained seed, gives the parameters to begin with.

    Raises ``ValueError`` for a setting that is wrong or does not fit the environment.
    """
    checks.instances("pqn.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    env, defaults = strict(env), hyper
    remake = functools.partial(make, env, hyper=hyper, network=network, optimizer=optimizer, bonus=bonus, start=start)
    curiosity = intrinsic.make(config.bonus, env, (config.num_epochs, config.num_minibatches), bonus)
    normalize.check(config, observation_spec(env))
    network = nets.value_network(network, config.network, observation_spec(env), env.action_space)
    network = nets.starting_from(network, start)
    rollout.check_minibatches(config, network.remembers)
    network = precision.apply_to_network(config.precision, network)

    def update(state: State) -> tuple[State, Metrics]:
        key, key_noise, key_envs, key_learn, *key_bonus = jax.random.split(state.key, 5 if curiosity else 4)
        noise = exploration_noise(key_noise, (config.num_steps, config.num_envs), env.action_space.n)  # type: ignore[union-attr]
        actors, steps, episodes = rollout.collect(
            env, state.actors, value_policy.actor(network, state), noise, key_envs, config.num_steps
        )
        state, reward, paid = rewards(state, steps, *key_bonus)
        state, metrics = learn(state, with_targets(state, steps, reward), key_learn)
        state = state._replace(actors=actors, key=key, updates=state.updates + 1, **normalize.after(state, steps))
        return state, metrics | paid | rollout.episode_metrics(episodes)

    def loss(params: Params, memory: Memory, batch: Batch) -> tuple[Array, Metrics]:
        """The mean squared error of the values of the actions taken; half of it is descended, as the paper does."""
        _, q = network.unroll(params, memory, batch.obs, batch.first)
        taken = pick(q, batch.action)
        mse = jnp.mean((taken - batch.target) ** 2)
        return 0.5 * mse, {"loss": mse, "q": taken.mean()}

    def rewards(state: State, steps: rollout.Steps, *key: Array) -> tuple[State, Array, Metrics]:
        """The rewards that are learned from, the bonus for what is new among them, whose model learns."""
        reward = normalize.rewards(state.reward_stats, normalize.clipped(config.reward_clip, steps.reward))
        reward = reward * state.hyper.reward_scale
        if not curiosity:
            return state, reward, {}
        transitions = intrinsic.Transitions(steps.obs, steps.extras, steps.next_obs)
        learned, bonus, metrics = curiosity.update(state.bonus, transitions, state.hyper.bonus, *key)
        return state._replace(bonus=learned), reward + state.hyper.bonus.weight * bonus, metrics

    def with_targets(state: State, steps: rollout.Steps, reward: Array) -> Batch:
        """Lambda returns of a rollout, as training sequences."""
        obs = normalize.observations(state.obs_stats, steps.obs)
        memories, q = network.unroll(state.params, state.actors.memory, obs, steps.first)

        def value_of(obs: Observation, t: Array, b: Array) -> Array:
            obs = normalize.observations(state.obs_stats, obs)
            memory = network.memory_at(memories, t, b)
            return best_value(network.step(state.params, memory, obs, jnp.zeros(t.shape, bool))[1], obs)

        v_t = rollout.following_values(env, steps, best_value(q, steps.obs), value_of, network.heavy)
        discount_t = state.hyper.gamma * (1 - steps.terminated)
        continue_t = 1.0 - (steps.terminated | steps.truncated)
        q_lambda = state.hyper.q_lambda
        target = returns.over_batch(returns.lambda_returns, reward, discount_t, v_t, continue_t, q_lambda)
        batch = Batch(obs, steps.first, steps.extras, target)
        return batch if network.remembers else jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)

    def learn(state: State, batch: Batch, key: Array) -> tuple[State, Metrics]:
        """Epochs of minibatch steps, and their mean metrics."""
        tx = algorithm.current_optimizer(config, state, optimizer)
        order = rollout.minibatches(key, batch.first.shape[1], config.num_epochs, config.num_minibatches)

        def minibatch(carry: tuple[Any, Any], rows: Array) -> tuple[tuple[Any, Any], Metrics]:
            part = jax.tree.map(lambda x: x[:, rows], batch)
            start = jax.tree.map(lambda x: x[rows], state.actors.memory)
            step = optim.minimize(tx, lambda p: loss(p, start, part), *carry)
            return (step.params, step.opt_state), step.extra | {"grad_norm": step.grad_norm}

        (params, opt_state), metrics = loops.scan(minibatch, (state.params, state.opt_state), order)
        means = jax.tree.map(jnp.mean, metrics)
        means |= {"root_loss": jnp.sqrt(means["loss"]), "epsilon": exploration(state)}
        return state._replace(params=params, opt_state=opt_state), means

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_params, key_envs, key_run, key_optimizer, *key_bonus = jax.random.split(key, 5 if curiosity else 4)
        return State(
            **algorithm.start_learning(config, hyper, network.init(key_params), key_optimizer, num_updates, optimizer),
            actors=rollout.start(env, key_envs, config.num_envs, network.memory),
            **normalize.start(config, observation_spec(env), start),
            bonus=curiosity.init(*key_bonus, config.num_envs) if curiosity else None,
            key=key_run,
        )

    return Algorithm(
        init=init,
        update=update,
        act=functools.partial(value_policy.act, network),
        env_steps_per_update=config.num_envs * config.num_steps,
        name="pqn",
        env=env,
        config=config,
        hyper=hyper,
        uses_length=True,
        remake=remake,
        check_hyper=check_hyper,
    )


class State(NamedTuple):
    """The whole run."""

    params: Params
    opt_state: OptState
    actors: rollout.Actors
    obs_stats: normalize.Stats | None
    reward_stats: normalize.RewardStats | None
    bonus: Any  # intrinsic.State; None without a bonus
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


class Batch(NamedTuple):
    """Training data ``[L, N, ...]``: N sequences of length L (of length 1 unless the network is recurrent)."""

    obs: Observation
    first: Array
    action: Array
    target: Array
