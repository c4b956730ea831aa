"""Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347).

One update: act for T steps in B environments with the current policy, estimate advantages by GAE, then take several
epochs of minibatch steps on a surrogate that is only trusted near the policy that acted:

    PPO-Clip     L = E[ min(r A, clip(r, 1 - eps, 1 + eps) A) ]      r = pi(a|x) / pi_old(a|x)       (eq. 7)
    PPO-Penalty  L = E[ r A - beta KL(pi_old || pi) ]                beta halved or doubled by the KL (eq. 8)

plus a value loss and an entropy bonus (eq. 9). What follows the paper's reference code rather than its text: orthogonal
initialization, advantages standardized per minibatch, value clipping, a global-norm clip, an annealed learning rate,
Adam's eps of 1e-5 (Huang et al. 2022, "The 37 implementation details of PPO").

Truncated episodes bootstrap from the value of their last observation, and nothing leaks over a reset. A recurrent
policy starts each rollout from the memory it had, trains on whole sequences, and resets its memory at the start of each episode.

``config.bonus`` adds the advantages of a bonus for what is new (``jrl.intrinsic``), ``config.imitation`` learning from what went better than
expected, and ``config.auxiliary`` auxiliary tasks (``self_imitation.py`` and ``auxiliary_tasks.py`` beside this).
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import algorithm, intrinsic, nets
from jrl.algorithm import Algorithm, Metrics
from jrl.algos import auxiliary_tasks, self_imitation
from jrl.algos.ppo_settings import Config, Hyper, check
from jrl.envs.spaces import to_env
from jrl.envs.strict import strict
from jrl.envs.types import Box, Discrete, Environment, MultiDiscrete, Space, observation_spec
from jrl.equations import distributions, losses, returns
from jrl.equations.distributions import Distribution
from jrl.experience import normalize, rollout
from jrl.numerics import loops, optim, precision
from jrl.numerics.settings import check_hyper
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
    """PPO in ``env``. ``hyper`` are the defaults of ``init``; ``network``, ``optimizer`` and ``bonus`` take the place of those that ``config``
    describes; ``start``, the state of one trained seed, gives the parameters and the statistics of observations to begin with.

    Raises ``ValueError`` for a setting that is wrong or does not fit.
    """
    check(config, hyper, start)
    env, defaults = strict(env), hyper
    obs_spec = observation_spec(env)
    remake = functools.partial(make, env, hyper=hyper, network=network, optimizer=optimizer, bonus=bonus, start=start)
    curiosity = intrinsic.make(config.bonus, env, (config.num_epochs, config.num_minibatches), bonus)
    own = network
    network = nets.starting_from(nets.policy_network(own, config.network, obs_spec, env.action_space), start)
    rollout.check_minibatches(config, network.remembers)
    normalize.check(config, obs_spec)
    network = precision.apply_to_network(config.precision, network)
    distribution = action_distribution(env.action_space, config.continuous)
    imitation = self_imitation.make(config.imitation, env, config.num_envs, network, distribution)
    auxiliary = auxiliary_tasks.make(config.auxiliary, env, config, network, own)
    num_keys = 7 if auxiliary else 6 if curiosity or imitation else 4

    def update(state: State) -> tuple[State, Metrics]:
        key, key_noise, key_envs, key_learn, *more_keys = jax.random.split(state.key, num_keys)
        noise = distribution.noise(key_noise, (config.num_steps, config.num_envs))
        actors, steps, episodes = rollout.collect(env, state.actors, actor(state), noise, key_envs, config.num_steps)
        state, bonus_advantage, paid = explore(state, steps, actors.obs, *more_keys[:1])
        batch = with_advantages(state, steps, bonus_advantage)
        state, metrics = learn(state, batch, key_learn)
        state, replayed = learn_from_replay(state, steps, *more_keys[1:])
        state = state._replace(actors=actors, key=key, updates=state.updates + 1, **normalize.after(state, steps))
        metrics |= paid | replayed
        metrics["explained_variance"] = losses.explained_variance(batch.value, batch.target)
        return state, metrics | rollout.episode_metrics(episodes)

    def loss(params: Params, memory: Memory, batch: Batch, state: State) -> tuple[Array, Metrics]:
        hyper = state.hyper
        _, outputs = network.unroll(params, memory, batch.obs, batch.first)
        log_ratio = distribution.log_prob(outputs.policy, batch.action) - batch.log_prob
        advantage = batch.advantage
        if config.standardize_advantages == "minibatch":
            advantage = losses.standardize(advantage)

        if config.loss == "penalty":
            penalty = state.kl_weight * distribution.kl(batch.policy, outputs.policy)
            policy_loss = losses.ppo_unclipped(log_ratio, advantage) + penalty
        elif config.dual_clip:
            policy_loss = losses.ppo_dual_clip(log_ratio, advantage, hyper.clip_eps, hyper.dual_clip)
        else:
            policy_loss = losses.ppo_clip(log_ratio, advantage, hyper.clip_eps)

        if config.value_clip:
            value_loss = losses.clipped_value_loss(outputs.value, batch.value, batch.target, hyper.value_clip_eps)
        else:
            value_loss = losses.value_loss(outputs.value, batch.target)

        entropy = distribution.entropy(outputs.policy)
        metrics = {
            "policy_loss": policy_loss.mean(),
            "value_loss": value_loss.mean(),
            "entropy": entropy.mean(),
            "approximate_kl": losses.approximate_kl(log_ratio).mean(),
            "clip_fraction": losses.clip_fraction(log_ratio, hyper.clip_eps),
        }
        total = metrics["policy_loss"] + hyper.value_weight * metrics["value_loss"]
        total = total - hyper.entropy_weight * metrics["entropy"]
        return total, {"loss": total} | metrics

    def actor(state: State) -> Any:
        """Sample actions, and return what learning needs later."""

        def act(memory: Memory, obs: Observation, first: Array, noise: Array) -> tuple[Any, Array, Any]:
            normalized = normalize.observations(state.obs_stats, obs)
            next_memory, outputs = network.step(state.params, memory, normalized, first)
            action = distribution.from_noise(outputs.policy, noise)
            return next_memory, to_env(env.action_space, action), (action, outputs.policy)

        return act

    def explore(state: State, steps: rollout.Steps, last_obs: Observation, *key: Array) -> tuple[State, Any, Metrics]:
        """Learn the bonus for what is new; what it adds to the advantages, None if there is none."""
        if not curiosity:
            return state, None, {}
        transitions = intrinsic.Transitions(steps.obs, steps.extras[0], steps.next_obs)
        learned, advantage, metrics = curiosity.advantages(
            state.bonus, transitions, last_obs, state.hyper.bonus, state.hyper.gae_lambda, *key
        )
        return state._replace(bonus=learned), state.hyper.bonus.weight * advantage, metrics

    def learn_from_replay(state: State, steps: rollout.Steps, *keys: Array) -> tuple[State, Metrics]:
        """Learn from what went better than expected, and for the auxiliary tasks, if that is asked for."""
        metrics: Metrics = {}
        for beside, key in zip((imitation, auxiliary), keys, strict=False):
            if beside:
                tx = algorithm.current_optimizer(config, state, optimizer)
                state, more = beside.update(state, steps, steps.extras[0], key, tx)
                metrics |= more
        return state, metrics

    def with_advantages(state: State, steps: rollout.Steps, bonus_advantage: Array | None) -> Batch:
        """Values and advantages of a rollout, as training sequences."""
        obs = normalize.observations(state.obs_stats, steps.obs)
        memories, outputs = network.unroll(state.params, state.actors.memory, obs, steps.first)
        v_t = rollout.following_values(env, steps, outputs.value, value_of(state, memories), network.heavy)
        reward = normalize.rewards(state.reward_stats, steps.reward)
        discount_t = state.hyper.gamma * (1 - steps.terminated)
        continue_t = 1.0 - (steps.terminated | steps.truncated)
        gae_lambda = state.hyper.gae_lambda
        advantage = returns.over_batch(returns.gae, outputs.value, reward, discount_t, v_t, continue_t, gae_lambda)
        target = advantage + outputs.value
        if bonus_advantage is not None:
            advantage = advantage + bonus_advantage
        if config.standardize_advantages == "batch":
            advantage = losses.standardize(advantage)
        action, policy = steps.extras
        log_prob = distribution.log_prob(policy, action)
        kept = policy if config.loss == "penalty" else ()
        batch = Batch(obs, steps.first, action, log_prob, kept, outputs.value, advantage, target)
        return batch if network.remembers else jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)

    def value_of(state: State, memories: Any) -> Any:
        """The value of observations after steps t of environments b, with the recurrent memory at that time."""

        def value(obs: Observation, t: Array, b: Array) -> Array:
            normalized = normalize.observations(state.obs_stats, obs)
            memory = network.memory_at(memories, t, b)
            return network.step(state.params, memory, normalized, jnp.zeros(t.shape, bool))[1].value

        return value

    def learn(state: State, batch: Batch, key: Array) -> tuple[State, Metrics]:
        """Epochs of minibatch steps, and their mean metrics."""
        tx = algorithm.current_optimizer(config, state, optimizer)
        order = rollout.minibatches(key, batch.first.shape[1], config.num_epochs, config.num_minibatches)
        memory = state.actors.memory

        def minibatch(carry: tuple[Any, Any, Array], rows: Array) -> tuple[tuple[Any, Any, Array], Metrics]:
            params, opt_state, go = carry
            part = jax.tree.map(lambda x: x[:, rows], batch)
            start = jax.tree.map(lambda x: x[rows], memory)
            step = optim.minimize(tx, lambda p: loss(p, start, part, state), params, opt_state)
            stepped = (step.params, step.opt_state)
            metrics = step.extra | {"grad_norm": step.grad_norm, "minibatches": jnp.float32(1)}
            if config.kl_stop:
                go = go & ~(metrics["approximate_kl"] > 1.5 * state.hyper.target_kl)
                stepped = jax.tree.map(lambda new, old: jnp.where(go, new, old), stepped, (params, opt_state))
                metrics = jax.tree.map(lambda m: jnp.where(go, m, 0.0), metrics)
            return (*stepped, go), metrics

        (params, opt_state, _), metrics = loops.scan(minibatch, (state.params, state.opt_state, jnp.bool_(True)), order)
        taken = metrics.pop("minibatches").sum()
        means = jax.tree.map(lambda m: m.sum() / jnp.maximum(taken, 1), metrics)
        if config.kl_stop:
            means["minibatches"] = taken
        state = state._replace(params=params, opt_state=opt_state)
        return adapt_penalty(state, batch, means) if config.loss == "penalty" else (state, means)

    def adapt_penalty(state: State, batch: Batch, metrics: Metrics) -> tuple[State, Metrics]:
        """Adapt the weight of the penalty by the KL of the whole batch after the update, as in the paper."""
        _, outputs = network.unroll(state.params, state.actors.memory, batch.obs, batch.first)
        kl = distribution.kl(batch.policy, outputs.policy).mean()
        adapted = losses.adapt_kl_weight(state.kl_weight, kl, state.hyper.target_kl, state.hyper.kl_weight)
        return state._replace(kl_weight=adapted), metrics | {"kl": kl, "kl_weight": state.kl_weight}

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        number = 6 if auxiliary else 5 if curiosity else 4
        key_params, key_envs, key_run, key_optimizer, *more_keys = jax.random.split(key, number)
        length = num_updates if config.optimizer.uses_length else None
        learner = algorithm.start_learning(config, hyper, network.init(key_params), key_optimizer, length, optimizer)
        return State(
            **learner,
            actors=rollout.start(env, key_envs, config.num_envs, network.memory),
            **normalize.start(config, obs_spec, start),
            bonus=curiosity.init(more_keys[0], config.num_envs) if curiosity else None,
            imitation=imitation.init() if imitation else None,
            auxiliary=auxiliary.init(more_keys[1]) if auxiliary else None,
            kl_weight=learner["hyper"].kl_weight,
            key=key_run,
        )

    def act(state: State, obs: Observation, key: Array | None = None, memory: Memory = None) -> tuple[Array, Any]:
        params = optim.eval_params(state.opt_state, state.params)
        next_memory, outputs = nets.step_one(network, params, normalize.observations(state.obs_stats, obs), memory)
        chosen = distribution.mode(outputs.policy) if key is None else distribution.sample(key, outputs.policy)
        return to_env(env.action_space, chosen), next_memory

    return Algorithm(
        init=init,
        update=update,
        act=act,
        env_steps_per_update=config.num_envs * config.num_steps,
        name="ppo",
        env=env,
        config=config,
        hyper=hyper,
        uses_length=config.optimizer.uses_length,
        remake=remake,
        check_hyper=check_hyper,
    )


class State(NamedTuple):
    """The whole run."""

    params: Params
    opt_state: OptState
    actors: rollout.Actors
    obs_stats: normalize.Stats | None
    reward_stats: normalize.RewardStats | None
    bonus: Any  # intrinsic.State; None without a bonus
    imitation: Any  # replay.Buffer; None without self-imitation
    auxiliary: Any  # auxiliary_tasks.State; None without auxiliary tasks
    kl_weight: Array
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if constant or unknown
    hyper: Hyper


class Batch(NamedTuple):
    """Training data ``[L, N, ...]``: N sequences of length L (of length 1 unless the network is recurrent)."""

    obs: Observation
    first: Array
    action: Array
    log_prob: Array
    policy: Any  # parameters of the policy that acted, for the exact KL of PPO-Penalty; else ()
    value: Array
    advantage: Array
    target: Array


def action_distribution(space: Space, continuous: Literal["normal", "tanh_normal"] = "normal") -> Distribution:
    """The family of policies for an action space. Raises ``ValueError`` for tanh_normal where a bound is infinite."""
    match space:
        case Discrete(n):
            return distributions.categorical(n)
        case MultiDiscrete(nvec):
            return distributions.multi_categorical(nvec)
        case Box(low, high):
            if continuous == "tanh_normal" and not np.isfinite([low, high]).all():
                raise ValueError(
                    f"config.continuous=tanh_normal needs finite bounds; {space} has infinite ones: take normal"
                )
            return {"normal": distributions.normal, "tanh_normal": distributions.tanh_normal}[continuous](len(low))
