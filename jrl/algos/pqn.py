"""Parallelised Q-networks: deep Q-learning without replay or target network (Gallici et al. 2024, arXiv 2407.04811).

One update: act epsilon-greedily for T steps in B environments, take the lambda returns of the greedy policy as targets

    G_t = r_t + discount_t ( lambda c_t G_{t+1} + (1 - lambda c_t) max_a Q(x_t, a) )        c_t = 0 where an episode ends

(Peng's Q(lambda); section 4 and algorithm 1), and descend ``(Q(x, a) - G)^2`` in several epochs of minibatches. Layer
normalization in the network stands in for the target network (theorem 2).

Truncated episodes bootstrap from their last observation. A recurrent network starts each rollout from the memory it had
and trains on whole sequences, as in the paper's PQN-RNN.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import nets
from jrl.algorithm import Algorithm, Metrics, exploration, learning_rate_factor, optimizer
from jrl.envs.strict import strict
from jrl.envs.types import Environment, observation_spec
from jrl.equations import returns
from jrl.experience import rollout
from jrl.experience.greedy import best_value, epsilon_greedy, exploration_noise, mask, pick
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
        network: shape of the network.
        optimizer: what the optimizer is made of.
        precision: float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like
            'params=float32,compute=bfloat16,output=float32'.
    """

    num_envs: int = 32
    num_steps: int = 64
    num_epochs: int = 4
    num_minibatches: int = 16
    network: nets.ValueConfig = field(default_factory=nets.ValueConfig)
    optimizer: optim.OptimizerConfig = field(default_factory=optim.OptimizerConfig)
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("num_envs", "num_steps", "num_epochs", "num_minibatches"):
            checks.positive_int(f"config.{name}", getattr(self, name))
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
        q_lambda: lambda of the returns.
        epsilon_start: share of actions chosen uniformly, at the start of the run.
        epsilon_end: that share later; and throughout, where the length of the run is unknown.
        epsilon_fraction: share of the run over which epsilon falls, linearly.
        max_grad_norm: global norm that gradients are scaled down to (or the bound of config.optimizer.clip).
        reward_scale: factor on rewards, for learning alone.
        optimizer: numbers of the optimizer.
    """

    learning_rate: float = 2.5e-4
    gamma: float = 0.99
    q_lambda: float = 0.95
    epsilon_start: float = 1.0
    epsilon_end: float = 0.05
    epsilon_fraction: float = 0.2
    max_grad_norm: float = 10.0
    reward_scale: float = 1.0
    optimizer: optim.Hyper = optim.Hyper()


def check_hyper(hyper: Hyper) -> None:
    """Raise ``ValueError`` for a concrete number outside its range; traced numbers pass."""
    for name in ("gamma", "q_lambda", "epsilon_start", "epsilon_end", "epsilon_fraction"):
        checks.within(f"hyper.{name}", getattr(hyper, name), 0, 1)
    checks.above_zero("hyper.max_grad_norm", hyper.max_grad_norm)
    for name in ("learning_rate", "reward_scale"):
        checks.within(f"hyper.{name}", getattr(hyper, name), 0, float("inf"))
    optim.check_hyper(hyper.optimizer)


class State(NamedTuple):
    """The whole run."""

    params: Any
    opt_state: Any
    actors: rollout.Actors
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


class Batch(NamedTuple):
    """Training data ``[L, N, ...]``: N sequences of length L (of length 1 unless the network is recurrent)."""

    obs: Any
    first: Array
    action: Array
    target: Array


def make(env: Environment, config: Config = Config(), hyper: Hyper = Hyper()) -> Algorithm:
    """PQN in ``env``, which must have discrete actions. ``hyper`` are the defaults that ``init`` takes.

    Raises ``ValueError`` for a setting out of range or one that does not fit the environment.
    """
    checks.instances("pqn.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    env = strict(env)
    network = nets.action_values(config.network, observation_spec(env), env.action_space)
    network = precision.float32_outputs(precision.apply(config.precision, network))
    recurrent = config.network.remembers
    defaults = hyper

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = defaults if hyper is None else hyper
        check_hyper(hyper)
        key_params, key_envs, key_run, key_optimizer = jax.random.split(key, 4)
        hyper = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyper)
        params = network.init(key_params)
        return State(
            params=params,
            opt_state=optimizer(config, hyper, 1.0, key_optimizer).init(params),
            actors=rollout.start(env, key_envs, config.num_envs, network.memory),
            key=key_run,
            updates=jnp.int32(0),
            num_updates=jnp.asarray(0 if num_updates is None else num_updates, jnp.int32),
            hyper=hyper,
        )

    def update(state: State) -> tuple[State, Metrics]:
        key, key_noise, key_envs, key_learn = jax.random.split(state.key, 4)
        noise = exploration_noise(key_noise, (config.num_steps, config.num_envs), env.action_space.n)  # type: ignore[union-attr]
        actors, steps, episodes = rollout.collect(env, state.actors, actor(state), noise, key_envs, config.num_steps)
        batch = assemble(state, steps)
        params, opt_state, learning = learn(state, batch, key_learn)
        state = state._replace(params=params, opt_state=opt_state, actors=actors, key=key, updates=state.updates + 1)
        return state, learning | rollout.episode_metrics(episodes)

    def actor(state: State) -> Any:
        """The policy that acts: epsilon-greedy."""
        epsilon = exploration(state)

        def act(memory: Any, obs: Any, first: Array, noise: tuple[Array, Array]) -> tuple[Any, Array, Any]:
            later, q = network.step(state.params, memory, obs, first)
            action = epsilon_greedy(mask(q, obs), epsilon, noise)
            return later, action, action

        return act

    def assemble(state: State, steps: rollout.Steps) -> Batch:
        """Lambda returns of a rollout, as training sequences."""

        memories, q = network.unroll(state.params, state.actors.memory, steps.obs, steps.first)

        def value_of(obs: Any, t: Array, b: Array) -> Array:
            memory = network.memory_at(memories, t, b)
            return best_value(network.step(state.params, memory, obs, jnp.zeros(t.shape, bool))[1], obs)

        v_t = rollout.following_values(env, steps, best_value(q, steps.obs), value_of, network.heavy)
        discount_t = state.hyper.gamma * (1 - steps.terminated)
        continue_t = 1.0 - (steps.terminated | steps.truncated)
        over_envs = jax.vmap(returns.lambda_returns, in_axes=(1, 1, 1, 1, None), out_axes=1)
        reward = steps.reward * state.hyper.reward_scale
        target = over_envs(reward, discount_t, v_t, continue_t, state.hyper.q_lambda)
        batch = Batch(steps.obs, steps.first, steps.extras, target)
        return batch if recurrent else jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)

    def learn(state: State, batch: Batch, key: Array) -> tuple[Any, Any, Metrics]:
        """Epochs of minibatch steps; returns the parameters, the optimizer's state and the mean metrics."""
        tx = optimizer(config, state.hyper, learning_rate_factor(config, state))
        orders = jax.vmap(lambda k: rollout.shuffle(k, batch.first.shape[1]))(jax.random.split(key, config.num_epochs))
        orders = orders.reshape(config.num_epochs * config.num_minibatches, -1)
        memory = state.actors.memory

        def minibatch(carry: tuple[Any, Any], rows: Array) -> tuple[tuple[Any, Any], Metrics]:
            part = jax.tree.map(lambda x: x[:, rows], batch)
            start = jax.tree.map(lambda x: x[rows], memory)
            step = optim.minimize(tx, lambda p: loss(p, start, part), *carry)
            return (step.params, step.opt_state), step.extra | {"grad_norm": step.grad_norm}

        (params, opt_state), metrics = loops.scan(minibatch, (state.params, state.opt_state), orders)
        means = jax.tree.map(jnp.mean, metrics)
        return params, opt_state, means | {"root_loss": jnp.sqrt(means["loss"]), "epsilon": exploration(state)}

    def loss(params: Any, memory: Any, batch: Batch) -> tuple[Array, Metrics]:
        """The mean squared error of the values of the actions taken; half of it is descended, as the paper does."""
        _, q = network.unroll(params, memory, batch.obs, batch.first)
        taken = pick(q, batch.action)
        mse = jnp.mean((taken - batch.target) ** 2)
        return 0.5 * mse, {"loss": mse, "q": taken.mean()}

    def act(state: State, obs: Any, key: Array | None = None, memory: Any = None) -> tuple[Array, Any]:
        first = jnp.bool_(memory is None)
        memory = network.memory if memory is None else memory
        one = jax.tree.map(lambda x: x[None], (memory, obs, first))
        params = optim.eval_params(state.opt_state, state.params)
        later, q = jax.tree.map(lambda x: x[0], network.step(params, *one))
        values = mask(q, obs)
        if key is None:
            return jnp.argmax(values).astype(jnp.int32), later
        noise = exploration_noise(key, (), values.shape[0])
        return epsilon_greedy(values, exploration(state), noise), later

    per_update = config.num_envs * config.num_steps

    def remake(config: Config) -> Algorithm:
        return make(env, config, hyper)

    return Algorithm(init, update, act, per_update, "pqn", env, config, hyper, True, remake, check_hyper=check_hyper)
