"""PPO-CMA: proximal policy optimization with covariance matrix adaptation (Hamalainen et al. 2018, arXiv 1810.02541).

A normal policy whose mean mu(x) and standard deviation sigma(x) are two networks, trained one after the other in each update, so
that the policy first grows wide along what went well and only then moves (algorithm 2):

    deviation    -E[ A+ log N(a; mu_old(x), sigma(x)) ]            on the rollouts of the last H updates, with their advantages
    mean         -E[ w  log N(a'; mu(x), sigma(x)) ]               on the newest one

    where A > 0      a' = a,            w = A
    where A < 0      a' = 2 mu - a,     w = -A mean_i exp( -(a_i - mu_i)^2 / (2 sigma_i^2) )       mirrored (section 4.3); mu of before

mu_old is the mean before the update: a squared distance from it makes sigma grow along a good direction, where plain
policy gradients shrink it too soon. Nothing is clipped; the name is the authors'. Advantages are by GAE, divided by their deviation, not
centred. Actions are in units of the bounds. As in the authors' code the mean is kept within the bounds by a smooth function, and so
is the deviation between 0.01 and 1. Unlike there, truncated episodes bootstrap from their last observation, and the value learns by squared error.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import algorithm, nets
from jrl.algorithm import Algorithm, Metrics
from jrl.algos.off_policy import real_actions
from jrl.envs.spaces import to_env
from jrl.envs.strict import strict
from jrl.envs.types import Environment, observation_spec
from jrl.equations import distributions, losses, returns
from jrl.equations.distributions import NormalParams
from jrl.experience import normalize, rollout
from jrl.numerics import checks, loops, optim, precision
from jrl.numerics.settings import AboveZero, NonNegative, Positive, Precision, Settings, Unit, check_hyper
from jrl.numerics.types import Memory, Observation, Params

Array = jax.Array
NARROWEST, WIDEST = 0.01, 1.0  # standard deviations, in units of the bounds


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    num_envs: Positive = 8  # Environments that each seed steps in parallel.
    num_steps: Positive = 256  # Steps of each environment per update.
    num_gradient_steps: Positive = 100  # Minibatches of each of value, deviation and mean per update.
    batch_size: Positive = 256  # Samples in a minibatch.
    history: Positive = 5  # H: rollouts that the deviation learns from.
    mirror: bool = True  # Learn from negative advantages by mirrored actions, instead of leaving them out.
    normalize_observations: bool = False  # By their running mean and standard deviation.
    normalize_rewards: bool = False  # By the running standard deviation of the discounted return.
    first_mean: float = 0.0  # Mean of the policy at first, between -1 and 1.
    first_std: AboveZero = 0.5  # Standard deviation of the policy at first, between 0.01 and 1.
    # Shape of the networks of mean, deviation and value.
    network: nets.ContinuousConfig = field(default_factory=lambda: nets.ContinuousConfig(hidden=(64, 64)))
    # What the optimizers are made of.
    optimizer: optim.OptimizerConfig = field(default_factory=lambda: optim.CONSTANT_ADAM)
    # float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    precision: Precision = "float32"


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 5e-4  # Initial learning rate; decays by config.optimizer.schedule.
    gamma: Unit = 0.99  # Discount of the return.
    gae_lambda: Unit = 0.95  # Lambda of the advantage estimate.
    max_grad_norm: AboveZero = 0.5  # Bound of config.optimizer.clip, if there is one.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizers.


def make(
    env: Environment,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    optimizer: algorithm.Optimizer | None = None,
    start: Any = None,
) -> Algorithm:
    """PPO-CMA in ``env``, which must have bounded real actions. ``hyper`` are the defaults of ``init``; ``optimizer`` takes the place of the one
    that ``config`` describes; ``start``, the state of one trained seed, gives the parameters and the statistics of observations to begin with.

    Raises ``ValueError`` for a setting that is wrong or does not fit the environment.
    """
    check(config, hyper)
    env, defaults = strict(env), hyper
    num_actions = real_actions(env, "ppo_cma")
    spec = observation_spec(env)
    normalize.check(config, spec)
    remake = functools.partial(make, env, hyper=hyper, optimizer=optimizer, start=start)
    networks = {
        name: precision.apply_to_network(config.precision, nets.head(config.network, spec, width, scale))
        for name, width, scale in (("value", 1, 1.0), ("std", num_actions, 0.01), ("mean", num_actions, 0.01))
    }
    normal = distributions.normal(num_actions)
    num_samples = config.num_envs * config.num_steps

    def update(state: State) -> tuple[State, Metrics]:
        key, key_noise, key_envs, *keys = jax.random.split(state.key, 6)
        noise = normal.noise(key_noise, (config.num_steps, config.num_envs))
        actors, steps, episodes = rollout.collect(env, state.actors, actor(state), noise, key_envs, config.num_steps)
        new, target = with_advantages(state, steps)
        slot = state.updates % config.history
        history = jax.tree.map(lambda store, x: store.at[slot].set(x), state.history, new)
        old = state._replace(history=history)
        stored = jnp.minimum(state.updates + 1, config.history) * num_samples

        def value_loss(params: Params, rows: Array, now: State) -> Array:
            return losses.value_loss(value(params, part(old, new.obs, rows)), target[rows]).mean()

        def std_loss(params: Params, rows: Array, now: State) -> Array:
            batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[rows], history)
            obs = normalize.observations(old.obs_stats, batch.obs)
            policy = NormalParams(mean(old.params, obs), log_std(params, obs))
            return -jnp.mean(jnp.maximum(batch.advantage, 0.0) * normal.log_prob(policy, batch.action))

        def mean_loss(params: Params, rows: Array, now: State) -> Array:
            obs = part(old, new.obs, rows)
            before, spread = mean(old.params, obs), log_std(now.params, obs)
            action, weight = mirrored(new.action[rows], new.advantage[rows], before, jnp.exp(spread))
            return -jnp.mean(weight * normal.log_prob(NormalParams(mean(params, obs), spread), action))

        metrics: Metrics = {}
        state = old
        for name, loss, key_loss, size in zip(
            networks, (value_loss, std_loss, mean_loss), keys, (num_samples, stored, num_samples), strict=True
        ):
            state, learned = descend(name, loss, state, key_loss, size)
            metrics |= learned
        spread = jnp.exp(log_std(state.params, part(old, new.obs, jnp.arange(min(num_samples, 256)))))
        state = state._replace(actors=actors, key=key, updates=state.updates + 1, **normalize.after(state, steps))
        return state, metrics | {"std": spread.mean()} | rollout.episode_metrics(episodes)

    def mirrored(action: Array, advantage: Array, before: Array, std: Array) -> tuple[Array, Array]:
        """Actions to move towards, and their weights ``[N]``."""
        if not config.mirror:
            return action, jnp.maximum(advantage, 0.0)
        return losses.mirrored_actions(action, advantage, before, std)

    def descend(name: str, loss: Any, state: State, key: Array, num_rows: Any) -> tuple[State, Metrics]:
        """Minibatch steps of one network, on rows drawn from the first ``num_rows``."""
        tx = algorithm.current_optimizer(config, state, optimizer)

        def step(carry: tuple[Params, Any], key: Array) -> tuple[tuple[Params, Any], Metrics]:
            rows = jax.random.randint(key, (config.batch_size,), 0, num_rows)

            def of_this_network(own: Params) -> tuple[Array, Array]:
                value = loss({**state.params, name: own}, rows, state)
                return value, value

            done = optim.minimize(tx, of_this_network, *carry)
            return (done.params, done.opt_state), {f"{name}_loss": done.extra, f"{name}_grad_norm": done.grad_norm}

        carry = (state.params[name], state.opt_state[name])
        (params, opt_state), metrics = loops.scan(step, carry, jax.random.split(key, config.num_gradient_steps))
        learned = state._replace(params={**state.params, name: params}, opt_state={**state.opt_state, name: opt_state})
        return learned, jax.tree.map(jnp.mean, metrics)

    def with_advantages(state: State, steps: rollout.Steps) -> tuple[Samples, Array]:
        """The samples of a rollout with their advantages, and the targets of their values ``[N]``."""
        shape = steps.reward.shape
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps.obs)
        v_tm1 = value(state.params, normalize.observations(state.obs_stats, flat)).reshape(shape)

        def value_of(obs: Observation, t: Array, b: Array) -> Array:
            return value(state.params, normalize.observations(state.obs_stats, obs))

        v_t = rollout.following_values(env, steps, v_tm1, value_of)
        reward = normalize.rewards(state.reward_stats, steps.reward)
        discount_t = state.hyper.gamma * (1 - steps.terminated)
        continue_t = 1.0 - (steps.terminated | steps.truncated)
        gae_lambda = state.hyper.gae_lambda
        advantage = returns.over_batch(returns.gae, v_tm1, reward, discount_t, v_t, continue_t, gae_lambda).ravel()
        scaled = advantage / (advantage.std() + 1e-8)
        action = steps.extras.reshape(num_samples, num_actions)
        return Samples(flat, action, scaled), advantage + v_tm1.ravel()

    def part(state: State, obs: Observation, rows: Array) -> Observation:
        return normalize.observations(state.obs_stats, jax.tree.map(lambda x: x[rows], obs))

    def value(params: Params, obs: Observation) -> Array:
        return nets.outputs(networks["value"], params["value"], obs)[:, 0]

    def mean(params: Params, obs: Observation) -> Array:
        return jnp.tanh(nets.outputs(networks["mean"], params["mean"], obs) + math.atanh(config.first_mean))

    def log_std(params: Params, obs: Observation) -> Array:
        low, high = math.log(NARROWEST), math.log(WIDEST)
        first = (math.log(config.first_std) - low) / (high - low)
        output = nets.outputs(networks["std"], params["std"], obs)
        return low + (high - low) * jax.nn.sigmoid(output + math.log(first / (1 - first)))

    def policy(params: Params, obs: Observation) -> NormalParams:
        return NormalParams(mean(params, obs), log_std(params, obs))

    def actor(state: State) -> Any:
        def act(memory: Memory, obs: Observation, first: Array, noise: Array) -> tuple[Any, Array, Any]:
            action = normal.from_noise(policy(state.params, normalize.observations(state.obs_stats, obs)), noise)
            return memory, to_env(env.action_space, action), action

        return act

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_params, key_envs, key_run, key_optimizer = jax.random.split(key, 4)
        keys = jax.random.split(key_params, 3)
        params = {name: net.init(k) for (name, net), k in zip(networks.items(), keys, strict=True)}
        if start is not None:
            checks.fields("start", start, "params", "opt_state")
            params = nets.like("params", evaluated(start), params)
        learner = algorithm.start_learning(config, hyper, params, key_optimizer, num_updates, optimizer)
        tx = algorithm.optimizer(config, learner["hyper"], 1.0, own=optimizer)
        learner["opt_state"] = {name: tx.init(own) for name, own in params.items()}
        obs = jax.tree.map(lambda x: jnp.zeros((config.history, num_samples, *x.shape), x.dtype), spec)
        zeros = jnp.zeros((config.history, num_samples, num_actions + 1), jnp.float32)
        return State(
            **learner,
            actors=rollout.start(env, key_envs, config.num_envs, ()),
            **normalize.start(config, spec, start),
            history=Samples(obs, zeros[..., 1:], zeros[..., 0]),
            key=key_run,
        )

    def act(state: State, obs: Observation, key: Array | None = None, memory: Memory = None) -> tuple[Array, Any]:
        one = policy(evaluated(state), jax.tree.map(lambda x: x[None], normalize.observations(state.obs_stats, obs)))
        action = (one.mean if key is None else normal.sample(key, one))[0]
        return to_env(env.action_space, action), ()

    return Algorithm(
        init=init,
        update=update,
        act=act,
        env_steps_per_update=num_samples,
        name="ppo_cma",
        env=env,
        config=config,
        hyper=hyper,
        uses_length=config.optimizer.uses_length,
        remake=remake,
        losses=("value_loss", "std_loss", "mean_loss"),
        check_hyper=check_hyper,
    )


def evaluated(state: Any) -> Params:
    """The parameters of each network that a state acts with."""
    return {name: optim.eval_params(state.opt_state[name], own) for name, own in state.params.items()}


class Samples(NamedTuple):
    """Steps ``[N]`` with their advantages, divided by the deviation of those of their rollout."""

    obs: Observation
    action: Array
    advantage: Array


class State(NamedTuple):
    """The whole run."""

    params: Params  # of mean, std and value
    opt_state: Any  # of each of them
    actors: rollout.Actors
    obs_stats: normalize.Stats | None
    reward_stats: normalize.RewardStats | None
    history: Samples  # [H, N]: a ring of rollouts
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


def check(config: Config, hyper: Hyper) -> None:
    """Raise ``ValueError`` for settings that are wrong."""
    checks.instances("ppo_cma.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    if not -1 < config.first_mean < 1:
        raise ValueError(f"config.first_mean must be between -1 and 1, without these; got {config.first_mean}")
    if not NARROWEST < config.first_std < WIDEST:
        raise ValueError(
            f"config.first_std must be between {NARROWEST} and {WIDEST}, without these; got {config.first_std}"
        )
