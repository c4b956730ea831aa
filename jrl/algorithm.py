"""An algorithm is a few pure functions over one state; everything else is a transform of them.

The state is the whole run: parameters, optimizer, environments, normalizers, keys, counters and hyperparameters. Save
it, load it, go on, and every number is the one an uninterrupted run gives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jrl.envs.types import Environment, example_action, observation_spec
from jrl.experience.rollout import mean_or_nan
from jrl.numerics import checks, optim, precision, rounding
from jrl.numerics.types import Params

Array = jax.Array
State = Any
Hyper = Any
Metrics = dict[str, Array]
# A user's own: any optax transformation, or a function of the hyperparameters and of the learning rate now, which gives one.
Optimizer: TypeAlias = optax.GradientTransformation | Callable[[Hyper, Array], optax.GradientTransformation]

# Metrics that are means over the episodes that ended, ``metrics["episodes"]`` of them; NaN where none did.
PER_EPISODE = ("episode_return", "episode_length")
LEARNED = (
    "params",
    "critic_params",
    "target_params",
    "opt_state",
    "critic_opt_state",
    "obs_stats",
    "reward_stats",
    "bonus",
    "kl_weight",
)


def learned_fields(state: State) -> Any:
    """What was learned so far: the fields of a state that are named in ``LEARNED``; the whole state if it has none of them."""
    return [getattr(state, name) for name in LEARNED if hasattr(state, name)] or state


class Algorithm(NamedTuple):
    """Pure functions that make up an algorithm, and what a loop needs to know about them.

    Attributes:
        init: ``(key, hyper=None, num_updates=None) -> State``. ``num_updates`` is the length of the run, which schedules
            follow; without it the learning rate stays at its full value. ``hyper=None`` takes the defaults below.
        update: ``State -> (State, Metrics)``; metrics are scalars. If ``episodes`` is among them, it is how many episodes ended,
            and ``episode_return`` and ``episode_length`` are means over these.
        act: ``(state, obs, key=None, memory=None) -> (action, memory)`` for one observation: sampled with a key, greedy
            without; ``memory=None`` begins an episode.
        env_steps_per_update: environment steps, over all environments, that one update takes.
        name: Name of the algorithm.
        env: Environment in which it learns.
        config: static settings, a frozen dataclass.
        hyper: default hyperparameters, a NamedTuple of floats.
        uses_length: whether ``num_updates`` changes the course of a run (an annealed learning rate): such a run cannot be
            resumed with another length.
        remake: ``config -> Algorithm``: the algorithm with other static settings, under the same transforms of this module; other
            fields that were ``_replace``d are lost.
        losses: names of metrics that must be finite; where one is not, a seed counts as broken. Other metrics may be NaN.
        learned: ``State -> tree`` of what must be finite too: parameters, optimizer, statistics.
        check_hyper: raises ``ValueError`` for a hyperparameter out of range, as ``init`` does; ``None`` asks ``init``, whose tracing
            takes longer.
    """

    init: Callable[..., State]
    update: Callable[[State], tuple[State, Metrics]]
    act: Callable[..., tuple[Array, Any]]
    env_steps_per_update: int
    name: str
    env: Environment
    config: Any
    hyper: Hyper
    uses_length: bool
    remake: Callable[[Any], "Algorithm"]
    losses: tuple[str, ...] = ("loss", "grad_norm")
    learned: Callable[[State], Any] = learned_fields
    check_hyper: Callable[[Hyper], None] | None = None


def check(algo: Algorithm) -> tuple[State, Metrics]:
    """Shapes of a state and of the metrics of an update, by abstract evaluation.

    Raises ``ValueError`` where ``init`` or ``update`` is not what ``Algorithm`` says.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    if not hasattr(algo.hyper, "_fields"):
        raise ValueError(f"{algo.name}: hyper must be a NamedTuple of numbers; got {algo.hyper!r}")
    state = checks.traced(algo.name, "init", lambda key: algo.init(key, algo.hyper, 1), key)
    returned = checks.traced(algo.name, "update", algo.update, state)
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], dict):
        raise ValueError(
            f"{algo.name}: update must return (state, metrics), metrics a dict; got {type(returned).__name__}"
        )
    _same_state(algo.name, state, returned[0])
    for name, metric in returned[1].items():
        if getattr(metric, "shape", None) != () or not jnp.issubdtype(metric.dtype, jnp.number):
            raise ValueError(f"{algo.name}: the metric {name!r} must be a scalar number; got {metric}")
    return state, returned[1]


def check_act(algo: Algorithm, state: State) -> None:
    """Raise ``ValueError`` where ``act``, in a state of these shapes, is not what ``Algorithm`` says."""
    obs = observation_spec(algo.env)
    chosen = checks.traced(algo.name, "act", algo.act, state, obs)
    wanted = example_action(algo.env.action_space).shape
    if not isinstance(chosen, tuple) or len(chosen) != 2 or getattr(chosen[0], "shape", None) != wanted:
        raise ValueError(f"{algo.name}: act must return (action, memory), the action of shape {wanted}; got {chosen}")


def _same_state(algo: str, before: State, after: State) -> None:
    if str(jax.tree.structure(before)) != str(jax.tree.structure(after)):
        raise ValueError(f"{algo}: update must return a state of the structure that init returns")
    for (path, a), b in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            place = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"{algo}: update returns {place} as {b.dtype} {list(b.shape)}, init as {a.dtype} {list(a.shape)}"
            )


def optimizer(
    config: Any, hyper: Any, factor: Array | float, key: Array | None = None, own: Optimizer | None = None
) -> optax.GradientTransformation:
    """An algorithm's optimizer at ``factor`` times its learning rate, with loss scaling where it uses float16.

    ``config`` has the fields ``optimizer`` and ``precision``; ``hyper`` has ``optimizer``, ``learning_rate``, ``max_grad_norm``. ``own``
    takes the place of the optimizer that they describe. Raises ``ValueError`` if it is none.
    """
    if own is None:
        tx = optim.make(config.optimizer, hyper.optimizer, hyper.learning_rate * factor, hyper.max_grad_norm, key)
    else:
        tx = optim.own(own, hyper, hyper.learning_rate * factor)
    policy = precision.parse(config.precision)
    half = "float16" in (policy.params, policy.compute, policy.output)
    return rounding.dynamic_loss_scaling(tx) if half else tx


def current_optimizer(config: Any, state: Any, own: Optimizer | None = None) -> optax.GradientTransformation:
    """The algorithm's optimizer, or the user's ``own``, at the learning rate that the schedule gives now."""
    return optimizer(config, state.hyper, learning_rate_factor(config, state), own=own)


def start_learning(
    config: Any,
    hyper: Any,
    params: Params,
    key: Array,
    num_updates: Array | int | None,
    own: Optimizer | None = None,
) -> dict[str, Any]:
    """The state fields that all learners have in common: hyperparameters in float32, parameters, optimizer and counters.

    ``num_updates`` is the length of the run, which schedules follow; ``None`` if it is unknown. ``own`` is the user's optimizer.
    """
    hyper = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyper)
    return {
        "params": params,
        "opt_state": optimizer(config, hyper, 1.0, key, own).init(params),
        "updates": jnp.int32(0),
        "num_updates": jnp.asarray(0 if num_updates is None else num_updates, jnp.int32),
        "hyper": hyper,
    }


def gradient_steps(
    learn: Callable[[State, Array], tuple[State, Metrics]],
    state: State,
    keys: Array,
    ready: Array,
    fields: tuple[str, ...],
) -> tuple[State, Metrics]:
    """One gradient step ``learn(state, key)`` per key, which changes no more than ``fields``: these keep their values, and metrics are 0,
    until ``ready``."""
    learned, metrics = jax.lax.scan(learn, state, keys)
    new, old = ({name: getattr(each, name) for name in fields} for each in (learned, state))
    kept = jax.tree.map(lambda new, old: jnp.where(ready, new, old), new, old)
    return learned._replace(**kept), {name: jnp.where(ready, m.mean(), 0.0) for name, m in metrics.items()}


def learn_from_replay(
    learn: Callable[[State, Array, Array], tuple[State, Metrics]], state: State, keys: Array, ready: Array, every: int
) -> tuple[State, Metrics]:
    """Take one gradient step ``learn(state, key, ready)`` per key, then update the target network: it is copied every ``every``
    updates, or moves by ``hyper.tau`` at each update if ``every`` is 0. What was learned is discarded until ``ready``.
    """
    learned, metrics = jax.lax.scan(lambda s, k: learn(s, k, ready), state, keys)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(ready, new, old),
        (learned.params, learned.opt_state),
        (state.params, state.opt_state),
    )
    updates = state.updates + 1
    target_params = optim.towards(state.target_params, params, optim.target_share(every, updates, state.hyper.tau))
    state = learned._replace(params=params, target_params=target_params, opt_state=opt_state, updates=updates)
    means = {name: jnp.where(ready, m.mean(), 0.0) for name, m in metrics.items()}
    return state, means | {"root_loss": jnp.sqrt(means["loss"])}


def progress(state: Any) -> Array:
    """Share of the run that is done, by the state's ``updates`` and ``num_updates``."""
    return state.updates / jnp.maximum(state.num_updates, 1)


def exploration(state: Any) -> Array:
    """Share of actions chosen uniformly now, as the three ``epsilon_`` fields of ``state.hyper`` say; its end where the length of
    the run is unknown."""
    h = state.hyper
    done = jnp.minimum(progress(state) / jnp.maximum(h.epsilon_fraction, 1e-6), 1.0)
    epsilon = h.epsilon_start + (h.epsilon_end - h.epsilon_start) * done
    return jnp.where(state.num_updates > 0, epsilon, h.epsilon_end)


def importance_exponent(state: Any) -> Array:
    """Beta of prioritized replay now: from ``hyper.importance_start`` linearly to 1 at the end of the run, 1 where its length is
    unknown (1511.05952, section 3.4)."""
    rising = state.hyper.importance_start + (1 - state.hyper.importance_start) * jnp.minimum(progress(state), 1.0)
    return jnp.where(state.num_updates > 0, rising, 1.0)


def learning_rate_factor(config: Any, state: Any) -> Array:
    """Current factor on the learning rate; 1 where the length of the run is unknown."""
    step = 1 / jnp.maximum(state.num_updates, 1)
    now = optim.schedule(config.optimizer, state.hyper.optimizer, progress(state), step)
    return jnp.where(state.num_updates > 0, now, 1.0)


def over_seeds(algo: Algorithm) -> Algorithm:
    """The algorithm with a leading axis of seeds: ``init`` takes keys ``[N]``, states and metrics have ``[N, ...]``."""
    return algo._replace(
        init=lambda keys, hyper=None, num_updates=None: jax.vmap(lambda k: algo.init(k, hyper, num_updates))(keys),
        update=jax.vmap(algo.update),
        act=jax.vmap(algo.act),
        remake=lambda config: over_seeds(algo.remake(config)),
    )


def over_hypers(algo: Algorithm) -> Algorithm:
    """The algorithm with a leading axis of hyperparameters: every leaf of ``hyper`` is ``[N]``; the key is shared.

    ``over_hypers(over_seeds(algo))`` has states ``[hypers, seeds, ...]``: a grid of settings in one program, each on the
    same seeds.
    """
    return algo._replace(
        init=lambda key, hyper, num_updates=None: jax.vmap(lambda h: algo.init(key, h, num_updates))(hyper),
        update=jax.vmap(algo.update),
        act=jax.vmap(algo.act),
        remake=lambda config: over_hypers(algo.remake(config)),
    )


def over_members(algo: Algorithm) -> Algorithm:
    """The algorithm over pairs: keys ``[N]`` and hyperparameters ``[N]`` side by side, as the run loop uses it."""
    return algo._replace(
        init=lambda keys, hypers, num_updates=None: jax.vmap(lambda k, h: algo.init(k, h, num_updates))(keys, hypers),
        update=jax.vmap(algo.update),
        act=jax.vmap(algo.act),
        remake=lambda config: over_members(algo.remake(config)),
    )


def over_devices(algo: Algorithm, mesh: Mesh) -> Algorithm:
    """A vmapped algorithm with its leading axis laid over the first axis of a mesh; nothing is communicated.

    Raises ``ValueError`` from JAX if the leading axis is not a multiple of the number of devices.
    """
    spec = PartitionSpec(mesh.axis_names[0])
    update = jax.shard_map(algo.update, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return algo._replace(update=update, remake=lambda config: over_devices(algo.remake(config), mesh))


def with_evaluation(algo: Algorithm, evaluate: Callable[[State, Array], Metrics], every: int, key: Array) -> Algorithm:
    """The algorithm whose update is ``every`` updates followed by ``evaluate(state, key)``, merged into the metrics.

    Evaluation keys come from ``key`` and the training state is untouched, so the numbers of training do not change. The
    metrics of the updates are averaged, those of episodes over all episodes.
    """

    def update(state: State) -> tuple[State, Metrics]:
        def one(state: State, _: None) -> tuple[State, Metrics]:
            state, metrics = algo.update(state)
            return state, to_sums(metrics)

        state, sums = jax.lax.scan(one, state, length=every)
        means = to_means(jax.tree.map(lambda x: x.sum(0), sums), every)
        return state, means | {f"eval_{name}": x for name, x in evaluate(state, key).items()}

    def init(key: Array, hyper: Hyper = None, num_updates: Array | int | None = None) -> State:
        return algo.init(key, hyper, None if num_updates is None else num_updates * every)

    return algo._replace(
        init=init,
        update=update,
        env_steps_per_update=algo.env_steps_per_update * every,
        remake=lambda config: with_evaluation(algo.remake(config), evaluate, every, key),
    )


def to_sums(metrics: Metrics) -> Metrics:
    """Metrics of an update that can be added to those of another: the means over episodes become sums over them."""
    count = metrics.get("episodes")
    if count is None:
        return metrics
    return metrics | {k: jnp.where(count > 0, metrics[k] * count, 0.0) for k in PER_EPISODE if k in metrics}


def to_means(sums: Metrics, num_updates: Any) -> Metrics:
    """Metrics of several updates from their sums: means over updates, or over episodes; ``episodes`` stays a sum."""
    means = {k: v / num_updates for k, v in sums.items()}
    if "episodes" not in sums:
        return means
    count = sums["episodes"]
    return means | {"episodes": count} | {k: mean_or_nan(sums[k], count) for k in PER_EPISODE if k in sums}
