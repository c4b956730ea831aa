"""An algorithm is a few pure functions over one state; everything else is a transform of them.

The state is the whole run: parameters, optimizer, environments, normalizers, keys, counters and hyperparameters. Save
it, load it, go on, and every number is the one an uninterrupted run gives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jrl import optim, precision, rounding
from jrl.envs.types import Environment

Array = jax.Array
State = Any
Hyper = Any
Metrics = dict[str, Array]


class Algorithm(NamedTuple):
    """Pure functions that make up an algorithm, and what a loop needs to know about them.

    Attributes:
        init: ``(key, hyper=None, num_updates=None) -> State``. ``num_updates`` is the length of the run, which schedules
            follow; without it the learning rate stays at its full value. ``hyper=None`` takes the defaults below.
        update: ``State -> (State, Metrics)``; metrics are float32 scalars.
        act: ``(state, obs, key=None, memory=None) -> (action, memory)`` for one observation: sampled with a key, greedy
            without; ``memory=None`` begins an episode.
        env_steps_per_update: environment steps, over all environments, that one update takes.
        name: of the algorithm.
        env: what it learns in.
        config: static settings, a frozen dataclass.
        hyper: default hyperparameters, a NamedTuple of floats.
        uses_length: whether ``num_updates`` changes the course of a run (an annealed learning rate): such a run cannot be
            resumed with another length.
        remake: ``config -> Algorithm``: made anew with other static settings, under the transforms of this module; what was
            ``_replace``d is not kept.
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


def optimizer(config: Any, hyper: Any, factor: Array | float, key: Array | None = None) -> optax.GradientTransformation:
    """An algorithm's optimizer at ``factor`` times its learning rate, with loss scaling where it uses float16.

    ``config`` has the fields ``optimizer`` and ``precision``; ``hyper`` has ``optimizer``, ``learning_rate``, ``max_grad_norm``.
    """
    tx = optim.make(config.optimizer, hyper.optimizer, hyper.learning_rate * factor, hyper.max_grad_norm, key)
    policy = precision.parse(config.precision)
    half = "float16" in (policy.params, policy.compute, policy.output)
    return rounding.dynamic_loss_scaling(tx) if half else tx


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
    """Factor on the learning rate now; 1 where the length of the run is unknown."""
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
    metrics of the updates are averaged.
    """

    def update(state: State) -> tuple[State, Metrics]:
        state, metrics = jax.lax.scan(lambda s, _: algo.update(s), state, length=every)
        means = jax.tree.map(lambda m: m.mean(0), metrics)
        return state, means | {f"eval_{name}": x for name, x in evaluate(state, key).items()}

    def init(key: Array, hyper: Hyper = None, num_updates: Array | int | None = None) -> State:
        return algo.init(key, hyper, None if num_updates is None else num_updates * every)

    return algo._replace(
        init=init,
        update=update,
        env_steps_per_update=algo.env_steps_per_update * every,
        remake=lambda config: with_evaluation(algo.remake(config), evaluate, every, key),
    )
