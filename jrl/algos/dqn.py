"""Deep Q-networks (Mnih et al., Nature 2015) and the parts of Rainbow (Hessel et al. 2018, arXiv 1710.02298).

One update: act for a few steps in B environments, then take gradient steps on transitions from the replay:

    DQN            y = r + gamma max_a Q'(x', a)                                Q' the target network
    double         y = r + gamma Q'(x', argmax_a Q(x', a))                      1509.06461, eq. 4
    n-step         r and gamma over n steps                                     1710.02298, section 3
    Munchausen     y = r + alpha tau log pi(a|x) + gamma sum_a' pi(a'|x') (Q'(x', a') - tau log pi(a'|x'))
                   with pi = softmax(Q' / tau)                                  2007.14430, eq. 1
    C51            the distribution of y, projected on fixed atoms              1707.06887, algorithm 1
    QR             its quantiles                                                1710.10044, eq. 10
    dueling, noisy are shapes of the network (``nets.ValueConfig``), PER a way of drawing (``jrl.experience.replay``)

Each is an option of its own. ``RAINBOW`` is their documented composition. Truncated episodes bootstrap from their last
observation. Until ``learning_starts`` steps are stored, gradient steps are computed and dropped: the schedule is static.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrl import nets
from jrl.algorithm import Algorithm, Metrics, exploration, importance_exponent, learning_rate_factor, optimizer
from jrl.envs import wrappers
from jrl.envs.strict import strict
from jrl.envs.types import Discrete, Environment, observation_spec
from jrl.equations import losses
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
        batch_size: transitions in a minibatch.
        capacity: rows of the replay, over all environments.
        learning_starts: environment steps before the first gradient step.
        target_every: updates between hard copies into the target network; 0 for soft ones (hyper.tau) at each.
        n_step: steps of a transition.
        num_frames: observations stacked along the last axis, oldest first; the replay stores each once.
        double: choose with the online network what the target network values; Munchausen chooses nothing, and ignores it.
        prioritized: draw transitions by their error.
        munchausen: add the scaled log-policy to the reward (of n steps, to the first).
        distribution: mean (plain values), categorical (C51) or quantile (QR).
        atoms: of a distribution.
        loss: squared, or huber (robust, but drawn to the median of targets), for mean values.
        network: shape of the network; dueling and noisy are here.
        optimizer: what the optimizer is made of.
        precision: float32, bfloat16, float16 (with dynamic loss scaling), pure_bfloat16, or like
            'params=float32,compute=bfloat16,output=float32'.
    """

    num_envs: int = 10
    num_steps: int = 1
    num_gradient_steps: int = 1
    batch_size: int = 128
    capacity: int = 10_000
    learning_starts: int = 1_000
    target_every: int = 50
    n_step: int = 1
    num_frames: int = 1
    double: bool = True
    prioritized: bool = False
    munchausen: bool = False
    distribution: Literal["mean", "categorical", "quantile"] = "mean"
    atoms: int = 51
    loss: Literal["squared", "huber"] = "squared"
    network: nets.ValueConfig = field(default_factory=lambda: nets.ValueConfig(norm="none"))
    optimizer: optim.OptimizerConfig = field(default_factory=optim.OptimizerConfig)
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in (
            "num_envs",
            "num_steps",
            "num_gradient_steps",
            "batch_size",
            "capacity",
            "n_step",
            "num_frames",
            "atoms",
        ):
            checks.positive_int(f"config.{name}", getattr(self, name))
        for name in ("learning_starts", "target_every"):
            checks.positive_int(f"config.{name}", getattr(self, name), at_least=0)
        checks.one_of("config.distribution", self.distribution, ("mean", "categorical", "quantile"))
        checks.one_of("config.loss", self.loss, ("huber", "squared"))
        precision.parse(self.precision)
        if self.learning_starts > self.capacity:
            raise ValueError(
                f"config.learning_starts must be at most capacity = {self.capacity}; got {self.learning_starts}"
            )
        if self.network.remembers:
            raise ValueError(
                "config.network.gru and attention: DQN replays single transitions; R2D2 and PQN train recurrent networks"
            )
        if self.munchausen and self.distribution != "mean":
            raise ValueError("config.munchausen needs config.distribution=mean")
        if self.distribution != "mean" and self.atoms < 2:
            raise ValueError(f"config.atoms must be an integer of at least 2; got {self.atoms}")


RAINBOW = Config(
    n_step=3,
    double=True,
    prioritized=True,
    distribution="categorical",
    network=nets.ValueConfig(norm="none", dueling=True, noisy=True),
)


class Hyper(NamedTuple):
    """Hyperparameters: data of the state, floats or traced scalars, that may differ between vmapped runs.

    Attributes:
        learning_rate: at the start of the run; config.optimizer.schedule says how it goes on.
        gamma: discount of the return.
        epsilon_start: share of actions chosen uniformly, at the start of the run (unless the network is noisy).
        epsilon_end: that share later; and throughout, where the length of the run is unknown.
        epsilon_fraction: share of the run over which epsilon falls, linearly.
        tau: share of the online network in each soft target update; 1 copies it.
        max_grad_norm: global norm that gradients are scaled down to (or the bound of config.optimizer.clip).
        priority_exponent: alpha of prioritized replay.
        importance_start: beta of prioritized replay at the start of the run; it rises to 1.
        munchausen_weight: alpha of Munchausen.
        temperature: tau of Munchausen.
        v_min: smallest return of C51.
        v_max: largest return of C51.
        optimizer: numbers of the optimizer.
    """

    learning_rate: float = 5e-4
    gamma: float = 0.99
    epsilon_start: float = 1.0
    epsilon_end: float = 0.05
    epsilon_fraction: float = 0.2
    tau: float = 0.01
    max_grad_norm: float = 10.0
    priority_exponent: float = 0.6
    importance_start: float = 0.4
    munchausen_weight: float = 0.9
    temperature: float = 0.03
    v_min: float = 0.0
    v_max: float = 100.0
    optimizer: optim.Hyper = optim.Hyper()


def check_hyper(hyper: Hyper) -> None:
    """Raise ``ValueError`` for a concrete number outside its range; traced numbers pass."""
    for name in (
        "gamma",
        "epsilon_start",
        "epsilon_end",
        "epsilon_fraction",
        "tau",
        "priority_exponent",
        "importance_start",
    ):
        checks.within(f"hyper.{name}", getattr(hyper, name), 0, 1)
    checks.within("hyper.learning_rate", hyper.learning_rate, 0, float("inf"))
    checks.within("hyper.munchausen_weight", hyper.munchausen_weight, 0, 1)
    for name in ("max_grad_norm", "temperature"):
        checks.above_zero(f"hyper.{name}", getattr(hyper, name))
    bounds = (hyper.v_min, hyper.v_max)
    for name in ("v_min", "v_max"):
        checks.within(f"hyper.{name}", getattr(hyper, name), -1e30, 1e30)
    if not any(isinstance(x, jax.core.Tracer) for x in bounds) and not float(hyper.v_max) > float(hyper.v_min):
        raise ValueError(f"hyper.v_max must be above hyper.v_min; got {hyper.v_max:g} and {hyper.v_min:g}")
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
    """DQN in ``env``, which must have discrete actions. ``hyper`` are the defaults that ``init`` takes.

    Raises ``ValueError`` for a setting out of range, one that does not fit the environment, or a replay larger than memory.
    """
    checks.instances("dqn.make", config=(config, Config), hyper=(hyper, Hyper))
    check_hyper(hyper)
    env = strict(env)
    unstacked = env
    env = strict(wrappers.frame_stack(env, config.num_frames)) if config.num_frames > 1 else env
    atoms = 1 if config.distribution == "mean" else config.atoms
    obs_spec = observation_spec(env)
    network = nets.action_values(config.network, obs_spec, env.action_space, atoms)
    network = precision.float32_outputs(precision.apply(config.precision, network))
    memory = replay.make(
        obs_spec,
        config.num_envs,
        config.capacity,
        config.batch_size,
        config.n_step,
        config.prioritized,
        config.num_frames,
    )
    assert isinstance(env.action_space, Discrete)
    num_actions = env.action_space.n
    noisy, defaults = config.network.noisy, hyper
    per_update = config.num_envs * config.num_steps
    first_learning = -(-config.learning_starts // per_update)

    def outputs(params: Any, obs: Any, key: Array | None) -> Array:
        """The network's answer ``[N, A]`` or ``[N, A, atoms]``, noisy with a key."""
        params = nets.with_noise(params, key) if noisy and key is not None else params
        return network.step(params, (), obs, jnp.zeros(jax.tree.leaves(obs)[0].shape[0], bool))[1]

    def values(answer: Array, obs: Any, hyper: Hyper) -> Array:
        """Expected returns ``[N, A]``, minus infinity where an action is illegal."""
        match config.distribution:
            case "categorical":
                answer = jnp.sum(jax.nn.softmax(answer) * support(hyper), axis=-1)
            case "quantile":
                answer = answer.mean(-1)
        return mask(answer, obs)

    def support(hyper: Hyper) -> Array:
        return hyper.v_min + (hyper.v_max - hyper.v_min) * jnp.linspace(0, 1, atoms, dtype=jnp.float32)[None, None]

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
            actors=rollout.start(env, key_envs, config.num_envs, ()),
            buffer=memory.init(),
            key=key_run,
            updates=jnp.int32(0),
            num_updates=jnp.asarray(0 if num_updates is None else num_updates, jnp.int32),
            hyper=hyper,
        )

    def update(state: State) -> tuple[State, Metrics]:
        # Few draws: on a CPU each costs as much as a layer of the network.
        keys = jax.random.split(state.key, 4 + config.num_gradient_steps)
        key, key_noise, key_envs, key_weights = keys[:4]
        noise = exploration_noise(key_noise, (config.num_steps, config.num_envs), num_actions)
        weight_keys = jax.random.split(key_weights, config.num_steps) if noisy else None
        actors, steps, episodes = rollout.collect(
            env, state.actors, actor(state), (noise, weight_keys), key_envs, config.num_steps
        )
        rows = replay.Step(steps.obs, steps.extras, steps.reward, steps.terminated, steps.truncated, steps.next_obs)
        buffer, _ = jax.lax.scan(lambda b, s: (memory.add(b, s), None), state.buffer, rows)
        state = state._replace(actors=actors, buffer=buffer, key=key)

        ready = state.updates + 1 >= first_learning  # counted in updates: steps would overflow
        learned, metrics = jax.lax.scan(lambda s, k: learn(s, k, ready), state, keys[4:])
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
        means |= {"root_loss": jnp.sqrt(means["loss"]), "epsilon": epsilon_of(state)}
        return state, means | rollout.episode_metrics(episodes)

    def actor(state: State) -> Any:
        """The policy that acts: epsilon-greedy, or greedy with noisy weights."""
        epsilon = epsilon_of(state)

        def act(nothing: Any, obs: Any, first: Array, noise: Any) -> tuple[Any, Array, Any]:
            chance, key = noise
            action = epsilon_greedy(values(outputs(state.params, obs, key), obs, state.hyper), epsilon, chance)
            return nothing, action, action

        return act

    def epsilon_of(state: State) -> Array:
        """Noisy weights explore by themselves."""
        return jnp.float32(0) if noisy else exploration(state)

    def learn(state: State, key: Array, ready: Array) -> tuple[State, Metrics]:
        """One minibatch; priorities stay as they are until ``ready``."""
        h = state.hyper
        key_batch, key_online, key_target, key_select = jax.random.split(key, 4) if noisy else (key, None, None, None)
        batch = memory.sample(state.buffer, key_batch, h.gamma, importance_exponent(state))
        answer = outputs(state.target_params, batch.next_obs, key_target)
        if config.double:
            chooser = values(outputs(state.params, batch.next_obs, key_select), batch.next_obs, h)
        else:
            chooser = values(answer, batch.next_obs, h)
        used = batch.weight > 0  # other rows hold nothing: what is computed of them may be NaN, and 0 times NaN is NaN
        target = losses.masked(targets(state, batch, answer, jnp.argmax(chooser, axis=-1)), used)
        number = jnp.maximum(used.sum(), 1)

        def loss(params: Any) -> tuple[Array, tuple[Metrics, Array]]:
            taken = losses.masked(pick(outputs(params, batch.obs, key_online), batch.action), used)
            error, each, priority = errors(taken, target, h)
            total = jnp.sum(batch.weight * each) / number
            mean_square = jnp.sum(used * error**2) / number
            return total, ({"loss": mean_square, "objective": total}, priority)

        tx = optimizer(config, h, learning_rate_factor(config, state))
        step = optim.minimize(tx, loss, state.params, state.opt_state)
        metrics, priority = step.extra
        rows = jnp.where(ready, batch.rows, replay.NOWHERE)
        buffer = memory.update(state.buffer, rows, priority**h.priority_exponent)
        state = state._replace(params=step.params, opt_state=step.opt_state, buffer=buffer)
        if config.distribution == "categorical":  # much mass at an edge: returns lie beyond the support
            metrics |= {"mass_at_v_min": target[:, 0].sum() / number, "mass_at_v_max": target[:, -1].sum() / number}
        return state, metrics | {"grad_norm": step.grad_norm}

    def targets(state: State, batch: replay.Batch, answer: Array, best: Array) -> Array:
        """What the value of each action taken should be ``[N]``, or its distribution: probabilities or quantiles ``[N, atoms]``."""
        h = state.hyper
        following = pick(answer, best)
        if config.munchausen:
            legal = mask(answer, batch.next_obs)
            log_pi = jax.nn.log_softmax(legal / h.temperature)
            soft = jnp.sum(jnp.where(jnp.isneginf(legal), 0.0, jnp.exp(log_pi) * (answer - h.temperature * log_pi)), -1)
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
        """Error of each mean value ``[N]``, the loss of each, and what its priority is of: for C51 the divergence from the
        target, as in Rainbow (1710.02298, section 4)."""
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

    def act(state: State, obs: Any, key: Array | None = None, memory: Any = None) -> tuple[Array, Any]:
        params = optim.eval_params(state.opt_state, state.params)
        key_noise, key_weights = (None, None) if key is None else jax.random.split(key)
        one = jax.tree.map(lambda x: x[None], obs)
        q = values(outputs(params, one, key_weights), one, state.hyper)[0]
        if key_noise is None:
            return jnp.argmax(q).astype(jnp.int32), ()
        return epsilon_greedy(q, epsilon_of(state), exploration_noise(key_noise, (), num_actions)), ()

    def remake(config: Config) -> Algorithm:
        return make(unstacked, config, hyper)

    return Algorithm(init, update, act, per_update, "dqn", env, config, hyper, True, remake, check_hyper=check_hyper)
