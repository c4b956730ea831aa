"""Forward-backward reinforcement learning (Edwards, Downs and Davidson 2018, arXiv 1803.10227).

Deep Q-learning that also imagines how its goals could have been reached. A model that is learned from the replay goes back in time,

    a ~ p(a | x')                    which action led here,       loss  -log p(a | x')
    x = x' - f(x', a)                and from where,              loss  1/2 || f(x', a) - (x' - x) ||^2
    x ~ p(x | x', a)                 or, of one-hot observations, loss  -log p(x | x', a)

from observations that were rewarded. Each gradient step learns from transitions of the replay and from imagined ones, whose only reward is the one
at the goal, so that its value spreads over all ways that lead there, also those that were never taken.

What differs from the paper: goals are remembered when they are found (and may be given), actions are drawn from those that were seen to lead to an
observation, which leaves out predecessors that do not exist, and transitions are imagined anew for each gradient step instead of
being stored.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrl import algorithm, nets
from jrl.algorithm import Algorithm, Metrics
from jrl.algos import value_policy
from jrl.envs.strict import seems_one_hot, strict
from jrl.envs.types import Environment, MaskedObs, observation_spec
from jrl.experience import normalize, replay, ring, rollout
from jrl.experience.greedy import pick
from jrl.nets.torso import TorsoConfig
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


def _model_network() -> TorsoConfig:
    return TorsoConfig(torso="mlp", hidden=(64, 64), activation="relu")


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    num_envs: Positive = 10  # Environments that each seed steps in parallel.
    num_steps: Positive = 1  # Steps of each environment per update.
    num_gradient_steps: Positive = 1  # Minibatches per update.
    batch_size: Positive = 128  # Transitions of the replay in a minibatch.
    num_imagined: Positive = 8  # Imagined trajectories in a minibatch.
    length: Positive = 16  # Steps that they go back from a goal.
    num_goals: Positive = 100  # The newest rewarded observations, which are remembered.
    predecessor: Literal["difference", "one_hot"] = "difference"  # What the model gives of the observation before.
    capacity: Positive = 10_000  # Rows of the replay, over all environments.
    learning_starts: NonNegativeInt = 1_000  # Environment steps before the first gradient step.
    target_every: NonNegativeInt = 50  # Updates between copies to the target network; 0 for a soft update each time.
    normalize_observations: bool = False  # Standardize observations by running statistics.
    normalize_rewards: bool = False  # Divide rewards by the running deviation of discounted returns.
    reward_clip: NonNegative = 0.0  # Bound that rewards are cut off at, above and below 0; 0 for none.
    # Shape of the network.
    network: nets.ValueConfig = field(default_factory=lambda: nets.ValueConfig(norm="none"))
    model: TorsoConfig = field(default_factory=_model_network)  # Shape of both networks of the model.
    optimizer: optim.OptimizerConfig = field(default_factory=optim.OptimizerConfig)  # What the optimizer is made of.
    # float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    precision: Precision = "float32"


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 5e-4  # Initial learning rate; decays by config.optimizer.schedule.
    gamma: Unit = 0.99  # Discount of the return.
    imagined_weight: NonNegative = 1.0  # Weight of the loss of imagined transitions.
    model_learning_rate: NonNegative = 1e-3  # Learning rate of the model; constant, by Adam.
    epsilon_start: Unit = 1.0  # Share of actions chosen uniformly at the start of the run.
    epsilon_end: Unit = 0.05  # Final share, and that of a run of unknown length.
    epsilon_fraction: Unit = 0.2  # Share of the run over which epsilon falls linearly.
    tau: Unit = 0.01  # Polyak coefficient of a soft target update; 1 copies the online network.
    max_grad_norm: AboveZero = 10.0  # Largest global norm of a gradient, or the bound of config.optimizer.clip.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.


class Goals(NamedTuple):
    """Observations ``[N, ...]`` with which a rewarded step ended, its reward, and whether it terminated the episode."""

    obs: Observation
    reward: Array
    terminated: Array


def make(
    env: Environment,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    goals: Goals | None = None,
    network: nets.Network | None = None,
    optimizer: algorithm.Optimizer | None = None,
    start: Any = None,
) -> Algorithm:
    """FBRL in ``env``, which must have discrete actions and observations of one array. ``hyper`` are the defaults of ``init``; ``goals`` are
    known from the start; ``network`` and ``optimizer`` take the place of those that ``config`` describes; ``start``, the state of one trained
    seed, gives the parameters to begin with.

    Raises ``ValueError`` for a setting or goals that are wrong or do not fit the environment, or a replay larger than memory.
    """
    check(config, hyper)
    env, defaults = strict(env), hyper
    given: dict[str, Any] = {"goals": goals, "network": network, "optimizer": optimizer, "start": start}
    remake = functools.partial(make, env, hyper=hyper, **given)
    spec = array_spec(env, config)
    network = value_policy.plain_network("FBRL", env, config, network, start)
    model = nets.backward_model(config.model, spec, env.action_space.n, config.predecessor)  # type: ignore[union-attr]
    # Pairs, since the model needs the observation with which an episode terminated.
    store = replay.make((spec, spec), config.num_envs, config.capacity, config.batch_size)
    known_goals = first_goals(config, spec, goals)
    per_update = config.num_envs * config.num_steps
    first_learning = -(-config.learning_starts // per_update)

    def update(state: State) -> tuple[State, Metrics]:
        keys = jax.random.split(state.key, 3 + config.num_gradient_steps)
        key, key_noise, key_envs = keys[:3]
        actors, steps, played = value_policy.collect(env, config, network, state, key_noise, key_envs)
        pairs = steps._replace(obs=(steps.obs, steps.next_obs), next_obs=(steps.next_obs, steps.next_obs))
        buffer = replay.add_rollout(store, state.buffer, pairs, steps.extras, config.reward_clip)
        reward = normalize.clipped(config.reward_clip, steps.reward)
        found = jax.tree.map(
            lambda x: x.reshape(per_update, *x.shape[2:]), Goals(steps.next_obs, reward, steps.terminated)
        )
        goals = ring.add(state.goals, found, found.reward > 0)
        state = state._replace(actors=actors, buffer=buffer, goals=goals, key=key)
        ready = state.updates + 1 >= first_learning  # counted in updates: steps would overflow
        state, metrics = algorithm.learn_from_replay(learn, state, keys[3:], ready, config.target_every)
        state = state._replace(**normalize.after(state, steps))
        return state, metrics | played

    def learn(state: State, key: Array, ready: Array) -> tuple[State, Metrics]:
        """One minibatch, half of it real and half imagined, by the model that learned from the real one."""
        key_batch, key_goals, key_model = jax.random.split(key, 3)
        stored = store.sample(state.buffer, key_batch, state.hyper.gamma)
        real = normalize.transitions(state, stored._replace(obs=stored.obs[0], next_obs=stored.obs[1]))
        state, modelled = learn_model(state, real)
        imagined = imagine(state, key_goals, key_model)
        both = jax.tree.map(lambda *parts: jnp.concatenate(parts), real, imagined)
        target = value_policy.double_targets(network, state.params, state.target_params, both)

        def loss(params: Params) -> tuple[Array, Metrics]:
            taken = pick(nets.outputs(network, params, both.obs), both.action)
            error = jnp.where(both.weight > 0, target - taken, 0.0)
            squares = jnp.split(error**2, [config.batch_size])
            seen, thought = replay.mean(real, squares[0]), replay.mean(imagined, squares[1])
            return 0.5 * (seen + state.hyper.imagined_weight * thought), {"loss": seen, "imagined_loss": thought}

        tx = algorithm.current_optimizer(config, state, optimizer)
        step = optim.minimize(tx, loss, state.params, state.opt_state)
        state = state._replace(params=step.params, opt_state=step.opt_state)
        return state, step.extra | modelled | {"grad_norm": step.grad_norm}

    def learn_model(state: State, batch: replay.Batch) -> tuple[State, Metrics]:
        """A step of the model of what came before, from real transitions."""

        def loss(params: Params) -> tuple[Array, Metrics]:
            each = model.losses(params, batch.obs, batch.action, batch.next_obs)
            action, before = (replay.mean(batch, x) for x in each)
            return action + before, {"backward_action_loss": action, "backward_loss": before}

        tx = optim.make(optim.CONSTANT_ADAM, learning_rate=state.hyper.model_learning_rate)
        step = optim.minimize(tx, loss, state.model_params, state.model_opt_state)
        return state._replace(model_params=step.params, model_opt_state=step.opt_state), step.extra

    def imagine(state: State, key_goals: Array, key_model: Array) -> replay.Batch:
        """Imagined transitions ``[length * num_imagined]`` that lead to goals; their weight is 0 while there are none."""
        found, known = ring.sample(state.goals, key_goals, config.num_imagined)
        goals = normalize.observations(state.obs_stats, found.obs)
        obs, action, next_obs = model.imagine(state.model_params, goals, jax.random.split(key_model, config.length))
        reward = jnp.zeros(action.shape, jnp.float32).at[0].set(normalize.rewards(state.reward_stats, found.reward))
        discount = jnp.full(action.shape, state.hyper.gamma).at[0].multiply(1.0 - found.terminated)
        weight, rows = jnp.full(action.shape, known, jnp.float32), jnp.full(action.shape, replay.NOWHERE)
        batch = replay.Batch(obs, action, reward, discount, next_obs, weight, rows)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        *keys, key_model = jax.random.split(key, 5)
        model_params = model.init(key_model)
        return State(
            **value_policy.start_learning(env, config, hyper, network, store, keys, num_updates, optimizer),
            model_params=model_params,
            model_opt_state=optim.make(optim.CONSTANT_ADAM).init(model_params),
            **normalize.start(config, spec, start),
            goals=known_goals,
        )

    return Algorithm(
        init=init,
        update=update,
        act=functools.partial(value_policy.act, network),
        env_steps_per_update=per_update,
        name="fbrl",
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
    model_params: Params
    model_opt_state: OptState
    actors: rollout.Actors
    obs_stats: normalize.Stats | None
    reward_stats: normalize.RewardStats | None
    buffer: replay.Buffer
    goals: ring.Ring  # of Goals
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


def array_spec(env: Environment, config: Config) -> jax.ShapeDtypeStruct:
    """The shape and dtype of observations. Raises ``ValueError`` unless they are one array without masks, and one-hot if that is asked for."""
    spec = observation_spec(env)
    if isinstance(spec, MaskedObs) or not getattr(spec, "shape", ()):
        raise ValueError(
            f"FBRL imagines observations, which must be one array without masks; those of {env.name} are {spec}"
        )
    if config.predecessor == "one_hot" and not seems_one_hot(env):
        raise ValueError(
            f"config.predecessor=one_hot needs observations that are one-hot; those of {env.name} are not: take difference"
        )
    return spec


def first_goals(config: Config, spec: jax.ShapeDtypeStruct, goals: Goals | None) -> ring.Ring:
    """The goals that are known from the start. Raises ``ValueError`` for goals of other shapes, or too many."""
    nothing = ring.empty(Goals(spec, jnp.float32(0), jnp.bool_(False)), config.num_goals)
    if goals is None:
        return nothing
    checks.instances("fbrl.make", goals=(goals, Goals))
    given = [jnp.shape(x) for x in goals]
    if not given[1] or given != [(given[1][0], *spec.shape), given[1], given[1]] or given[1][0] > config.num_goals:
        raise ValueError(
            f"goals must be at most config.num_goals = {config.num_goals} observations of shape {spec.shape}, rewards and flags; "
            f"got shapes {given}"
        )
    return ring.add(nothing, jax.tree.map(jnp.asarray, goals), jnp.ones(given[1], bool))


def check(config: Config, hyper: Hyper) -> None:
    """Raise ``ValueError`` for settings that are wrong or do not fit each other."""
    checks.instances("fbrl.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    replay.check_learning_starts(config)
    per_update = config.num_envs * config.num_steps
    if config.num_goals < per_update:
        raise ValueError(
            f"config.num_goals must be at least num_envs * num_steps = {per_update}; got {config.num_goals}"
        )
