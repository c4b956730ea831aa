"""Return decomposition for delayed rewards: RUDDER (Arjona-Medina et al. 2019, arXiv 1806.07857).

A recurrent network predicts, after each step of an episode, the return that the episode will have had at its end:

    loss             (G - g_T)^2 + w / (T + 1) sum_t (G - g_t)^2        g_t from x_0, a_0, ..., x_t, a_t       (section 3)
    new rewards      r'_0 = g_0,  r'_t = g_t - g_{t-1},  r'_T = G - g_{T-1}                                    (eq. 4)

A step is paid for what it changes in the prediction, when it changes it. The new rewards of an episode sum to its return whatever the
network predicts, so that policies keep their returns (theorem 1); they come early where it predicts well.

``make`` learns the network from whole episodes in which actions are chosen uniformly, the newest of which it keeps; ``redistributed``
is the environment with the new rewards, in which any algorithm learns. Unlike the paper the prediction is not made anew
while the policy learns, and differences are the only analysis of contributions.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import algorithm, nets
from jrl.algorithm import Algorithm, Metrics
from jrl.algos.ppo import action_distribution
from jrl.envs import wrappers
from jrl.envs.spaces import Discrete, to_env, to_vector
from jrl.envs.strict import strict
from jrl.envs.types import Environment, MaskedObs, example_action, observation_spec, without_mask
from jrl.experience import normalize, rollout
from jrl.nets.actor_critic import policy_params, policy_width
from jrl.numerics import checks, optim, precision
from jrl.numerics.settings import AboveZero, NonNegative, Positive, Precision, Settings, check_hyper
from jrl.numerics.types import EnvState, Memory, Observation, OptState, Params

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    num_envs: Positive = 16  # Episodes that each seed plays per update, one in each environment.
    num_gradient_steps: Positive = 64  # Minibatches per update.
    batch_size: Positive = 32  # Episodes in a minibatch.
    capacity: Positive = 512  # Episodes that are kept.
    lstm: Positive = 32  # Width of the recurrent network.
    hidden: tuple[Positive, ...] = (32,)  # Widths of the dense layers before it.
    optimizer: optim.OptimizerConfig = field(default_factory=optim.OptimizerConfig)  # What the optimizer is made of.
    # float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    precision: Precision = "float32"


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 1e-2  # Initial learning rate; decays by config.optimizer.schedule.
    early_weight: NonNegative = 5.0  # w: weight of the errors of all predictions beside that of the last.
    max_grad_norm: AboveZero = 1.0  # Largest global norm of a gradient, or the bound of config.optimizer.clip.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.


def make(
    env: Environment,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    optimizer: algorithm.Optimizer | None = None,
) -> Algorithm:
    """The prediction of returns in ``env``, which must have a time limit; its ``act`` chooses uniformly. ``hyper`` are the defaults of
    ``init``; ``optimizer`` takes the place of the one that ``config`` describes.

    Raises ``ValueError`` for a setting that is wrong or does not fit the environment.
    """
    checks.instances("rudder.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    env, defaults = strict(env), hyper
    if env.time_limit is None:
        raise ValueError(
            f"rudder needs episodes that end; {env.name} has no time limit: wrap it in wrappers.time_limit"
        )
    limit: int = env.time_limit
    if config.capacity < max(config.num_envs, config.batch_size):
        raise ValueError(f"config.capacity must be at least num_envs and batch_size; got {config.capacity}")
    remake = functools.partial(make, env, hyper=hyper, optimizer=optimizer)
    network = network_of(env, config)
    uniform = uniform_policy(env)

    def update(state: State) -> tuple[State, Metrics]:
        key, key_envs, key_act, key_run, key_learn = jax.random.split(state.key, 5)
        actors = rollout.start(env, key_envs, config.num_envs, ())

        def act(nothing: Any, obs: Observation, first: Array, key: Array) -> tuple[Any, Array, Any]:
            action = uniform(obs, jax.random.split(key, config.num_envs))
            return nothing, action, action

        keys = jax.random.split(key_act, limit)
        _, steps, _ = rollout.collect(env, actors, act, keys, key_run, limit)
        episodes = one_episode(steps)
        at = (state.updates * config.num_envs + jnp.arange(config.num_envs)) % config.capacity
        kept = jax.tree.map(lambda store, new: store.at[at].set(new), state.episodes, episodes)
        stats = normalize.update(state.return_stats, episodes.total)
        state = state._replace(key=key, updates=state.updates + 1, episodes=kept, return_stats=stats)
        state, metrics = jax.lax.scan(learn, state, jax.random.split(key_learn, config.num_gradient_steps))
        means = jax.tree.map(jnp.mean, metrics)
        played = {"episodes": jnp.float32(config.num_envs), "episode_return": episodes.total.mean()}
        return state, means | played | {"episode_length": episodes.alive.sum() / config.num_envs}

    def learn(state: State, key: Array) -> tuple[State, Metrics]:
        """One minibatch of episodes."""
        stored = jnp.minimum(state.updates * config.num_envs, config.capacity)
        rows = jax.random.randint(key, (config.batch_size,), 0, stored)
        part = jax.tree.map(lambda x: jnp.swapaxes(x[rows], 0, 1) if x.ndim > 1 else x[rows], state.episodes)
        target = normalize.standardize(state.return_stats, part.total)

        def loss(params: Params) -> tuple[Array, Metrics]:
            first = jnp.zeros_like(part.alive).at[0].set(True)
            memory = jax.tree.map(lambda x: jnp.broadcast_to(x, (config.batch_size, *x.shape)), network.memory)
            _, g = network.unroll(params, memory, seen(env, part.obs, part.action), first)
            error = jnp.square(g[..., 0] - target) * part.alive
            length = part.alive.sum(0)
            last = jnp.take_along_axis(error, jnp.maximum(length - 1, 0)[None], axis=0)[0]
            total = jnp.mean(last + state.hyper.early_weight * error.sum(0) / jnp.maximum(length, 1))
            return total, {"loss": total, "last_error": last.mean(), "first_error": error[0].mean()}

        tx = algorithm.current_optimizer(config, state, optimizer)
        step = optim.minimize(tx, loss, state.params, state.opt_state)
        state = state._replace(params=step.params, opt_state=step.opt_state)
        return state, step.extra | {"grad_norm": step.grad_norm}

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_params, key_run, key_optimizer = jax.random.split(key, 3)
        learner = algorithm.start_learning(
            config, hyper, network.init(key_params), key_optimizer, num_updates, optimizer
        )
        return State(
            **learner,
            episodes=empty(env, config.capacity, limit),
            return_stats=normalize.init(()),
            key=key_run,
        )

    def act(state: State, obs: Observation, key: Array | None = None, memory: Memory = None) -> tuple[Array, Any]:
        one = jax.tree.map(lambda x: x[None], obs)
        return uniform(one, (jax.random.key(0) if key is None else key)[None])[0], ()

    return Algorithm(
        init=init,
        update=update,
        act=act,
        env_steps_per_update=config.num_envs * limit,
        name="rudder",
        env=env,
        config=config,
        hyper=hyper,
        uses_length=config.optimizer.uses_length,
        remake=remake,
        check_hyper=check_hyper,
    )


class Episodes(NamedTuple):
    """Whole episodes ``[N, L]``, one after the other in a ring."""

    obs: Observation
    action: Array
    alive: Array  # bool: the step belongs to the episode
    total: Array  # float32 [N]: return


class State(NamedTuple):
    """The whole run, the episodes included."""

    params: Params
    opt_state: OptState
    return_stats: normalize.Stats
    episodes: Episodes
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


def redistributed(predictor: Algorithm, state: State) -> Environment:
    """The environment of ``predictor`` with the new rewards, by what was learned in ``state`` of one seed. The rewards of every episode sum
    to what they did."""
    env = predictor.env
    network = network_of(env, predictor.config)

    def reset(key: Array) -> tuple[Any, Any]:
        obs, inner = env.reset(key)
        return obs, (inner, obs, network.memory, jnp.float32(0), jnp.float32(0))

    def step(key: Array, carry: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        inner, obs, memory, before, total = carry
        one = jax.tree.map(lambda x: x[None], (memory, seen(env, obs, action), jnp.bool_(False)))
        memory, g = jax.tree.map(lambda x: x[0], network.step(state.params, *one))
        prediction = normalize.destandardize(state.return_stats, g[0])
        obs, inner, reward, terminated, truncated = env.step(key, inner, action)
        total = total + reward
        now = jnp.where(terminated | truncated, total, prediction)
        return obs, (inner, obs, memory, now, total), now - before, terminated, truncated

    return wrappers.wrapped_as(env, "redistributed", {}, reset=reset, step=step)


def network_of(env: Environment, config: Config) -> nets.Network:
    """The recurrent network, whose input is the pair of an observation and the action taken, and whose output is one number."""
    spec = jax.eval_shape(lambda obs: seen(env, obs, example_action(env.action_space)), observation_spec(env))
    shape = nets.ValueConfig(hidden=config.hidden, lstm=config.lstm, norm="none")
    return precision.apply_to_network(config.precision, nets.action_values(shape, spec, Discrete(1)))


def seen(env: Environment, obs: Observation, action: Array) -> tuple[Observation, Array]:
    """What the network is given of steps ``[...]``."""
    return without_mask(obs), to_vector(env.action_space, action)


def one_episode(steps: rollout.Steps) -> Episodes:
    """The first episode of each environment, of steps ``[T, B]``."""
    ended = steps.terminated | steps.truncated
    alive = jnp.cumsum(ended, axis=0) - ended == 0
    total = jnp.sum(steps.reward * alive, axis=0)
    obs, action = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (steps.obs, steps.extras))
    return Episodes(obs, action, alive.T, total)


def empty(env: Environment, capacity: int, limit: int) -> Episodes:
    """Room for episodes."""
    shape = (capacity, limit)
    obs, action = observation_spec(env), example_action(env.action_space)
    zeros = jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape), x.dtype), (obs, action))
    return Episodes(zeros[0], zeros[1], jnp.zeros(shape, bool), jnp.zeros(capacity, jnp.float32))


def uniform_policy(env: Environment) -> Callable[[Observation, Array], Array]:
    """``(obs [N], keys [N]) -> actions [N]``, all choices that are legal alike, and real numbers normal about the middle of their bounds."""
    space = env.action_space
    distribution = action_distribution(space)

    def choose(obs: Observation, keys: Array) -> Array:
        zeros = jnp.zeros((keys.shape[0], policy_width(space)), jnp.float32)
        policy = policy_params(nets.Config(), space, zeros, zeros, obs.mask if isinstance(obs, MaskedObs) else None)
        return to_env(space, jax.vmap(distribution.sample)(keys, policy))

    return choose
