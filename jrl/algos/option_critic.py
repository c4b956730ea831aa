"""The option-critic with tables and linear features (Bacon, Harb and Precup 2017, arXiv 1609.05140, algorithm 1).

Options w are policies pi_w(a|s) that go on until they terminate, with probability beta_w(s); a policy over options chooses the next.
All are learned at once, one step at a time:

    values          Q(s, w) = sum_a pi_w(a|s) Q_U(s, w, a)                                                       (eq. 1)
    upon arrival    U(w, s') = (1 - beta_w(s')) Q(s', w) + beta_w(s') max_w' Q(s', w')                           (eq. 3)
    critic          Q_U(s, w, a) += alpha (r + gamma U(w, s') - Q_U(s, w, a))                                    (eq. 2)
    options         theta += alpha_theta d log pi_w(a|s)/d theta (Q_U(s, w, a) - Q(s, w))                        (theorem 1, with a baseline)
    termination     nu -= alpha_nu d beta_w(s')/d nu (Q(s', w) - max_w' Q(s', w') + xi)                          (theorem 2)

An option that is worse than the best one where it arrives learns to stop there. The margin xi makes options last: without it they shrink
to single steps. The policy over options is epsilon-greedy; policies are softmax, terminations are logistic. Truncated episodes bootstrap from
their last observation.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, Metrics
from jrl.algos.td import epsilon_greedy
from jrl.envs.strict import strict
from jrl.envs.types import Discrete, Environment, next_episode, observation_spec
from jrl.experience.rollout import mean_or_nan
from jrl.numerics import checks
from jrl.numerics.precision import exact
from jrl.numerics.settings import AboveZero, NonNegative, Positive, Settings, Unit, check_hyper
from jrl.numerics.types import Memory, Observation

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    num_options: Positive = 4  # Options.
    num_steps: Positive = 100  # Environment steps per update; each one is learned from at once.


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 0.5  # Alpha of the critic.
    option_learning_rate: NonNegative = 0.25  # Alpha of the policies of options.
    termination_learning_rate: NonNegative = 0.25  # Alpha of the terminations.
    gamma: Unit = 0.99  # Discount of the return.
    epsilon: Unit = 0.05  # Share of options chosen uniformly.
    temperature: AboveZero = 0.1  # Temperature of the options' softmax policies.
    margin: NonNegative = 0.01  # Xi: advantage that an option must lack to be ended.


class State(NamedTuple):
    """The whole run: values, policies and terminations, and where the agent is."""

    q: Array  # [options, actions, d]
    theta: Array  # [options, actions, d]
    nu: Array  # [options, d]
    env_state: Any
    x: Array
    option: Array
    action: Array
    episode_return: Array
    episode_length: Array
    key: Array
    hyper: Hyper


class Step(NamedTuple):
    """What happened at one step, for metrics."""

    ended: Array
    total: Array
    length: Array
    squared_error: Array
    switched: Array


def make(env: Environment, config: Config = Config(), hyper: Hyper = Hyper()) -> Algorithm:
    """The option-critic in ``env``, which must have discrete actions, all legal, and a float observation vector.

    The memory of ``act`` is the option under way. Raises ``ValueError`` for another environment or a number out of range.
    """
    checks.instances("option_critic.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    env, defaults = strict(env), hyper
    spec = observation_spec(env)
    if not isinstance(env.action_space, Discrete) or hasattr(spec, "mask"):
        raise ValueError(f"option_critic needs discrete actions, all of them legal; {env.name} has {env.action_space}")
    if getattr(spec, "ndim", 0) != 1:
        raise ValueError(f"option_critic needs an observation vector; {env.name} has {spec}")
    num_options, num_actions, num_features = config.num_options, env.action_space.n, spec.shape[0]
    every_option = jnp.ones(num_options, bool)

    def step(state: State, _: None) -> tuple[State, Step]:
        key, key_env, key_reset, key_next, key_first = jax.random.split(state.key, 5)
        obs, env_state, reward, terminated, truncated = env.step(key_env, state.env_state, state.action)
        x_t, ended = obs.astype(jnp.float32), terminated | truncated
        state, error = learn(state, reward, state.hyper.gamma * (1.0 - terminated), x_t, terminated)
        option, action = choose(state, x_t, state.option, key_next)
        switched = option != state.option

        first_obs, first_state = next_episode(env, key_reset, env_state)
        first_x = first_obs.astype(jnp.float32)
        first_option, first_action = begin(state, first_x, key_first)
        env_state, x, option, action = jax.tree.map(
            lambda new, old: jnp.where(ended, new, old),
            (first_state, first_x, first_option, first_action),
            (env_state, x_t, option, action),
        )
        total, length = state.episode_return + reward, state.episode_length + 1
        happened = Step(ended, jnp.where(ended, total, 0.0), jnp.where(ended, length, 0.0), error**2, switched & ~ended)
        state = state._replace(env_state=env_state, x=x, option=option, action=action, key=key)
        return state._replace(
            episode_return=jnp.where(ended, 0.0, total), episode_length=jnp.where(ended, 0.0, length)
        ), happened

    def learn(state: State, reward: Array, discount_t: Array, x_t: Array, terminated: Array) -> tuple[State, Array]:
        """One step of critic, options and terminations, and the critic's error."""
        h, w, a, x = state.hyper, state.option, state.action, state.x
        q_t, beta = values(state, x_t), jax.nn.sigmoid(state.nu[w] @ x_t)
        error = reward + discount_t * upon_arrival(q_t, w, beta) - state.q[w, a] @ x
        pi = policy(state, w, x)
        q_u = state.q[w] @ x
        advantage = q_u[a] - pi @ q_u
        slope = jnp.outer(jax.nn.one_hot(a, num_actions) - pi, x)  # times the temperature, which alpha has in it
        regret = jnp.where(terminated, 0.0, q_t[w] - q_t.max() + h.margin)
        return state._replace(
            q=state.q.at[w, a].add(h.learning_rate * error * x),
            theta=state.theta.at[w].add(h.option_learning_rate * advantage * slope),
            nu=state.nu.at[w].add(-h.termination_learning_rate * beta * (1 - beta) * regret * x_t),
        ), error

    def values(state: State, x: Array) -> Array:
        """``Q(s, w)`` of all options."""
        return jnp.stack([policy(state, w, x) @ (state.q[w] @ x) for w in range(num_options)])

    def policy(state: State, option: Array | int, x: Array) -> Array:
        """Probabilities of the actions of an option."""
        return jax.nn.softmax(state.theta[option] @ x / state.hyper.temperature)

    def choose(state: State, x: Array, option: Array, key: Array) -> tuple[Array, Array]:
        """The option that goes on, or the next, and its action."""
        key_stop, key_start = jax.random.split(key)
        stops = jax.random.bernoulli(key_stop, jax.nn.sigmoid(state.nu[option] @ x))
        key_option, key_action = jax.random.split(key_start)
        option = jnp.where(stops, sample_option(state, x, key_option), option)
        return option, sample_action(state, option, x, key_action)

    def begin(state: State, x: Array, key: Array) -> tuple[Array, Array]:
        """The option and the action with which an episode begins."""
        key_option, key_action = jax.random.split(key)
        option = sample_option(state, x, key_option)
        return option, sample_action(state, option, x, key_action)

    def sample_option(state: State, x: Array, key: Array) -> Array:
        chances = epsilon_greedy(values(state, x), state.hyper.epsilon, every_option)
        return jax.random.categorical(key, jnp.log(chances)).astype(jnp.int32)

    def sample_action(state: State, option: Array, x: Array, key: Array) -> Array:
        return jax.random.categorical(key, jnp.log(policy(state, option, x))).astype(jnp.int32)

    def update(state: State) -> tuple[State, Metrics]:
        state, steps = jax.lax.scan(step, state, length=config.num_steps)
        episodes = steps.ended.sum()
        return state, {
            "td_error": jnp.sqrt(steps.squared_error.mean()),
            "option_length": config.num_steps / jnp.maximum(steps.switched.sum() + episodes, 1),
            "episodes": episodes.astype(jnp.float32),
            "episode_return": mean_or_nan(steps.total.sum(), episodes),
            "episode_length": mean_or_nan(steps.length.sum(), episodes),
        }

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_reset, key_options, key_begin, key_run = jax.random.split(key, 4)
        hyper = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyper)
        obs, env_state = env.reset(key_reset)
        shape, x, zero = (num_options, num_actions, num_features), obs.astype(jnp.float32), jnp.float32(0)
        # Policies that are all alike would stay so, since each would learn the same.
        theta = hyper.temperature * jax.random.normal(key_options, shape, jnp.float32)
        q, nu, first = jnp.zeros(shape, jnp.float32), jnp.zeros((num_options, num_features), jnp.float32), jnp.int32(0)
        state = State(q, theta, nu, env_state, x, first, first, zero, zero, key_run, hyper)
        option, action = begin(state, x, key_begin)
        return state._replace(option=option, action=action)

    def act(state: State, obs: Observation, key: Array | None = None, memory: Memory = None) -> tuple[Array, Any]:
        x = obs.astype(jnp.float32)
        if key is not None:
            option, action = begin(state, x, key) if memory is None else choose(state, x, memory, key)
            return action, option
        option = best = jnp.argmax(values(state, x)).astype(jnp.int32)
        if memory is not None:
            option = jnp.where(state.nu[memory] @ x > 0, best, memory)
        return jnp.argmax(policy(state, option, x)).astype(jnp.int32), option

    init, update, act = exact(init), exact(update), exact(act)  # values of tables are no place to round
    return Algorithm(
        init=init,
        update=update,
        act=act,
        env_steps_per_update=config.num_steps,
        name="option_critic",
        env=env,
        config=config,
        hyper=hyper,
        uses_length=False,
        remake=functools.partial(make, env, hyper=hyper),
        losses=("td_error",),
        learned=lambda state: (state.q, state.theta, state.nu),
        check_hyper=check_hyper,
    )


def upon_arrival(q_t: Array, option: Array, beta: Array) -> Array:
    """``U(w, s')``: the option's value where it goes on, and the best one's where it stops; ``q_t`` are values of all options."""
    return (1 - beta) * q_t[option] + beta * q_t.max()
