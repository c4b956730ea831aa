"""Deep Q-learning from demonstrations (Hester et al. 2018, arXiv 1704.03732).

What was shown is learned from before the first step in the environment, and beside one's own transitions ever after:

    J     = J_1 + lambda_n J_n + lambda_E J_E + lambda_2 J_2
    J_1   1/2 (r + gamma Q'(x', argmax_a Q(x', a)) - Q(x, a))^2        double Q-learning, Q' the target network
    J_n   the same with the rewards and the discount of n steps
    J_E   max_a [ Q(x, a) + m 1(a != a_E) ] - Q(x, a_E)                where a_E was shown: to be better than all others by a margin m
    J_2   the sum of squared weights

What differs from the paper: a fixed share of each minibatch are demonstrations (as in R2D3, arXiv 1909.01387), drawn by their own errors, where the
paper draws from one replay in which demonstrations have larger priorities. As there, they are never overwritten.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import algorithm, nets
from jrl.algorithm import Algorithm, Metrics
from jrl.algos import bc, value_policy
from jrl.envs.strict import strict
from jrl.envs.types import Environment, observation_spec, without_mask
from jrl.equations import losses
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
from jrl.numerics.types import OptState, Params

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    num_envs: Positive = 10  # Environments that each seed steps in parallel.
    num_steps: Positive = 1  # Steps of each environment per update.
    pretraining: NonNegativeInt = 1_000  # Minibatches of demonstrations alone, before the first environment step.
    num_gradient_steps: Positive = 1  # Minibatches per update.
    batch_size: Positive = 128  # Transitions of its own in a minibatch.
    num_shown: Positive = 32  # Transitions of demonstrations in a minibatch.
    capacity: Positive = 10_000  # Rows of the replay, over all environments, besides the demonstrations.
    learning_starts: NonNegativeInt = 0  # Environment steps before the first gradient step after pretraining.
    target_every: NonNegativeInt = 50  # Updates between copies to the target network; 0 for a soft update each time.
    n_step: Positive = 10  # Length n of the n-step loss.
    normalize_observations: bool = False  # Standardize observations by running statistics.
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
    n_step_weight: NonNegative = 1.0  # Lambda_n: weight of the n-step loss.
    margin_weight: NonNegative = 1.0  # Lambda_E: weight of the margin loss.
    margin: NonNegative = 0.8  # By how much the value of what was shown is to exceed the others.
    decay: NonNegative = 1e-5  # Lambda_2: weight of the sum of squared weights.
    epsilon_start: Unit = 0.1  # Share of actions chosen uniformly at the start of the run.
    epsilon_end: Unit = 0.01  # Final share, and that of a run of unknown length.
    epsilon_fraction: Unit = 0.2  # Share of the run over which epsilon falls linearly.
    tau: Unit = 0.01  # Polyak coefficient of a soft target update; 1 copies the online network.
    priority_exponent: Unit = 0.4  # Alpha of prioritized replay.
    importance_start: Unit = 0.6  # Beta of prioritized replay at the start of the run; it rises to 1.
    max_grad_norm: AboveZero = 10.0  # Largest global norm of a gradient, or the bound of config.optimizer.clip.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.


def make(
    env: Environment,
    demonstrations: replay.Step,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    network: nets.Network | None = None,
    optimizer: algorithm.Optimizer | None = None,
) -> Algorithm:
    """DQfD in ``env``, which must have discrete actions, from ``demonstrations``: steps ``[T, B]`` in the order in which they happened, as
    ``bc.play`` gives them. ``hyper`` are the defaults of ``init``; ``network`` and ``optimizer`` take the place of those that ``config``
    describes.

    Raises ``ValueError`` for demonstrations or a setting that do not fit the environment, or a replay larger than memory.
    """
    check(config, hyper, demonstrations)
    env, defaults = strict(env), hyper
    remake = functools.partial(make, env, demonstrations, hyper=hyper, network=network, optimizer=optimizer)
    spec = observation_spec(env)
    normalize.check(config, spec)
    network = value_policy.plain_network("DQfD", env, config, network)
    length, num_shown_envs = check_demonstrations(env, demonstrations)
    own = views(config, spec, config.num_envs, config.capacity, config.batch_size)
    rows = max(2 * length, config.n_step + 3)  # a truncated step takes two
    shown = views(config, spec, num_shown_envs, num_shown_envs * rows, config.num_shown)
    per_update = config.num_envs * config.num_steps
    first_learning = -(-config.learning_starts // per_update)

    def update(state: State) -> tuple[State, Metrics]:
        keys = jax.random.split(state.key, 3 + config.num_gradient_steps)
        key, key_noise, key_envs = keys[:3]
        actors, steps, played = value_policy.collect(env, config, network, state, key_noise, key_envs)
        buffer = replay.add_rollout(own.one, state.buffer, steps, steps.extras, config.reward_clip)
        state = state._replace(actors=actors, buffer=buffer, key=key)
        ready = state.updates + 1 >= first_learning  # counted in updates: steps would overflow
        state, metrics = algorithm.learn_from_replay(learn, state, keys[3:], ready, config.target_every)
        state = state._replace(obs_stats=after(state.obs_stats, steps.obs))
        return state, metrics | played

    def learn(state: State, key: Array, ready: Any) -> tuple[State, Metrics]:
        """One minibatch of its own transitions and of those shown; priorities stay as they are until ``ready``."""
        key_own, key_shown = jax.random.split(key)
        mine, theirs = sample(own, state, state.buffer, key_own), sample(shown, state, state.demonstrations, key_shown)
        one, n = jax.tree.map(lambda *parts: jnp.concatenate(parts), mine, theirs)
        used, h = one.weight > 0, state.hyper
        expert = used & (jnp.arange(used.size) >= config.batch_size)
        number = jnp.maximum(used.sum(), 1)
        target, target_n = (
            value_policy.double_targets(network, state.params, state.target_params, x) for x in (one, n)
        )

        def loss(params: Params) -> tuple[Array, tuple[Metrics, Array]]:
            q = mask(nets.outputs(network, params, one.obs), one.obs)
            taken = pick(q, one.action)
            error, error_n = (losses.masked(y - taken, used) for y in (target, target_n))
            margin = losses.masked(jax.vmap(losses.large_margin, (0, 0, None))(q, one.action, h.margin), expert)
            each = 0.5 * error**2 + 0.5 * h.n_step_weight * error_n**2 + h.margin_weight * margin
            total = jnp.sum(one.weight * each) / number + h.decay * optim.global_norm(params) ** 2
            metrics = {"loss": jnp.sum(error**2) / number, "objective": total}
            return total, (metrics | {"margin_loss": margin.sum() / jnp.maximum(expert.sum(), 1)}, error)

        tx = algorithm.current_optimizer(config, state, optimizer)
        step = optim.minimize(tx, loss, state.params, state.opt_state)
        metrics, error = step.extra
        rows, priority = jnp.where(ready, one.rows, replay.NOWHERE), jnp.abs(error) ** h.priority_exponent
        (rows_own, rows_shown), (priority_own, priority_shown) = (
            jnp.split(x, [config.batch_size]) for x in (rows, priority)
        )
        state = state._replace(
            params=step.params,
            opt_state=step.opt_state,
            buffer=own.one.update(state.buffer, rows_own, priority_own),
            demonstrations=shown.one.update(state.demonstrations, rows_shown, priority_shown),
        )
        return state, metrics | {"grad_norm": step.grad_norm}

    def sample(views: Views, state: State, buffer: replay.Buffer, key: Array) -> tuple[replay.Batch, replay.Batch]:
        """The same transitions over one step, and over n."""
        beta = algorithm.importance_exponent(state)

        def seen(store: replay.Replay, key: Array) -> replay.Batch:
            batch = store.sample(buffer, key, state.hyper.gamma, beta)
            obs, next_obs = (normalize.observations(state.obs_stats, x) for x in (batch.obs, batch.next_obs))
            return batch._replace(obs=obs, next_obs=next_obs)

        return seen(views.one, key), seen(views.n, jax.random.clone(key))

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        *keys, key_pretraining = jax.random.split(key, 5)
        steps = demonstrations._replace(truncated=jnp.asarray(demonstrations.truncated).at[-1].set(True))
        stats = normalize.init(without_mask(spec).shape) if config.normalize_observations else None
        state = State(
            **value_policy.start_learning(env, config, hyper, network, own.one, keys, num_updates, optimizer),
            obs_stats=after(stats, jax.tree.map(jnp.asarray, steps.obs)),
            demonstrations=replay.add_rollout(shown.one, shown.one.init(), steps, steps.action, config.reward_clip),
        )
        return pretrained(state, key_pretraining)

    def pretrained(state: State, key: Array) -> State:
        """The state after ``config.pretraining`` minibatches of demonstrations alone, for there is nothing of its own yet."""

        def step(state: State, x: tuple[Array, Array]) -> tuple[State, None]:
            state, _ = learn(state, x[1], True)
            share = optim.target_share(config.target_every, x[0], state.hyper.tau)
            return state._replace(target_params=optim.towards(state.target_params, state.params, share)), None

        numbers = 1 + jnp.arange(config.pretraining)
        return jax.lax.scan(step, state, (numbers, jax.random.split(key, config.pretraining)))[0]

    return Algorithm(
        init=init,
        update=update,
        act=functools.partial(value_policy.act, network),
        env_steps_per_update=per_update,
        name="dqfd",
        env=env,
        config=config,
        hyper=hyper,
        uses_length=True,
        remake=remake,
        check_hyper=check_hyper,
    )


class State(NamedTuple):
    """The whole run, the replay and the demonstrations included."""

    params: Params
    target_params: Params
    opt_state: OptState
    actors: rollout.Actors
    obs_stats: normalize.Stats | None
    buffer: replay.Buffer
    demonstrations: replay.Buffer
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


class Views(NamedTuple):
    """One replay, whose rows are seen over one step and over n."""

    one: replay.Replay
    n: replay.Replay


def views(config: Config, spec: Any, num_envs: int, capacity: int, batch_size: int) -> Views:
    """A prioritized replay of ``capacity`` rows. Raises ``ValueError`` if it holds too few."""
    return Views(*(replay.make(spec, num_envs, capacity, batch_size, n, prioritized=True) for n in (1, config.n_step)))


def after(stats: normalize.Stats | None, obs: Any) -> normalize.Stats | None:
    """Statistics of observations, if there are some, after these."""
    return None if stats is None else normalize.update(stats, without_mask(obs))


def check(config: Config, hyper: Hyper, demonstrations: replay.Step) -> None:
    """Raise ``ValueError`` for settings that are wrong or do not fit each other."""
    given = {"demonstrations": (demonstrations, replay.Step), "config": (config, Config), "hyper": (hyper, Hyper)}
    checks.instances("dqfd.make", **given)
    check_hyper(hyper)
    replay.check_learning_starts(config)


def check_demonstrations(env: Environment, demonstrations: replay.Step) -> tuple[int, int]:
    """How many steps of how many environments they have. Raises ``ValueError`` unless they fit the environment."""
    shape = jnp.shape(demonstrations.reward)
    each = {name: jnp.shape(getattr(demonstrations, name)) for name in ("reward", "terminated", "truncated")}
    if len(shape) != 2 or len({*each.values()}) != 1:
        raise ValueError(f"demonstrations must be steps [T, B]; got {each}")
    for obs in (demonstrations.obs, demonstrations.next_obs):
        flat = jax.tree.map(lambda x: jnp.reshape(x, (-1, *jnp.shape(x)[2:])), (obs, demonstrations.action))
        bc.check_demonstrations(env, bc.Demonstrations(*flat))
    return shape
