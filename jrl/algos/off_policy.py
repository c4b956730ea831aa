"""What SAC and TD3 have in common: settings, networks and a replay for real actions, and acting at random before learning begins.

Actions are in [-1, 1] wherever they are learned from; the environment is given them mapped onto its bounds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jrl import algorithm, nets
from jrl.algorithm import Metrics
from jrl.envs.spaces import to_env
from jrl.envs.strict import strict
from jrl.envs.types import Box, Environment, observation_spec
from jrl.experience import normalize, replay, rollout
from jrl.numerics import checks, optim, precision
from jrl.numerics.settings import NonNegative, NonNegativeInt, Positive, Precision, Settings
from jrl.numerics.types import Observation, Params

Array = jax.Array


@dataclass(frozen=True)
class OffPolicyConfig(Settings):
    """Static settings, which shape the compiled program."""

    num_envs: Positive = 1  # Environments that each seed steps in parallel.
    num_steps: Positive = 1  # Steps of each environment per update.
    num_gradient_steps: Positive = 1  # Minibatches per update.
    batch_size: Positive = 256  # Transitions in a minibatch.
    capacity: Positive = 1_000_000  # Rows of the replay, over all environments.
    learning_starts: NonNegativeInt = 5_000  # Environment steps with random actions before the first gradient step.
    n_step: Positive = 1  # Length n of n-step returns.
    num_critics: Positive = 2  # Critics, of whose values the smallest counts.
    normalize_observations: bool = False  # Standardize observations by running statistics.
    normalize_rewards: bool = False  # Divide rewards by the running deviation of discounted returns.
    reward_clip: NonNegative = 0.0  # Bound that rewards are cut off at, above and below 0; 0 for none.
    # Shape of the policy and of each critic.
    network: nets.ContinuousConfig = field(default_factory=nets.ContinuousConfig)
    # What the optimizers are made of.
    optimizer: optim.OptimizerConfig = field(default_factory=lambda: optim.CONSTANT_ADAM)
    # float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    precision: Precision = "float32"


class Parts(NamedTuple):
    """What is made of an environment and a configuration."""

    env: Environment
    num_actions: int
    policy: nets.Network
    critics: nets.Network
    store: replay.Replay
    first_learning: int  # updates with random actions, of which the last one learns


def make_parts(env: Environment, config: OffPolicyConfig, name: str, width: int = 1) -> Parts:
    """The parts; the policy's network gives ``width`` numbers for each number of an action. Raises ``ValueError`` for what does not fit."""
    env = strict(env)
    obs_spec = observation_spec(env)
    num_actions = check(config, env, obs_spec, name)
    networks = (
        nets.head(config.network, obs_spec, width * num_actions, scale=0.01),
        nets.critics(config.network, obs_spec, num_actions, config.num_critics),
    )
    policy, critics = (precision.apply_to_network(config.precision, network) for network in networks)
    action_spec = jax.ShapeDtypeStruct((num_actions,), jnp.float32)
    sizes = (config.num_envs, config.capacity, config.batch_size, config.n_step)
    store = replay.make(obs_spec, *sizes, action_spec=action_spec)
    per_update = config.num_envs * config.num_steps
    return Parts(env, num_actions, policy, critics, store, -(-config.learning_starts // per_update))


def act_and_store(
    parts: Parts, config: OffPolicyConfig, state: Any, key: Array, act: Callable[[Observation, Array], Array]
) -> tuple[Any, rollout.Steps, Metrics]:
    """A rollout by ``act(obs [B], noise [B, A]) -> action``, where the first ones are random, and its transitions in the replay."""
    key_noise, key_uniform, key_envs = jax.random.split(key, 3)
    shape = (config.num_steps, config.num_envs, parts.num_actions)
    noise = jax.random.normal(key_noise, shape, jnp.float32)
    uniform = jax.random.uniform(key_uniform, shape, jnp.float32, -1.0, 1.0)
    waits = state.updates + 1 < parts.first_learning

    def actor(memory: Any, obs: Observation, first: Array, noise: Any) -> tuple[Any, Array, Any]:
        action = jnp.where(waits, noise[1], act(normalize.observations(state.obs_stats, obs), noise[0]))
        return memory, to_env(parts.env.action_space, action), action

    actors, steps, episodes = rollout.collect(
        parts.env, state.actors, actor, (noise, uniform), key_envs, config.num_steps
    )
    buffer = replay.add_rollout(parts.store, state.buffer, steps, steps.extras, config.reward_clip)
    return state._replace(actors=actors, buffer=buffer), steps, rollout.episode_metrics(episodes)


def sample(parts: Parts, state: Any, key: Array) -> replay.Batch:
    """A minibatch with normalized observations and rewards, whose weight is 0 for a row that is no transition."""
    return normalize.transitions(state, parts.store.sample(state.buffer, key, state.hyper.gamma))


def critic_step(
    parts: Parts, tx: optax.GradientTransformation, state: Any, batch: replay.Batch, target: Array
) -> tuple[Any, Metrics]:
    """One step of all critics towards ``target [N]``: half the squared error, summed over critics."""

    def loss(params: Params) -> tuple[Array, Metrics]:
        values = nets.outputs(parts.critics, params, (batch.obs, batch.action))
        each = 0.5 * jnp.square(values - jax.lax.stop_gradient(target)[:, None]).sum(-1)
        total = replay.mean(batch, each)
        return total, {"critic_loss": total, "q": replay.mean(batch, values.mean(-1))}

    step = optim.minimize(tx, loss, state.critic_params, state.critic_opt_state)
    state = state._replace(critic_params=step.params, critic_opt_state=step.opt_state)
    return state, step.extra | {"critic_grad_norm": step.grad_norm}


def start_learning(
    parts: Parts,
    config: OffPolicyConfig,
    hyper: Any,
    key: Array,
    num_updates: Any,
    optimizer: Any,
    params_of: Callable[[Array], Params],
    trained: Any,
) -> dict[str, Any]:
    """The fields of a state that SAC and TD3 share. ``params_of(key)`` are the parameters of the policy's optimizer; those of ``trained``, the
    state of one seed, take their place, and that of the critics', if it is given.

    Raises ``ValueError`` where they have other shapes.
    """
    key_params, key_critics, key_envs, key_run, key_optimizer, key_critic_optimizer = jax.random.split(key, 6)
    params, critic_params = params_of(key_params), parts.critics.init(key_critics)
    if trained is not None:
        checks.fields("start", trained, "params", "critic_params", "opt_state")
        params = nets.like("params", optim.eval_params(trained.opt_state, trained.params), params)
        critic_params = nets.like("critic_params", trained.critic_params, critic_params)
    learner = algorithm.start_learning(config, hyper, params, key_optimizer, num_updates, optimizer)
    tx = algorithm.optimizer(config, learner["hyper"], 1.0, key_critic_optimizer, optimizer)
    return learner | {
        "critic_params": critic_params,
        "critic_opt_state": tx.init(critic_params),
        "actors": rollout.start(parts.env, key_envs, config.num_envs, ()),
        "buffer": parts.store.init(),
        "key": key_run,
        **normalize.start(config, observation_spec(parts.env), trained),
    }


def check(config: OffPolicyConfig, env: Environment, obs_spec: Any, name: str) -> int:
    """How many real numbers an action has. Raises ``ValueError`` for settings or spaces that do not fit."""
    replay.check_learning_starts(config)
    normalize.check(config, obs_spec)
    return real_actions(env, name)


def real_actions(env: Environment, name: str) -> int:
    """How many real numbers an action has. Raises ``ValueError`` for another space, or infinite bounds."""
    space = env.action_space
    if not isinstance(space, Box):
        raise ValueError(f"{name} needs real actions (Box); {env.name} has {space}: take dqn or ppo")
    if not all(map(math.isfinite, (*space.low, *space.high))):
        raise ValueError(f"{name} needs finite bounds of actions; {env.name} has {space}")
    return len(space.low)
