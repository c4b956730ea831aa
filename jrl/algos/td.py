"""Temporal differences with tables and linear features (Sutton & Barto, 2nd ed., chapters 5-7, 9, 11, 12).

From the Bellman equation to the update, in four lines:

    v_pi(s) = E[ R + gamma v_pi(S') | S = s ]                       Bellman equation                        (3.14)
    0       = E[ R + gamma v(S') - v(S) | S = s ]                   holds for v = v_pi, and for no other v
    delta   = R + gamma v(S') - v(S)                                one sample of it, the TD error          (6.5)
    v(S)   <- v(S) + alpha delta                                    a step that brings its mean to 0        (6.2)

With features ``v(s) = w . x(s)``, a table being one-hot features, the step is ``w <- w + alpha delta x(S)``: the
gradient of ``-1/2 (target - w . x)^2`` with the target held still, hence *semi-gradient* (9.7).

``prediction.py`` beside this, whose names are here too, learns the value of a policy from a stream of transitions. This
file learns to act: each method is one equation for its target (``METHODS``), and ``make`` runs them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, Metrics
from jrl.algos.prediction import Stream as Stream
from jrl.algos.prediction import gradient_td as gradient_td
from jrl.algos.prediction import lambda_return as lambda_return
from jrl.algos.prediction import monte_carlo as monte_carlo
from jrl.algos.prediction import n_step_td as n_step_td
from jrl.algos.prediction import td as td
from jrl.algos.prediction import td_lambda as td_lambda
from jrl.envs.strict import strict
from jrl.envs.types import Discrete, Environment, MaskedObs, next_episode, observation_spec
from jrl.experience.rollout import mean_or_nan
from jrl.numerics import checks
from jrl.numerics.precision import exact
from jrl.numerics.settings import NonNegative, Positive, Settings, Unit, check_hyper
from jrl.numerics.types import Memory, Observation

Array = jax.Array


# Control: action values that are linear in the observation, ``q(x, a) = q[a] . x``; a table for one-hot observations

Method = Literal["sarsa", "expected_sarsa", "q_learning", "double_q", "sarsa_lambda", "watkins_q", "tree_backup"]


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    # sarsa (6.7), expected_sarsa (6.9), q_learning (6.8), double_q (6.10), sarsa_lambda (section 12.7), watkins_q (section 12.10), or
    # tree_backup (n steps, section 7.5).
    method: Method = "q_learning"
    trace: Literal["accumulating", "replacing"] = "accumulating"  # Eligibility traces of the lambda methods.
    n: Positive = 3  # Steps of tree_backup.
    num_steps: Positive = 100  # Environment steps per update; each one is learned from at once.
    initial: float = 0.0  # Initial weights; for a table the value of every state and action.


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 0.1  # Alpha.
    gamma: Unit = 0.99  # Discount of the return.
    epsilon: Unit = 0.1  # Share of actions chosen uniformly.
    trace_decay: Unit = 0.9  # Lambda of sarsa_lambda and watkins_q.


class Transition(NamedTuple):
    """One step as the learner sees it; ``a_t`` is the action it will take next. Actions are one-hot ``[A]``."""

    x_tm1: Array
    a_tm1: Array
    r_t: Array
    discount_t: Array
    x_t: Array
    a_t: Array
    legal_t: Array
    ended: Array


class State(NamedTuple):
    """The whole run. ``q`` is ``[A, d]``, or ``[2, A, d]`` for double_q."""

    q: Array
    memory: Memory  # of the method: traces [A, d], or the last n transitions
    env_state: Any
    x: Array
    legal: Array
    action: Array  # chosen for x already: sarsa learns from the action that it will take
    episode_return: Array
    episode_length: Array
    key: Array
    hyper: Hyper


def expected(q: Array, pi: Array) -> Array:
    """``sum_a pi(a) q(a)``."""
    return jnp.sum(pi * q)


def epsilon_greedy(q: Array, epsilon: Array | float, legal: Array) -> Array:
    """Probabilities ``[A]``: epsilon spread over all legal actions, the rest over the best ones, ties evenly."""
    best = legal & (q == jnp.max(jnp.where(legal, q, -jnp.inf)))
    return epsilon * legal / jnp.maximum(legal.sum(), 1) + (1 - epsilon) * best / jnp.maximum(best.sum(), 1)


def make(env: Environment, config: Config = Config(), hyper: Hyper = Hyper()) -> Algorithm:
    """A method of control in ``env``, which must have discrete actions and a float observation vector.

    ``envs.tabular.environment(mdp)`` makes one of any finite process. Raises ``ValueError`` for another environment or a
    number out of range.
    """
    checks.instances("td.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    env = strict(env)
    spec = observation_spec(env)
    shape = spec.obs if isinstance(spec, MaskedObs) else spec
    if not isinstance(env.action_space, Discrete):
        raise ValueError(f"td needs discrete actions; {env.name} has {env.action_space}")
    if getattr(shape, "ndim", 0) != 1:
        raise ValueError(f"td needs an observation vector; {env.name} has {shape}")
    num_actions, num_features = env.action_space.n, shape.shape[0]
    learn, start_memory = METHODS[config.method]
    defaults = hyper

    def look(obs: Observation) -> tuple[Array, Array]:
        if isinstance(obs, MaskedObs):
            return obs.obs.astype(jnp.float32), obs.mask
        return obs.astype(jnp.float32), jnp.ones(num_actions, bool)

    def values(q: Array, x: Array) -> Array:
        return (q.sum(0) if config.method == "double_q" else q) @ x

    def choose(key: Array, q: Array, x: Array, legal: Array, epsilon: Array | float) -> Array:
        return jax.random.categorical(key, jnp.log(epsilon_greedy(values(q, x), epsilon, legal))).astype(jnp.int32)

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_reset, key_action, key_run = jax.random.split(key, 3)
        hyper = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyper)
        obs, env_state = env.reset(key_reset)
        x, legal = look(obs)
        shape = (num_actions, num_features)
        q = jnp.full((2, *shape) if config.method == "double_q" else shape, config.initial, jnp.float32)
        action = choose(key_action, q, x, legal, hyper.epsilon)
        memory = start_memory(config, num_actions, num_features)
        zero = jnp.float32(0)
        return State(q, memory, env_state, x, legal, action, zero, zero, key_run, hyper)

    def step(state: State, _: None) -> tuple[State, tuple[Array, ...]]:
        key, key_env, key_reset, key_action, key_coin = jax.random.split(state.key, 5)
        obs, env_state, reward, terminated, truncated = env.step(key_env, state.env_state, state.action)
        x_t, legal_t = look(obs)
        key_next, key_first = jax.random.split(key_action)
        a_t = choose(key_next, state.q, x_t, legal_t, state.hyper.epsilon)
        ended = terminated | truncated
        one_hot = jax.nn.one_hot(jnp.stack([state.action, a_t]), num_actions, dtype=jnp.float32)
        discount_t = state.hyper.gamma * (1.0 - terminated)
        transition = Transition(state.x, one_hot[0], reward, discount_t, x_t, one_hot[1], legal_t, ended)
        q, memory, delta = learn(config, state.hyper, state.q, state.memory, transition, key_coin)

        first_obs, first_state = next_episode(env, key_reset, env_state)
        first_x, first_legal = look(first_obs)
        first_action = choose(key_first, q, first_x, first_legal, state.hyper.epsilon)
        fresh = (first_state, first_x, first_legal, first_action)
        env_state, x, legal, action = jax.tree.map(
            lambda new, old: jnp.where(ended, new, old), fresh, (env_state, x_t, legal_t, a_t)
        )
        total, length = state.episode_return + reward, state.episode_length + 1
        kept = jnp.where(ended, 0.0, total), jnp.where(ended, 0.0, length)
        counted = (ended.astype(jnp.float32), jnp.where(ended, total, 0.0), jnp.where(ended, length, 0.0), delta**2)
        return State(q, memory, env_state, x, legal, action, *kept, key, state.hyper), counted

    def update(state: State) -> tuple[State, Metrics]:
        state, (ended, total, length, squared) = jax.lax.scan(step, state, length=config.num_steps)
        episodes = ended.sum()
        return state, {
            "td_error": jnp.sqrt(squared.mean()),
            "episodes": episodes,
            "episode_return": mean_or_nan(total.sum(), episodes),
            "episode_length": mean_or_nan(length.sum(), episodes),
        }

    def act(state: State, obs: Observation, key: Array | None = None, memory: Memory = None) -> tuple[Array, Any]:
        x, legal = look(obs)
        if key is None:
            return jnp.argmax(jnp.where(legal, values(state.q, x), -jnp.inf)).astype(jnp.int32), ()
        return choose(key, state.q, x, legal, state.hyper.epsilon), ()

    def remake(config: Config) -> Algorithm:
        return make(env, config, hyper)

    init, update, act = exact(init), exact(update), exact(act)  # action values of tables are no place to round
    made = Algorithm(
        init, update, act, config.num_steps, "td", env, config, hyper, False, remake, check_hyper=check_hyper
    )
    return made._replace(losses=("td_error",), learned=lambda state: (state.q, state.memory))


# One method a function: (config, hyper, q, memory, transition, key) -> (q, memory, TD error)

Learned = tuple[Array, Any, Array]


def _one_step(target: Callable[[Hyper, Array, Transition], Array]) -> Callable[..., Learned]:
    """``q(s, a) += alpha (r + discount target - q(s, a))``."""

    def learn(config: Config, h: Hyper, q: Array, memory: Memory, t: Transition, key: Array) -> Learned:
        delta = t.r_t + t.discount_t * target(h, q @ t.x_t, t) - t.a_tm1 @ q @ t.x_tm1
        return q + h.learning_rate * delta * jnp.outer(t.a_tm1, t.x_tm1), memory, delta

    return learn


def _best(q: Array, t: Transition) -> Array:
    return jnp.where(t.legal_t.any(), jnp.max(jnp.where(t.legal_t, q, -jnp.inf)), 0.0)


def _double_q(config: Config, h: Hyper, q: Array, memory: Memory, t: Transition, key: Array) -> Learned:
    """One table, by the toss of a coin, moves to the other's value of the action that is best by its own (6.10)."""
    first = jax.random.bernoulli(key)
    this, other = jnp.where(first, q, q[::-1])
    best = jax.nn.one_hot(jnp.argmax(jnp.where(t.legal_t, this @ t.x_t, -jnp.inf)), len(t.a_t), dtype=jnp.float32)
    delta = t.r_t + t.discount_t * (best @ other @ t.x_t) - t.a_tm1 @ this @ t.x_tm1
    changed = this + h.learning_rate * delta * jnp.outer(t.a_tm1, t.x_tm1)
    return jnp.where(first, jnp.stack([changed, other]), jnp.stack([other, changed])), memory, delta


def _with_traces(greedy: bool) -> Callable[..., Learned]:
    """SARSA(lambda), or Watkins's Q(lambda), whose traces end with the first action that is not greedy."""

    def learn(config: Config, h: Hyper, q: Array, e: Array, t: Transition, key: Array) -> Learned:
        q_t = q @ t.x_t
        target = _best(q_t, t) if greedy else t.a_t @ q_t
        delta = t.r_t + t.discount_t * target - t.a_tm1 @ q @ t.x_tm1
        here = jnp.outer(t.a_tm1, t.x_tm1)
        e = e + here if config.trace == "accumulating" else jnp.where(here != 0, here, e)
        q = q + h.learning_rate * delta * e
        goes_on = ~t.ended & (t.a_t @ q_t >= target) if greedy else ~t.ended
        return q, e * jnp.where(goes_on, t.discount_t * h.trace_decay, 0.0), delta

    return learn


class _Window(NamedTuple):
    """The last n transitions, the newest last, and which are there."""

    transitions: Transition
    there: Array


def _tree_backup(config: Config, h: Hyper, q: Array, window: _Window, t: Transition, key: Array) -> Learned:
    """n-step tree backup (7.16): the oldest of n transitions is learned from; at the end of an episode all that are left."""

    def push(old, new):
        return jnp.concatenate([old[1:], new[None]])

    w = jax.tree.map(push, window, _Window(t, jnp.bool_(True)))
    steps = w.transitions
    error = jnp.float32(0)
    for i in range(config.n):  # the book's order: the oldest first, each with the weights left by the one before
        pi = jax.vmap(lambda x, legal, q=q: epsilon_greedy(q @ x, h.epsilon, legal))(steps.x_t, steps.legal_t)
        g = expected(q @ steps.x_t[-1], pi[-1])
        g = steps.r_t[-1] + steps.discount_t[-1] * g
        for k in reversed(range(i, config.n - 1)):
            # What was not taken is expected by its value, what was taken by what came of it.
            values, taken = q @ steps.x_t[k], steps.a_tm1[k + 1]
            g = steps.r_t[k] + steps.discount_t[k] * (expected(values * (1 - taken), pi[k]) + (pi[k] @ taken) * g)
        delta = g - steps.a_tm1[i] @ q @ steps.x_tm1[i]
        due = w.there[i] & (t.ended | (i == 0))
        q = q + jnp.where(due, h.learning_rate * delta, 0.0) * jnp.outer(steps.a_tm1[i], steps.x_tm1[i])
        error = jnp.where(due, delta, error)
    return q, w._replace(there=w.there & ~t.ended), error


def _no_memory(config: Config, num_actions: int, num_features: int) -> Any:
    return ()


def _traces(config: Config, num_actions: int, num_features: int) -> Array:
    return jnp.zeros((num_actions, num_features), jnp.float32)


def _empty_window(config: Config, num_actions: int, num_features: int) -> _Window:
    x, a, scalar = (jnp.zeros((config.n, *shape), jnp.float32) for shape in ((num_features,), (num_actions,), ()))
    yes, legal = jnp.zeros(config.n, bool), jnp.ones((config.n, num_actions), bool)
    return _Window(Transition(x, a, scalar, scalar, x, a, legal, yes), yes)


METHODS: dict[str, tuple[Callable[..., Learned], Callable[..., Any]]] = {
    "sarsa": (_one_step(lambda h, q, t: t.a_t @ q), _no_memory),
    "expected_sarsa": (_one_step(lambda h, q, t: expected(q, epsilon_greedy(q, h.epsilon, t.legal_t))), _no_memory),
    "q_learning": (_one_step(lambda h, q, t: _best(q, t)), _no_memory),
    "double_q": (_double_q, _no_memory),
    "sarsa_lambda": (_with_traces(greedy=False), _traces),
    "watkins_q": (_with_traces(greedy=True), _traces),
    "tree_backup": (_tree_backup, _empty_window),
}
