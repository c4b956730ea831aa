"""Experience replay as pure functions: uniform (Lin 1992) or prioritized (Schaul et al. 2016, arXiv 1511.05952).

Each of B environments has a ring of rows in the order in which things happened. A row is an observation and what was done
and earned there; the next observation is the next row, so that none is stored twice. Where an episode was truncated, its last
observation, which the next episode does not begin with, gets a row of its own. Of stacked frames a row holds the newest, and
the stack is put together from the rows before it.

``make`` draws n-step transitions: they stop at the end of an episode, bootstrap from a truncated episode's last
observation, and are shorter where the newest row is closer than n. ``make_sequences`` draws rows in a row, for recurrent
networks. Drawing costs ``O(batch)`` and writing ``O(B)``, prioritized times ``log capacity``. Nothing copies
the buffer: rows are scattered into it in place.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.experience import normalize
from jrl.numerics import checks
from jrl.numerics.host import device_memory
from jrl.numerics.types import Observation

Array = jax.Array
CHOICE = jax.ShapeDtypeStruct((), jnp.int32)
NOWHERE = 2**30  # a row that no buffer has
UNROLLED = 8  # steps of n-step returns that are compiled one after the other
MID, TERMINATED, TRUNCATED, FINAL = range(4)  # FINAL: only an observation, of a truncated episode's end


class Step(NamedTuple):
    """What happened in B environments at one step; ``next_obs`` is the observation before any reset."""

    obs: Observation
    action: Array
    reward: Array
    terminated: Array
    truncated: Array
    next_obs: Observation


class Batch(NamedTuple):
    """n-step transitions ``[N]``.

    Attributes:
        obs: where they start.
        action: taken there.
        reward: discounted rewards of up to n steps, summed.
        discount: what multiplies the value of ``next_obs``: gamma to the number of steps, or 0 after a termination.
        next_obs: the observation they end with, before any reset; any, where ``discount`` is 0.
        weight: importance weight, at most 1; 0 for a row that is no transition.
        rows: which rows they start at, int32, for ``update``; NOWHERE where the weight is 0.
    """

    obs: Observation
    action: Array
    reward: Array
    discount: Array
    next_obs: Observation
    weight: Array
    rows: Array


class Sequences(NamedTuple):
    """Rows ``[L, N]`` in the order in which things happened; an episode may end within, and the next begin.

    Attributes:
        obs: what was seen.
        first: whether it is the first of its episode.
        action: taken there.
        reward: that followed.
        kind: MID, TERMINATED, TRUNCATED (the row after it is FINAL), or FINAL: only an observation, of a truncated episode's end.
        weight: importance weight ``[N]``, at most 1; 0 for rows that are no sequence.
        rows: which rows they start at ``[N]``, int32, for ``update``; NOWHERE where the weight is 0.
    """

    obs: Observation
    first: Array
    action: Array
    reward: Array
    kind: Array
    weight: Array
    rows: Array


class Buffer(NamedTuple):
    """The stored rows ``[B, capacity / B, ...]``, how many were written to each ring ``[B]``, and the priorities' tree."""

    obs: Observation
    action: Array
    reward: Array
    kind: Array  # uint8
    written: Array  # int32 [B]: rows written; once the ring is full, reduced by whole ring lengths
    tree: Any  # float32 [2 * leaves], sums of priorities from the root at 1; () unless prioritized
    largest: Array  # float32 []: the largest priority so far, which new rows get


class Replay(NamedTuple):
    """Pure functions of a buffer.

    Attributes:
        init: ``() -> Buffer``, empty.
        add: ``(buffer, Step [B]) -> buffer``.
        sample: of transitions ``(buffer, key, gamma, beta=1) -> Batch [N]``, of sequences ``(buffer, key, beta=1) -> Sequences
            [L, N]``; beta is the exponent of importance weights.
        update: ``(buffer, rows [N], priority [N]) -> buffer``; does nothing unless prioritized. ``priority`` is the absolute
            error, to which the exponent alpha was applied.
        size: ``buffer -> int32 []``, rows that are stored.
        bytes: of a buffer.
    """

    init: Callable[[], Buffer]
    add: Callable[[Buffer, Step], Buffer]
    sample: Callable[..., Any]
    update: Callable[[Buffer, Array, Array], Buffer]
    size: Callable[[Buffer], Array]
    bytes: int


def make(
    obs_spec: Any,
    num_envs: int,
    capacity: int,
    batch_size: int,
    n_step: int = 1,
    prioritized: bool = False,
    num_frames: int = 1,
    action_spec: Any = CHOICE,
) -> Replay:
    """A replay of n-step transitions, of ``capacity`` rows (rounded down to a multiple of ``num_envs``).

    ``num_frames`` says how many frames are stacked along the last axis of observations of ``obs_spec`` (as
    ``wrappers.frame_stack`` does): each frame is stored once. ``action_spec`` is the shape of an action, of a choice if not given.
    Raises ``ValueError`` if it holds too few rows, or is larger than the device's memory.
    """
    checks.positive_int("replay: n_step", n_step)
    store = _Store(obs_spec, num_envs, capacity, batch_size, 2, num_frames - 1, prioritized, num_frames, action_spec)
    store.check_capacity(capacity, n_step + num_frames + 1, "n_step + num_frames + 1")

    def sample(buffer: Buffer, key: Array, gamma: Array | float, beta: Array | float = 1.0) -> Batch:
        env, row, weight = store.draw(buffer, key, beta)
        reward, discount, end = assemble(buffer, env, row, gamma)
        return Batch(
            obs=store.observe(buffer, env, row),
            action=buffer.action[env, row],
            reward=reward,
            discount=discount,
            next_obs=store.observe(buffer, env, end),
            weight=weight,
            rows=store.names(env, row, weight),
        )

    def assemble(buffer: Buffer, env: Array, row: Array, gamma: Array | float) -> tuple[Array, ...]:
        """Rewards summed, discount, and the row to bootstrap from."""
        newest = store.wrap(buffer.written[env] - 1)

        def further(carry: Any) -> Any:
            n, going, reward, discount, end = carry
            kind = buffer.kind[env, end]
            reward = jnp.where(going, reward + discount * buffer.reward[env, end], reward)
            discount = jnp.where(going, discount * gamma * (kind != TERMINATED), discount)
            following = jnp.where(going, store.wrap(end + 1), end)
            return n + 1, going & (kind == MID) & (following != newest), reward, discount, following

        carry: Any = (
            0,
            jnp.ones(batch_size, bool),
            jnp.zeros(batch_size, jnp.float32),
            jnp.ones(batch_size, jnp.float32),
            row,
        )
        if n_step <= UNROLLED:
            for _ in range(n_step):
                carry = further(carry)
        else:
            carry = jax.lax.while_loop(lambda c: (c[0] < n_step) & c[1].any(), further, carry)
        _, _, reward, discount, end = carry
        return reward, discount, end

    return Replay(store.init, store.add, sample, store.update, store.size, store.bytes)


def add_rollout(store: Replay, buffer: Buffer, steps: Any, action: Array, reward_clip: float = 0.0) -> Buffer:
    """The buffer with the steps ``[T, B]`` of a rollout, whose rewards are cut off at ``reward_clip`` unless that is 0."""
    reward = normalize.clipped(reward_clip, steps.reward)
    rows = Step(steps.obs, action, reward, steps.terminated, steps.truncated, steps.next_obs)
    return jax.lax.scan(lambda b, step: (store.add(b, step), None), buffer, rows)[0]


def mean(batch: Batch, x: Array) -> Array:
    """The mean of ``x [N]`` over the transitions of a minibatch; 0 if there is none."""
    used = batch.weight > 0
    return jnp.sum(jnp.where(used, x, 0.0)) / jnp.maximum(used.sum(), 1)


def make_sequences(
    obs_spec: Any, num_envs: int, capacity: int, batch_size: int, length: int, prioritized: bool = False
) -> Replay:
    """A replay of sequences of ``length`` rows, else like ``make``. A recurrent memory can be stored as part of ``obs_spec``."""
    checks.positive_int("replay: length", length, at_least=2)
    # The row before tells whether a row starts an episode.
    store = _Store(obs_spec, num_envs, capacity, batch_size, length, 1, prioritized, 1)
    store.check_capacity(capacity, length + 2, "length + 2")

    def sample(buffer: Buffer, key: Array, beta: Array | float = 1.0) -> Sequences:
        env, start, weight = store.draw(buffer, key, beta)
        envs = env[None]
        rows = store.wrap(start[None] + jnp.arange(length)[:, None])
        return Sequences(
            obs=store.observe(buffer, envs, rows),
            first=store.starts(buffer, envs, rows),
            action=buffer.action[envs, rows],
            reward=buffer.reward[envs, rows],
            kind=buffer.kind[envs, rows],
            weight=weight,
            rows=store.names(env, start, weight),
        )

    return Replay(store.init, store.add, sample, store.update, store.size, store.bytes)


class _Store:
    """Rows and their priorities; a row can be drawn only if at least ``needs - 1`` rows follow it and ``before`` rows precede it."""

    def __init__(
        self, obs_spec, num_envs, capacity, batch_size, needs, before, prioritized, num_frames, action_spec=CHOICE
    ):
        for name, value in (("batch_size", batch_size), ("num_envs", num_envs), ("num_frames", num_frames)):
            checks.positive_int(f"replay: {name}", value)
        self.num_envs, self.length, self.batch_size = num_envs, capacity // num_envs, batch_size
        self.needs, self.before, self.prioritized, self.num_frames = needs, before, prioritized, num_frames
        self.action_spec = action_spec
        self.leaves = 2 ** math.ceil(math.log2(max(1, num_envs * self.length))) if prioritized else 0
        self.frame_spec = obs_spec if num_frames == 1 else _one_frame(obs_spec, num_frames)
        self.bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(self.init)))
        refuse_if_larger_than_memory(self.bytes)

    def check_capacity(self, capacity: int, rows: int, why: str) -> None:
        if self.length < rows:
            raise ValueError(
                f"replay: capacity must be at least {rows * self.num_envs}, {why} rows for each environment; got {capacity}"
            )

    def wrap(self, row: Array) -> Array:
        """The place in its ring of a row that may be up to a ring's length before it. ``%`` would round towards minus infinity, in six
        operations that XLA repeats in all that uses them: a prioritized update takes nearly twice as long to compile."""
        return jax.lax.rem(row + self.length, jnp.full_like(row, self.length))

    def init(self) -> Buffer:
        shape = (self.num_envs, self.length)
        return Buffer(
            obs=jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape), x.dtype), self.frame_spec),
            action=jnp.zeros((*shape, *self.action_spec.shape), self.action_spec.dtype),
            reward=jnp.zeros(shape, jnp.float32),
            kind=jnp.full(shape, FINAL, jnp.uint8),  # so that the first row ever is the first of an episode
            written=jnp.zeros(self.num_envs, jnp.int32),
            tree=jnp.zeros(2 * self.leaves, jnp.float32) if self.prioritized else (),
            largest=jnp.float32(1),
        )

    def add(self, buffer: Buffer, step: Step) -> Buffer:
        """A row in each environment, and a second one with the last observation of those that were truncated alone."""
        kind = jnp.where(step.terminated, TERMINATED, jnp.where(step.truncated, TRUNCATED, MID)).astype(jnp.uint8)
        cut = step.truncated & ~step.terminated
        envs, nowhere = jnp.arange(self.num_envs), jnp.full(self.num_envs, self.num_envs)
        rows = jnp.concatenate([envs, jnp.where(cut, envs, nowhere)])
        at = self.wrap(jnp.concatenate([buffer.written, buffer.written + 1]))

        def put(store: Array, x: Array, final: Array) -> Array:
            return store.at[rows, at].set(jnp.concatenate([x, final]), mode="drop")

        def newest(obs: Observation) -> Any:
            return obs[..., -self.frame_spec.shape[-1] :] if self.num_frames > 1 else obs

        before = buffer.written
        buffer = buffer._replace(
            obs=jax.tree.map(put, buffer.obs, newest(step.obs), newest(step.next_obs)),
            action=put(buffer.action, step.action, jnp.zeros_like(step.action)),
            reward=put(buffer.reward, step.reward, jnp.zeros_like(step.reward)),
            kind=put(buffer.kind, kind, jnp.full_like(kind, FINAL)),
        )
        if self.prioritized:
            tree = self._open_and_close(buffer, envs, before)
            tree = self._open_and_close(buffer._replace(tree=tree), rows[self.num_envs :], before + 1)
            buffer = buffer._replace(tree=tree)
        written = before + 1 + cut
        # Only the place in the ring and whether it is full matter: taken down by whole rings, the count never overflows.
        return buffer._replace(written=jnp.where(written >= 2 * self.length, written - self.length, written))

    def _open_and_close(self, buffer: Buffer, rows: Array, before: Array) -> Array:
        """The tree after one row more than ``before`` was written in the environments of ``rows``: the row that now has
        enough successors becomes drawable, the one whose predecessors were overwritten stops being so."""
        envs, at = jnp.arange(self.num_envs), self.wrap(before)
        opened, closed = self.wrap(at - (self.needs - 1)), self.wrap(at + self.before)
        drawable = (before + 1 >= self.needs) & (buffer.kind[envs, opened] != FINAL)
        priority = jnp.where(drawable, buffer.largest, jnp.float32(0))

        def leaf(row):
            return jnp.where(rows < self.num_envs, envs * self.length + row, self.leaves)

        leaves = jnp.concatenate([leaf(closed), leaf(opened)])
        return set_leaves(buffer.tree, leaves, jnp.concatenate([jnp.zeros_like(priority), priority]))

    def draw(self, buffer: Buffer, key: Array, beta: Array | float) -> tuple[Array, Array, Array]:
        """Environment, row and importance weight ``[N]``; the weight is 0 where the row cannot be drawn."""
        stored = jnp.minimum(buffer.written, self.length)
        oldest = stored - 1 - self.before * (buffer.written >= self.length)
        if self.prioritized:
            # Stratified: one draw from each of N equal parts of the whole priority (section 3.3).
            part = jnp.arange(self.batch_size, dtype=jnp.float32)
            mass = (part + jax.random.uniform(key, (self.batch_size,), jnp.float32)) / self.batch_size
            leaf = find_leaves(buffer.tree, mass * buffer.tree[1])
            env, row = (
                jnp.minimum(jax.lax.div(leaf, jnp.full_like(leaf, self.length)), self.num_envs - 1),
                self.wrap(leaf),
            )
            share = buffer.tree[self.leaves + leaf] / jnp.maximum(buffer.tree[1], 1e-20)
            weight = (jnp.maximum(stored.sum(), 1) * jnp.maximum(share, 1e-20)) ** -beta
        else:
            uniform = jax.random.uniform(key, (2, self.batch_size), jnp.float32)
            env = _choose(uniform[0], 0, self.num_envs)
            youngest = self.needs - 1
            age = _choose(uniform[1], youngest, jnp.maximum(oldest[env], youngest) + 1)
            row = self.wrap(buffer.written[env] - 1 - age)
            weight = jnp.ones(self.batch_size, jnp.float32)
        age = self.wrap(buffer.written[env] - 1 - row)
        usable = (buffer.kind[env, row] != FINAL) & (age >= self.needs - 1) & (age <= oldest[env])
        weight = jnp.where(usable, weight, 0.0)
        return env, row, weight / jnp.maximum(weight.max(), 1e-20)

    def names(self, env: Array, row: Array, weight: Array) -> Array:
        return jnp.where(weight > 0, env * self.length + row, NOWHERE)

    def starts(self, buffer: Buffer, env: Array, row: Array) -> Array:
        """Whether an episode begins at the row."""
        before = buffer.kind[env, self.wrap(row - 1)]
        return (before == TERMINATED) | (before == FINAL)

    def observe(self, buffer: Buffer, env: Array, row: Array) -> Any:
        """What was seen, its frames stacked; before an episode began its first frame is repeated."""
        if self.num_frames == 1:
            return jax.tree.map(lambda store: store[env, row], buffer.obs)
        rows = [row]
        for _ in range(self.num_frames - 1):
            rows.append(jnp.where(self.starts(buffer, env, rows[-1]), rows[-1], self.wrap(rows[-1] - 1)))
        return jnp.concatenate([buffer.obs[env, r] for r in reversed(rows)], axis=-1)

    def update(self, buffer: Buffer, rows: Array, priority: Array) -> Buffer:
        if not self.prioritized:
            return buffer
        priority = jnp.where(jnp.isfinite(priority), priority, 0.0)  # one NaN would spoil every sum above it for good
        # Sorted, since XLA would else work out the rows again at every level, from a copy of the whole tree.
        rows, priority = jax.lax.sort((rows, priority), num_keys=1)
        tree = set_leaves(buffer.tree, rows, jnp.maximum(priority, 1e-6))
        known = jnp.where(rows < self.leaves, priority, 0.0)
        return buffer._replace(tree=tree, largest=jnp.maximum(buffer.largest, known.max()))

    def size(self, buffer: Buffer) -> Array:
        return jnp.minimum(buffer.written, self.length).sum()


def _choose(uniform: Array, low: int, high: Array | int) -> Array:
    """An integer in ``[low, high)`` for each number in [0, 1), which has 23 bits: ample for a ring, and a third of randint's cost."""
    return jnp.minimum(low + (uniform * (high - low)).astype(jnp.int32), high - 1)


def _one_frame(obs_spec: Any, num_frames: int) -> jax.ShapeDtypeStruct:
    shape = getattr(obs_spec, "shape", ())
    if not shape or shape[-1] % num_frames:
        raise ValueError(
            f"replay: the last axis of observations must hold num_frames = {num_frames} frames; got {obs_spec}"
        )
    return jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // num_frames), obs_spec.dtype)


# Sums of priorities in a complete binary tree: node k has the children 2k and 2k + 1, the leaves are its last half


def set_leaves(tree: Array, leaf: Array, value: Array) -> Array:
    """The tree with leaves ``[N]`` set, and the sums above them; those beyond the last leaf are dropped.

    Where a leaf is set twice, one of the values stays.
    """
    leaves = tree.shape[0] // 2
    there = leaf < leaves
    tree = tree.at[jnp.where(there, leaves + leaf, tree.shape[0])].set(value, mode="drop")
    for level in range(1, int(math.log2(leaves)) + 1):
        node = jnp.where(there, (leaves + leaf) >> level, tree.shape[0])
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


def check_learning_starts(config: Any) -> None:
    """Raise ``ValueError`` where learning would never start, since the replay does not hold as many steps."""
    if config.learning_starts > config.capacity:
        raise ValueError(
            f"config.learning_starts must be at most capacity = {config.capacity}; got {config.learning_starts}"
        )


def refuse_if_larger_than_memory(needed: int) -> None:
    """Raise ``ValueError`` with both numbers if one buffer of ``needed`` bytes does not fit the first device."""
    there = device_memory()
    if there is not None and needed > there:
        raise ValueError(
            f"replay: a buffer of {needed / 2**30:.1f} GiB is larger than the device's {there / 2**30:.1f} GiB"
        )
