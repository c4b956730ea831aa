"""The functions that a run compiles: the whole of it, and a chunk of its updates."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Algorithm, Metrics, State, to_sums

Array = jax.Array


def num_updates(algo: Algorithm, env_steps: int) -> int:
    """Whole updates within the budget. Raises ``ValueError`` if there is none."""
    updates = env_steps // algo.env_steps_per_update
    if updates < 1:
        raise ValueError(f"env_steps must be at least one update, {algo.env_steps_per_update}; got {env_steps}")
    return updates


def train_fn(algo: Algorithm, env_steps: int) -> Callable[..., tuple[State, Metrics]]:
    """The whole run as one pure function ``train(key, hyper=None) -> (state, metrics)``, to jit, vmap and shard as you like.

    It makes ``env_steps // algo.env_steps_per_update`` updates, never more steps than asked; metrics are ``[updates]``.
    Raises ``ValueError`` if the budget holds no update.
    """
    updates = num_updates(algo, env_steps)

    def train(key: Array, hyper: Any = None) -> tuple[State, Metrics]:
        state = algo.init(key, hyper, updates)
        return jax.lax.scan(lambda s, _: algo.update(s), state, length=updates)

    return train


class LoopState(NamedTuple):
    """A group of members between two chunks: their states, and the sums of their metrics since the last whole row
    ``[members, metrics]``."""

    states: State
    row: Array


class Rows(NamedTuple):
    """Metrics of a chunk for ``[members]``: sums over the updates of each row ``[members, max_rows + 1]``, of which the chunk filled
    the first, and the first update (from 0, within the chunk) at which a loss was not finite ``[members]``, -1 for none."""

    sums: Metrics
    first_bad: Array


def max_rows(num_members: int) -> int:
    """Rows of metrics that a chunk can hold on the device: fewer for thousands of members."""
    return max(64, min(1024, 2**18 // num_members))


def chunk(
    algo: Algorithm, names: Sequence[str], log_every: int, max_rows: int
) -> Callable[[LoopState, Array, Array], tuple[LoopState, Rows]]:
    """``(members, n, before) -> (members, rows)``: ``n`` updates of a group of members, ``log_every`` of them summed into each row.

    ``names`` are those of the algorithm's metrics; ``before`` is how many updates are in the members' row already. Both numbers are
    traced, so that one program serves chunks of any length up to ``log_every * max_rows - before``.
    """
    update = jax.vmap(algo.update)
    losses = [name for name in names if name in algo.losses]

    def run(members: LoopState, n: Array, before: Array) -> tuple[LoopState, Rows]:
        def body(i: Array, carry: Any) -> Any:
            states, sums, bad = carry
            states, metrics = update(states)
            if losses:
                wrong = ~jnp.isfinite(jnp.stack([metrics[name] for name in losses])).all(0)
                bad = jnp.where((bad < 0) & wrong, i, bad)
            row = to_sums(metrics)
            row = jnp.stack([row[name].astype(jnp.float32) for name in names])
            return states, sums.at[(before + i) // log_every].add(row), bad

        # All metrics stand in one array, so that an update writes once.
        num_members = len(members.row)
        sums = jnp.zeros((max_rows + 1, len(names), num_members), jnp.float32).at[0].set(members.row.T)
        start = (members.states, sums, jnp.full(num_members, -1, jnp.int32))
        states, sums, bad = jax.lax.fori_loop(0, n, body, start)
        rows = Rows({name: sums[:, i].T for i, name in enumerate(names)}, bad)
        return LoopState(states, sums[(before + n) // log_every].T), rows

    return run
