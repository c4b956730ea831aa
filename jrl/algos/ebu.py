"""Episodic backward update of deep Q-learning (Lee et al. 2019, arXiv 1805.12375).

A stretch of an episode is drawn from the replay, and its targets are made from its end backwards with the target network Q':

    y_t = r_t + gamma max_a q~(a)
    q~  = Q'(x_{t+1}, .), but for the action that was taken there, with  beta y_{t+1} + (1 - beta) Q'(x_{t+1}, a_{t+1})      (algorithm 2)

so that one update carries a reward back over the whole stretch, where deep Q-learning carries it one step. The diffusion
factor beta keeps single lucky returns from being believed at once: 0 is deep Q-learning, 1 takes them as they are.

What differs from the paper: ``batch_size`` stretches of ``length`` steps make one minibatch, which may begin within an episode and run on
into the next (nothing is carried across), instead of minibatches along one whole episode; truncated episodes bootstrap from their last
observation.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import algorithm, nets
from jrl.algorithm import Algorithm, Metrics
from jrl.algos import value_policy
from jrl.envs.strict import strict
from jrl.envs.types import Environment, observation_spec
from jrl.equations import returns
from jrl.experience import normalize, replay, rollout
from jrl.experience.greedy import mask, pick
from jrl.numerics import checks, optim
from jrl.numerics.settings import (
    AboveZero,
    NonNegative,
    NonNegativeInt,
    Positive,
    Precision,
    Settings,
    Unit,
    check_hyper,
)
from jrl.numerics.types import Observation, OptState, Params

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    num_envs: Positive = 10  # Environments that each seed steps in parallel.
    num_steps: Positive = 1  # Steps of each environment per update.
    num_gradient_steps: Positive = 1  # Minibatches per update.
    batch_size: Positive = 4  # Stretches in a minibatch.
    length: Positive = 64  # Steps of a stretch.
    capacity: Positive = 10_000  # Rows of the replay, over all environments.
    learning_starts: NonNegativeInt = 1_000  # Environment steps before the first gradient step.
    target_every: NonNegativeInt = 50  # Updates between copies to the target network; 0 for a soft update each time.
    normalize_observations: bool = False  # Standardize observations by running statistics.
    normalize_rewards: bool = False  # Divide rewards by the running deviation of discounted returns.
    reward_clip: NonNegative = 0.0  # Bound that rewards are cut off at, above and below 0; 0 for none.
    # Shape of the network.
    network: nets.ValueConfig = field(default_factory=lambda: nets.ValueConfig(norm="none"))
    optimizer: optim.OptimizerConfig = field(default_factory=optim.OptimizerConfig)  # What the optimizer is made of.
    # float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    precision: Precision = "float32"


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 5e-4  # Initial learning rate; decays by config.optimizer.schedule.
    gamma: Unit = 0.99  # Discount of the return.
    diffusion: Unit = 0.5  # Beta: how far the target of the next step is believed.
    epsilon_start: Unit = 1.0  # Share of actions chosen uniformly at the start of the run.
    epsilon_end: Unit = 0.05  # Final share, and that of a run of unknown length.
    epsilon_fraction: Unit = 0.2  # Share of the run over which epsilon falls linearly.
    tau: Unit = 0.01  # Polyak coefficient of a soft target update; 1 copies the online network.
    max_grad_norm: AboveZero = 10.0  # Largest global norm of a gradient, or the bound of config.optimizer.clip.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.


def make(
    env: Environment,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    network: nets.Network | None = None,
    optimizer: algorithm.Optimizer | None = None,
    start: Any = None,
) -> Algorithm:
    """EBU in ``env``, which must have discrete actions. ``hyper`` are the defaults of ``init``; ``network`` and ``optimizer`` take the place
    of those that ``config`` describes; ``start``, the state of one trained seed, gives the parameters to begin with.

    Raises ``ValueError`` for a setting that is wrong or does not fit the environment, or a replay larger than memory.
    """
    check(config, hyper)
    env, defaults = strict(env), hyper
    remake = functools.partial(make, env, hyper=hyper, network=network, optimizer=optimizer, start=start)
    spec = observation_spec(env)
    normalize.check(config, spec)
    network = value_policy.plain_network("EBU", env, config, network, start)
    num_rows = config.length + 1  # the last only to bootstrap from
    store = replay.make_sequences(spec, config.num_envs, config.capacity, config.batch_size, num_rows)
    per_update = config.num_envs * config.num_steps
    first_learning = -(-max(config.learning_starts, num_rows * config.num_envs) // per_update)

    def update(state: State) -> tuple[State, Metrics]:
        keys = jax.random.split(state.key, 3 + config.num_gradient_steps)
        key, key_noise, key_envs = keys[:3]
        actors, steps, played = value_policy.collect(env, config, network, state, key_noise, key_envs)
        buffer = replay.add_rollout(store, state.buffer, steps, steps.extras, config.reward_clip)
        state = state._replace(actors=actors, buffer=buffer, key=key)
        ready = state.updates + 1 >= first_learning  # counted in updates: steps would overflow
        state, metrics = algorithm.learn_from_replay(learn, state, keys[3:], ready, config.target_every)
        state = state._replace(**normalize.after(state, steps))
        return state, metrics | played

    def learn(state: State, key: Array, ready: Array) -> tuple[State, Metrics]:
        """One minibatch of stretches."""
        seq = store.sample(state.buffer, key)
        obs = normalize.observations(state.obs_stats, seq.obs)
        target = targets(state, obs, seq._replace(reward=normalize.rewards(state.reward_stats, seq.reward)))
        used = (seq.kind[:-1] != replay.FINAL) & (seq.weight > 0)[None]
        number = jnp.maximum(used.sum(), 1)

        def loss(params: Params) -> tuple[Array, Metrics]:
            taken = pick(outputs(params, jax.tree.map(lambda x: x[:-1], obs)), seq.action[:-1])
            mse = jnp.sum(jnp.where(used, target - taken, 0.0) ** 2) / number
            return 0.5 * mse, {"loss": mse, "q": jnp.sum(jnp.where(used, taken, 0.0)) / number}

        tx = algorithm.current_optimizer(config, state, optimizer)
        step = optim.minimize(tx, loss, state.params, state.opt_state)
        state = state._replace(params=step.params, opt_state=step.opt_state)
        return state, step.extra | {"grad_norm": step.grad_norm}

    def targets(state: State, obs: Observation, seq: replay.Sequences) -> Array:
        """Targets ``[length, N]`` of the actions taken, made backwards."""
        q_t = mask(outputs(state.target_params, obs), obs)[1:]
        kind, reward, action = seq.kind[:-1], seq.reward[:-1], seq.action[1:]
        discount_t = state.hyper.gamma * (kind != replay.TERMINATED)
        continue_t = (1.0 * (kind == replay.MID)).at[-1].set(0.0)  # what was done in the last row is not followed
        diffusion = state.hyper.diffusion
        return returns.over_batch(returns.backward_targets, reward, discount_t, q_t, action, continue_t, diffusion)

    def outputs(params: Params, obs: Observation) -> Array:
        """Values ``[L, N, A]`` of all actions in rows ``[L, N]``."""
        length, number = jax.tree.leaves(obs)[0].shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), obs)
        return nets.outputs(network, params, flat).reshape(length, number, -1)

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        keys = jax.random.split(key, 4)
        return State(
            **value_policy.start_learning(env, config, hyper, network, store, keys, num_updates, optimizer),
            **normalize.start(config, spec, start),
        )

    return Algorithm(
        init=init,
        update=update,
        act=functools.partial(value_policy.act, network),
        env_steps_per_update=per_update,
        name="ebu",
        env=env,
        config=config,
        hyper=hyper,
        uses_length=True,
        remake=remake,
        check_hyper=check_hyper,
    )


class State(NamedTuple):
    """The whole run, the replay included."""

    params: Params
    target_params: Params
    opt_state: OptState
    actors: rollout.Actors
    obs_stats: normalize.Stats | None
    reward_stats: normalize.RewardStats | None
    buffer: replay.Buffer
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


def check(config: Config, hyper: Hyper) -> None:
    """Raise ``ValueError`` for settings that are wrong or do not fit each other."""
    checks.instances("ebu.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    replay.check_learning_starts(config)
    least = (config.length + 3) * config.num_envs
    if config.capacity < least:
        raise ValueError(
            f"config.capacity must be at least {least}, length + 3 rows for each environment; got {config.capacity}"
        )
