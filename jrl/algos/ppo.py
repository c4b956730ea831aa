"""Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347).

One update: act for T steps in B environments with the current policy, estimate advantages by GAE, then take several
epochs of minibatch steps on a surrogate that is only trusted near the policy that acted:

    PPO-Clip     L = E[ min(r A, clip(r, 1 - eps, 1 + eps) A) ]      r = pi(a|x) / pi_old(a|x)       (eq. 7)
    PPO-Penalty  L = E[ r A - beta KL(pi_old || pi) ]                beta halved or doubled by the KL (eq. 8)

plus a value loss and an entropy bonus (eq. 9). What follows the paper's reference code rather than its text: orthogonal
initialization, advantages standardized per minibatch, value clipping, a global-norm clip, an annealed learning rate,
Adam's eps of 1e-5 (Huang et al. 2022, "The 37 implementation details of PPO").

Truncated episodes bootstrap from the value of their last observation, and nothing leaks over a reset. A recurrent
policy starts each rollout from the memory it had, trains on whole sequences, and forgets where an episode begins.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import nets
from jrl.algorithm import Algorithm, Metrics, learning_rate_factor, optimizer
from jrl.envs.strict import strict
from jrl.envs.types import Box, Discrete, Environment, MaskedObs, MultiDiscrete, Space, observation_spec
from jrl.equations import distributions, losses, returns
from jrl.equations.distributions import Distribution
from jrl.experience import normalize, rollout
from jrl.numerics import checks, loops, optim, precision

Array = jax.Array


@dataclass(frozen=True)
class Config:
    """Static settings: they decide shapes and structure, and are compiled in.

    Attributes:
        num_envs: environments stepped side by side in each seed.
        num_steps: steps in each environment per update.
        num_epochs: passes over the data of an update.
        num_minibatches: gradient steps per pass; divides num_envs * num_steps (recurrent: num_envs).
        loss: clip (PPO-Clip) or penalty (PPO-Penalty, adaptive KL weight; the preset "penalty" has a learning rate for it).
        dual_clip: bound the loss of negative advantages by hyper.dual_clip.
        value_clip: clip value updates by hyper.value_clip_eps.
        kl_stop: skip the minibatches left in an update once its KL exceeds 1.5 x hyper.target_kl.
        standardize_advantages: per minibatch, per batch, or none.
        normalize_observations: by running mean and standard deviation.
        normalize_rewards: by the running standard deviation of the discounted return.
        continuous: policy for real actions, normal (clipped to the bounds) or tanh_normal; both act in units where
            finite bounds are -1 and 1.
        network: shape of the network.
        optimizer: what the optimizer is made of.
        precision: float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like
            'params=float32,compute=bfloat16,output=float32'.
    """

    num_envs: int = 4
    num_steps: int = 128
    num_epochs: int = 4
    num_minibatches: int = 4
    loss: Literal["clip", "penalty"] = "clip"
    dual_clip: bool = False
    value_clip: bool = True
    kl_stop: bool = False
    standardize_advantages: Literal["minibatch", "batch", "none"] = "minibatch"
    normalize_observations: bool = False
    normalize_rewards: bool = False
    continuous: Literal["normal", "tanh_normal"] = "normal"
    network: nets.Config = field(default_factory=nets.Config)
    optimizer: optim.OptimizerConfig = field(default_factory=optim.OptimizerConfig)
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("num_envs", "num_steps", "num_epochs", "num_minibatches"):
            checks.positive_int(f"config.{name}", getattr(self, name))
        checks.one_of("config.loss", self.loss, ("clip", "penalty"))
        checks.one_of("config.continuous", self.continuous, ("normal", "tanh_normal"))
        checks.one_of("config.standardize_advantages", self.standardize_advantages, ("minibatch", "batch", "none"))
        precision.parse(self.precision)
        samples, what = (
            (self.num_envs, "") if self.network.remembers else (self.num_envs * self.num_steps, " * num_steps")
        )
        if samples % self.num_minibatches:
            raise ValueError(
                f"config.num_minibatches must divide num_envs{what} = {samples}; got {self.num_minibatches}"
            )


class Hyper(NamedTuple):
    """Hyperparameters: data of the state, floats or traced scalars, that may differ between vmapped runs.

    Attributes:
        learning_rate: at the start of the run; config.optimizer.schedule says how it goes on.
        gamma: discount of the return.
        gae_lambda: lambda of the advantage estimate.
        clip_eps: range of the ratio, 1 - eps to 1 + eps.
        value_clip_eps: range of a value update, in units of return.
        entropy_weight: weight of the entropy bonus.
        value_weight: weight of the value loss.
        max_grad_norm: global norm that gradients are scaled down to (or the bound of config.optimizer.clip).
        dual_clip: bound on the ratio where the advantage is negative.
        target_kl: KL that the penalty steers to; kl_stop stops at 1.5 times it.
        kl_weight: initial weight of the KL penalty; it is adapted within a factor of 100.
        optimizer: numbers of the optimizer.
    """

    learning_rate: float = 2.5e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_eps: float = 0.2
    value_clip_eps: float = 0.2
    entropy_weight: float = 0.01
    value_weight: float = 0.5
    max_grad_norm: float = 0.5
    dual_clip: float = 3.0
    target_kl: float = 0.01
    kl_weight: float = 1.0
    optimizer: optim.Hyper = optim.Hyper()


def check_hyper(hyper: Hyper) -> None:
    """Raise ``ValueError`` for a concrete number outside its range; traced numbers pass."""
    inf = float("inf")
    ranges = {"gamma": (0, 1), "gae_lambda": (0, 1), "dual_clip": (1, inf), "target_kl": (1e-12, inf)}
    checks.above_zero("hyper.max_grad_norm", hyper.max_grad_norm)
    for name in hyper._fields[:-1]:
        checks.within(f"hyper.{name}", getattr(hyper, name), *ranges.get(name, (0, inf)))
    optim.check_hyper(hyper.optimizer)


def check_minibatches(config: Config) -> None:
    """Raise ``ValueError`` where advantages would be standardized over one sample: they would all be 0."""
    parts = {"minibatch": config.num_minibatches, "batch": 1, "none": 0}[config.standardize_advantages]
    if config.num_envs * config.num_steps == parts:
        raise ValueError(
            f"config.standardize_advantages={config.standardize_advantages} needs two samples or more; got "
            f"num_envs * num_steps / num_minibatches = 1"
        )


class State(NamedTuple):
    """The whole run."""

    params: Any
    opt_state: Any
    actors: rollout.Actors
    obs_stats: normalize.Stats | None
    reward_stats: normalize.RewardStats | None
    kl_weight: Array
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if constant or unknown
    hyper: Hyper


class Batch(NamedTuple):
    """Training data ``[L, N, ...]``: N sequences of length L (of length 1 unless the network is recurrent)."""

    obs: Any
    first: Array
    action: Array
    log_prob: Array
    policy: Any  # parameters of the policy that acted, for the exact KL of PPO-Penalty; else ()
    value: Array
    advantage: Array
    target: Array


def make(env: Environment, config: Config = Config(), hyper: Hyper = Hyper()) -> Algorithm:
    """PPO in ``env``. ``hyper`` are the defaults that ``init`` takes.

    Raises ``ValueError`` for a setting out of range or one that does not fit the environment.
    """
    checks.instances("ppo.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    env = strict(env)
    obs_spec = observation_spec(env)
    network = nets.actor_critic(config.network, obs_spec, env.action_space)
    network = precision.float32_outputs(precision.apply(config.precision, network))
    check_minibatches(config)
    distribution = action_distribution(env.action_space, config.continuous)
    recurrent = config.network.remembers
    anneals = config.optimizer.uses_length
    defaults = hyper

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = defaults if hyper is None else hyper
        check_hyper(hyper)
        key_params, key_envs, key_run, key_optimizer = jax.random.split(key, 4)
        hyper = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyper)
        params = network.init(key_params)
        shape = (obs_spec.obs if isinstance(obs_spec, MaskedObs) else obs_spec).shape
        return State(
            params=params,
            opt_state=optimizer(config, hyper, 1.0, key_optimizer).init(params),
            actors=rollout.start(env, key_envs, config.num_envs, network.memory),
            obs_stats=normalize.init(shape) if config.normalize_observations else None,
            reward_stats=normalize.init_rewards(config.num_envs) if config.normalize_rewards else None,
            kl_weight=hyper.kl_weight,
            key=key_run,
            updates=jnp.int32(0),
            num_updates=jnp.asarray(num_updates if anneals and num_updates is not None else 0, jnp.int32),
            hyper=hyper,
        )

    def update(state: State) -> tuple[State, Metrics]:
        key, key_noise, key_envs, key_learn = jax.random.split(state.key, 4)
        noise = distribution.noise(key_noise, (config.num_steps, config.num_envs))
        actors, steps, episodes = rollout.collect(env, state.actors, actor(state), noise, key_envs, config.num_steps)
        batch = assemble(state, steps)
        learner, learning = learn(state, batch, key_learn)
        state = state._replace(**learner, actors=actors, key=key, updates=state.updates + 1)
        state = state._replace(**next_statistics(state, steps))
        metrics = learning | {
            "explained_variance": losses.explained_variance(batch.value, batch.target),
        }
        return state, metrics | rollout.episode_metrics(episodes)

    def actor(state: State) -> Any:
        """The policy that acts: sampled, and what learning needs of it later."""

        def act(memory: Any, obs: Any, first: Array, noise: Array) -> tuple[Any, Array, Any]:
            normalized = normalize.observations(state.obs_stats, obs)
            later, outputs = network.step(state.params, memory, normalized, first)
            action = distribution.from_noise(outputs.policy, noise)
            return later, to_env(env.action_space, action), (action, outputs.policy)

        return act

    def assemble(state: State, steps: rollout.Steps) -> Batch:
        """Values and advantages of a rollout, as training sequences."""
        obs = normalize.observations(state.obs_stats, steps.obs)
        memories, outputs = network.unroll(state.params, state.actors.memory, obs, steps.first)
        v_t = rollout.following_values(env, steps, outputs.value, value_of(state, memories), network.heavy)
        reward = steps.reward
        if state.reward_stats is not None:
            reward = normalize.scale(state.reward_stats.stats, reward)
        discount_t = state.hyper.gamma * (1 - steps.terminated)
        continue_t = 1.0 - (steps.terminated | steps.truncated)
        over_envs = jax.vmap(returns.gae, in_axes=(1, 1, 1, 1, 1, None), out_axes=1)
        advantage = over_envs(outputs.value, reward, discount_t, v_t, continue_t, state.hyper.gae_lambda)
        target = advantage + outputs.value
        if config.standardize_advantages == "batch":
            advantage = losses.standardize(advantage)
        action, policy = steps.extras
        log_prob = distribution.log_prob(policy, action)
        kept = policy if config.loss == "penalty" else ()
        batch = Batch(obs, steps.first, action, log_prob, kept, outputs.value, advantage, target)
        return batch if recurrent else jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)

    def value_of(state: State, memories: Any) -> Any:
        """The value of observations after steps t of environments b, with the memories of then."""

        def value(obs: Any, t: Array, b: Array) -> Array:
            normalized = normalize.observations(state.obs_stats, obs)
            return network.step(state.params, network.memory_at(memories, t, b), normalized, jnp.zeros(t.shape, bool))[
                1
            ].value

        return value

    def learn(state: State, batch: Batch, key: Array) -> tuple[dict[str, Any], Metrics]:
        """Epochs of minibatch steps; returns the parts of the state that changed, and the mean metrics."""
        num_sequences = batch.first.shape[1]
        tx = optimizer(config, state.hyper, learning_rate_factor(config, state))
        orders = jax.vmap(lambda k: rollout.shuffle(k, num_sequences))(jax.random.split(key, config.num_epochs))
        orders = orders.reshape(config.num_epochs * config.num_minibatches, -1)
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

        (params, opt_state, _), metrics = loops.scan(
            minibatch, (state.params, state.opt_state, jnp.bool_(True)), orders
        )
        taken = metrics.pop("minibatches").sum()
        means = jax.tree.map(lambda m: m.sum() / jnp.maximum(taken, 1), metrics)
        changed = {"params": params, "opt_state": opt_state}
        if config.kl_stop:
            means["minibatches"] = taken
        if config.loss == "penalty":
            # The paper adapts the weight by the KL after the update; all rows, with the new parameters.
            _, outputs = network.unroll(params, memory, batch.obs, batch.first)
            kl = distribution.kl(batch.policy, outputs.policy).mean()
            changed["kl_weight"] = losses.adapt_kl_weight(
                state.kl_weight, kl, state.hyper.target_kl, state.hyper.kl_weight
            )
            means |= {"kl": kl, "kl_weight": state.kl_weight}
        return changed, means

    def loss(params: Any, memory: Any, batch: Batch, state: State) -> tuple[Array, Metrics]:
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

    def next_statistics(state: State, steps: rollout.Steps) -> dict[str, Any]:
        obs_stats, reward_stats = state.obs_stats, state.reward_stats
        if obs_stats is not None:
            obs_stats = normalize.update(obs_stats, steps.obs.obs if isinstance(steps.obs, MaskedObs) else steps.obs)
        if reward_stats is not None:
            ended = steps.terminated | steps.truncated
            reward_stats = normalize.update_rewards(reward_stats, steps.reward, ended, state.hyper.gamma)
        return {"obs_stats": obs_stats, "reward_stats": reward_stats}

    def act(state: State, obs: Any, key: Array | None = None, memory: Any = None) -> tuple[Array, Any]:
        first = jnp.bool_(memory is None)
        memory = network.memory if memory is None else memory
        normalized = normalize.observations(state.obs_stats, obs)
        one = jax.tree.map(lambda x: x[None], (memory, normalized, first))
        params = optim.eval_params(state.opt_state, state.params)
        later, outputs = jax.tree.map(lambda x: x[0], network.step(params, *one))
        chosen = distribution.mode(outputs.policy) if key is None else distribution.sample(key, outputs.policy)
        return to_env(env.action_space, chosen), later

    per_update = config.num_envs * config.num_steps

    def remake(config: Config) -> Algorithm:
        return make(env, config, hyper)

    return Algorithm(init, update, act, per_update, "ppo", env, config, hyper, anneals, remake, check_hyper=check_hyper)


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


def to_env(space: Space, action: Array) -> Array:
    """The environment's action of a policy's: real ones are clipped to [-1, 1] and mapped onto finite bounds."""
    if not isinstance(space, Box):
        return action
    low, high = np.array(space.low, np.float32), np.array(space.high, np.float32)
    finite = np.isfinite(low) & np.isfinite(high)
    least, most = np.where(finite, low, -1), np.where(finite, high, 1)
    center, half = (least + most) / 2, (most - least) / 2
    mapped = center + half * jnp.where(finite, jnp.clip(action, -1, 1), action)
    return jnp.clip(mapped, low, high)
