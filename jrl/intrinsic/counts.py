"""Bonuses by counting (Strehl & Littman 2008; Tang et al. 2017, arXiv 1611.04717).

    bonus    1 / sqrt( N(x, a) )         N(x, a) how often action a was taken in x, this time included

``exact`` counts one-hot observations and single integers, each in its own entry. ``hashed`` cuts the range of every number of an observation
into cells and hashes the cells' indices into a table: what lies in the same cells shares an entry, and two others share one with a probability
of about 1/entries. The first steps set the width of the cells and are not counted. Discrete actions are told apart; of others, only the
observation is counted. There is nothing to learn.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.envs.spaces import Discrete, Space
from jrl.envs.strict import seems_one_hot
from jrl.envs.types import Environment
from jrl.equations.exploration import count_bonus
from jrl.experience import normalize
from jrl.intrinsic.settings import Config
from jrl.intrinsic.types import Intrinsic, Transitions
from jrl.numerics.types import Memory, Observation, Params

Array = jax.Array
MOST = 2.0**20 - 1  # cells on either side of the mean: beyond them, all is one cell


class Cells(NamedTuple):
    """How often each entry was met, and how ``hashed`` finds an entry."""

    counts: Array  # int32 [entries, actions]
    multipliers: Any  # uint32 [numbers of an observation]; () of exact counts
    stats: Any  # normalize.Stats of the steps that set the cells; () of exact counts


def exact(config: Config, obs_spec: Any, action_space: Space) -> Intrinsic:
    """Counts of one-hot observations, or of single integers from 0. Raises ``ValueError`` for observations of more than one array."""
    leaves = jax.tree.leaves(obs_spec)
    if len(leaves) != 1:
        raise ValueError(
            f"bonus.kind=counts needs observations of one array, one-hot or an integer; got {obs_spec}: take hash"
        )
    single = leaves[0].shape == ()
    size = config.table if single else math.prod(leaves[0].shape)

    def index(cells: Cells, obs: Observation) -> Array:
        [x] = jax.tree.leaves(obs)
        return x.astype(jnp.int32) % size if single else jnp.argmax(x.reshape(x.shape[0], -1), axis=-1)

    def start(key: Array) -> Cells:
        return Cells(_zeros(size, action_space), (), ())

    def learn(cells: Cells, obs: Observation) -> tuple[Cells, Array]:
        return cells, jnp.int32(1)

    return _counter(index, start, learn, action_space)


def check_one_hot(env: Environment) -> None:
    """Raise ``ValueError`` where observations are neither one-hot nor a single integer."""
    if not seems_one_hot(env):
        raise ValueError(
            f"bonus.kind=counts needs observations that are one-hot or a single integer; those of {env.name} are not: take hash"
        )


def hashed(config: Config, obs_spec: Any, action_space: Space) -> Intrinsic:
    """Counts of observations of any shape, hashed."""
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(obs_spec))

    def index(cells: Cells, obs: Observation) -> Array:
        # What has not varied gets cells so small that any other value lies in another.
        width = jnp.maximum(jnp.sqrt(cells.stats.variance), 1e-4) / config.resolution
        place = jnp.floor((_flat(obs) - cells.stats.mean) / width)
        whole = jnp.clip(place, -MOST, MOST).astype(jnp.int32).astype(jnp.uint32)
        mixed = jnp.sum(whole * cells.multipliers, axis=-1, dtype=jnp.uint32)
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)  # every bit of the sum counts in the remainder
        return ((mixed ^ (mixed >> 13)) % jnp.uint32(config.table)).astype(jnp.int32)

    def start(key: Array) -> Cells:
        multipliers = jax.random.bits(key, (numbers,), jnp.uint32) | 1
        return Cells(_zeros(config.table, action_space), multipliers, normalize.init((numbers,)))

    def learn(cells: Cells, obs: Observation) -> tuple[Cells, Array]:
        known = cells.stats.size >= config.calibration
        later = normalize.update(cells.stats, _flat(obs))
        stats = jax.tree.map(lambda new, old: jnp.where(known, old, new), later, cells.stats)
        return cells._replace(stats=stats), known.astype(jnp.int32)

    return _counter(index, start, learn, action_space)


def _counter(
    index: Callable[[Cells, Observation], Array],
    start: Callable[[Array], Cells],
    learn: Callable[[Cells, Observation], tuple[Cells, Array]],
    action_space: Space,
) -> Intrinsic:
    """A counter, from the index of an observation's entry, what it begins with, and ``learn(cells, obs) -> (cells, 1 to count, 0 to wait)``."""

    def entry(cells: Cells, transitions: Transitions) -> tuple[Array, Array]:
        place = index(cells, transitions.obs)
        return place, transitions.action if isinstance(action_space, Discrete) else jnp.zeros_like(place)

    def init(key: Array) -> tuple[Params, Memory]:
        return (), start(key)

    def observe(cells: Cells, transitions: Transitions) -> Cells:
        cells, one = learn(cells, transitions.obs)
        return cells._replace(counts=cells.counts.at[entry(cells, transitions)].add(one))

    def bonus(params: Params, cells: Cells, transitions: Transitions) -> Array:
        return count_bonus(cells.counts[entry(cells, transitions)])

    def loss(params: Params, cells: Cells, transitions: Transitions, hyper: Any) -> Array:
        return jnp.zeros(transitions.action.shape[0], jnp.float32)

    return Intrinsic(init, observe, bonus, loss, standardized=False, uses_next=False)


def _zeros(size: int, action_space: Space) -> Array:
    return jnp.zeros((size, action_space.n if isinstance(action_space, Discrete) else 1), jnp.int32)


def _flat(obs: Observation) -> Array:
    """The numbers of observations, float32 ``[N, numbers]``."""
    leaves = jax.tree.leaves(obs)
    return jnp.concatenate([x.reshape(x.shape[0], -1).astype(jnp.float32) for x in leaves], axis=-1)
