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

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import nets
from jrl.algorithm import Algorithm, Metrics, exploration, importance_exponent, learning_rate_factor, optimizer
from jrl.envs.strict import strict
from jrl.envs.types import Discrete, Environment, observation_spec
from jrl.equations import losses, returns
from jrl.experience import replay, rollout
from jrl.experience.greedy import epsilon_greedy, exploration_noise, mask, pick
from jrl.numerics import checks, optim, precision

Array = jax.Array


@dataclass(frozen=True)
class Config:
    """Static settings: they decide shapes and structure, and are compiled in.

    Attributes:
        num_envs: environments stepped side by side in each seed.
        num_steps: steps in each environment per update.
        num_gradient_steps: minibatches per update.
        batch_size: sequences in a minibatch.
        burn_in: rows at the start of a sequence that only bring the memory up to date.
        length: rows after them that are learned from.
        capacity: rows of the replay, over all environments.
        learning_starts: environment steps before the first gradient step.
        target_every: updates between hard copies into the target network; 0 for soft ones (hyper.tau) at each.
        n_step: steps of a target, fewer at the end of a sequence.
        double: choose with the online network what the target network values.
        prioritized: draw sequences by their errors.
        rescale: learn values through h(x) = sgn(x) (sqrt(|x| + 1) - 1) + x / 1000, for returns of very different sizes.
        network: shape of the network; gru is the width of its memory, stored with each row.
        optimizer: what the optimizer is made of.
        precision: float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like
            'params=float32,compute=bfloat16,output=float32'.
    """

    num_envs: int = 16
    num_steps: int = 4
    num_gradient_steps: int = 1
    batch_size: int = 32
    burn_in: int = 10
    length: int = 20
    capacity: int = 50_000
    learning_starts: int = 2_000
    target_every: int = 50
    n_step: int = 5
    double: bool = True
    prioritized: bool = True
    rescale: bool = False
    network: nets.ValueConfig = field(default_factory=lambda: nets.ValueConfig(hidden=(64,), norm="none", gru=64))
    optimizer: optim.OptimizerConfig = field(default_factory=optim.OptimizerConfig)
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("num_envs", "num_steps", "num_gradient_steps", "batch_size", "length", "capacity", "n_step"):
            checks.positive_int(f"config.{name}", getattr(self, name))
        for name in ("burn_in", "learning_starts", "target_every"):
            checks.positive_int(f"config.{name}", getattr(self, name), at_least=0)
        precision.parse(self.precision)
        if self.learning_starts > self.capacity:
            raise ValueError(
                f"config.learning_starts must be at most capacity = {self.capacity}; got {self.learning_starts}"
            )
        if not self.network.gru:
            raise ValueError("config.network.gru must be at least 1: without a memory this is DQN; got 0")
        if self.network.attention.kind != "none":
            raise ValueError(
                "config.network.attention: R2D2 would store its memory with each row; PPO and PQN train it"
            )
        if self.network.noisy:
            raise ValueError("config.network.noisy is an option of DQN; R2D2 explores by epsilon")


class Hyper(NamedTuple):
    """Hyperparameters: data of the state, floats or traced scalars, that may differ between vmapped runs.

    Attributes:
        learning_rate: at the start of the run; config.optimizer.schedule says how it goes on.
        gamma: discount of the return.
        epsilon_start: share of actions chosen uniformly, at the start of the run.
        epsilon_end: that share later; and throughout, where the length of the run is unknown.
        epsilon_fraction: share of the run over which epsilon falls, linearly.
        tau: share of the online network in each soft target update; 1 copies it.
        max_grad_norm: global norm that gradients are scaled down to (or the bound of config.optimizer.clip).
        priority_exponent: alpha of prioritized replay.
        importance_start: beta of prioritized replay at the start of the run; it rises to 1.
        priority_max: eta, the share of a sequence's largest error in its priority; the rest is the mean.
        optimizer: numbers of the optimizer.
    """

    learning_rate: float = 1e-3
    gamma: float = 0.99
    epsilon_start: float = 1.0
    epsilon_end: float = 0.05
    epsilon_fraction: float = 0.3
    tau: float = 0.01
    max_grad_norm: float = 10.0
    priority_exponent: float = 0.9
    importance_start: float = 0.6
    priority_max: float = 0.9
    optimizer: optim.Hyper = optim.Hyper()


def check_hyper(hyper: Hyper) -> None:
    """Raise ``ValueError`` for a concrete number outside its range; traced numbers pass."""
    for name in hyper._fields:
        if name not in ("learning_rate", "max_grad_norm", "optimizer"):
            checks.within(f"hyper.{name}", getattr(hyper, name), 0, 1)
    checks.within("hyper.learning_rate", hyper.learning_rate, 0, float("inf"))
    checks.above_zero("hyper.max_grad_norm", hyper.max_grad_norm)
    optim.check_hyper(hyper.optimizer)


class State(NamedTuple):
    """The whole run, the replay included."""

    params: Any
    target_params: Any
    opt_state: Any
    actors: rollout.Actors
    buffer: replay.Buffer
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


def make(env: Environment, config: Config = Config(), hyper: Hyper = Hyper()) -> Algorithm:
    """R2D2 in ``env``, which must have discrete actions. ``hyper`` are the defaults that ``init`` takes.

    Raises ``ValueError`` for a setting out of range, one that does not fit the environment, or a replay larger than memory.
    """
    checks.instances("r2d2.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    env = strict(env)
    obs_spec = observation_spec(env)
    network = nets.action_values(config.network, obs_spec, env.action_space)
    network = precision.float32_outputs(precision.apply(config.precision, network))
    rows = config.burn_in + config.length + 1  # the last only to bootstrap from
    if config.capacity // config.num_envs < rows + 2:
        least = (rows + 2) * config.num_envs
        raise ValueError(
            f"config.capacity must be at least {least}, burn_in + length + 3 rows for each environment; got {config.capacity}"
        )
    stored = (obs_spec, jax.eval_shape(lambda: network.memory))
    memory = replay.make_sequences(
        stored, config.num_envs, config.capacity, config.batch_size, rows, config.prioritized
    )
    assert isinstance(env.action_space, Discrete)
    num_actions, defaults = env.action_space.n, hyper
    per_update = config.num_envs * config.num_steps
    first_learning = -(-max(config.learning_starts, rows * config.num_envs) // per_update)

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = defaults if hyper is None else hyper
        check_hyper(hyper)
        key_params, key_envs, key_run, key_optimizer = jax.random.split(key, 4)
        hyper = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyper)
        params = network.init(key_params)
        return State(
            params=params,
            target_params=jax.tree.map(jnp.copy, precision.cast(params, "float32")),
            opt_state=optimizer(config, hyper, 1.0, key_optimizer).init(params),
            actors=rollout.start(env, key_envs, config.num_envs, network.memory),
            buffer=memory.init(),
            key=key_run,
            updates=jnp.int32(0),
            num_updates=jnp.asarray(0 if num_updates is None else num_updates, jnp.int32),
            hyper=hyper,
        )

    def update(state: State) -> tuple[State, Metrics]:
        keys = jax.random.split(state.key, 3 + config.num_gradient_steps)
        key, key_noise, key_envs = keys[:3]
        noise = exploration_noise(key_noise, (config.num_steps, config.num_envs), num_actions)
        actors, steps, episodes = rollout.collect(env, state.actors, actor(state), noise, key_envs, config.num_steps)
        action, before, after = steps.extras
        row = replay.Step(
            (steps.obs, before), action, steps.reward, steps.terminated, steps.truncated, (steps.next_obs, after)
        )
        buffer, _ = jax.lax.scan(lambda b, s: (memory.add(b, s), None), state.buffer, row)
        state = state._replace(actors=actors, buffer=buffer, key=key)

        ready = state.updates + 1 >= first_learning  # counted in updates: steps would overflow
        learned, metrics = jax.lax.scan(lambda s, k: learn(s, k, ready), state, keys[3:])
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ready, new, old),
            (learned.params, learned.opt_state),
            (state.params, state.opt_state),
        )
        updates = state.updates + 1
        share = optim.target_share(config.target_every, updates, state.hyper.tau)
        target_params = optim.towards(state.target_params, params, share)
        state = learned._replace(params=params, target_params=target_params, opt_state=opt_state, updates=updates)
        means = {name: jnp.where(ready, m.mean(), 0.0) for name, m in metrics.items()}
        means |= {"root_loss": jnp.sqrt(means["loss"]), "epsilon": exploration(state)}
        return state, means | rollout.episode_metrics(episodes)

    def actor(state: State) -> Any:
        """The policy that acts, epsilon-greedy, and the memories to store."""
        epsilon = exploration(state)

        def act(before: Any, obs: Any, first: Array, noise: Any) -> tuple[Any, Array, Any]:
            after, q = network.step(state.params, before, obs, first)
            action = epsilon_greedy(mask(q, obs), epsilon, noise)
            return after, action, (action, before, after)

        return act

    def learn(state: State, key: Array, ready: Array) -> tuple[State, Metrics]:
        """One minibatch of sequences; priorities stay as they are until ``ready``."""
        h = state.hyper
        seq = memory.sample(state.buffer, key, importance_exponent(state))
        obs, stored = seq.obs
        before, after = jax.tree.map(lambda x: x[0], stored), slice(config.burn_in, None)
        part = jax.tree.map(lambda x: x[after], (obs, seq.first))
        starts = [burn_in(params, seq, before) for params in (state.params, state.target_params)]
        target = targets(state, seq, part, *starts)
        learnable = (seq.kind[after][:-1] != replay.FINAL) & (seq.weight > 0)[None]

        def loss(params: Any) -> tuple[Array, tuple[Metrics, Array]]:
            _, q = network.unroll(params, burn_in(params, seq, before), *part)
            taken = pick(q[:-1], seq.action[after][:-1])
            error = jnp.where(learnable, target - taken, 0.0)
            count = jnp.maximum(learnable.sum(), 1)
            total = 0.5 * jnp.sum(seq.weight * error**2) / count
            return total, ({"loss": jnp.sum(error**2) / count, "objective": total, "q": taken.mean()}, jnp.abs(error))

        tx = optimizer(config, h, learning_rate_factor(config, state))
        step = optim.minimize(tx, loss, state.params, state.opt_state)
        metrics, error = step.extra
        mean = error.sum(0) / jnp.maximum(learnable.sum(0), 1)
        priority = h.priority_max * error.max(0) + (1 - h.priority_max) * mean
        starts_at = jnp.where(ready, seq.rows, replay.NOWHERE)
        buffer = memory.update(state.buffer, starts_at, priority**h.priority_exponent)
        state = state._replace(params=step.params, opt_state=step.opt_state, buffer=buffer)
        return state, metrics | {"grad_norm": step.grad_norm}

    def burn_in(params: Any, seq: replay.Sequences, before: Any) -> Any:
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
        over_batch = jax.vmap(returns.n_step_returns, in_axes=(1, 1, 1, 1, None), out_axes=1)
        wanted = over_batch(reward, discount, following, goes_on, config.n_step)
        return losses.squash(wanted) if config.rescale else wanted

    def act(state: State, obs: Any, key: Array | None = None, memory: Any = None) -> tuple[Array, Any]:
        first = jnp.bool_(memory is None)
        memory = network.memory if memory is None else memory
        one = jax.tree.map(lambda x: x[None], (memory, obs, first))
        params = optim.eval_params(state.opt_state, state.params)
        after, q = jax.tree.map(lambda x: x[0], network.step(params, *one))
        values = mask(q, obs)
        if key is None:
            return jnp.argmax(values).astype(jnp.int32), after
        return epsilon_greedy(values, exploration(state), exploration_noise(key, (), num_actions)), after

    def remake(config: Config) -> Algorithm:
        return make(env, config, hyper)

    return Algorithm(init, update, act, per_update, "r2d2", env, config, hyper, True, remake, check_hyper=check_hyper)
