"""What algorithms have in common that act on the action values of a network, epsilon-greedily, or greedily where no key is given."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jrl import algorithm, nets
from jrl.algorithm import Metrics, Optimizer, exploration
from jrl.envs.types import Environment, observation_spec
from jrl.experience import normalize, replay, rollout
from jrl.experience.greedy import choose, epsilon_greedy, exploration_noise, mask, pick
from jrl.numerics import optim, precision
from jrl.numerics.types import Memory, Observation, Params

Array = jax.Array


def actor(network: nets.Network, state: Any) -> Callable[[Memory, Observation, Array, Any], tuple[Any, Array, Any]]:
    """What ``rollout.collect`` acts by: ``(memory, obs [B], first [B], noise) -> (memory, action [B], action)``."""
    epsilon = exploration(state)

    def act(memory: Memory, obs: Observation, first: Array, noise: tuple[Array, Array]) -> tuple[Any, Array, Any]:
        next_memory, q = network.step(state.params, memory, normalize.observations(state.obs_stats, obs), first)
        action = epsilon_greedy(mask(q, obs), epsilon, noise)
        return next_memory, action, action

    return act


def act(
    network: nets.Network, state: Any, obs: Observation, key: Array | None = None, memory: Memory = None
) -> tuple[Array, Any]:
    """The ``act`` of an ``Algorithm``, after the network."""
    params = optim.eval_params(state.opt_state, state.params)
    next_memory, q = nets.step_one(network, params, normalize.observations(state.obs_stats, obs), memory)
    return choose(mask(q, obs), exploration(state), key), next_memory


def collect(
    env: Environment, config: Any, network: nets.Network, state: Any, key_noise: Array, key_envs: Array
) -> tuple[rollout.Actors, rollout.Steps, Metrics]:
    """A rollout of ``config.num_steps`` steps, whose ``extras`` are the actions, and its metrics."""
    num_actions = env.action_space.n  # type: ignore[union-attr]
    noise = exploration_noise(key_noise, (config.num_steps, config.num_envs), num_actions)
    act = actor(network, state)
    actors, steps, episodes = rollout.collect(env, state.actors, act, noise, key_envs, config.num_steps)
    return actors, steps, {"epsilon": exploration(state)} | rollout.episode_metrics(episodes)


def start_learning(
    env: Environment,
    config: Any,
    hyper: Any,
    network: nets.Network,
    store: replay.Replay,
    keys: Any,
    num_updates: Any,
    optimizer: Optimizer | None,
) -> dict[str, Any]:
    """The fields of a state that learners with a replay and a target network have in common; ``keys`` are for parameters, environments, the run and
    the optimizer."""
    key_params, key_envs, key_run, key_optimizer = keys
    params = network.init(key_params)
    return algorithm.start_learning(config, hyper, params, key_optimizer, num_updates, optimizer) | {
        "target_params": optim.copied(params),
        "actors": rollout.start(env, key_envs, config.num_envs, network.memory),
        "buffer": store.init(),
        "key": key_run,
    }


def double_targets(network: nets.Network, params: Params, target_params: Params, batch: replay.Batch) -> Array:
    """``r + gamma Q'(x', argmax_a Q(x', a))`` of a minibatch, float32 ``[N]`` (van Hasselt et al. 2016, arXiv 1509.06461, eq. 4)."""
    best = jnp.argmax(mask(nets.outputs(network, params, batch.next_obs), batch.next_obs), axis=-1)
    return batch.reward + batch.discount * pick(nets.outputs(network, target_params, batch.next_obs), best)


def plain_network(
    name: str, env: Environment, config: Any, own: nets.Network | None, start: Any = None
) -> nets.Network:
    """The network of action values that ``config`` describes, or the user's ``own``, with the parameters of ``start`` if there is one. Raises
    ``ValueError`` for a memory and for noise, which the algorithm of this name does not use."""
    if config.network.noisy:
        raise ValueError(f"config.network.noisy is an option of DQN; {name} explores by epsilon")
    network = nets.value_network(own, config.network, observation_spec(env), env.action_space)
    if network.remembers:
        raise ValueError(
            f"config.network.gru, lstm and attention: R2D2 and PQN train recurrent networks, {name} does not"
        )
    return precision.apply_to_network(config.precision, nets.starting_from(network, start))
