"""Deep Q-networks (Mnih et al., Nature 2015) and the parts of Rainbow (Hessel et al. 2018, arXiv 1710.02298).

One update: act for a few steps in B environments, then take gradient steps on transitions from the replay:

    DQN            y = r + gamma max_a Q'(x', a)                                Q' the target network
    double         y = r + gamma Q'(x', argmax_a Q(x', a))                      1509.06461, eq. 4
    n-step         r and gamma over n steps                                     1710.02298, section 3
    Munchausen     y = r + alpha [tau log pi(a|x)]_-1^0 + gamma sum_a' pi(a'|x') (Q'(x', a') - tau log pi(a'|x'))
                   with pi = softmax(Q' / tau)                                  2007.14430, eq. 1
    C51            the distribution of y, projected on fixed atoms              1707.06887, algorithm 1
    QR             its quantiles                                                1710.10044, eq. 10
    dueling, noisy are shapes of the network (``nets.ValueConfig``), PER a way of drawing (``jrl.experience.replay``), and a bonus for what is
    new (``config.bonus``, ``jrl.intrinsic``) is part of the reward, as it would be paid today

Each can be switched on by itself. ``RAINBOW`` is their documented composition. Truncated episodes bootstrap from their last
observation. Until ``learning_starts`` steps are stored, gradient steps are computed but discarded: the program has no branch.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import algorithm, intrinsic, nets
from jrl.algorithm import Algorithm, Metrics, exploration
from jrl.algos import value_policy
from jrl.algos.dqn_settings import RAINBOW as RAINBOW
from jrl.algos.dqn_settings import Config, Hyper, check, check_hyper
from jrl.envs import wrappers
from jrl.envs.strict import strict
from jrl.envs.types import Environment, observation_spec
from jrl.equations import losses
from jrl.experience import normalize, replay, rollout
from jrl.experience.greedy import choose, epsilon_greedy, exploration_noise, mask, pick
from jrl.numerics import optim, precision
from jrl.numerics.types import Memory, Observation, OptState, Params

Array = jax.Array


def make(
    env: Environment,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    network: nets.Network | None = None,
    optimizer: algorithm.Optimizer | None = None,
    bonus: intrinsic.Intrinsic | None = None,
    start: Any = None,
) -> Algorithm:
    """DQN in ``env``, which must have discrete actions. ``hyper`` are the defaults of ``init``; ``network``, ``optimizer`` and ``bonus`` take
    the place of those that ``config`` describes; ``start``, the state of one trained seed, gives the parameters to begin with.

    Raises ``ValueError`` for a setting that is wrong or does not fit the environment, or a replay larger than memory.
    """
    check(config, hyper, bonus)
    unstacked, defaults = strict(env), hyper
    env = strict(wrappers.frame_stack(unstacked, config.num_frames)) if config.num_frames > 1 else unstacked
    remake = functools.partial(
        make, unstacked, hyper=hyper, network=network, optimizer=optimizer, bonus=bonus, start=start
    )
    curiosity = intrinsic.make(config.bonus, env, (config.num_gradient_steps, 1), bonus)
    normalize.check(config, observation_spec(env))
    network, store = network_of(env, config, network, start), replay_of(env, config)
    num_actions = env.action_space.n  # type: ignore[union-attr]
    noisy = config.network.noisy
    per_update = config.num_envs * config.num_steps
    first_learning = -(-config.learning_starts // per_update)

    def update(state: State) -> tuple[State, Metrics]:
        # Few draws: on a CPU each costs as much as a layer of the network.
        learning = slice(4, 4 + config.num_gradient_steps)
        keys = jax.random.split(state.key, learning.stop + (1 if curiosity else 0))
        key, key_noise, key_envs, key_weights = keys[:4]
        noise = exploration_noise(key_noise, (config.num_steps, config.num_envs), num_actions)
        weight_keys = jax.random.split(key_weights, config.num_steps) if noisy else None
        actors, steps, episodes = rollout.collect(
            env, state.actors, actor(state), (noise, weight_keys), key_envs, config.num_steps
        )
        buffer = replay.add_rollout(store, state.buffer, steps, steps.extras, config.reward_clip)
        state = state._replace(actors=actors, buffer=buffer, key=key)
        state, paid = explore(state, steps, *keys[learning.stop :])
        ready = state.updates + 1 >= first_learning  # counted in updates: steps would overflow
        state, metrics = algorithm.learn_from_replay(learn, state, keys[learning], ready, config.target_every)
        state = state._replace(**normalize.after(state, steps))
        return state, metrics | paid | {"epsilon": epsilon_of(state)} | rollout.episode_metrics(episodes)

    def learn(state: State, key: Array, ready: Array) -> tuple[State, Metrics]:
        """One minibatch; priorities stay as they are until ``ready``."""
        h = state.hyper
        key_batch, key_online, key_target, key_select = jax.random.split(key, 4) if noisy else (key, None, None, None)
        stored = store.sample(state.buffer, key_batch, h.gamma, algorithm.importance_exponent(state))
        batch = with_bonus(state, stored, normalize.transitions(state, stored))
        next_outputs = outputs(state.target_params, batch.next_obs, key_target)
        if config.double:
            chooser = values(outputs(state.params, batch.next_obs, key_select), batch.next_obs, h)
        else:
            chooser = values(next_outputs, batch.next_obs, h)
        used = batch.weight > 0  # unused rows may give NaN, and 0 times NaN is NaN
        target = losses.masked(targets(state, batch, next_outputs, jnp.argmax(chooser, axis=-1)), used)
        number = jnp.maximum(used.sum(), 1)

        def loss(params: Params) -> tuple[Array, tuple[Metrics, Array]]:
            taken = losses.masked(pick(outputs(params, batch.obs, key_online), batch.action), used)
            error, each, priority = errors(taken, target, h)
            total = jnp.sum(batch.weight * each) / number
            mean_square = jnp.sum(used * error**2) / number
            return total, ({"loss": mean_square, "objective": total}, priority)

        step = optim.minimize(
            algorithm.current_optimizer(config, state, optimizer), loss, state.params, state.opt_state
        )
        metrics, priority = step.extra
        rows = jnp.where(ready, batch.rows, replay.NOWHERE)
        buffer = store.update(state.buffer, rows, priority**h.priority_exponent)
        state = state._replace(params=step.params, opt_state=step.opt_state, buffer=buffer)
        if config.distribution == "categorical":  # much mass at an edge: returns lie beyond the support
            metrics |= {"mass_at_v_min": target[:, 0].sum() / number, "mass_at_v_max": target[:, -1].sum() / number}
        return state, metrics | {"grad_norm": step.grad_norm}

    def explore(state: State, steps: rollout.Steps, *key: Array) -> tuple[State, Metrics]:
        """Learn the bonus for what is new from a rollout, if there is one."""
        if not curiosity:
            return state, {}
        transitions = intrinsic.Transitions(steps.obs, steps.extras, steps.next_obs)
        learned, _, metrics = curiosity.update(state.bonus, transitions, state.hyper.bonus, *key)
        return state._replace(bonus=learned), metrics

    def with_bonus(state: State, stored: replay.Batch, batch: replay.Batch) -> replay.Batch:
        """A minibatch with the bonus of today in its rewards; the replay does not store the end that a bonus may depend on."""
        if not curiosity:
            return batch
        paid = curiosity.bonus(state.bonus, intrinsic.Transitions(stored.obs, stored.action, stored.next_obs))
        paid = jnp.where(batch.discount > 0, paid, 0.0) if curiosity.uses_next else paid
        return batch._replace(reward=batch.reward + state.hyper.bonus.weight * paid)

    def targets(state: State, batch: replay.Batch, next_outputs: Array, best: Array) -> Array:
        """Targets of the values of the actions taken ``[N]``, or of their distributions: probabilities or quantiles ``[N, atoms]``."""
        h = state.hyper
        following = pick(next_outputs, best)
        if config.munchausen:
            legal = mask(next_outputs, batch.next_obs)
            log_pi = jax.nn.log_softmax(legal / h.temperature)
            soft = jnp.sum(
                jnp.where(jnp.isneginf(legal), 0.0, jnp.exp(log_pi) * (next_outputs - h.temperature * log_pi)), -1
            )
            before = mask(outputs(state.target_params, batch.obs, None), batch.obs)
            taken = pick(jax.nn.log_softmax(before / h.temperature), batch.action)
            bonus = h.munchausen_weight * jnp.clip(h.temperature * taken, -1.0, 0.0)
            return batch.reward + bonus + batch.discount * soft
        match config.distribution:
            case "mean":
                return batch.reward + batch.discount * following
            case "quantile":
                return batch.reward[:, None] + batch.discount[:, None] * following
            case "categorical":
                atoms_of = support(h)[0]
                moved = batch.reward[:, None] + batch.discount[:, None] * atoms_of
                return jax.vmap(losses.project_categorical, in_axes=(0, 0, None))(
                    jax.nn.softmax(following), moved, atoms_of[0]
                )

    def errors(taken: Array, target: Array, hyper: Hyper) -> tuple[Array, Array, Array]:
        """Error of each mean value ``[N]``, the loss of each, and the quantity that its priority is computed from: for C51 the divergence from
        the target, as in Rainbow (1710.02298, section 4)."""
        match config.distribution:
            case "mean":
                error = target - taken
                return error, losses.huber(error) if config.loss == "huber" else 0.5 * error**2, jnp.abs(error)
            case "quantile":
                each = jax.vmap(losses.quantile_huber)(taken, target)
                return target.mean(-1) - taken.mean(-1), each, each
            case "categorical":
                each = -jnp.sum(target * jax.nn.log_softmax(taken), axis=-1)
                entropy = -jnp.sum(jax.scipy.special.xlogy(target, target), axis=-1)
                error = jnp.sum((target - jax.nn.softmax(taken)) * support(hyper)[0], axis=-1)
                return error, each, jnp.maximum(each - entropy, 0.0)

    def outputs(params: Params, obs: Observation, key: Array | None) -> Array:
        """The network's output ``[N, A]`` or ``[N, A, atoms]``, noisy with a key."""
        params = nets.with_noise(params, key) if noisy and key is not None else params
        return nets.outputs(network, params, obs)

    def values(output: Array, obs: Observation, hyper: Hyper) -> Array:
        """Expected returns ``[N, A]``, minus infinity where an action is illegal."""
        match config.distribution:
            case "categorical":
                output = jnp.sum(jax.nn.softmax(output) * support(hyper), axis=-1)
            case "quantile":
                output = output.mean(-1)
        return mask(output, obs)

    def support(hyper: Hyper) -> Array:
        between = jnp.linspace(0, 1, config.atoms, dtype=jnp.float32)[None, None]
        return hyper.v_min + (hyper.v_max - hyper.v_min) * between

    def actor(state: State) -> Any:
        """The policy that acts: epsilon-greedy, or greedy with noisy weights."""
        epsilon = epsilon_of(state)

        def act(nothing: Any, obs: Observation, first: Array, noise: Any) -> tuple[Any, Array, Any]:
            chance, key = noise
            obs = normalize.observations(state.obs_stats, obs)
            action = epsilon_greedy(values(outputs(state.params, obs, key), obs, state.hyper), epsilon, chance)
            return nothing, action, action

        return act

    def epsilon_of(state: State) -> Array:
        """0 with noisy networks, which explore through their weights."""
        return jnp.float32(0) if noisy else exploration(state)

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        keys = jax.random.split(key, 5 if curiosity else 4)
        return State(
            **value_policy.start_learning(env, config, hyper, network, store, keys[:4], num_updates, optimizer),
            **normalize.start(config, observation_spec(env), start),
            bonus=curiosity.init(keys[4], config.num_envs) if curiosity else None,
        )

    def act(state: State, obs: Observation, key: Array | None = None, memory: Memory = None) -> tuple[Array, Any]:
        params = optim.eval_params(state.opt_state, state.params)
        key_noise, key_weights = (None, None) if key is None else jax.random.split(key)
        one = jax.tree.map(lambda x: x[None], normalize.observations(state.obs_stats, obs))
        q = values(outputs(params, one, key_weights), one, state.hyper)[0]
        return choose(q, epsilon_of(state), key_noise), ()

    return Algorithm(
        init=init,
        update=update,
        act=act,
        env_steps_per_update=per_update,
        name="dqn",
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
    actors: rollout.Actors
    obs_stats: normalize.Stats | None
    reward_stats: normalize.RewardStats | None
    bonus: Any  # intrinsic.State; None without a bonus
    buffer: replay.Buffer
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


def network_of(env: Environment, config: Config, own: nets.Network | None, start: Any) -> nets.Network:
    """The network of action values: ``own``, or the one that ``config`` describes, with the parameters of ``start`` if there is one."""
    atoms = 1 if config.distribution == "mean" else config.atoms
    network = nets.value_network(own, config.network, observation_spec(env), env.action_space, atoms)
    if own is not None and config.network.noisy:
        raise ValueError("config.network.noisy has no effect on a network of your own: leave it False")
    if network.remembers:
        raise ValueError(
            "config.network.gru, lstm and attention: DQN replays single transitions; R2D2 and PQN train recurrent networks"
        )
    return precision.apply_to_network(config.precision, nets.starting_from(network, start))


def replay_of(env: Environment, config: Config) -> replay.Replay:
    """The replay of transitions."""
    return replay.make(
        observation_spec(env),
        config.num_envs,
        config.capacity,
        config.batch_size,
        config.n_step,
        config.prioritized,
        config.num_frames,
    )
