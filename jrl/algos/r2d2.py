"""Recurrent DQN with stored memories and burn-in: R2D2 (Kapturowski et al. 2019, "Recurrent experience replay ...").

The replay holds with each observation the memory the network had before it. A draw is a sequence of rows (section 2.3):

    stored state    the memory of the first row, which an older network left
    burn-in         unrolled over the first rows without learning, so that the memory is one of today's network
    learning        on the rows after them, towards n-step double targets of the target network:

        y_t = h( sum_{k<n} gamma^k r_{t+k} + gamma^n h^-1( Q'(x_{t+n}, argmax_a Q(x_{t+n}, a)) ) )       (eq. 1)

    priority        of a sequence: eta max |delta_t| + (1 - eta) mean |delta_t|                          (section 2.3)

A sequence runs on over the end of an episode: the memory starts anew there, and nothing is bootstrapped across. Unlike the
paper one actor acts in all environments, and sequences may begin at any row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import algorithm, nets
from jrl.algorithm import Algorithm, Metrics, exploration
from jrl.algos import value_policy
from jrl.algos.r2d2_settings import Config, Hyper, check
from jrl.envs.strict import strict
from jrl.envs.types import Environment, observation_spec
from jrl.equations import losses, returns
from jrl.experience import normalize, replay, rollout
from jrl.experience.greedy import epsilon_greedy, exploration_noise, mask, pick
from jrl.numerics import optim, precision, settings
from jrl.numerics.types import Observation, OptState, Params

Array = jax.Array


def make(
    env: Environment,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    network: nets.Network | None = None,
    optimizer: algorithm.Optimizer | None = None,
    start: Any = None,
) -> Algorithm:
    """R2D2 in ``env``, which must have discrete actions. ``hyper`` are the defaults of ``init``; ``network`` and ``optimizer`` take the place
    of those that ``config`` describes; ``start``, the state of one trained seed, gives the parameters to begin with.

    Raises ``ValueError`` for a setting that is wrong or does not fit the environment, or a replay larger than memory.
    """
    check(config, hyper)
    env, defaults = strict(env), hyper
    remake = functools.partial(make, env, hyper=hyper, network=network, optimizer=optimizer, start=start)
    normalize.check(config, observation_spec(env))
    network = nets.value_network(network, config.network, observation_spec(env), env.action_space)
    network = nets.starting_from(network, start)
    if not network.remembers:
        raise ValueError("config.network.gru or lstm must be at least 1: without a memory this is DQN; got 0")
    network = precision.apply_to_network(config.precision, network)
    num_rows = config.burn_in + config.length + 1  # the last only to bootstrap from
    store = replay.make_sequences(
        (observation_spec(env), jax.eval_shape(lambda: network.memory)),
        config.num_envs,
        config.capacity,
        config.batch_size,
        num_rows,
        config.prioritized,
    )
    num_actions = env.action_space.n  # type: ignore[union-attr]
    per_update = config.num_envs * config.num_steps
    first_learning = -(-max(config.learning_starts, num_rows * config.num_envs) // per_update)

    def update(state: State) -> tuple[State, Metrics]:
        keys = jax.random.split(state.key, 3 + config.num_gradient_steps)
        key, key_noise, key_envs = keys[:3]
        noise = exploration_noise(key_noise, (config.num_steps, config.num_envs), num_actions)
        actors, steps, episodes = rollout.collect(env, state.actors, actor(state), noise, key_envs, config.num_steps)
        action, before, after = steps.extras
        with_memories = steps._replace(obs=(steps.obs, before), next_obs=(steps.next_obs, after))
        buffer = replay.add_rollout(store, state.buffer, with_memories, action, config.reward_clip)
        state = state._replace(actors=actors, buffer=buffer, key=key)
        ready = state.updates + 1 >= first_learning  # counted in updates: steps would overflow
        state, metrics = algorithm.learn_from_replay(learn, state, keys[3:], ready, config.target_every)
        state = state._replace(**normalize.after(state, steps))
        return state, metrics | {"epsilon": exploration(state)} | rollout.episode_metrics(episodes)

    def learn(state: State, key: Array, ready: Array) -> tuple[State, Metrics]:
        """One minibatch of sequences; priorities stay as they are until ``ready``."""
        h = state.hyper
        seq = normalized(state, store.sample(state.buffer, key, algorithm.importance_exponent(state)))
        obs, stored = seq.obs
        before, after = jax.tree.map(lambda x: x[0], stored), slice(config.burn_in, None)
        part = jax.tree.map(lambda x: x[after], (obs, seq.first))
        starts = [burn_in(params, seq, before) for params in (state.params, state.target_params)]
        target = targets(state, seq, part, *starts)
        learnable = (seq.kind[after][:-1] != replay.FINAL) & (seq.weight > 0)[None]

        def loss(params: Params) -> tuple[Array, tuple[Metrics, Array]]:
            _, q = network.unroll(params, burn_in(params, seq, before), *part)
            taken = pick(q[:-1], seq.action[after][:-1])
            error = jnp.where(learnable, target - taken, 0.0)
            count = jnp.maximum(learnable.sum(), 1)
            total = 0.5 * jnp.sum(seq.weight * error**2) / count
            return total, ({"loss": jnp.sum(error**2) / count, "objective": total, "q": taken.mean()}, jnp.abs(error))

        step = optim.minimize(
            algorithm.current_optimizer(config, state, optimizer), loss, state.params, state.opt_state
        )
        metrics, error = step.extra
        mean = error.sum(0) / jnp.maximum(learnable.sum(0), 1)
        priority = h.priority_max * error.max(0) + (1 - h.priority_max) * mean
        starts_at = jnp.where(ready, seq.rows, replay.NOWHERE)
        buffer = store.update(state.buffer, starts_at, priority**h.priority_exponent)
        state = state._replace(params=step.params, opt_state=step.opt_state, buffer=buffer)
        return state, metrics | {"grad_norm": step.grad_norm}

    def normalized(state: State, seq: replay.Sequences) -> replay.Sequences:
        obs, stored = seq.obs
        obs = normalize.observations(state.obs_stats, obs)
        return seq._replace(obs=(obs, stored), reward=normalize.rewards(state.reward_stats, seq.reward))

    def burn_in(params: Params, seq: replay.Sequences, before: Any) -> Any:
        """The memories ``[N]`` after the first rows, as ``params`` have them; no gradient goes through."""
        if not config.burn_in:
            return before
        obs, first = jax.tree.map(lambda x: x[: config.burn_in], (seq.obs[0], seq.first))
        memories, _ = network.unroll(params, before, obs, first)
        rows = jnp.arange(config.batch_size)
        return jax.lax.stop_gradient(network.memory_at(memories, jnp.full_like(rows, config.burn_in - 1), rows))

    def targets(state: State, seq: replay.Sequences, part: Any, online: Any, target: Any) -> Array:
        """What the value of each action taken should be ``[length, N]``, from memories ``[N]`` of both networks."""
        obs = part[0]
        q = network.unroll(state.target_params, target, *part)[1]
        chooser = network.unroll(state.params, online, *part)[1] if config.double else q
        best = jnp.argmax(mask(chooser, obs), axis=-1)
        following = pick(q, best)[1:]
        kind, reward = (x[config.burn_in : -1] for x in (seq.kind, seq.reward))
        if config.rescale:
            following = losses.unsquash(following)
        discount, goes_on = state.hyper.gamma * (kind != replay.TERMINATED), 1.0 * (kind == replay.MID)
        wanted = returns.over_batch(returns.n_step_returns, reward, discount, following, goes_on, config.n_step)
        return losses.squash(wanted) if config.rescale else wanted

    def actor(state: State) -> Any:
        """The policy that acts, epsilon-greedy, and the memories to store."""
        epsilon = exploration(state)

        def act(before: Any, obs: Observation, first: Array, noise: Any) -> tuple[Any, Array, Any]:
            obs = normalize.observations(state.obs_stats, obs)
            after, q = network.step(state.params, before, obs, first)
            action = epsilon_greedy(mask(q, obs), epsilon, noise)
            return after, action, (action, before, after)

        return act

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        settings.check_hyper(hyper)
        keys = jax.random.split(key, 4)
        return State(
            **value_policy.start_learning(env, config, hyper, network, store, keys, num_updates, optimizer),
            **normalize.start(config, observation_spec(env), start),
        )

    return Algorithm(
        init=init,
        update=update,
        act=functools.partial(value_policy.act, network),
        env_steps_per_update=per_update,
        name="r2d2",
        env=env,
        config=config,
        hyper=hyper,
        uses_length=True,
        remake=remake,
        check_hyper=settings.check_hyper,
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
