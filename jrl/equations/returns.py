"""Temporal-difference errors and returns, one function an equation, on one unbatched trajectory of length T.

Time convention: ``v_tm1[t]`` is the value of the observation acted on, ``r_t[t]`` the reward that followed, ``v_t[t]``
the value of the observation that followed, *before any reset*. ``discount_t = gamma * (1 - terminated_t)`` multiplies
``v_t``; ``continue_t = 1 - (terminated_t | truncated_t)`` cuts traces, so that nothing leaks from one episode into the
one before. Within an episode ``v_t[t] == v_tm1[t + 1]``; at a truncation they differ, and ``v_t`` is the right one.

All arrays are float32 ``[T]`` unless said otherwise; ``vmap`` them over batches. Every function raises ``ValueError`` at
trace time if shapes disagree. None stops gradients: callers decide.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jrl.numerics import loops
from jrl.numerics.checks import same_shape

Array = jax.Array
UNROLL = 16  # steps of a return that are one kernel on a GPU


def over_batch(equation: Callable[..., Array], *args: Any) -> Array:
    """``equation`` on trajectories side by side: arrays are ``[T, B, ...]``, numbers are shared, the result is ``[T, B]``."""
    return jax.vmap(equation, in_axes=tuple(1 if jnp.ndim(x) else None for x in args), out_axes=1)(*args)


def td_error(v_tm1: Array, r_t: Array, discount_t: Array, v_t: Array) -> Array:
    """TD errors ``r_t + discount_t * v_t - v_tm1`` (Sutton & Barto, 2nd ed., eq. 6.5); any one shape."""
    same_shape("td_error", v_tm1=v_tm1, r_t=r_t, discount_t=discount_t, v_t=v_t)
    return r_t + discount_t * v_t - v_tm1


def discounted_returns(r_t: Array, discount_t: Array, v_t: Array, continue_t: Array) -> Array:
    """Monte Carlo returns that bootstrap where the episode or the trajectory is cut; lambda returns with lambda = 1."""
    return lambda_returns(r_t, discount_t, v_t, continue_t, 1.0)


def lambda_returns(r_t: Array, discount_t: Array, v_t: Array, continue_t: Array, lambda_: Array | float) -> Array:
    """Lambda returns ``[T]`` (Sutton & Barto, eq. 12.18, in recursive form).

    ``G_t = r_t + discount_t * ((1 - lambda c_t) v_t + lambda c_t G_{t+1})`` with ``c_t = continue_t`` and
    ``G_{T} = v_t[T-1]``. ``lambda_`` is a scalar or ``[T]``.
    """
    same_shape("lambda_returns", r_t=r_t, discount_t=discount_t, v_t=v_t, continue_t=continue_t)
    lambda_t = jnp.broadcast_to(jnp.asarray(lambda_, r_t.dtype), r_t.shape) * continue_t

    def step(g_next: Array, x: tuple[Array, ...]) -> tuple[Array, Array]:
        r, discount, v, lambda_c = x
        g = r + discount * ((1 - lambda_c) * v + lambda_c * g_next)
        return g, g

    _, returns = loops.scan(step, v_t[-1], (r_t, discount_t, v_t, lambda_t), reverse=True, gpu_unroll=UNROLL)
    return returns


def n_step_returns(r_t: Array, discount_t: Array, v_t: Array, continue_t: Array, n: int) -> Array:
    """n-step returns ``[T]`` (Sutton & Barto, eq. 7.1), shorter where an episode or the trajectory ends.

    Each sums up to ``n`` rewards, then bootstraps from the value ``v_t`` of the last observation reached.
    Raises ``ValueError`` if ``n < 1``.
    """
    same_shape("n_step_returns", r_t=r_t, discount_t=discount_t, v_t=v_t, continue_t=continue_t)
    if n < 1:
        raise ValueError(f"n_step_returns: n must be at least 1, got {n}")
    # G^(1) = r + discount v; G^(k+1)_t = r_t + discount_t G^(k)_{t+1} where the step t goes on, else G^(1).
    one_step = r_t + discount_t * v_t
    more = continue_t.at[-1].set(0)
    returns = one_step
    for _ in range(n - 1):
        following = jnp.concatenate([returns[1:], v_t[-1:]])
        returns = jnp.where(more > 0, r_t + discount_t * following, one_step)
    return returns


def n_step_transitions(r_t: Array, discount_t: Array, continue_t: Array, n: int) -> tuple[Array, Array, Array]:
    """Each transition stretched over up to ``n`` steps: ``(reward [T], discount [T], last [T] int32)``.

    From step t the discounted rewards up to step ``last[t]`` sum to ``reward[t]``, and ``discount[t]`` multiplies the value of
    the observation that followed step ``last[t]``, before any reset: ``t + n - 1``, or sooner where an episode or the
    trajectory ends. So ``reward + discount * v_t[last]`` is the n-step return (Sutton & Barto, eq. 7.1) for values that are
    not known yet. Raises ``ValueError`` if ``n < 1``.
    """
    same_shape("n_step_transitions", r_t=r_t, discount_t=discount_t, continue_t=continue_t)
    if n < 1:
        raise ValueError(f"n_step_transitions: n must be at least 1, got {n}")
    steps = len(r_t)
    t = jnp.arange(steps)
    end = jax.lax.cummin(jnp.where((continue_t == 0) | (t == steps - 1), t, steps - 1), reverse=True)  # of t's episode

    def join(a: Any, b: Any) -> Any:
        """``a`` steps from t followed by ``b`` steps from there, if the episode goes on so long."""
        (reward, discount, length), (reward_b, discount_b, length_b) = a, b
        reward_b, discount_b = (jnp.pad(x[length:], (0, min(length, steps))) for x in (reward_b, discount_b))
        on = t + length <= end
        joined = jnp.where(on, reward + discount * reward_b, reward), jnp.where(on, discount * discount_b, discount)
        return *joined, length + length_b

    # Spans of 1, 2, 4, ... steps, and of them one of n: log2(n) passes.
    whole, power = None, (r_t, discount_t, 1)
    for bit in bin(n)[:1:-1]:
        if bit == "1":
            whole = power if whole is None else join(whole, power)
        power = join(power, power)
    assert whole is not None
    return whole[0], whole[1], jnp.minimum(t + n - 1, end)


def backward_targets(
    r_t: Array, discount_t: Array, q_t: Array, a_t: Array, continue_t: Array, beta: Array | float
) -> Array:
    """Targets of action values along an episode, each from the one after it (Lee et al. 2019, arXiv 1805.12375, algorithm 2).

        y_t = r_t + discount_t max_a q~_t(a)       q~_t = q_t, but for the action taken next, with beta y_{t+1} + (1 - beta) q_t(a_t)

    Args:
        r_t: rewards ``[T]``.
        discount_t: gamma, or 0 after a termination, ``[T]``.
        q_t: values of all actions where the step ended, ``[T, A]``; minus infinity where one is illegal.
        a_t: the action that was taken there, int ``[T]``; any where ``continue_t`` is 0.
        continue_t: 0 where the episode ended or nothing is known of its next step, else 1, ``[T]``.
        beta: Diffusion factor. 0 gives one-step targets, 1 returns of the actions taken where these seem best.

    Returns float32 ``[T]``.
    """
    same_shape("backward_targets", r_t=r_t, discount_t=discount_t, a_t=a_t, continue_t=continue_t, q_t=q_t[:, 0])
    actions = jnp.arange(q_t.shape[-1])

    def step(y_next: Array, x: tuple[Array, ...]) -> tuple[Array, Array]:
        r, discount, q, a, goes_on = x
        mixed = jnp.where((actions == a) & (goes_on > 0), beta * y_next + (1 - beta) * q, q)
        best = jnp.where(discount > 0, mixed.max(), 0.0)  # of a terminal state all may be minus infinity
        y = r + discount * best
        return y, y

    _, y = jax.lax.scan(step, jnp.float32(0), (r_t, discount_t, q_t, a_t, continue_t), reverse=True)
    return y


def gae(v_tm1: Array, r_t: Array, discount_t: Array, v_t: Array, continue_t: Array, lambda_: Array | float) -> Array:
    """Generalized advantage estimates ``[T]`` (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    ``A_t = delta_t + discount_t lambda c_t A_{t+1}``, with ``delta_t`` the TD error and ``c_t = continue_t``. The
    matching value targets are ``A_t + v_tm1``, the lambda returns. ``lambda_`` is a scalar.
    """
    same_shape("gae", v_tm1=v_tm1, r_t=r_t, discount_t=discount_t, v_t=v_t, continue_t=continue_t)
    delta_t = td_error(v_tm1, r_t, discount_t, v_t)
    return _discounted_sum(delta_t, discount_t * continue_t * lambda_)


def vtrace(
    v_tm1: Array,
    r_t: Array,
    discount_t: Array,
    v_t: Array,
    continue_t: Array,
    log_rho_t: Array,
    lambda_: Array | float = 1.0,
    clip_rho: Array | float = 1.0,
    clip_c: Array | float = 1.0,
    clip_pg_rho: Array | float = 1.0,
) -> tuple[Array, Array]:
    """V-trace value targets and policy-gradient advantages, each ``[T]`` (Espeholt et al. 2018, arXiv 1802.01561, eq. 1).

    ``log_rho_t`` is ``log pi(a|x) - log mu(a|x)`` of the action taken at each step. Targets are
    ``vs = v_tm1 + E_t`` with ``E_t = rho_t delta_t + discount_t lambda c_t E_{t+1}``; advantages are
    ``min(clip_pg_rho, rho_t) (r_t + discount_t vs_{t+1} - v_tm1)``, where ``vs_{t+1}`` is ``v_t`` at a cut.
    """
    same_shape(
        "vtrace",
        v_tm1=v_tm1,
        r_t=r_t,
        discount_t=discount_t,
        v_t=v_t,
        continue_t=continue_t,
        log_rho_t=log_rho_t,
    )
    rho_t = jnp.exp(log_rho_t)
    delta_t = jnp.minimum(clip_rho, rho_t) * td_error(v_tm1, r_t, discount_t, v_t)
    c_t = lambda_ * jnp.minimum(clip_c, rho_t)
    targets = v_tm1 + _discounted_sum(delta_t, discount_t * continue_t * c_t)

    following = jnp.where(continue_t > 0, jnp.concatenate([targets[1:], v_t[-1:]]), v_t)
    advantages = jnp.minimum(clip_pg_rho, rho_t) * (r_t + discount_t * following - v_tm1)
    return targets, advantages


def retrace(
    q_t: Array,
    v_t: Array,
    r_t: Array,
    discount_t: Array,
    continue_t: Array,
    log_rho_t: Array,
    lambda_: Array | float,
) -> Array:
    """Retrace targets for ``Q(x_{t-1}, a_{t-1})``, ``[T]`` (Munos et al. 2016, arXiv 1606.02647, eq. 3-4).

    ``G_t = r_t + discount_t (v_t + c_t (G_{t+1} - q_t))`` with ``c_t = lambda min(1, rho_t)``, cut by ``continue_t``.
    ``v_t`` is the expectation of Q under the target policy at the next observation; ``q_t`` and ``log_rho_t``, both
    ``[T - 1]``, belong to the action taken there.
    """
    same_shape("retrace", v_t=v_t, r_t=r_t, discount_t=discount_t, continue_t=continue_t)
    same_shape("retrace", q_t=q_t, log_rho_t=log_rho_t, **{"r_t[:-1]": r_t[:-1]})
    c_t = lambda_ * jnp.minimum(1.0, jnp.exp(log_rho_t)) * continue_t[:-1]

    def step(g_next: Array, x: tuple[Array, ...]) -> tuple[Array, Array]:
        r, discount, v, c, q = x
        g = r + discount * (v + c * (g_next - q))
        return g, g

    last = r_t[-1] + discount_t[-1] * v_t[-1]
    _, returns = loops.scan(
        step, last, (r_t[:-1], discount_t[:-1], v_t[:-1], c_t, q_t), reverse=True, gpu_unroll=UNROLL
    )
    return jnp.concatenate([returns, last[None]])


def _discounted_sum(x_t: Array, decay_t: Array) -> Array:
    """``y_t = x_t + decay_t y_{t+1}``, with nothing after the end."""

    def step(y_next: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
        y = x[0] + x[1] * y_next
        return y, y

    _, sums = loops.scan(step, jnp.zeros_like(x_t[0]), (x_t, decay_t), reverse=True, gpu_unroll=UNROLL)
    return sums
