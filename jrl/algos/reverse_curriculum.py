"""A reverse curriculum (Florensa et al. 2017, arXiv 1707.05300): episodes begin near the goal, and then ever farther from it.

One stage of the curriculum (algorithm 1):

    starts      new ones by random walks from good ones (procedure 2), and some that were good before
    learn       a few updates of any algorithm, whose episodes begin in these starts
    good        starts from which the policy succeeds with a frequency between low and high: neither solved nor hopeless

It is a transform: of an algorithm ``env -> Algorithm`` it makes one that learns the same policy by the curriculum. Where an episode can begin is
not always for the learner to say; here an environment's state is data.

What differs from the paper: the frequencies are those of episodes that are played for it, which count as environment steps, and a share of the
training episodes begins as the environment has it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import algorithm
from jrl.algorithm import Algorithm, Metrics
from jrl.algos.rudder import uniform_policy
from jrl.envs import wrappers
from jrl.envs.strict import strict
from jrl.envs.types import Environment
from jrl.experience import ring, rollout
from jrl.numerics import checks
from jrl.numerics.settings import Finite, Positive, Settings, Unit, check_hyper
from jrl.numerics.types import EnvState, Observation

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    num_updates: Positive = 4  # Updates of the algorithm in a stage.
    num_new: Positive = 20  # New starts of a stage.
    num_old: Positive = 10  # Starts of a stage that were good before.
    capacity: Positive = 500  # Good starts that are remembered.
    walk: Positive = 20  # Most random steps from a good start to a new one.
    episodes: Positive = 3  # Episodes from each start that tell whether it is good.
    horizon: Positive = 50  # Most steps of such an episode; longer ones have failed.


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learner: Any  # Hyperparameters of the algorithm.
    success: Finite = 0.5  # Least return of an episode that succeeds, without discount.
    low: Unit = 0.1  # Least frequency of success of a good start.
    high: Unit = 0.9  # Largest frequency of success of a good start.
    usual: Unit = 0.1  # Share of the training episodes that begin as the environment has it.


class Starts(NamedTuple):
    """First observations of episodes ``[N, ...]``, and the environment's states there."""

    obs: Observation
    state: EnvState


def make(
    learner: Callable[[Environment], Algorithm],
    env: Environment,
    near_goal: Callable[[Array], tuple[Observation, EnvState]],
    config: Config = Config(),
    hyper: Hyper | None = None,
) -> Algorithm:
    """The algorithm that ``learner`` makes for an environment, learning in ``env`` by a reverse curriculum. ``near_goal`` is like ``env.reset``,
    but begins close to the goal. Clocks, the parts of a state named ``time``, begin anew with each episode.

    Raises ``ValueError`` for settings that do not fit, and where ``near_goal`` does not return what ``env.reset`` returns.
    """
    checks.instances("reverse_curriculum.make", config=(config, Config))
    env = strict(env)
    inner = learner(env)
    defaults = hyper or Hyper(inner.hyper)
    check(config, defaults)
    check_near_goal(env, near_goal)
    uniform = uniform_policy(env)

    def update(state: State) -> tuple[State, Metrics]:
        key, key_starts, key_label = jax.random.split(state.key, 3)
        starts = new_starts(state, key_starts)
        beginning = learner(beginning_in(env, starts, state.hyper.usual))

        def one(learned: Any, _: None) -> tuple[Any, Metrics]:
            learned, metrics = beginning.update(learned)
            return learned, algorithm.to_sums(metrics)

        learned, sums = jax.lax.scan(one, state.inner, length=config.num_updates)
        metrics = algorithm.to_means(jax.tree.map(lambda x: x.sum(0), sums), config.num_updates)
        new = jax.tree.map(lambda x: x[config.num_old :], starts)
        frequency = successes(learned, new, state.hyper.success, key_label)
        solved, within = frequency > state.hyper.high, frequency >= state.hyper.low
        good = jnp.where((within & ~solved).any(), within & ~solved, solved)  # where all is too easy, on from there
        state = state._replace(inner=learned, good=ring.add(state.good, new, good), key=key, updates=state.updates + 1)
        return state, metrics | {"success": frequency.mean(), "good_starts": good.mean()}

    def new_starts(state: State, key: Array) -> Starts:
        """Starts of a stage: the ends of random walks from good ones, and good ones."""
        key_old, key_new, key_length, key_walk = jax.random.split(key, 4)
        old, _ = ring.sample(state.good, key_old, config.num_old)
        begin, _ = ring.sample(state.good, key_new, config.num_new, newest=config.num_new)
        length = jax.random.randint(key_length, (config.num_new,), 1, config.walk + 1)

        def step(starts: Any, x: tuple[Array, Array]) -> tuple[Any, Any]:
            t, key = x
            keys_act, keys_step = jax.random.split(key, (2, config.num_new))
            obs, walked, _, terminated, _ = jax.vmap(env.step)(keys_step, starts.state, uniform(starts.obs, keys_act))
            goes_on = (t < length) & ~terminated  # an episode cannot begin where it would end
            return rollout.where(goes_on, Starts(obs, walked), starts), None

        steps = (jnp.arange(config.walk), jax.random.split(key_walk, config.walk))
        new, _ = jax.lax.scan(step, begin, steps)
        return jax.tree.map(lambda *x: jnp.concatenate(x), old, new._replace(state=wound_back(env, new.state)))

    def successes(learned: Any, starts: Starts, least: Array | float, key: Array) -> Array:
        """How often the sampled policy returns at ``least`` so much from each new start, float32 ``[num_new]``."""
        several = jax.tree.map(lambda x: jnp.repeat(x, config.episodes, axis=0), starts)
        number = config.num_new * config.episodes

        def act(obs: Observation, keys: Array, memory: Any = None) -> tuple[Array, Any]:
            return jax.vmap(lambda o, k, m: inner.act(learned, o, k, m))(obs, keys, memory)

        def step(carry: Any, key: Array) -> tuple[Any, None]:
            env_state, action, memory, alive, total = carry
            keys_step, keys_act = jax.random.split(key, (2, number))
            obs, env_state, reward, terminated, truncated = jax.vmap(env.step)(keys_step, env_state, action)
            action, memory = act(obs, keys_act, memory)
            return (env_state, action, memory, alive & ~(terminated | truncated), total + alive * reward), None

        key_first, key_run = jax.random.split(key)
        action, memory = act(several.obs, jax.random.split(key_first, number))
        begin = (several.state, action, memory, jnp.ones(number, bool), jnp.zeros(number))
        end, _ = jax.lax.scan(step, begin, jax.random.split(key_run, config.horizon))
        return jnp.mean((end[-1] >= least).reshape(config.num_new, config.episodes), axis=-1)

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check(config, hyper)
        key_inner, key_near, key_run = jax.random.split(key, 3)
        length = None if num_updates is None else num_updates * config.num_updates
        learned = inner.init(key_inner, hyper.learner, length)
        near = Starts(*jax.vmap(near_goal)(jax.random.split(key_near, config.num_new)))
        nothing = ring.empty(jax.tree.map(lambda x: x[0], near), config.capacity)
        good = ring.add(nothing, near, jnp.ones(config.num_new, bool))
        numbers = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyper)
        return State(learned, good, key_run, jnp.int32(0), numbers)

    def act(state: State, obs: Observation, key: Array | None = None, memory: Any = None) -> tuple[Array, Any]:
        return inner.act(state.inner, obs, key, memory)

    played = config.num_new * (config.walk + config.episodes * config.horizon)
    return inner._replace(
        init=init,
        update=update,
        act=act,
        env_steps_per_update=config.num_updates * inner.env_steps_per_update + played,
        name=f"{inner.name}_reverse_curriculum",
        hyper=defaults,
        remake=lambda changed: make(lambda e: learner(e).remake(changed), env, near_goal, config, hyper),
        learned=lambda state: inner.learned(state.inner),
        check_hyper=lambda hyper: check(config, hyper),
    )


class State(NamedTuple):
    """The whole run."""

    inner: Any  # the state of the algorithm
    good: ring.Ring  # of Starts
    key: Array
    updates: Array  # int32: stages so far
    hyper: Hyper


def beginning_in(env: Environment, starts: Starts, usual: Array | float = 0.0) -> Environment:
    """The environment, whose episodes begin in one of ``starts``, but a share ``usual`` of them as they do."""

    def reset(key: Array) -> tuple[Observation, EnvState]:
        key_whether, key_which, key_usual = jax.random.split(key, 3)
        at = jax.random.randint(key_which, (), 0, jax.tree.leaves(starts)[0].shape[0])
        one = jax.tree.map(lambda x: x[at], tuple(starts))
        begins = jax.random.bernoulli(key_whether, usual)
        return jax.tree.map(lambda a, b: jnp.where(begins, a, b), env.reset(key_usual), one)

    return wrappers.wrapped_as(env, "beginning_in", {}, reset=reset)


def wound_back(env: Environment, state: EnvState) -> EnvState:
    """States ``[N, ...]`` whose clocks, the leaves named ``time``, are those of an episode's first state."""
    fresh = env.reset(jax.random.key(0))[1]

    def leaf(path: Any, x: Array, first: Array) -> Array:
        clock = getattr(path[-1], "name", None) == "time" if path else False
        return jnp.broadcast_to(first, x.shape) if clock else x

    return jax.tree_util.tree_map_with_path(leaf, state, fresh)


def check(config: Config, hyper: Hyper) -> None:
    """Raise ``ValueError`` for settings that do not fit each other."""
    checks.instances("reverse_curriculum.make", hyper=(hyper, Hyper))
    check_hyper(hyper)
    if config.capacity < config.num_new + config.num_old:
        raise ValueError(
            f"config.capacity must be at least num_new + num_old = {config.num_new + config.num_old}; got {config.capacity}"
        )


def check_near_goal(env: Environment, near_goal: Callable[[Array], tuple[Observation, EnvState]]) -> None:
    """Raise ``ValueError`` unless it returns what the environment's ``reset`` returns."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    found, wanted = checks.traced(env.name, "near_goal", near_goal, key), jax.eval_shape(env.reset, key)
    shapes = [str(jax.tree.map(lambda x: (x.dtype, x.shape), tree)) for tree in (found, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"near_goal must return what reset of {env.name} returns, {shapes[1]}; got {shapes[0]}")
