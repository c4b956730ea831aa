"""Finite Markov decision processes as arrays, and their exact answers.

With ``S`` states and ``A`` actions, the value of a policy ``pi`` solves the Bellman equation (Sutton & Barto, 2nd ed.,
eq. 3.14), which is linear and so has a direct answer; the optimal value solves eq. 3.19, which iteration finds:

    v_pi(s) = sum_a pi(a|s) sum_s' p(s'|s,a) [ r(s,a,s') + gamma v_pi(s') ]
    v_*(s)  = max_a         sum_s' p(s'|s,a) [ r(s,a,s') + gamma v_*(s') ]

Terminal states have the value 0. Everything is pure and works under jit and vmap. ``jrl.envs.tabular`` has the well-known
ones, and makes environments of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jrl.numerics import checks
from jrl.numerics.precision import exact

Array = jax.Array


class MDP(NamedTuple):
    """A finite Markov decision process.

    Attributes:
        transition: ``p(s'|s,a)``, float32 ``[S, A, S]``; rows sum to 1.
        reward: ``r(s,a,s')``, float32 ``[S, A, S]``.
        terminal: bool ``[S]``: an episode ends on arrival.
        start: distribution of the first state, float32 ``[S]``.
        legal: bool ``[S, A]``: actions that can be chosen.
        reward_std: standard deviation of normal noise on the reward, float32 ``[S, A]``.
    """

    transition: Array
    reward: Array
    terminal: Array
    start: Array
    legal: Array
    reward_std: Array


def make(
    transition: ArrayLike,
    reward: ArrayLike,
    terminal: ArrayLike | None = None,
    start: ArrayLike | None = None,
    legal: ArrayLike | None = None,
    reward_std: ArrayLike = 0.0,
) -> MDP:
    """An ``MDP`` from arrays; reward is ``[S, A, S]`` or ``[S, A]``, the start uniform over what is not terminal.

    Raises ``ValueError`` for shapes that do not fit, rows that are no distributions, and rewards that are not finite.
    """
    transition = jnp.asarray(transition, jnp.float32)
    if transition.ndim != 3 or transition.shape[0] != transition.shape[2]:
        raise ValueError(f"transition must be [states, actions, states]; got {transition.shape}")
    states, actions, _ = transition.shape
    reward = jnp.asarray(reward, jnp.float32)
    if reward.shape == (states, actions):
        reward = jnp.broadcast_to(reward[:, :, None], transition.shape)
    terminal = jnp.zeros(states, bool) if terminal is None else jnp.asarray(terminal, bool)
    start = ~terminal / jnp.maximum(1, (~terminal).sum()) if start is None else jnp.asarray(start, jnp.float32)
    legal = jnp.ones((states, actions), bool) if legal is None else jnp.asarray(legal, bool)
    for name, given, wanted in (
        ("reward", reward, transition.shape),
        ("terminal", terminal, (states,)),
        ("start", start, (states,)),
        ("legal", legal, (states, actions)),
    ):
        if given.shape != wanted:
            raise ValueError(f"{name} must have shape {wanted}; got {given.shape}")
    if not isinstance(transition, jax.core.Tracer):
        rows = np.asarray(transition)
        if rows.min() < 0 or not np.allclose(rows.sum(-1), 1, atol=1e-4):
            raise ValueError("transition must be a distribution over next states for each state and action")
    std = jnp.broadcast_to(jnp.asarray(reward_std, jnp.float32), (states, actions))
    _check_numbers(reward=reward, start=start, reward_std=std)
    return MDP(transition, reward, terminal, start.astype(jnp.float32), legal, std)


def _check_numbers(reward: Array, start: Array, reward_std: Array) -> None:
    """Raise ``ValueError`` unless concrete numbers can be what their names say; traced ones pass."""
    if isinstance(reward, jax.core.Tracer) or isinstance(start, jax.core.Tracer):
        return
    if not np.isfinite(reward).all():
        raise ValueError("reward must be finite")
    if not (np.asarray(start) >= 0).all() or not np.isclose(start.sum(), 1, atol=1e-4):
        raise ValueError(f"start must be a distribution over states; got {np.asarray(start).tolist()}")
    checks.within("reward_std", reward_std, 0, np.inf)


def discounts(mdp: MDP, gamma: Array | float) -> Array:
    """What multiplies the value of each next state: ``gamma``, or 0 where it is terminal; ``[S]``."""
    return gamma * (1.0 - mdp.terminal)


@exact
def action_values(mdp: MDP, v: Array, gamma: Array | float) -> Array:
    """``q(s,a) = sum_s' p(s'|s,a) [r(s,a,s') + gamma v(s')]``, ``[S, A]`` (eq. 4.6); 0 in terminal states."""
    backed_up = mdp.reward + (discounts(mdp, gamma) * v)[None, None]
    return jnp.einsum("sat,sat->sa", mdp.transition, backed_up) * ~mdp.terminal[:, None]


@exact
def chain(mdp: MDP, policy: Array) -> tuple[Array, Array]:
    """The Markov chain of a policy ``[S, A]``: transitions ``[S, S]`` and expected rewards ``[S]``."""
    checks.same_shape("mdp.chain", policy=policy, legal=mdp.legal)
    moves = jnp.einsum("sa,sat->st", policy, mdp.transition)
    return moves, jnp.einsum("sa,sat,sat->s", policy, mdp.transition, mdp.reward) * ~mdp.terminal


@exact
def evaluate_policy(mdp: MDP, policy: Array, gamma: Array | float) -> Array:
    """``v_pi`` ``[S]`` by solving the Bellman equation; with ``gamma = 1`` every state must reach a terminal one."""
    moves, reward = chain(mdp, policy)
    flow = moves * discounts(mdp, gamma)[None] * ~mdp.terminal[:, None]
    return jnp.linalg.solve(jnp.eye(len(reward)) - flow, reward)


@exact
def shaped(mdp: MDP, potential: Array, gamma: Array | float) -> MDP:
    """The process with ``r(s,a,s') + gamma Phi(s') - Phi(s)`` as its reward, for a potential ``Phi [S]`` that counts as 0 in terminal states
    (Ng, Harada and Russell 1999, theorem 1).

    At this ``gamma`` it has the same optimal policies; values become ``v(s) - Phi(s)``.
    """
    checks.same_shape("mdp.shaped", potential=potential, terminal=mdp.terminal)
    bonus = (discounts(mdp, gamma) * potential)[None] - potential[:, None]
    return mdp._replace(reward=mdp.reward + bonus[:, None, :])


def uniform_policy(mdp: MDP) -> Array:
    """Every legal action with the same probability, ``[S, A]``."""
    return mdp.legal / jnp.maximum(mdp.legal.sum(1, keepdims=True), 1)


def greedy_policy(mdp: MDP, q: Array) -> Array:
    """The legal action of the highest value (the first of several), ``[S, A]``."""
    best = jnp.argmax(jnp.where(mdp.legal, q, -jnp.inf), axis=1)
    return jax.nn.one_hot(best, q.shape[1])


@exact
def value_iteration(mdp: MDP, gamma: Array | float, tolerance: float = 1e-6, max_sweeps: int = 100_000) -> Array:
    """``v_*`` ``[S]``: sweeps of eq. 4.10 until none changes a value by more than ``tolerance``.

    Near ``gamma = 1`` sweeps approach it slowly; for any below 1 the answer is therefore the exact value of the policy that is
    greedy at the end.
    """

    def better(v: Array) -> Array:
        best = jnp.max(jnp.where(mdp.legal, action_values(mdp, v, gamma), -jnp.inf), axis=1)
        return jnp.where(mdp.terminal, 0.0, best)

    def going(carry: tuple[Array, Array, Array]) -> Array:
        _, change, sweeps = carry
        return (change > tolerance) & (sweeps < max_sweeps)

    def sweep(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, _, sweeps = carry
        new = better(v)
        return new, jnp.abs(new - v).max(), sweeps + 1

    start = jnp.zeros(len(mdp.terminal))
    swept = jax.lax.while_loop(going, sweep, (start, jnp.float32(jnp.inf), jnp.int32(0)))[0]
    exact = evaluate_policy(mdp, greedy_policy(mdp, action_values(mdp, swept, gamma)), gamma)
    return jnp.where(gamma < 1, exact, swept)


@exact
def policy_iteration(mdp: MDP, gamma: Array | float, max_rounds: int = 1000) -> tuple[Array, Array]:
    """An optimal policy ``[S, A]`` and ``v_*`` ``[S]``: evaluate, act greedily, until nothing changes (section 4.3).

    ``gamma`` must be below 1 unless every policy reaches a terminal state.
    """

    def going(carry: tuple[Array, Array, Array]) -> Array:
        _, changed, rounds = carry
        return changed & (rounds < max_rounds)

    def improve(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        policy, _, rounds = carry
        q = action_values(mdp, evaluate_policy(mdp, policy, gamma), gamma)
        now = jnp.sum(policy * q, axis=1)
        best = jnp.max(jnp.where(mdp.legal, q, -jnp.inf), axis=1)
        # Only where an action is better by more than rounding: ties would otherwise change places for ever.
        wins = best > now + 1e-5 * (1 + jnp.abs(now))
        new = jnp.where(wins[:, None], greedy_policy(mdp, q), policy)
        return new, wins.any(), rounds + 1

    first = greedy_policy(mdp, action_values(mdp, jnp.zeros(len(mdp.terminal)), gamma))
    policy, _, _ = jax.lax.while_loop(going, improve, (first, jnp.bool_(True), jnp.int32(0)))
    return policy, evaluate_policy(mdp, policy, gamma)


@exact
def state_distribution(mdp: MDP, policy: Array) -> Array:
    """How often each state is acted in, in the long run with restarts, ``[S]``; the chain must be irreducible."""
    moves, _ = chain(mdp, policy)
    # An arrival in a terminal state is an arrival in the next episode's first state.
    moves = moves * ~mdp.terminal[None] + (moves * mdp.terminal[None]).sum(1, keepdims=True) * mdp.start[None]
    states = len(mdp.terminal)
    wanted = jnp.concatenate([jnp.zeros(states), jnp.ones(1)])
    equations = jnp.concatenate([jnp.eye(states) - moves.T, jnp.ones((1, states))])
    return jnp.linalg.lstsq(equations, wanted)[0] * ~mdp.terminal


@exact
def td_fixed_point(mdp: MDP, policy: Array, gamma: Array | float, features: Array, weighting: Array) -> Array:
    """Weights ``[d]`` at which the expected TD(0) update is 0 (eq. 9.12-9.14): features ``[S, d]``, weighting ``[S]``."""
    moves, reward = chain(mdp, policy)
    flow = moves * discounts(mdp, gamma)[None]
    weighted = features * (weighting * ~mdp.terminal)[:, None]
    return jnp.linalg.lstsq(weighted.T @ (features - flow @ features), weighted.T @ reward)[0]
