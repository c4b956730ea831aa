"""Experience replay as pure functions: uniform (Lin 1992) or prioritized (Schaul et al. 2016, arXiv 1511.05952).

Each of B environments has a ring of rows in the order in which things happened. A row is an observation and what was done
and earned there; the next observation is the next row, so that none is stored twice. Where an episode was truncated, its last
observation, which the next episode does not begin with, gets a row of its own.

Sampling assembles n-step transitions: they stop at the end of an episode, bootstrap from a truncated episode's last
observation, and are shorter where the newest row is closer than n. It costs ``O(batch * n)``, prioritized ``O(batch * log
capacity)`` besides; writing costs ``O(B)``. Nothing copies the buffer: rows are scattered into it in place.
"""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import checks

Array = jax.Array
NOWHERE = 2**30  # a row that no buffer has
MID, TERMINATED, TRUNCATED, FINAL = range(4)  # FINAL: only an observation, of a truncated episode's end


class Step(NamedTuple):
    """What happened in B environments at one step; ``next_obs`` is the observation before any reset."""

    obs: Any
    action: Array
    reward: Array
    terminated: Array
    truncated: Array
    next_obs: Any


class Batch(NamedTuple):
    """n-step transitions ``[N]``.

    Attributes:
        obs: where they start.
        action: taken there.
        reward: discounted rewards of up to n steps, summed.
        discount: what multiplies the value of ``next_obs``: gamma to the number of steps, or 0 after a termination.
        next_obs: the observation they end with, before any reset.
        weight: importance weight, at most 1; 0 for a row that is no transition.
        rows: which rows they start at, int32, for ``update``; NOWHERE where the weight is 0.
    """

    obs: Any
    action: Array
    reward: Array
    discount: Array
    next_obs: Any
    weight: Array
    rows: Array


class Buffer(NamedTuple):
    """The stored rows ``[B, capacity / B, ...]``, how many were ever written to each ring ``[B]``, and the priorities' tree."""

    obs: Any
    action: Array
    reward: Array
    kind: Array  # uint8
    written: Array  # int32 [B]
    tree: Any  # float32 [2 * leaves], sums of priorities from the root at 1; () unless prioritized
    largest: Array  # float32 []: the largest priority so far, which new rows get


class Replay(NamedTuple):
    """Pure functions of a buffer.

    Attributes:
        init: ``() -> Buffer``, empty.
        add: ``(buffer, Step [B]) -> buffer``.
        sample: ``(buffer, key, gamma, beta=1) -> Batch [N]``; beta is the exponent of importance weights.
        update: ``(buffer, rows [N], priority [N]) -> buffer``; does nothing unless prioritized. ``priority`` is the absolute
            error, to which the exponent alpha was applied.
        size: ``buffer -> int32 []``, rows that are stored.
        bytes: of a buffer.
    """

    init: Callable[[], Buffer]
    add: Callable[[Buffer, Step], Buffer]
    sample: Callable[..., Batch]
    update: Callable[[Buffer, Array, Array], Buffer]
    size: Callable[[Buffer], Array]
    bytes: int


def make(
    obs_spec: Any, num_envs: int, capacity: int, batch_size: int, n_step: int = 1, prioritized: bool = False
) -> Replay:
    """A replay of ``capacity`` rows (rounded down to a multiple of ``num_envs``) for observations of ``obs_spec``.

    Raises ``ValueError`` if it holds too few rows, or is larger than the device's memory.
    """
    for name, value in (("batch_size", batch_size), ("n_step", n_step), ("num_envs", num_envs)):
        checks.positive_int(f"replay: {name}", value)
    length = capacity // num_envs
    if length < n_step + 2:
        raise ValueError(
            f"replay: capacity must be at least {(n_step + 2) * num_envs}, n_step + 2 rows for each environment; got {capacity}"
        )
    leaves = 2 ** math.ceil(math.log2(num_envs * length)) if prioritized else 0
    envs = jnp.arange(num_envs)

    def init() -> Buffer:
        rows = lambda x: jnp.zeros((num_envs, length, *x.shape), x.dtype)  # noqa: E731
        return Buffer(
            obs=jax.tree.map(rows, obs_spec),
            action=jnp.zeros((num_envs, length), jnp.int32),
            reward=jnp.zeros((num_envs, length), jnp.float32),
            kind=jnp.zeros((num_envs, length), jnp.uint8),
            written=jnp.zeros(num_envs, jnp.int32),
            tree=jnp.zeros(2 * leaves, jnp.float32) if prioritized else (),
            largest=jnp.float32(1),
        )

    def add(buffer: Buffer, step: Step) -> Buffer:
        kind = jnp.where(step.terminated, TERMINATED, jnp.where(step.truncated, TRUNCATED, MID)).astype(jnp.uint8)
        buffer = _write(buffer, envs, step.obs, step.action, step.reward, kind)
        # A second row, for those that were truncated alone: the others write nowhere.
        alone = step.truncated & ~step.terminated
        rows = jnp.where(alone, envs, num_envs)
        nothing = jnp.zeros(num_envs, jnp.int32)
        final = jnp.full(num_envs, FINAL, jnp.uint8)
        return _write(buffer, rows, step.next_obs, nothing, nothing.astype(jnp.float32), final)

    def _write(buffer: Buffer, rows: Array, obs: Any, action: Array, reward: Array, kind: Array) -> Buffer:
        at = buffer.written % length
        put = lambda store, x: store.at[rows, at].set(x, mode="drop")  # noqa: E731
        written = buffer.written.at[rows].add(1, mode="drop")
        tree = buffer.tree
        if prioritized:
            # A row that only holds an observation is never drawn.
            fresh = jnp.where(kind == FINAL, 0.0, buffer.largest)
            tree = set_leaves(tree, jnp.where(rows < num_envs, envs * length + at, leaves), fresh)
        return buffer._replace(
            obs=jax.tree.map(put, buffer.obs, obs),
            action=put(buffer.action, action),
            reward=put(buffer.reward, reward),
            kind=put(buffer.kind, kind),
            written=written,
            tree=tree,
        )

    def sample(buffer: Buffer, key: Array, gamma: Array | float, beta: Array | float = 1.0) -> Batch:
        key_env, key_row = jax.random.split(key)
        stored = jnp.minimum(buffer.written, length)
        if prioritized:
            # Stratified: one draw from each of N equal parts of the whole priority (section 3.3).
            mass = (jnp.arange(batch_size) + jax.random.uniform(key_row, (batch_size,))) / batch_size
            leaf = find_leaves(buffer.tree, mass * buffer.tree[1])
            env, row = jnp.minimum(leaf // length, num_envs - 1), leaf % length
            share = buffer.tree[leaves + leaf] / jnp.maximum(buffer.tree[1], 1e-20)
            weight = (jnp.maximum(stored.sum(), 1) * jnp.maximum(share, 1e-20)) ** -beta
        else:
            env = jax.random.randint(key_env, (batch_size,), 0, num_envs)
            age = 1 + jax.random.randint(key_row, (batch_size,), 0, jnp.maximum(stored[env] - 1, 1))
            row = (buffer.written[env] - 1 - age) % length
            weight = jnp.ones(batch_size)
        newest = (buffer.written[env] - 1) % length
        # The newest row's next observation has not come yet.
        usable = (buffer.kind[env, row] != FINAL) & (row != newest) & (stored[env] > 1)
        weight = jnp.where(usable, weight, 0.0)
        weight = weight / jnp.maximum(weight.max(), 1e-20)
        reward, discount, end = _assemble(buffer, env, row, newest, gamma)
        at = lambda store, row: store[env, row]  # noqa: E731
        return Batch(
            obs=jax.tree.map(lambda store: at(store, row), buffer.obs),
            action=at(buffer.action, row),
            reward=reward,
            discount=discount,
            next_obs=jax.tree.map(lambda store: at(store, end), buffer.obs),
            weight=weight,
            rows=jnp.where(usable, env * length + row, NOWHERE),
        )

    def _assemble(buffer: Buffer, env: Array, row: Array, newest: Array, gamma: Array | float) -> tuple[Array, ...]:
        """Rewards summed, discount, and the row to bootstrap from."""
        reward, discount = jnp.zeros(batch_size), jnp.ones(batch_size)
        going = jnp.ones(batch_size, bool)
        end = row
        for _ in range(n_step):
            kind = buffer.kind[env, end]
            reward = jnp.where(going, reward + discount * buffer.reward[env, end], reward)
            discount = jnp.where(going, discount * gamma * (kind != TERMINATED), discount)
            end = jnp.where(going, (end + 1) % length, end)
            going = going & (kind == MID) & (end != newest)
        return reward, discount, end

    def update(buffer: Buffer, rows: Array, priority: Array) -> Buffer:
        if not prioritized:
            return buffer
        tree = set_leaves(buffer.tree, rows, jnp.maximum(priority, 1e-6))
        known = jnp.where(rows < leaves, priority, 0.0)
        return buffer._replace(tree=tree, largest=jnp.maximum(buffer.largest, known.max()))

    def size(buffer: Buffer) -> Array:
        return jnp.minimum(buffer.written, length).sum()

    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(init)))
    refuse_if_larger_than_memory(needed)
    return Replay(init, add, sample, update, size, needed)


# Sums of priorities in a complete binary tree: node k has the children 2k and 2k + 1, the leaves are its last half


def set_leaves(tree: Array, leaf: Array, value: Array) -> Array:
    """The tree with leaves ``[N]`` set, and the sums above them; those beyond the last leaf are dropped.

    Where a leaf is set twice, one of the values stays.
    """
    leaves = tree.shape[0] // 2
    node = jnp.where(leaf < leaves, leaves + leaf, tree.shape[0])
    tree = tree.at[node].set(value, mode="drop")
    for _ in range(int(math.log2(leaves))):
        node = jnp.where(node < tree.shape[0], node // 2, tree.shape[0])
        child = jnp.minimum(2 * node, tree.shape[0] - 2)
        tree = tree.at[node].set(tree[child] + tree[child + 1], mode="drop")
    return tree


def find_leaves(tree: Array, mass: Array) -> Array:
    """The leaves ``[N]`` at which the running sum of priorities first exceeds ``mass [N]``."""
    leaves = tree.shape[0] // 2
    node = jnp.ones(mass.shape, jnp.int32)
    for _ in range(int(math.log2(leaves))):
        left = tree[2 * node]
        # Never into a half that has nothing, which rounding could ask for.
        right = (mass >= left) & (tree[2 * node + 1] > 0)
        mass = jnp.where(right, mass - left, mass)
        node = 2 * node + right
    return node - leaves


def refuse_if_larger_than_memory(needed: int) -> None:
    """Raise ``ValueError`` with both numbers if one buffer of ``needed`` bytes does not fit the first device."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        there = (device.memory_stats() or {}).get("bytes_limit", needed)
    if needed > there:
        raise ValueError(
            f"replay: a buffer of {needed / 2**30:.1f} GiB is larger than the device's {there / 2**30:.1f} GiB"
        )
