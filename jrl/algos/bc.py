"""Behaviour cloning: a policy that does what was shown (Pomerleau 1989).

    loss    -E[ log pi(a|x) ]        over the steps of demonstrations

``demonstrate`` plays a trained policy, and ``make`` learns the policy of an actor-critic network from what it did, or from steps of any other
source. What was learned is a start for PPO: ``ppo.make(env, config, start=state)``, with the same network and without normalized observations.
The value's part of the network learns nothing here.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import algorithm, nets
from jrl.algorithm import Algorithm, Metrics
from jrl.algos.ppo import action_distribution
from jrl.envs.spaces import from_env, to_env
from jrl.envs.strict import strict
from jrl.envs.types import Environment, example_action, observation_spec
from jrl.experience import replay, rollout
from jrl.numerics import checks, loops, optim, precision
from jrl.numerics.settings import AboveZero, NonNegative, Positive, Precision, Settings, check_hyper
from jrl.numerics.types import Memory, Observation, OptState, Params

Array = jax.Array


class Demonstrations(NamedTuple):
    """Steps ``[N]``: what was seen, and what was done there, in the units of a policy (real actions reach from -1 to 1)."""

    obs: Observation
    action: Array


@dataclass(frozen=True)
class Config(Settings):
    """Static settings, which shape the compiled program."""

    num_gradient_steps: Positive = 10  # Minibatches per update.
    batch_size: Positive = 256  # Steps in a minibatch.
    network: nets.Config = field(default_factory=nets.Config)  # Shape of the network.
    optimizer: optim.OptimizerConfig = field(default_factory=optim.OptimizerConfig)  # What the optimizer is made of.
    # float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like 'params=float32,compute=bfloat16,output=float32'.
    precision: Precision = "float32"


class Hyper(NamedTuple):
    """Hyperparameters: part of the state, floats or traced scalars, which may differ between vmapped runs."""

    learning_rate: NonNegative = 1e-3  # Initial learning rate; decays by config.optimizer.schedule.
    max_grad_norm: AboveZero = 0.5  # Largest global norm of a gradient, or the bound of config.optimizer.clip.
    optimizer: optim.Numbers = optim.Hyper()  # Numbers of the optimizer.


def make(
    env: Environment,
    demonstrations: Demonstrations,
    config: Config = Config(),
    hyper: Hyper = Hyper(),
    *,
    network: nets.Network | None = None,
    optimizer: algorithm.Optimizer | None = None,
) -> Algorithm:
    """Behaviour cloning for ``env`` from ``demonstrations``, whose steps count as environment steps each time that they are learned from.
    ``hyper`` are the defaults of ``init``; ``network`` and ``optimizer`` take the place of those that ``config`` describes.

    Raises ``ValueError`` for demonstrations or a setting that do not fit the environment, and for a network with a memory.
    """
    checks.instances(
        "bc.make", demonstrations=(demonstrations, Demonstrations), config=(config, Config), hyper=(hyper, Hyper)
    )
    check_hyper(hyper)
    env, defaults = strict(env), hyper
    number = check_demonstrations(env, demonstrations)
    remake = functools.partial(make, env, demonstrations, hyper=hyper, network=network, optimizer=optimizer)
    network = nets.policy_network(network, config.network, observation_spec(env), env.action_space)
    if network.remembers:
        raise ValueError("network.gru, lstm and attention: what is learned from single steps has no memory")
    network = precision.apply_to_network(config.precision, network)
    distribution = action_distribution(env.action_space)

    def update(state: State) -> tuple[State, Metrics]:
        key, key_rows = jax.random.split(state.key)
        tx = algorithm.current_optimizer(config, state, optimizer)

        def step(carry: tuple[Params, OptState], rows: Array) -> tuple[tuple[Params, OptState], Metrics]:
            part = jax.tree.map(lambda x: x[rows], state.demonstrations)
            done = optim.minimize(tx, lambda params: loss(params, part), *carry)
            return (done.params, done.opt_state), done.extra | {"grad_norm": done.grad_norm}

        rows = jax.random.randint(key_rows, (config.num_gradient_steps, config.batch_size), 0, number)
        (params, opt_state), metrics = loops.scan(step, (state.params, state.opt_state), rows)
        state = state._replace(params=params, opt_state=opt_state, key=key, updates=state.updates + 1)
        return state, jax.tree.map(jnp.mean, metrics)

    def loss(params: Params, batch: Demonstrations) -> tuple[Array, Metrics]:
        policy = nets.outputs(network, params, batch.obs).policy
        nll = -distribution.log_prob(policy, batch.action).mean()
        return nll, {"loss": nll, "entropy": distribution.entropy(policy).mean()}

    def init(key: Array, hyper: Hyper | None = None, num_updates: Array | int | None = None) -> State:
        hyper = hyper or defaults
        check_hyper(hyper)
        key_params, key_run, key_optimizer = jax.random.split(key, 3)
        params = network.init(key_params)
        learner = algorithm.start_learning(config, hyper, params, key_optimizer, num_updates, optimizer)
        return State(**learner, demonstrations=jax.tree.map(jnp.asarray, demonstrations), key=key_run)

    def act(state: State, obs: Observation, key: Array | None = None, memory: Memory = None) -> tuple[Array, Any]:
        _, outputs = nets.step_one(network, optim.eval_params(state.opt_state, state.params), obs, memory)
        chosen = distribution.mode(outputs.policy) if key is None else distribution.sample(key, outputs.policy)
        return to_env(env.action_space, chosen), ()

    return Algorithm(
        init=init,
        update=update,
        act=act,
        env_steps_per_update=config.num_gradient_steps * config.batch_size,
        name="bc",
        env=env,
        config=config,
        hyper=hyper,
        uses_length=config.optimizer.uses_length,
        remake=remake,
        check_hyper=check_hyper,
    )


class State(NamedTuple):
    """The whole run, the demonstrations included."""

    params: Params
    opt_state: OptState
    demonstrations: Demonstrations
    key: Array
    updates: Array  # int32: done so far
    num_updates: Array  # int32: of the whole run, for schedules; 0 if unknown
    hyper: Hyper


def demonstrate(
    algo: Algorithm, state: Any, key: Array, num_steps: int, num_envs: int = 8, greedy: bool = False
) -> Demonstrations:
    """What a trained policy saw and did, as ``play`` has it."""
    steps = play(algo, state, key, num_steps, num_envs, greedy)
    obs, action = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (steps.obs, steps.action))
    return Demonstrations(obs, from_env(algo.env.action_space, action))


def play(
    algo: Algorithm, state: Any, key: Array, num_steps: int, num_envs: int = 8, greedy: bool = False
) -> replay.Step:
    """``num_steps`` steps, rounded up to a multiple of ``num_envs``, of a trained policy without a memory, whose choices are sampled or greedy:
    ``[T, num_envs]``, in the order in which they happened.

    ``state`` is of one seed, as ``run.load(folder).member()`` gives it. Pure: the steps of many policies are a vmap.
    """
    key_envs, key_act, key_run = jax.random.split(key, 3)
    length = -(-num_steps // num_envs)

    def act(memory: Memory, obs: Observation, first: Array, keys: Array) -> tuple[Any, Array, Any]:
        action = jax.vmap(lambda o, k: algo.act(state, o, None if greedy else k)[0])(obs, keys)
        return memory, action, action

    actors = rollout.start(algo.env, key_envs, num_envs, ())
    keys = jax.random.split(key_act, (length, num_envs))
    _, steps, _ = rollout.collect(algo.env, actors, act, keys, key_run, length)
    return replay.Step(steps.obs, steps.extras, steps.reward, steps.terminated, steps.truncated, steps.next_obs)


def check_demonstrations(env: Environment, demonstrations: Demonstrations) -> int:
    """How many steps they have. Raises ``ValueError`` unless they fit the environment."""
    spec = (observation_spec(env), jax.eval_shape(lambda: example_action(env.action_space)))
    found = (demonstrations.obs, demonstrations.action)
    wanted, given = jax.tree.map(lambda x: [*x.shape], spec), jax.tree.map(lambda x: [*x.shape[1:]], found)
    if str(given) != str(wanted):
        raise ValueError(
            f"demonstrations must be steps [N] of observations and actions of shapes {wanted}; got {given}"
        )
    counts = {x.shape[0] for x in jax.tree.leaves(found)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"demonstrations must have one number of steps, at least 1; got {sorted(counts)}")
    return counts.pop()
